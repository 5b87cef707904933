"""Convolutions with standardized weights, in models: what they apply, what changes and what is refused."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import normzoo
from normzoo.layers.weight import ScaledConv, StandardizedConv, StandardizedConv2d, standardize_weights

GROUP_WS = {"name": "group+ws", "groups": 8}
# Architecture, norm, edge of its images, number of convolutions
MODELS = {
    "resnet20_cifar-group+ws": ("resnet20_cifar", GROUP_WS, 32, 19),
    "resnet20_cifar-scaled_ws": ("resnet20_cifar", "scaled_ws", 32, 19),
    "test_resnet-batch+ws": ("test_resnet", "batch+ws", 64, 15),
    "test_resnet-none+scaled_ws": ("test_resnet", "none+scaled_ws", 64, 15),
    "test_convnext-layer_channel+ws": ("test_convnext", "LayerNorm2d+WS", 64, 13),
}
RULES = [
    ("ws", {}),
    ("ws", {"eps": 1e-5, "unbiased": True, "eps_on_std": True}),
    ("scaled_ws", {}),
    ("scaled_ws", {"gamma": 1.7139588594436646, "clamp": True}),
]
every_model = pytest.mark.parametrize("key", MODELS)


def images(count: int = 2, size: int = 32) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def make(key: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    arch, norm, size, _ = MODELS[key]
    # timm's resnets start with last norms of 0, which gradients do not pass
    options = {"zero_init_last": False} if arch == "test_resnet" else {}
    return normzoo.create_model(arch, norm, **options), images(2, size)


def convolutions(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)]


def applied(conv: nn.Module) -> Tensor:
    """The weight by its formula, filter by filter, float64."""
    filters = []
    for i, w in enumerate(conv.weight.detach().double()):
        rule, centred = conv.rule, w - w.mean()
        if isinstance(conv, ScaledConv):
            spread = (centred**2).sum() if rule["clamp"] else w.numel() * (w.var(correction=0) + rule["eps"])
            spread = max(spread, rule["eps"]) if rule["clamp"] else spread
            filters.append(conv.gain[i].item() * rule["gamma"] * centred / spread**0.5)
        else:
            var = w.var(correction=int(rule["unbiased"]))
            filters.append(centred / (var**0.5 + rule["eps"] if rule["eps_on_std"] else (var + rule["eps"]) ** 0.5))
    return torch.stack(filters)


def draw_gains(model: nn.Module) -> None:
    for conv in convolutions(model):
        if isinstance(conv, ScaledConv):
            nn.init.uniform_(conv.gain, 0.5, 1.5)


@every_model
def test_convolutions_apply_the_standardized_weight(key):
    model, x = make(key)
    draw_gains(model)
    seen = []

    def compare(conv, args, out):
        want = F.conv2d(
            args[0].double(),
            applied(conv),
            None if conv.bias is None else conv.bias.double(),
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
        )
        seen.append(conv)
        assert_close(out.double(), want, rtol=1e-4, atol=1e-4 * want.abs().max().item())

    found = convolutions(model)
    for conv in found:
        conv.register_forward_hook(compare)
    for training in (True, False):
        with torch.no_grad():
            model.train(training)(x)
    assert len(seen) == 2 * len(found) == 2 * MODELS[key][3]
    assert all(isinstance(conv, StandardizedConv) for conv in seen)


@every_model
def test_filters_have_mean_0_and_the_variance_of_the_method(key):
    for conv in convolutions(make(key)[0]):
        w = conv.standardized_weight().detach().flatten(1)
        raw = conv.weight.detach().flatten(1).double().var(1, correction=0)
        want = raw / (raw + 1e-6) / (w.shape[1] if isinstance(conv, ScaledConv) else 1)
        assert w.mean(1).abs().max() < 1e-5
        assert_close(w.double().var(1, correction=0), want, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("method", "options"), RULES)
@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv1d(4, 6, 3, stride=2, padding=1, padding_mode="circular"),
        nn.Conv2d(4, 6, 3, groups=2, dilation=2, bias=False, padding="same"),
        nn.Conv2d(4, 4, 3, groups=4, padding=2, padding_mode="reflect"),
        nn.Conv3d(4, 6, (1, 2, 1)),
    ],
    ids=["1d-circular", "2d-groups", "2d-depthwise-reflect", "3d"],
)
def test_every_convolution_is_itself_with_another_weight(conv, method, options):
    plain = copy.deepcopy(conv).double()
    model = nn.Sequential(copy.deepcopy(plain))
    assert len(normzoo.standardize_weights(model, method, **options)) == 1
    draw_gains(model)
    plain.weight.data = applied(model[0])
    x = torch.randn(2, 4, *[7] * (conv.weight.ndim - 2), dtype=torch.float64)
    assert_close(model(x), plain(x), rtol=1e-10, atol=1e-10)


@every_model
def test_every_parameter_learns(key):
    model, x = make(key)
    F.cross_entropy(model(x), torch.tensor([1, 2])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(("method", "options"), RULES)
def test_gradient_is_that_of_the_formula(method, options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1)).double()
    normzoo.standardize_weights(model, method, **options)
    draw_gains(model)
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    names = [k for k, _ in model.named_parameters()]
    assert len(names) == (3 if method == "scaled_ws" else 2)

    def call(*values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, [*model.parameters()])


def test_scaled_weights_keep_variance_through_a_nonlinearity():
    """With the gain of ReLU, sqrt(2 / (1 - 1 / pi)), as gamma."""
    torch.manual_seed(0)
    x = torch.randn(4, 128, 16, 16).relu()
    conv = nn.Sequential(nn.Conv2d(128, 128, 3, bias=False))
    normzoo.standardize_weights(conv, "scaled_ws", gamma=(2 / (1 - 1 / torch.pi)) ** 0.5)
    assert conv(x).var().item() == pytest.approx(1, rel=0.1)


def test_parameters_and_state_dicts_stay_as_they_were():
    plain = normzoo.create_model("resnet20_cifar", {"name": "group", "groups": 8})
    held = plain.state_dict()
    model = normzoo.create_model("resnet20_cifar", GROUP_WS)
    model.load_state_dict(held, strict=True)
    x = images()
    with torch.no_grad():
        assert not torch.allclose(model(x), plain(x))
    assert len(normzoo.standardize_weights(plain)) == 19
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
    assert [*plain.state_dict()] == [*held]
    scaled = normzoo.create_model("resnet20_cifar", "scaled_ws").state_dict()
    added = {f"{name}.gain" for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert {k for k in scaled if k.endswith("gain")} == added
    assert all((v == 1).all() for k, v in scaled.items() if k.endswith("gain"))


@every_model
def test_copies_compute_the_same(key):
    model, x = make(key)
    draw_gains(model)
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    saved.seek(0)
    loaded = normzoo.create_model(*MODELS[key][:2])
    loaded.load_state_dict(torch.load(saved, weights_only=True), strict=True)
    with torch.no_grad():
        want = model.eval()(x)
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded.eval()):
            assert torch.equal(again(x), want)


def test_a_plain_timm_model_is_changed_in_place():
    model = timm.create_model("resnet18")
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    assert len(normzoo.standardize_weights(model)) == 20
    assert type(model.conv1) is StandardizedConv2d
    assert type(model.bn1) is nn.BatchNorm2d
    assert_close(model.state_dict(), weights, rtol=0, atol=0)
    assert repr(model.conv1).endswith("bias=False, eps=1e-06, unbiased=False, eps_on_std=False)")


def test_weights_do_not_depend_on_their_scale():
    model, x = make("resnet20_cifar-group+ws")
    with torch.no_grad():
        want = model.eval()(x)
        for conv in convolutions(model):
            conv.weight.mul_(3).add_(0.25)
        assert_close(model(x), want, rtol=1e-3, atol=1e-3 * want.abs().max().item())


class Upsampling(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 4, 2))


@pytest.mark.parametrize(
    ("model", "method", "options", "text"),
    [
        (nn.Linear(3, 4), "ws", {}, r"^Linear has no convolutions whose weights could be standardized$"),
        (nn.Conv2d(3, 4, 3), "wz", {}, r"^method must be one of 'ws', 'scaled_ws', not 'wz'$"),
        (nn.Conv2d(3, 4, 3), "ws", {"gamma": 2.0}, r"^gamma and clamp are not options of 'ws'$"),
        (nn.Conv2d(3, 4, 3), "scaled_ws", {"unbiased": True}, r"^unbiased and eps_on_std are not options of 'scaled"),
        (Upsampling(), "ws", {}, r"^the convolution '1' is a ConvTranspose2d, whose weights cannot be standardized$"),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1, groups=4)),
            "scaled_ws",
            {},
            r"^the filters of the convolution '1' have a single weight, which would become 0$",
        ),
    ],
)
def test_what_cannot_be_standardized_is_refused_and_left_alone(model, method, options, text):
    before = [(type(m), {*m._parameters}) for m in model.modules()]
    with pytest.raises(ValueError, match=text):
        standardize_weights(model, method, **options)
    assert [(type(m), {*m._parameters}) for m in model.modules()] == before


def test_weights_are_standardized_once():
    model = normzoo.create_model("resnet20_cifar", GROUP_WS)
    for method in ("ws", "scaled_ws"):
        with pytest.raises(ValueError, match=r"^the weights of the convolution 'conv1' are standardized already$"):
            normzoo.standardize_weights(model, method)


@pytest.mark.parametrize(
    ("name", "norm", "text"),
    [
        ("resnet20_cifar", "group+foo", r"^'foo' is not a known method for weights\. Valid: scaled_ws, ws\.$"),
        ("resnet20_cifar", "group+", r"^'' is not a known method for weights\. Valid: scaled_ws, ws\.$"),
        ("resnet20_cifar", "gruop+ws", r"^'gruop' is not a known norm; did you mean 'group' or "),
        ("resnet20_cifar", "+ws", r"^'' is not a known norm\."),
        (
            "resnet20_cifar",
            {"name": "group+ws", "groups": 0},
            r"^bn1 \(16 channels\) cannot become group\+ws: groups=0 ",
        ),
    ],
)
def test_errors_of_create_model(name, norm, text):
    with pytest.raises(ValueError, match=text):
        normzoo.create_model(name, norm)


def test_options_are_the_norms():
    model = normzoo.create_model("resnet20_cifar", {"name": "group+ws", "groups": 4, "eps": 1e-3})
    assert (model.bn1.groups, model.bn1.eps, model.conv1.rule["eps"]) == (4, 1e-3, 1e-6)
    with pytest.raises(TypeError, match=r"^norm 'scaled_ws' has no option 'gamma'"):
        normzoo.create_model("resnet20_cifar", {"name": "scaled_ws", "gamma": 1.7})


def test_methods_go_by_their_aliases():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    for name in ("batch", "foo", None):
        with pytest.raises(ValueError, match=rf"^'{name}' is not a known method for weights\. Valid: scaled_ws, ws\.$"):
            normzoo.standardize_weights(model, name)
    assert len(normzoo.standardize_weights(model, "weight_standardized")) == 1
    assert type(model[0]) is StandardizedConv2d
