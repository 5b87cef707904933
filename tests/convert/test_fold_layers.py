"""Folding into layers of any class, which are tried; through pooling; and the report of what was folded and left."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from convert.folding import assert_folds, run, trained
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sweeps import few
from torch import nn

from normzoo.convert import FoldReport
from normzoo.fold import fold_norms


class SamePad(nn.Conv2d):
    """Pads by the size of its input, with a module of its own."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.pad = nn.ZeroPad2d((0, 1, 0, 1))

    def forward(self, x):
        return F.conv2d(self.pad(x), self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Initialised(nn.Conv2d):
    def reset_parameters(self):
        super().reset_parameters()
        nn.init.dirac_(self.weight.data[: self.weight.size(1)])


class Reflecting(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(F.pad(x, (1, 1, 1, 1), mode="reflect"), self.weight, self.bias)


class InFloat32(nn.Conv2d):
    def forward(self, x):
        bias = None if self.bias is None else self.bias.float()
        return F.conv2d(x.float(), self.weight.float(), bias, self.stride, self.padding, self.dilation, self.groups)


class Masked(nn.Conv2d):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register_buffer("mask", torch.tensor([0.0, 1.0, 1.0]))

    def forward(self, x):
        return self._conv_forward(x, self.weight * self.mask, self.bias)


class Own(nn.Module):
    """No subclass of torch's; without a bias it has no parameter of that name."""

    def __init__(self, channels, out, kernel, stride=1, groups=1, bias=True):
        super().__init__()
        self.stride, self.groups = stride, groups
        self.weight = nn.Parameter(torch.randn(out, channels // groups, kernel, kernel) / 5)
        self.bias = nn.Parameter(torch.randn(out)) if bias else None

    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, 1, self.groups)


class Standardized(nn.Conv2d):
    def forward(self, x):
        var, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True)
        return self._conv_forward(x, (self.weight - mean) * (var + 1e-5).rsqrt(), self.bias)


class Clamped(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).clamp(-1e4, 1e4)


class Activated(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).relu()


class Quantized(nn.Conv2d):
    def forward(self, x):
        weight = torch.fake_quantize_per_tensor_affine(self.weight, 0.01, 0, -128, 127)
        return self._conv_forward(x, weight, self.bias)


class Cached(nn.Conv2d):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register_buffer("fast", self.weight.detach().clone())

    def forward(self, x):
        return self._conv_forward(x, self.weight if self.training else self.fast, self.bias)


class Equalized(nn.Conv2d):
    """A gain on weight and bias, so that what is added to the bias arrives scaled."""

    def forward(self, x):
        return super().forward(x) * 3


class Tied(nn.Conv2d):
    """Its weight in two places of its computation."""

    def forward(self, x):
        return super().forward(x) * self.weight.square().sum()


class Noisy(nn.Conv2d):
    def forward(self, x):
        y = super().forward(x)
        return y + torch.randn_like(y)


TAKEN = [SamePad, Initialised, Reflecting, InFloat32, Masked, Own, timm.layers.Conv2dSame]
REFUSED = [Standardized, Clamped, Activated, Quantized, Cached, Equalized, Tied, Noisy]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("cls", TAKEN)
def test_before_layers_of_any_class_that_are_linear(cls, groups, bias):
    conv = cls(6, 8, 3, stride=2, groups=groups, bias=bias)
    model = assert_folds(
        trained(nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU())),
        torch.randn(2, 6, 11, 11),
        1,
        others=[torch.randn(3, 6, 14, 9)],
    )
    assert model[0] is conv
    assert set(dict(conv.named_parameters())) == {"weight", "bias"}


@pytest.mark.parametrize("cls", REFUSED)
def test_before_others_are_left_with_the_reason(cls):
    model = trained(nn.Sequential(cls(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
    x = torch.randn(2, 3, 9, 9)
    torch.manual_seed(0)
    [before] = run(model, x)
    report = fold_norms(model, torch.randn_like(x))
    torch.manual_seed(0)
    assert torch.equal(run(model, x)[0], before)
    [left] = report.left
    assert left.why.startswith(f"0 ({cls.__name__}) was tried: its output is not linear in")


@pytest.mark.parametrize(
    ("conv", "count", "why"),
    [
        (SamePad(4, 8, 3, groups=2), 0, "2 (SamePad) was tried: it pads its input with zeros"),
        (Reflecting(4, 8, 3, bias=False), 1, ""),
        (Own(4, 8, 3, groups=2), 1, ""),
        (Clamped(4, 8, 3), 1, ""),  # whatever comes after
        (Standardized(4, 8, 3), 0, "2 (Standardized) was tried: a scale of its input is not one of its weight"),
        (timm.layers.Conv2dSame(4, 8, 3, 2), 0, "2 (Conv2dSame) was tried: it pads its input with zeros"),
        (
            timm.layers.Conv2dSame(4, 8, 2, 2),
            0,
            "2 (Conv2dSame) was tried: it pads its input with zeros",
        ),  # at odd sizes
        (timm.layers.Conv2dSame(4, 8, 1, 2), 1, ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_behind(conv, count, why):
    model = trained(nn.Sequential(nn.Tanh(), nn.BatchNorm2d(4), conv))
    report = fold_norms(copy.deepcopy(model), torch.randn(2, 4, 8, 8))
    assert len(report.left) == 1 - count
    assert why in "".join(left.why for left in report.left)
    assert_folds(model, torch.randn(2, 4, 8, 8), count, others=[torch.randn(2, 4, 9, 9)])


class OfKeyword(nn.Module):
    """A layer that is not called with one tensor cannot be tried."""

    def __init__(self):
        super().__init__()
        self.inner, self.bn = Masked(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.bn(self.inner(x=x))


def parametrized():
    return nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3))


def hooked():
    conv = nn.Conv2d(3, 8, 3)
    conv.register_forward_hook(lambda m, args, y: y * 2)
    return conv


class WithoutBias(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3, 3, 3))

    def forward(self, x):
        return F.conv2d(x, self.weight)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (OfKeyword, "inner is not called with one tensor, so that it cannot be tried"),
        (lambda: nn.Sequential(parametrized(), nn.BatchNorm2d(8)), "0 computes its weight by a parametrization"),
        (lambda: nn.Sequential(hooked(), nn.BatchNorm2d(8)), "0 has forward hooks"),
        (lambda: nn.Sequential(WithoutBias(), nn.BatchNorm2d(8)), "0 has no parameter bias"),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)), "in evaluation it is not a fixed scale and"),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8)), "its input is the output of relu"),
        (lambda: nn.Sequential(nn.Identity(), nn.BatchNorm2d(3)), "the model has no convolution or linear layer"),
        (
            lambda: nn.Sequential(
                nn.Conv2d(3, 8, 3), type("Own", (nn.BatchNorm2d,), {"forward": lambda self, x: x})(8)
            ),
            "its class Own has a forward of its own",
        ),
    ],
)
def test_what_is_left_says_why(model, why):
    model = trained(model())
    report = fold_norms(model, torch.randn(2, 3, 9, 9))
    assert len(report) == 0
    [left] = report.left
    assert why in left.why
    assert left.name in dict(model.named_modules())


