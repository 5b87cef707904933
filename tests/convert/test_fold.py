"""Folding: the folded model against the model before, in evaluation, with statistics as after some training."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from convert.folding import Net, assert_folds, assert_untouched, norms_in, run, snapshot, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from sweeps import slow
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d
from timm.layers import Linear as TimmLinear
from timm.layers.drop import DropBlock2d
from timm.layers.split_batchnorm import SplitBatchNorm2d
from timm.models.mlp_mixer import Affine as TimmAffine
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import normzoo
from normzoo.convert import _fold
from normzoo.convert._kinds import kind_of, read
from normzoo.convert._pairs import scale_and_shift
from normzoo.fold import fold_norms

CONV, NORM = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}, {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_into_the_convolution_before(dims, transposed, groups, bias):
    options = {"stride": 2, "padding": 1, "groups": groups, "bias": bias}
    conv = (TRANSPOSED if transposed else CONV)[dims](4, 8, 3, **options)
    model = assert_folds(trained(nn.Sequential(conv, NORM[dims](8), nn.ReLU())), torch.randn(3, 4, *[7] * dims), 1)
    assert isinstance(model[1], nn.Identity)
    assert model[0] is conv
    assert conv.bias.requires_grad
    assert norms_in(model) == 0


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_into_the_convolution_behind(dims, groups, bias):
    conv = CONV[dims](4, 8, 3, stride=2, groups=groups, bias=bias, dilation=2)
    model = nn.Sequential(nn.ReLU(), NORM[dims](4), conv, nn.ReLU())
    assert_folds(trained(model), torch.randn(3, 4, *[9] * dims), 1)


@pytest.mark.parametrize(
    ("conv", "count"),
    [
        (nn.Conv2d(4, 8, 3, padding=1), 0),
        (nn.Conv2d(4, 8, 3, padding="same"), 0),
        (nn.Conv2d(4, 8, 3, padding=(0, 1)), 0),
        (nn.Conv2d(4, 8, 3, padding="valid"), 1),
        (nn.Conv2d(4, 8, 1, padding="same"), 1),
        (nn.Conv2d(4, 8, 1, padding=1), 0),
        (nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"), 1),
        (nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular"), 1),
        (nn.Conv2d(4, 8, 3, padding="same", padding_mode="replicate"), 1),
        (nn.ConvTranspose2d(4, 8, 3), 0),
        (nn.ConvTranspose2d(4, 8, 1), 0),
        (timm.layers.Conv2dSame(4, 8, 3, 2), 0),
        (timm.layers.Conv2dSame(4, 8, 1, 2), 1),
    ],
    ids=str,
)
def test_a_shift_does_not_pass_through_zeros(conv, count):
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), conv)
    assert_folds(trained(model), torch.randn(2, 4, 7, 7), count)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_scale_passes_through_zeros(groups, transposed):
    conv = (TRANSPOSED if transposed else CONV)[2](4, 8, 3, padding=1, groups=groups)
    model = trained(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), conv))
    model[1].bias.data.zero_()
    model[1].running_mean.zero_()
    assert_folds(model, torch.randn(2, 4, 7, 7), 1)


@pytest.mark.parametrize("linear", [nn.Linear, TimmLinear])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(linear, bias):
    make = lambda: linear(4, 6, bias=bias)  # noqa: E731
    assert_folds(trained(nn.Sequential(make(), nn.BatchNorm1d(6), nn.ReLU())), torch.randn(5, 4), 1)
    assert_folds(trained(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(4), make())), torch.randn(5, 4), 1)
    model = trained(nn.Sequential(nn.ReLU(), TimmAffine(4), make(), TimmAffine(6), nn.GELU()))
    assert_folds(model, torch.randn(5, 3, 4), 2)


@pytest.mark.parametrize("size", [4, 6])
def test_the_channels_of_both_are_the_same_dimension(size):
    """Batch norm of (N, C, L) normalizes over what is no feature of the linear layer, if it has the same size too."""
    assert_folds(trained(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(size))), torch.randn(5, size, 4), 0)
    last = normzoo.create_norm("batch", 6, channel_dim=-1)
    assert_folds(trained(nn.Sequential(nn.Linear(4, 6), last)), torch.randn(5, size, 4), 1)
    conv = nn.Sequential(nn.Conv1d(4, 6, 1), normzoo.create_norm("affine", size, channel_dim=-1))
    assert_folds(trained(conv), torch.randn(5, 4, size), 0)


class Views(nn.Module):
    """A linear layer whose output is joined, and a convolution whose output becomes tokens, before the norm."""

    def __init__(self):
        super().__init__()
        self.linear, self.bn = nn.Linear(4, 6), nn.BatchNorm1d(6)
        self.conv, self.affine, self.out = nn.Conv2d(6, 8, 2), TimmAffine(8), nn.Linear(8, 3)

    def forward(self, x):
        y = self.linear(x)
        y = self.bn(y.flatten(0, 1)).reshape_as(y).transpose(1, 2).unflatten(2, (4, 4))
        return self.out(self.affine(self.conv(y.relu()).flatten(2).transpose(1, 2)).relu())


def test_views_that_keep_the_channels():
    assert_folds(trained(Views()), torch.randn(3, 16, 4), 2, others=[torch.randn(1, 16, 4)])


def test_a_view_of_half_the_output_is_not_the_output():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.bn(self.conv(x)[:, :4])

    assert_folds(trained(Half()), torch.randn(2, 3, 5, 5), 0)


def test_without_a_batch():
    model = nn.Sequential(nn.Conv2d(3, 6, 2), nn.InstanceNorm2d(6, affine=True, track_running_stats=True), nn.ReLU())
    assert_folds(trained(model), torch.randn(3, 6, 6), 1, others=[torch.randn(2, 3, 6, 6)])
    model = nn.Sequential(nn.Conv1d(3, 6, 2), nn.InstanceNorm1d(6, affine=True, track_running_stats=True))
    assert_folds(trained(model), torch.randn(3, 7), 1, others=[torch.randn(2, 3, 7)])


# those of the zoo's norms that are a scale and shift in evaluation
SCALES = ["affine", "batch", "batch_renorm", "frozen_batch", "ghost_batch", "l1_batch", "none", "batch_group", "power"]


def zoo_norm(name: str, channels: int = 8) -> nn.Module:
    return normzoo.create_norm(name, channels, **({"groups": 2} if name == "batch_group" else {}))


@pytest.mark.parametrize("name", SCALES)
def test_norms_of_the_zoo(name):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), zoo_norm(name), nn.ReLU(), zoo_norm(name), nn.Conv2d(8, 4, 3), nn.ReLU())
    assert_folds(trained(model), torch.randn(2, 3, 9, 9), 2)


def test_every_norm_of_the_zoo_is_folded_right_or_left():
    """Whatever the zoo has: outputs are the same. Those that are folded with trained parameters are known."""
    folded = set()
    for name in normzoo.list_norms():
        options = {"groups": 2} if "groups" in normzoo.norm_info(name).options and name != "power" else {}
        model = trained(nn.Sequential(nn.Conv2d(3, 8, 3), normzoo.create_norm(name, 8, **options), nn.ReLU()))
        for buffer_name, buffer in model[1].named_buffers():
            if buffer_name == "num_batches_tracked":
                buffer.fill_(20_000)  # past the warmup of some
        x = torch.randn(4, 3, 9, 9) * 5
        before = run(model, x)[0]
        if fold_norms(model, torch.randn(2, 3, 9, 9)).changed:
            folded.add(name)
        torch.testing.assert_close(run(model, x)[0], before, rtol=1e-5, atol=1e-4)
    assert folded == set(SCALES)


def test_online_norm_is_folded_where_it_is_exact():
    for compensation, count in (("clamp", 0), ("layer", 0), (None, 1)):
        norm = normzoo.create_norm("online", 8, compensation=compensation)
        assert_folds(trained(nn.Sequential(nn.Conv2d(3, 8, 3), norm)), torch.randn(2, 3, 9, 9) * 30, count)
    norm.weight.data.fill_(1e-6)  # far from the clamp on all inputs that come to mind
    norm.compensation = "clamp"
    assert scale_and_shift(norm, read(norm)) is None


class DropSome(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5, self.training)


@pytest.mark.parametrize(
    ("norm", "left"),
    [
        (BatchNormAct2d(8), nn.ReLU),
        (BatchNormAct2d(8, act_layer=nn.SiLU, inplace=False), nn.SiLU),
        (BatchNormAct2d(8, apply_act=False), nn.Identity),
        (BatchNormAct2d(8, drop_layer=nn.Dropout), nn.ReLU),
        (BatchNormAct2d(8, drop_layer=DropBlock2d, apply_act=False), nn.Identity),
        (BatchNormAct2d(8, drop_layer=DropSome), nn.Sequential),
        (FrozenBatchNormAct2d(8, act_layer=nn.LeakyReLU), nn.LeakyReLU),
        (FrozenBatchNorm2d(8), nn.Identity),
        (SplitBatchNorm2d(8), nn.Identity),
        (nn.SyncBatchNorm(8), nn.Identity),
        (nn.BatchNorm2d(8, affine=False), nn.Identity),
        (normzoo.create_norm("batch", 8, act_layer=nn.PReLU), nn.PReLU),
    ],
    ids=repr,
)
def test_the_activation_stays(norm, left):
    act = getattr(norm, "act", None)
    model = assert_folds(trained(nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.Tanh())), torch.randn(2, 3, 7, 7), 1)
    assert type(model[1]) is left
    if left not in (nn.Identity, nn.Sequential):
        assert model[1] is act


@pytest.mark.parametrize("act", [True, False])
def test_a_norm_with_activation_goes_behind_only_without_it(act):
    norm = BatchNormAct2d(8, apply_act=act, drop_layer=nn.Dropout)
    assert_folds(trained(nn.Sequential(nn.Tanh(), norm, nn.Conv2d(8, 4, 3))), torch.randn(2, 8, 7, 7), int(not act))


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(8, track_running_stats=False),
        nn.GroupNorm(2, 8),
        nn.InstanceNorm2d(8, affine=True),
        timm.layers.LayerNorm2d(8),
        timm.layers.EvoNorm2dB0(8),
        timm.layers.FilterResponseNormAct2d(8),
        type("OwnForward", (nn.BatchNorm2d,), {"forward": lambda self, x: super(nn.BatchNorm2d, self).forward(x) * 2})(
            8
        ),
    ],
    ids=lambda m: type(m).__name__,
)
def test_norms_that_are_no_fixed_scale_and_shift_stay(norm):
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)))
    assert_folds(model, torch.randn(4, 3, 8, 8), 1)
    assert model[1] is norm
    alone = trained(nn.Sequential(nn.Conv2d(3, 8, 3), norm))
    assert len(fold_norms(alone)) == 0


def test_between_two_layers_and_next_to_each_other():
    """Into one convolution from both sides; the first of a chain makes the next one's neighbour."""
    model = nn.Sequential(nn.Tanh(), nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8))
    model += nn.Sequential(BatchNormAct2d(8), nn.BatchNorm2d(8), nn.ReLU())
    assert_folds(trained(model), torch.randn(2, 4, 7, 7), 4)
    model = nn.Sequential(nn.Tanh(), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3))
    assert_folds(trained(model), torch.randn(2, 4, 7, 7), 3)


