"""Calibration on batches: of all kinds, of uneven sizes and shapes, from a generator, one at a time in memory."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import timm
import torch
from convert.test_fold_selections import SELECT, Thresholds, detector, images
from hypothesis import given, settings
from hypothesis import strategies as st
from sweeps import slow
from torch import nn
from torch.testing import assert_close

import normzoo
from normzoo.convert import _calibrate
from normzoo.convert._fit import Moments, channel_moments


def seasoned(model: nn.Module, dtype=torch.float64) -> nn.Module:
    """The model with batch norms as after some training, in evaluation."""
    generator = torch.Generator().manual_seed(0)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_mean.normal_(0, 0.5, generator=generator)
            m.running_var.uniform_(0.5, 2, generator=generator)
            m.weight.data.uniform_(0.5, 1.5, generator=generator)
            m.bias.data.normal_(0, 0.5, generator=generator)
    return model.to(dtype).eval()


def deep() -> nn.Module:
    """Six norms, each behind what all before it do."""
    torch.manual_seed(0)
    layers = []
    for c in (3, 8, 8, 8, 8, 8):
        layers += [nn.Conv2d(c, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU()]
    return seasoned(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)))


def data(n=24, size=8):
    """Samples that differ in brightness, so that batches differ in their moments."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, size, size, generator=generator, dtype=torch.float64)
    return x + torch.randn(n, 1, 1, 1, generator=generator, dtype=torch.float64)


def calibrated(model, to, batches, **options):
    model = copy.deepcopy(model)
    return model, normzoo.convert_norms(model, to, calibrate=batches, **options)


def of_calibration(report) -> list[str]:
    return [w for w in report.warnings if "tools that look for" not in w]


@pytest.mark.parametrize(
    ("to", "sizes"),
    [
        (pytest.param if sizes == [1, 15, 3, 5] or to == "group" else slow)(to, sizes)
        for to in ["group", "layer", "rms", "none", "affine", "evonorm_s0", "batch_renorm", "switchable"]
        for sizes in [[24], [8, 8, 8], [1, 15, 3, 5], [23, 1]]
    ],
)
def test_uneven_batches_are_as_all_in_one(to, sizes):
    model, x = deep(), data()
    options = {"groups": 2} if to in ("group", "evonorm_s0") else None
    want, report = calibrated(model, to, [x], options=options)
    got, other = calibrated(model, to, (batch for batch in x.split(sizes)), options=options)
    assert_close(got.state_dict(), want.state_dict(), rtol=1e-9, atol=1e-9)
    assert_close(got(x), want(x), rtol=1e-9, atol=1e-9)
    assert_close(other.after.relative, report.after.relative, rtol=1e-7, atol=1e-12)
    assert other.after.same_class == report.after.same_class
    assert other.warnings == report.warnings
    assert of_calibration(report) == []