class Holding(nn.Conv2d):
    """Holds norm and activation and calls them itself, as detectron2's does."""

    def __init__(self, *args, norm=None, activation=None, **options):
        super().__init__(*args, **options)
        self.norm, self.activation = norm, activation

    def forward(self, x):
        y = super().forward(x)
        y = y if self.norm is None else self.norm(y)
        return y if self.activation is None else self.activation(y)


class NormFirst(Holding):
    def forward(self, x):
        return super(Holding, self).forward(self.norm(x))


class Doubled(Holding):
    def forward(self, x):
        y = super(Holding, self).forward(x)
        return y + self.norm(y)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, timm.layers.BatchNormAct2d])
def test_a_convolution_that_holds_its_norm(norm, bias):
    first = Holding(3, 8, 3, bias=bias, norm=norm(8), activation=F.relu)
    model = trained(nn.Sequential(first, Holding(8, 8, 3, bias=bias, norm=norm(8))))
    model = assert_folds(model, torch.randn(2, 3, 9, 9), 2)
    assert type(model[0].norm) is (nn.Identity if norm is nn.BatchNorm2d else nn.ReLU)


@pytest.mark.parametrize("cls", [NormFirst, Doubled])
def test_a_convolution_that_uses_its_norm_otherwise_is_left(cls):
    model = trained(nn.Sequential(cls(4, 4, 3, padding=1, norm=nn.BatchNorm2d(4))))
    assert_folds(copy.deepcopy(model), torch.randn(2, 4, 9, 9), 0)
    [left] = fold_norms(model, torch.randn(2, 4, 9, 9)).left
    assert f"called inside of 0 ({cls.__name__}), which ({cls.__name__}) was tried: its weight and bias" in left.why