def test_an_error_in_the_middle_leaves_the_model_as_it_was(monkeypatch):
    model = trained(
        nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), BatchNormAct2d(8))
    )
    before, real, seen = snapshot(model), _fold.fused, []

    def second_fails(pair, **options):
        seen.append(pair)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return real(pair, **options)

    monkeypatch.setattr(_fold, "fused", second_fails)
    with pytest.raises(KeyboardInterrupt):
        fold_norms(model)
    assert_untouched(model, before)


def test_hooks_run_with_the_model_and_not_with_the_probe():
    seen = []

    class Recorder:
        def __deepcopy__(self, memo):
            raise AssertionError("hooks are not copied")

        def __call__(self, module, args, y):
            seen.append(y.shape)

    model = trained(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)))
    model[1].register_forward_hook(Recorder())
    assert len(fold_norms(model, torch.randn(2, 3, 7, 7))) == 1
    assert set(seen) == {(2, 8, 5, 5)}
    assert isinstance(model[1], nn.BatchNorm2d)


@pytest.mark.parametrize(
    ("dtype", "norm_dtype"),
    [
        (torch.float64, torch.float64),
        (torch.float16, torch.float16),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
)
def test_dtypes(dtype, norm_dtype):
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))).to(dtype)
    model[1].to(norm_dtype)
    assert_folds(model, torch.randn(2, 3, 7, 7, dtype=dtype), 1)
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_a_norm_that_changes_the_dtype_stays():
    """torchvision's frozen norm makes float32 of half precision, on which what follows relies."""
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 3).bfloat16(), FrozenBatchNorm2d(8), nn.Conv2d(8, 4, 1)))
    model[2].padding = (1, 1)
    assert_folds(model, torch.randn(2, 3, 7, 7, dtype=torch.bfloat16), 0)


