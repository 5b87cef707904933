"""Calibration: the new layers' outputs have the moments that the original's had, and an error changes nothing."""

from __future__ import annotations

import copy

import pytest
import timm.layers as tl
import torch
from torch import nn
from torch.testing import assert_close

import normzoo
from normzoo.convert._fit import channel_moments

# Norms whose output is a scale and shift of something, so that both moments can be met.
BOTH = [n for n in normzoo.list_norms() if n not in ("none", "frozen_batch", "proxy", "online", "power")]


class Net(nn.Module):
    """Batch norms with statistics that are not those of the batches, a zero-initialised last one, and a residual."""

    def __init__(self, fused=False):
        super().__init__()
        torch.manual_seed(0)

        def norm(c):
            return tl.norm_act.BatchNormAct2d(c) if fused else nn.BatchNorm2d(c)

        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1), norm(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1), norm(16)
        self.conv3, self.last = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)
        self.head, self.fused = nn.Linear(16, 5), fused
        for bn in (self.bn1, self.bn2, self.last):
            bn.running_mean.normal_()
            bn.running_var.uniform_(0.2, 3)
            nn.init.normal_(bn.weight, 1, 0.4)
            nn.init.normal_(bn.bias)
        nn.init.zeros_(self.last.weight)

    def forward(self, x):
        act = nn.Identity() if self.fused else nn.ReLU(inplace=True)
        x = act(self.bn1(self.conv1(x)))
        y = act(self.bn2(self.conv2(x)))
        return self.head((x + self.last(self.conv3(y))).mean((2, 3)))


SITES = ("bn1", "bn2", "last")


def batches(n=3):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 3, 8, 8, generator=generator) * 2 + 1, torch.zeros(8)) for _ in range(n)]


def moments_at(model, sites=SITES, inside=False):
    """Moments of each site's output on all batches at once, in evaluation, with hooks of its own."""
    found, handles = {}, []
    for name in sites:
        module = model.get_submodule(name)
        target = getattr(module, "act", None) if inside else None
        if isinstance(target, nn.Module):
            hook = target.register_forward_pre_hook(lambda m, i, name=name: found.update({name: stats(i[0])}))
        else:
            hook = module.register_forward_hook(lambda m, i, o, name=name: found.update({name: stats(o)}))
        handles.append(hook)
    with torch.no_grad():
        model.eval()(torch.cat([x for x, _ in batches()]))
    for handle in handles:
        handle.remove()
    return found


def stats(y):
    y = y.double().transpose(0, 1).flatten(1)
    return {"mean": y.mean(1), "var": y.var(1, correction=0)}


def options_of(name):
    return {"groups": 4} if "groups" in normzoo.norm_info(name).options else None


@pytest.mark.parametrize("name", BOTH)
def test_each_site_has_the_moments_that_it_had(name):
    model = Net()
    want = moments_at(model)
    report = normzoo.convert_norms(model, name, options=options_of(name), calibrate=batches())
    got = moments_at(model)
    for site in SITES:
        assert_close(got[site], want[site], rtol=2e-3, atol=2e-3, msg=lambda text, site=site: f"{site}: {text}")
    assert (model.last.weight == 0).all()
    assert report.after.relative < report.before.relative or report.before.relative < 1e-6


