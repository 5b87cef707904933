"""``convert_norms(model, "none", fold=True)``: scales go into the neighbours, shifts into the new layers' biases."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from timm.models.mlp_mixer import Affine as TimmAffine
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import normzoo
from normzoo import convert_norms
from normzoo.convert import _convert, _fold
from normzoo.convert._fold import shed_scales
from normzoo.convert._kinds import kind_of
from normzoo.convert._sites import find_sites
from normzoo.layers import NoNorm


def trained(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in evaluation, every norm with parameters and statistics as after some training."""
    rng = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if kind_of(module) is None:
            continue
        for name, t in [*module._parameters.items(), *module._buffers.items()]:
            if t is not None and t.is_floating_point():
                drawn = torch.rand(t.shape, generator=rng) + 0.5
                if name not in ("weight", "alpha", "running_var"):
                    drawn = torch.randn(t.shape, generator=rng) * 0.7
                t.data.copy_(drawn)
    return model.eval()


@torch.no_grad()
def assert_sheds(model: nn.Module, x: torch.Tensor, example=None) -> nn.Module:
    want = model(x).clone()
    report = convert_norms(model, "none", fold=True, example=example)
    norms = [m for m in model.modules() if kind_of(m) is not None]
    assert norms
    assert all(isinstance(m, NoNorm) for m in norms)
    assert len(report.changed) == len(norms)
    torch.testing.assert_close(model(x), want, rtol=0, atol=1e-5 * max(1.0, want.abs().max().item()))
    return model


def values(model: nn.Module):
    return dict(model.named_modules()), {n: (t, t.clone()) for n, t in model.state_dict(keep_vars=True).items()}


def assert_untouched(model: nn.Module, before) -> None:
    assert [*map(id, dict(model.named_modules()).values())] == [*map(id, before[0].values())]
    now = model.state_dict(keep_vars=True)
    assert list(now) == list(before[1])
    for name, (tensor, value) in before[1].items():
        assert now[name] is tensor
        assert torch.equal(tensor, value)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("conv", [nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d])
def test_before_and_behind(conv, groups, bias):
    """Behind, padding with zeros is no obstacle: the new bias, shift / scale, is added before it."""
    dims = int(conv.__name__[-2])
    norm = (nn.BatchNorm1d, nn.BatchNorm2d)[dims - 1]
    options = {"groups": groups, "bias": bias, "padding": 1, "stride": 2}
    x = torch.randn(3, 4, *[7] * dims)
    model = assert_sheds(trained(nn.Sequential(conv(4, 8, 3, **options), norm(8), nn.ReLU())), x)
    assert (model[0].bias is not None) == bias
    assert_sheds(trained(nn.Sequential(nn.Tanh(), norm(4), conv(4, 8, 3, **options), nn.ReLU())), x)
    assert_sheds(trained(nn.Sequential(nn.Tanh(), norm(4), conv(4, 8, 3, **options), norm(8), nn.ReLU())), x)


@pytest.mark.parametrize("mode", ["reflect", "circular", "replicate"])
def test_other_padding(mode):
    model = nn.Sequential(nn.Tanh(), nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3, padding=1, padding_mode=mode))
    assert_sheds(trained(model), torch.randn(2, 4, 7, 7))


def test_linear_and_channels_last():
    model = nn.Sequential(nn.Linear(4, 6), TimmAffine(6), nn.GELU(), TimmAffine(6), nn.Linear(6, 3))
    assert_sheds(trained(model), torch.randn(5, 3, 4))


def test_the_activation_stays_and_the_tensors_are_the_same():
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 3), BatchNormAct2d(8, act_layer=nn.SiLU), nn.Conv2d(8, 4, 1)))
    weight, bias = model[0].weight, model[1].bias
    assert_sheds(model, torch.randn(2, 3, 7, 7))
    assert isinstance(model[1].act, nn.SiLU)
    assert model[0].weight is weight  # that an optimizer knows
    assert model[1].bias is bias