def test_numbers_beyond_the_dtype_stay():
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))).half()
    model[1].float().weight.data.fill_(1e6)
    assert_folds(model, torch.randn(2, 3, 7, 7).half() * 1e-4, 0)


def test_channels_without_a_scale():
    model = trained(nn.Sequential(nn.Tanh(), nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    model[1].weight.data[0] = model[3].weight.data[3] = 0
    model[1].running_var[1] = model[3].running_var[2] = 0
    assert_folds(model, torch.randn(2, 3, 7, 7), 2)


def test_memory_format_and_requires_grad_stay():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 2, groups=2))
    model = (
        trained(model + nn.Sequential(nn.BatchNorm2d(4))).to(memory_format=torch.channels_last).requires_grad_(False)
    )
    assert_folds(model, torch.randn(2, 3, 9, 9).to(memory_format=torch.channels_last), 2)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not any(p.requires_grad for p in model.parameters())
    assert list(model.state_dict()) == ["0.weight", "0.bias", "3.weight", "3.bias"]


def test_weights_are_new_parameters():
    """Another model that shares them keeps its own."""
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    other = nn.Sequential(nn.Conv2d(3, 8, 3), model[1])
    other[0].weight, other[0].bias = model[0].weight, model[0].bias
    x = torch.randn(2, 3, 7, 7)
    before = run(other, x)[0]
    assert_folds(model, x, 1)
    assert torch.equal(run(other, x)[0], before)