@pytest.mark.parametrize("name", ["group", "rms", "batch_renorm", "layer"])
def test_fused_sites_are_met_before_their_activation(name):
    model = Net(fused=True)
    want = moments_at(model, inside=True)
    normzoo.convert_norms(model, name, options=options_of(name), calibrate=batches())
    assert_close(moments_at(model, inside=True), want, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", ["evonorm_s0", "evonorm_b0", "filter_response"])
def test_norms_with_an_activation_are_met_behind_it(name):
    model = Net(fused=True)
    want = moments_at(model, sites=("bn1", "bn2"))
    normzoo.convert_norms(model, name, options=options_of(name), calibrate=batches())
    assert_close(moments_at(model, sites=("bn1", "bn2")), want, rtol=2e-3, atol=2e-3)


def test_without_a_scale_the_means_are_met():
    model = Net()
    want = moments_at(model)
    report = normzoo.convert_norms(model, "none", calibrate=batches())
    got = moments_at(model)
    for site in SITES:
        assert_close(got[site]["mean"], want[site]["mean"], rtol=1e-3, atol=1e-3)
    assert report.changed[0].warnings == ["only the means are calibrated: it has no scale"]


def test_what_computes_the_same_is_left_as_it_is():
    model = Net()
    before = copy.deepcopy(model.state_dict())
    report = normzoo.convert_norms(model, "batch_renorm", calibrate=batches())
    assert_close(dict(model.state_dict()), dict(before), rtol=1e-4, atol=1e-4)
    assert report.before.relative < 1e-6
    assert report.before.same_class == report.after.same_class == 1


def test_running_statistics_of_new_layers_are_taken_from_the_batches():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), tl.norm.LayerNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    x = torch.cat([x for x, _ in batches()])
    report = normzoo.convert_norms(model, "batch", calibrate=batches())
    mean, var = channel_moments(model[0](x), 1)
    assert_close(model[1].running_mean.double(), mean, rtol=1e-4, atol=1e-4)
    n = x.numel() // 3
    assert_close(model[1].running_var.double(), var * n / (n - 1), rtol=1e-4, atol=1e-4)
    assert model[1].momentum == 0.1
    assert report.changed[0].warnings == []


def test_tokens_are_calibrated_over_their_last_dimension():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 8), nn.LayerNorm(8))
    nn.init.normal_(model[1].weight)
    x = torch.randn(16, 7, 6)
    want = channel_moments(model(x), -1)
    report = normzoo.convert_norms(model, "dynamic_tanh", calibrate=[x[:9], x[9:]])
    assert_close(channel_moments(model(x), -1), want, rtol=1e-3, atol=1e-3)
    assert report.after.same_class is None  # not (N, classes)


def test_modes_gradients_and_random_numbers_are_left_alone():
    model = Net()
    model.conv1.train()
    model.bn2.eval()
    modes = [model.get_submodule(n).training for n in ("", "conv1", *SITES)]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    normzoo.convert_norms(model, "group", options={"groups": 4}, calibrate=batches())
    assert torch.equal(state, torch.get_rng_state())
    assert [model.get_submodule(n).training for n in ("", "conv1", *SITES)] == modes
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_sites_without_scale_or_not_reached_are_named():
    class Unused(Net):
        def forward(self, x):
            return self.head(self.bn1(self.conv1(x)).mean((2, 3)))

    model = Unused()
    model.bn1 = nn.InstanceNorm2d(16)
    options = {"groups": 4, "affine": False}
    report = normzoo.convert_norms(model, "group", options=options, calibrate=batches())
    found = {s.name: s.warnings for s in report.changed}
    assert found["bn1"] == ["not calibrated: it has neither scale nor shift"]
    assert found["bn2"] == ["the calibration batches did not reach it"]
    assert "bn2 and 1 more: the calibration batches did not reach it" in str(report)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([], ValueError, r"calibrate has no batches"),
        ([{"x": 1}], ValueError, r"batch 0 is a dict without tensors; give forward="),
        ([torch.randn(2, 5, 8, 8)], ValueError, r"batch 0 could not be run: RuntimeError: .* to have 3 channels"),
        ([*batches(), (torch.randn(2, 5, 8, 8), 0)], ValueError, "batch 3 could not be run: .*; forward="),
        ([torch.full((2, 3, 8, 8), torch.nan)], ValueError, r"outputs on the calibration batches are not finite"),
    ],
)
def test_bad_batches_change_nothing(given, error, message):
    model = Net()
    modules, values = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        normzoo.convert_norms(model, "group", options={"groups": 4}, calibrate=given)
    unchanged(model, modules, values)


def test_an_error_within_the_new_layers_changes_nothing():
    model = Net()
    modules, values = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    calls = []

    class Fails(nn.GroupNorm):
        def forward(self, x):
            calls.append(len(calls))
            if len(calls) > 25:  # when all have been calibrated more than once
                raise RuntimeError("planted")
            return super().forward(x)

    with pytest.raises(ValueError, match="with the new layers, batch . could not be run: RuntimeError: planted"):
        normzoo.convert_norms(model, lambda c: Fails(4, c), calibrate=batches())
    assert len(calls) == 26
    unchanged(model, modules, values)


def unchanged(model, modules, values):
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())
    assert model.training
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