def test_biases_that_norms_share_part():
    """Each then has its own shift; they had their own statistics."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    model[4].bias = model[1].bias
    model = assert_sheds(trained(model), torch.randn(2, 3, 7, 7))
    assert model[4].bias is not model[1].bias
    frozen = nn.Sequential(nn.Conv2d(3, 8, 3), FrozenBatchNorm2d(8), nn.ReLU())
    assert_sheds(trained(frozen), torch.randn(2, 3, 7, 7))


def test_whole_models():
    for name in ("test_resnet", "mobilenetv3_small_050"):
        model = trained(timm.create_model(name, num_classes=10))
        assert_sheds(model, torch.randn(2, 3, 64, 64), example=torch.randn(2, 3, 64, 64))


def test_and_then_all_of_it():
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
    x = torch.randn(2, 3, 7, 7)
    want = model(x)
    convert_norms(model, "none", fold=True)
    assert len(normzoo.fold_norms(model)) == 1
    torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)


def test_scales_of_zero():
    """Before: the convolution gives zeros. Behind: what is left when nothing passes has no place before the padding."""
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    model[1].weight.data[2] = 0
    assert_sheds(model, torch.randn(2, 3, 7, 7))
    model = trained(nn.Sequential(nn.Tanh(), nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3, padding=1)))
    model[1].weight.data[2] = 0
    before = values(model)
    with pytest.raises(ValueError, match="the scale of 1 .a scale of zero leaves no place for its shift. cannot be"):
        convert_norms(model, "none", fold=True)
    assert_untouched(model, before)
    model[1].bias.data[2] = 0  # a channel that is nothing at all
    assert_sheds(model, torch.randn(2, 3, 7, 7))


def test_what_has_no_place_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), *[nn.BatchNorm2d(8), nn.ReLU()] * 1)
    before = values(trained(model))
    with pytest.raises(
        ValueError,
        match="the scale of 3 .its input is the output of relu.*fold=False",
    ):
        convert_norms(model, "none", fold=True)
    assert_untouched(model, before)
    with pytest.raises(ValueError, match="the shift of 1 has no place in layers without bias"):
        convert_norms(model, "none", include="1", fold=True, options={"affine": False})
    assert_untouched(model, before)
    convert_norms(model, "none", fold=True, exclude="3")
    assert isinstance(model[3], nn.BatchNorm2d)

    many = trained(nn.Sequential(nn.ReLU(), *[nn.BatchNorm2d(3) for _ in range(7)], nn.ReLU()))
    with pytest.raises(ValueError, match="the scale of 1 .*; 2 .*; 3 .* and 4 more cannot be"):
        convert_norms(many, "none", fold=True)
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        convert_norms(many.train(), "none", fold=True)


def test_scales_beyond_the_dtype_are_refused():
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))).half()
    model[3].float().weight.data.fill_(1e6)
    before = values(model)
    with pytest.raises(ValueError, match="the scale of 3 makes weights that are too large"):
        convert_norms(model, "none", fold=True)
    assert_untouched(model, before)


@pytest.mark.parametrize("at", ["put", "calibrate", "set"])
def test_a_later_error_undoes_it(monkeypatch, at):
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)))
    before, calibrate = values(model), None

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    if at == "put":
        real = _convert._put
        monkeypatch.setattr(
            _convert, "_put", lambda s, layers: fail() if isinstance(layers[0], NoNorm) else real(s, layers)
        )
    elif at == "calibrate":
        monkeypatch.setattr(_convert, "run_calibration", fail)
        calibrate = [torch.randn(2, 3, 9, 9)]
    else:  # between the first site and the second
        monkeypatch.setattr(
            _fold,
            "fused",
            lambda pair, shift, real=_fold.fused: real(pair, shift=shift) if pair.site.name == "1" else fail(),
        )
    with pytest.raises(KeyboardInterrupt):
        convert_norms(model, "none", fold=True, calibrate=calibrate)
    assert_untouched(model, before)


def test_the_context_undoes_on_error_alone():
    """Nor does it when it is forgotten, as the caller does after success."""
    for how in ("error", "success", "forgotten"):
        model = trained(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
        sites, weight = find_sites(model), model[0].weight.clone()
        context = shed_scales(model, sites, [NoNorm(8)])
        if how == "error":
            with pytest.raises(KeyError), context:
                raise KeyError
        elif how == "success":
            with context:
                pass
        del context
        assert torch.equal(model[0].weight, weight) == (how == "error")