def test_the_random_streams_and_modes_stay():
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), DropSome(), nn.Dropout()))
    model[2].training = True  # dropout at use, with the norm in evaluation
    state = torch.get_rng_state()
    assert len(fold_norms(model)) == 1
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == [False, False, False, True, False]


def test_a_model_that_draws_numbers():
    """It draws the same ones each time that it is run to be looked at, and those that it would have drawn after."""
    model = trained(Net(lambda n, x: n.bn(n.conv(x)) + 10 * torch.randn_like(x)))
    state = torch.get_rng_state()
    assert len(fold_norms(model)) == 1
    assert torch.equal(torch.get_rng_state(), state)


def test_compiled_models():
    plain = trained(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
    x = torch.randn(2, 3, 7, 7)
    want = run(plain, x)[0]
    torch._dynamo.reset()
    model = torch.compile(plain, backend="eager")
    run(model, x)
    assert len(fold_norms(model, torch.randn_like(x))) == 1
    assert isinstance(plain[1], nn.Identity)
    torch.testing.assert_close(run(model, x)[0], want, rtol=1e-5, atol=1e-5)

    inner = trained(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
    inner[1].compile(backend="eager")
    assert_folds(inner, x, 1)
    torch._dynamo.reset()


# The example


def test_training_mode_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        fold_norms(model)
    model[1].eval()
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        fold_norms(model)
    model.train()
    assert_untouched(model, before)


class Odd(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form, self.conv, self.bn = form, nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, *x, **named):
        x = named["x"] if self.form == "named" else x[0]["x"] if self.form == "dict" else x[0] * x[1]
        return self.bn(self.conv(x))


def test_examples():
    x = torch.randn(2, 3, 7, 7)
    for form, example in (("two", (x, x)), ("named", {"x": x}), ("dict", ({"x": x},))):
        model = trained(Odd(form))
        before = snapshot(model)
        with pytest.raises(ValueError, match="no input for it is known: pass example=, a batch of its inputs"):
            fold_norms(model)
        with pytest.raises((IndexError, KeyError, TypeError)):  # its own error
            fold_norms(model, object())
        assert_untouched(model, before)
        assert len(fold_norms(model, example)) == 1
        model = trained(Odd(form))
        model.example_input_array = example
        assert len(fold_norms(model)) == 1


def test_a_guess_that_fails_leaves_no_trace():
    """The first sizes that are tried are refused midway."""

    class Large(nn.Sequential):
        def forward(self, x):
            y = super().forward(x)
            if x.shape[-1] < 100:
                raise KeyError("too small")
            return y

    assert len(fold_norms(trained(Large(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))))) == 1


def test_nothing_to_do():
    with pytest.raises(ValueError, match="no normalization layer"):
        fold_norms(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval())
    # no example is needed where nothing can be folded
    assert len(fold_norms(trained(nn.Sequential(nn.Embedding(3, 4), nn.LayerNorm(4), nn.Linear(4, 4))))) == 0
    assert len(fold_norms(trained(nn.Sequential(FrozenBatchNorm2d(3), nn.ReLU())))) == 0
    assert len(fold_norms(nn.Sequential(nn.Conv1d(3, 8, 3), nn.LayerNorm((8, 3))).eval())) == 0


def test_folding_again_does_nothing():
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8)))
    assert len(fold_norms(model)) == 1
    weight = model[0].weight
    assert len(fold_norms(model)) == 0
    assert model[0].weight is weight