# Through pooling


class Functional(nn.Module):
    def __init__(self, between):
        super().__init__()
        self.conv, self.bn, self.between = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), between

    def forward(self, x):
        return self.bn(self.between(self.conv(x)))


THROUGH = {
    "max_pool2d": (lambda y: F.max_pool2d(y, 3, 2, 1), 1, 0),
    "max_pool2d with indices": (lambda y: F.max_pool2d(y, 2, return_indices=True)[0], 1, 0),
    "adaptive_max_pool2d": (lambda y: F.adaptive_max_pool2d(y, 2), 1, 0),
    "amax": (lambda y: y.amax((2, 3), keepdim=True), 1, 0),
    "two": (lambda y: F.max_pool2d(F.max_pool2d(y, 2), 2), 1, 0),
    "avg_pool2d": (lambda y: F.avg_pool2d(y, 2), 1, 1),
    "avg_pool2d that counts padding": (lambda y: F.avg_pool2d(y, 3, 1, 1), 0, 0),
    "avg_pool2d that does not": (lambda y: F.avg_pool2d(y, 3, 1, 1, count_include_pad=False), 1, 1),
    "mean": (lambda y: y.mean((2, 3), keepdim=True), 1, 1),
    "mean of channels": (lambda y: y.mean(1, keepdim=True).expand_as(y), 0, 0),
    "interpolate": (lambda y: F.interpolate(y, scale_factor=2, mode="bilinear"), 1, 1),
    "reflect": (lambda y: F.pad(y, (1, 1, 1, 1), mode="reflect"), 1, 1),
    "zeros": (lambda y: F.pad(y, (1, 1, 1, 1)), 0, 0),
    "relu": (lambda y: F.relu(y), 0, 0),
}


@pytest.mark.parametrize("case", few(THROUGH, "max_pool2d", "mean", "zeros", "two"))
def test_what_positive_and_negative_scales_pass_through(case):
    between, positive, negative = THROUGH[case]
    x, other = torch.randn(2, 3, 12, 12), torch.randn(1, 3, 18, 18)
    assert_folds(trained(Functional(between)), x, positive, others=[other])
    model = trained(Functional(between))
    model.bn.weight.data[3] *= -1
    assert_folds(model, x, negative, others=[other])
    with torch.inference_mode():
        assert len(fold_norms(trained(Functional(between)), x)) == positive


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_max_pooling_in_all_dimensions(dims, behind):
    conv, pool = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](4, 4, 3), getattr(nn, f"MaxPool{dims}d")(2)
    norm = getattr(nn, f"BatchNorm{dims}d")(4)
    model = [nn.Tanh(), norm, pool, conv] if behind else [conv, nn.Dropout(), pool, nn.Identity(), norm]
    assert_folds(trained(nn.Sequential(*model)), torch.randn(2, 4, *[11] * dims), 1)


def test_an_output_that_is_pooled_and_used_is_left():
    class Both(Functional):
        def forward(self, x):
            y = self.conv(x)
            return self.bn(F.max_pool2d(y, 2)) + y.mean()

    model = trained(Both(None))
    report = fold_norms(model, torch.randn(2, 3, 9, 9))
    assert "the output of conv is used elsewhere too" in report.left[0].why


def test_what_does_not_pass_is_named():
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.BatchNorm2d(8)))
    model[2].weight.data[3] *= -1
    [left] = fold_norms(model, torch.randn(2, 3, 9, 9)).left
    assert left.why.startswith("max_pool2d is between, through which negative scales do not pass")
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ZeroPad2d(1), nn.BatchNorm2d(8)))
    [left] = fold_norms(model, torch.randn(2, 3, 9, 9)).left
    assert left.why.startswith("constant_pad_nd is between, through which its scale and shift do not pass")


# Networks as users write them


class FrozenScale(nn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels, eps=1e-12)
        self.weight.requires_grad = False


def speed_run() -> nn.Module:
    """A network of CIFAR-10 speed runs: pooling between the first convolution of a group and its norm."""
    layers, channels = [nn.Conv2d(3, 12, 2, bias=True), nn.GELU()], 12
    for width in (8, 16, 16):
        first, second = (Initialised(c, width, 3, padding="same", bias=False) for c in (channels, width))
        layers += [first, nn.MaxPool2d(2), FrozenScale(width), nn.GELU(), second, FrozenScale(width), nn.GELU()]
        channels = width
    return nn.Sequential(*layers, nn.MaxPool2d(3), nn.Flatten(), nn.Linear(16, 10, bias=False))