@pytest.mark.parametrize("to", ["batch", "batch_renorm", "frozen_batch"])
@pytest.mark.parametrize("sizes", [[24], [1, 15, 3, 5]])
def test_new_running_statistics_are_of_all_values(to, sizes):
    """Also where a batch of one sample could not be trained on."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8))
    model.double().eval()
    x = data(24, 2)
    got, report = calibrated(model, to, x.split(sizes))
    entering = got[1](x.flatten(1))
    assert_close(got[2].running_mean, entering.mean(0), rtol=1e-6, atol=1e-6)
    assert_close(got[2].running_var, entering.var(0, correction=int(to == "batch")), rtol=1e-6, atol=1e-6)
    assert_close(channel_moments(got(x), 1), channel_moments(model(x), 1), rtol=1e-6, atol=1e-6)
    assert all(not site.warnings for site in report.changed)


@pytest.mark.parametrize("to", ["iter_norm", "l1_batch", "power", "online", "evonorm_b0", "ghost_batch"])
def test_other_statistics_let_the_moments_be_met(to):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), timm.layers.LayerNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
    model.append(timm.layers.LayerNorm2d(8)).double().eval()
    x = data()
    got, report = calibrated(model, to, x.split([9, 1, 14]))
    assert_close(channel_moments(got(x), 1), channel_moments(model(x), 1), rtol=1e-6, atol=1e-6)
    assert of_calibration(report) == []


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(0, 100))
def test_merged_moments_are_those_of_all(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(n, 3, 2, generator=generator, dtype=torch.float64) * 3 + 1000 for n in sizes]
    merged = None
    for part in parts:
        merged = Moments.of(part, 1).merged(merged)
    whole = torch.cat(parts).double().transpose(0, 1).flatten(1)
    assert merged.count == whole.shape[1]
    assert_close(merged.mean, whole.mean(1), rtol=1e-12, atol=0)
    assert_close(merged.var, whole.var(1, correction=0), rtol=1e-9, atol=1e-9)


# Batches of all kinds


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.bn = nn.Linear(3, 8), nn.Linear(4, 8), nn.BatchNorm1d(8)

    def forward(self, image, meta):
        return self.bn(self.a(image) + self.b(meta))


def test_several_inputs_and_dicts():
    image, meta = torch.randn(16, 3), torch.randn(16, 4)
    want = None
    for batches, forward in (
        ([(image, meta)], None),
        ([(image[:9], meta[:9]), (image[9:], meta[9:])], None),
        ([{"meta": meta, "image": image}], None),
        ({"meta": meta, "image": image}, None),
        ([{"image": image, "meta": meta, "label": 3}], lambda m, b: m(b["image"], b["meta"])),
        ([(image, meta, torch.zeros(16))], None),
    ):
        model = seasoned(Two(), torch.float32)
        normzoo.convert_norms(model, "group", calibrate=batches, forward=forward)
        got = torch.cat([model.bn.weight, model.bn.bias])
        want = got if want is None else want
        assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_lengths_that_differ():
    """Each value weighs alike."""
    model = seasoned(nn.Sequential(nn.Conv1d(1, 8, 5), nn.BatchNorm1d(8)))
    seqs = [torch.randn(4, 1, n, dtype=torch.float64) + n / 50 for n in (100, 20, 61)]
    want = torch.cat([model(s).transpose(0, 1).flatten(1) for s in seqs], 1)
    normzoo.convert_norms(model, "group", calibrate=seqs)
    got = torch.cat([model(s).transpose(0, 1).flatten(1) for s in seqs], 1)
    assert_close(got.mean(1), want.mean(1), rtol=1e-9, atol=1e-9)
    assert_close(got.var(1), want.var(1), rtol=1e-9, atol=1e-9)


class Stacking(nn.Module):
    """Takes lists of images of the same size."""

    def __init__(self):
        super().__init__()
        self.net = deep()

    def forward(self, images: list[torch.Tensor], targets=None):
        return [{"scores": row} for row in self.net(torch.stack(images))]


def test_lists_of_images():
    x = data(12)
    want = torch.stack([row["scores"] for row in Stacking()(list(x))]).detach()
    for batches in ([list(x)], [list(x[:5]), list(x[5:])], [(list(x), [{}] * 12)], [(tuple(x), None)]):
        model = Stacking()
        report = normzoo.convert_norms(model, "group", calibrate=batches)
        assert 0 < report.after.relative < report.before.relative
        got = torch.stack([row["scores"] for row in model(list(x))]).detach()
        assert_close(float((got - want).norm() / want.norm()), report.after.relative, rtol=1e-6, atol=1e-9)


def test_forward_needs_calibrate():
    with pytest.raises(ValueError, match="forward is what calibrate runs the model with"):
        normzoo.convert_norms(deep(), "group", forward=lambda m, b: m(b))


# One at a time


def test_a_loader_is_iterated_over_once_and_its_batches_are_not_changed():
    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = deep()

        def forward(self, x):
            return self.net(x.mul_(2))

    x, taken = data(), []

    def loader():
        for i, batch in enumerate(x.split(6)):
            taken.append(i)
            yield batch

    before = x.clone()
    normzoo.convert_norms(Changing(), "group", calibrate=loader())
    assert taken == [0, 1, 2, 3]
    assert torch.equal(x, before)


def test_activations_of_one_batch_at_a_time(monkeypatch):
    """What a layer gave for a batch is gone when the next one comes, and no tensor is of several batches."""
    alive, sizes = [], []

    class Watching(nn.Conv2d):
        def forward(self, x):
            gc.collect()
            assert all(ref() is None for ref in alive)
            sizes.append(len(x))
            y = super().forward(x)
            alive[:] = [weakref.ref(y)]
            return y

    model = nn.Sequential(Watching(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)).double().eval()
    normzoo.convert_norms(model, "group", calibrate=data().split([4, 8, 12]))
    assert set(sizes) == {4, 8, 12}


def test_a_model_that_draws_numbers_draws_the_same_in_each_pass():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = deep()

        def forward(self, x):
            return self.net(x + torch.randn_like(x))

    model = Noisy()
    state = torch.get_rng_state()
    report = normzoo.convert_norms(model, "batch_renorm", calibrate=data().split(8))
    assert torch.equal(torch.get_rng_state(), state)
    assert report.before.relative < 1e-12


def test_a_layer_that_some_batches_do_not_reach():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.all, self.some = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8)

        def forward(self, x):
            y = self.all(self.conv(x))
            return self.some(y.relu()) if len(x) < 10 else y

    x = data()
    model = seasoned(Routed())
    small, large = x[:8], x[8:]
    want = model(small)
    normzoo.convert_norms(model, "group", calibrate=[large, small])
    assert_close(channel_moments(model(small), 1), channel_moments(want, 1), rtol=1e-8, atol=1e-8)


def test_it_is_said_if_the_passes_do_not_settle(monkeypatch):
    monkeypatch.setattr(_calibrate, "_MOST_PASSES", 2)
    _, report = calibrated(deep(), "group", data().split([20, 1, 3]))
    assert "calibration did not settle: in the last of 2 passes" in report.warnings[0]
    assert "warning: calibration did not settle" in str(report)


# Models that select by their values


@pytest.mark.parametrize("case", SELECT)
def test_models_that_select_by_their_values(case):
    model = seasoned(Thresholds(SELECT[case]), torch.float32)
    x = torch.randn(6, 3, 12, 12)
    report = normzoo.convert_norms(model, "group", calibrate=x.split([4, 2]))
    assert 0 < report.after.relative < 2
    others = ("integers alone", "sizes alone", "unique")
    assert any("outputs cannot be compared" in w for w in report.warnings) == (case in others)


@settings(max_examples=10)
@given(st.integers(0, 1000))
def test_what_computes_the_same_selects_the_same(seed):
    torch.manual_seed(seed)
    model = seasoned(Thresholds(SELECT["nms"]), torch.float32)
    report = normzoo.convert_norms(model, "batch_renorm", calibrate=torch.randn(4, 3, 12, 12).split(2))
    assert report.before.relative < 1e-4
    assert report.after.relative < 1e-4


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    "name",
    [
        "ssdlite320_mobilenet_v3_large",
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in (
                "fasterrcnn_resnet50_fpn_v2",
                "maskrcnn_resnet50_fpn",
                "retinanet_resnet50_fpn_v2",
                "fcos_resnet50_fpn",
            )
        ),
    ],
)
@pytest.mark.slow
def test_detectors_calibrate_whole(name, seed):
    model = detector(name, seed)
    batches = [(images(), [{}] * 2), (images()[:1], [{}])]
    report = normzoo.convert_norms(model, "group", calibrate=batches)
    assert all("outputs cannot be compared" in w for w in of_calibration(report))  # as where nothing is detected
    assert 0 < report.after.relative < report.before.relative