def test_torchs_transformer_layer_is_left():
    """Its fast path reads the tensors of its parts."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    layer.norm1 = normzoo.create_norm("affine", 8, channel_dim=-1)
    model = trained(nn.Sequential(nn.Linear(8, 8), layer))
    assert len(fold_norms(model, torch.randn(2, 5, 8))) == 0


# Random networks


@st.composite
def networks(draw):
    """Convolutions of all kinds, norms and what stands between them; (model, channels)."""
    channels = first = draw(st.sampled_from([2, 4]))
    layers = []
    for _ in range(draw(st.integers(2, 7))):
        kind = draw(st.sampled_from(["conv", "conv", "transposed", "norm", "norm", "act", "rest"]))
        if kind in ("conv", "transposed"):
            out, groups = draw(st.sampled_from([2, 4, 6])), draw(st.sampled_from([1, 2]))
            options = {"groups": groups, "bias": draw(st.booleans()), "padding": draw(st.integers(0, 1))}
            if kind == "conv":
                options["padding_mode"] = draw(st.sampled_from(["zeros", "reflect"]))
            layers.append((nn.Conv2d if kind == "conv" else nn.ConvTranspose2d)(channels, out, 3, **options))
            channels = out
        elif kind == "norm":
            name = draw(st.sampled_from(["batch", "affine", "none", "l1_batch", "group", "torch", "timm"]))
            if name == "torch":
                layers.append(nn.BatchNorm2d(channels, affine=draw(st.booleans())))
            elif name == "timm":
                layers.append(BatchNormAct2d(channels, apply_act=draw(st.booleans())))
            else:
                layers.append(normzoo.create_norm(name, channels, **({"groups": 1} if name == "group" else {})))
        elif kind == "act":
            layers.append(nn.ReLU(inplace=draw(st.booleans())))
        else:
            layers.append(draw(st.sampled_from([nn.Identity(), nn.Dropout(), nn.AvgPool2d(3, 1, 1)])))
    return nn.Sequential(*layers, normzoo.create_norm("batch", channels)), first


@settings(max_examples=20)
@given(networks(), st.integers(0, 1000))
def test_random_networks(network, seed):
    model, channels = network
    torch.manual_seed(seed)
    model = trained(model, seed).double()
    x = torch.randn(2, channels, 16, 16, dtype=torch.float64)
    norms = norms_in(model)
    expected = run(copy.deepcopy(model), x.clone())[0]
    count = len(fold_norms(model, torch.randn(2, channels, 16, 16, dtype=torch.float64)))
    got = run(model, x.clone())[0]
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9 * max(1.0, expected.abs().max().item()))
    assert norms - norms_in(model) == count
    for before, norm in zip(model, list(model)[1:], strict=False):  # nothing that can be folded is left
        if isinstance(before, nn.Conv2d | nn.ConvTranspose2d) and kind_of(norm) is not None:
            assert kind_of(norm).name == "group"


# Whole models


def randomized(name: str, **options) -> nn.Module:
    torch.manual_seed(0)
    model = trained(timm.create_model(name, num_classes=10, **options))
    for head in [
        m for m in (getattr(model, n, None) for n in ("head", "fc", "classifier")) if isinstance(m, nn.Linear)
    ]:
        nn.init.normal_(head.weight, std=0.1)  # some are initially zero
    return model


@pytest.mark.parametrize(
    ("name", "pixels", "count", "norms"),
    [
        ("resnet18", 64, 20, 20),
        slow("efficientnet_b0", 64, 49, 49),
        ("mobilenetv3_small_050", 64, 34, 34),
        ("densenet121", 64, 59, 121),  # a norm and activation before the first convolution of each layer stays
        slow("regnetx_002", 64, 44, 44),
        ("repvgg_a0", 64, 44, 61),  # branches that are a norm alone stay
        slow("levit_128s", 224, 52, 52),
        ("convnext_atto", 64, 0, 17),
        slow("tf_mobilenetv3_small_minimal_100", 64, 34, 34),
        ("resmlp_12_224", 64, 13, 25),  # those before the layers that mix tokens stay
    ],
)
def test_timm_models(name, pixels, count, norms):
    model = randomized(name, **({"img_size": 64} if name == "resmlp_12_224" else {}))
    assert norms_in(model) == norms
    assert_folds(model, torch.randn(1, 3, pixels, pixels), count, others=[torch.randn(2, 3, pixels, pixels)])
    assert norms_in(model) == norms - count


@pytest.mark.parametrize("norm", ["batch_renorm", "frozen_batch", "none", "group"])
def test_converted_models(norm):
    model = randomized("test_resnet")
    normzoo.convert_norms(model, norm)
    trained(model, seed=1)
    assert_folds(model, torch.randn(2, 3, 64, 64), 0 if norm == "group" else 15)


def test_the_example_comes_from_the_configuration():
    model = randomized("test_resnet")
    model.pretrained_cfg = {"input_size": (3, 48, 48)}
    assert len(fold_norms(model)) == 15