def test_a_network_of_the_speed_runs():
    model = trained(speed_run())
    for m in model.modules():
        if isinstance(m, FrozenScale):
            m.weight.data.fill_(1)
    assert_folds(model, torch.randn(2, 3, 32, 32), 6)


class LiteBlock(nn.Module):
    """Of an EfficientNet port, with convolutions of its own class."""

    def __init__(self, channels, out, stride, expand):
        super().__init__()
        mid = channels * expand
        self.expand, self.bn0 = SamePad(channels, mid, 1, bias=False), nn.BatchNorm2d(mid)
        self.depthwise = SamePad(mid, mid, 3, stride=stride, groups=mid, bias=False)
        self.bn1, self.project, self.bn2 = nn.BatchNorm2d(mid), SamePad(mid, out, 1, bias=False), nn.BatchNorm2d(out)
        self.project.pad = nn.Identity()
        self.skip = stride == 1 and channels == out

    def forward(self, x):
        y = F.relu6(self.bn0(self.expand(x)))
        y = self.bn2(self.project(F.relu6(self.bn1(self.depthwise(y)))))
        return y + x[..., : y.shape[-2], : y.shape[-1]] if self.skip else y


def test_a_port_of_efficientnet_lite():
    blocks = [LiteBlock(8, 12, 2, 3), LiteBlock(12, 12, 1, 2)]
    model = nn.Sequential(SamePad(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU6(), *blocks)
    assert_folds(trained(model), torch.randn(2, 3, 33, 33), 7)


@settings(max_examples=10)
@given(
    st.sampled_from([*TAKEN, *REFUSED]),
    st.sampled_from([nn.Identity(), nn.MaxPool2d(2), nn.AvgPool2d(3, 1, 1), nn.Dropout(), nn.ReLU()]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 1000),
)
def test_random_layers_compute_the_same(cls, between, behind, bias, seed):
    assume(behind or cls is not InFloat32)  # whose output batch norm in float64 does not take
    torch.manual_seed(seed)
    conv, norm = cls(6, 6, 3, groups=2, bias=bias), nn.BatchNorm2d(6)
    model = trained(nn.Sequential(*([norm, between, conv] if behind else [conv, between, norm])), seed).double()
    if seed % 3 == 0:
        norm.weight.data[2] *= -1
    x = torch.randn(2, 6, 12, 12, dtype=torch.float64)
    state = torch.get_rng_state()
    [before] = run(model, x)
    fold_norms(model, torch.randn_like(x))
    torch.set_rng_state(state)
    # a convolution that computes in float32 rounds
    torch.testing.assert_close(run(model, x)[0], before, rtol=1e-5 if cls is InFloat32 else 1e-9, atol=1e-5)


# The report


def report_of_one() -> FoldReport:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8))
    return fold_norms(trained(model), torch.randn(2, 3, 9, 9))


def test_the_report():
    report = report_of_one()
    assert len(report) == 1
    assert report.to_dict() == {
        "changed": [{"name": "1", "layer": "BatchNorm2d (batch)", "channels": 8, "into": "0", "before": True}],
        "left": [
            {
                "name": "3",
                "layer": "BatchNorm2d (batch)",
                "channels": 8,
                "why": "its input is the output of relu; no convolution or linear layer is right behind it",
                "recognised": True,
            }
        ],
    }
    text = str(report)
    for part in ("1 of 2 norm layers folded", "0, before it", "its input is the output of relu"):
        assert part in text
    again = pickle.loads(pickle.dumps(report))
    assert again.to_dict() == report.to_dict()


def test_a_folded_model_has_nothing_to_fold_and_says_so_when_converted():
    import normzoo

    model = trained(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    assert len(fold_norms(model)) == 1
    for again in (model, copy.deepcopy(model)):
        report = fold_norms(again)
        assert (report.changed, report.left) == ([], [])
        with pytest.raises(ValueError, match="no normalization layer to convert; it had some, which were folded"):
            normzoo.convert_norms(again, "group")
    with pytest.raises(ValueError, match="has no normalization layer to fold"):
        fold_norms(nn.Sequential(nn.Conv2d(3, 8, 3)))
