"""Running statistics estimated anew, frozen norms and parameter groups, against slow and obvious twins."""

from __future__ import annotations

import copy
import datetime as dt
import math
import multiprocessing
import random
import re
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import timm.layers as tl
import torch
import torch.distributed as dist
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers.inplace_abn import InplaceAbn
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import normzoo
from normzoo import freeze_norms, param_groups, reestimate_statistics
from normzoo.convert._kinds import kind_of

C = 6
SIZES = (8, 2, 5, 3)
OPTIONS: dict[str, dict[str, Any]] = {
    "ghost_batch": {"ghost_size": 4},
    "batch_group": {"groups": 3},
    "batch_renorm": {"r_max": 3.0, "d_max": 5.0},
    "power": {"warmup": 2},
    "iter_norm": {"groups": 2},
}


def batches(sizes=SIZES, shape=(C, 4, 3), seed=0, scale=1.0):
    """Images whose mean and spread drift from batch to batch."""
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(n, *shape, generator=g, dtype=torch.float64) * (1 + i) + 3 * i) * scale
        for i, n in enumerate(sizes)
    ]


def layer_of(name, channels=C, **options):
    layer = normzoo.create_norm(name, channels, **OPTIONS.get(name, {}), **options).double()
    with torch.no_grad():
        for key, buffer in layer.named_buffers():
            if key.startswith("running_") and key != "running_whitening":
                buffer.uniform_(0.5, 2.0)
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.fill_(100)
    return layer


def with_statistics():
    """The zoo's layers that keep statistics of batches, found and not listed."""
    found = []
    for name in normzoo.list_norms():
        if name in ("frozen_batch", "online"):
            continue
        options = {"groups": 4} if name == "batch_group" else OPTIONS.get(name, {})
        if any(key.startswith("running_") for key, _ in normzoo.get_norm(name, **options)(32).named_buffers()):
            found.append(name)
    return found


ZOO = with_statistics()


# What each layer takes from one batch: (N, C, values) in float64, by its own page's formula.
def _by_channel(x):
    return x.movedim(1, 0).reshape(x.shape[1], -1)


def _biased(x):
    v = _by_channel(x)
    mean = v.sum(1) / v.shape[1]
    return {"running_mean": mean, "running_var": ((v - mean[:, None]) ** 2).sum(1) / v.shape[1]}


def _unbiased(x):
    n = x.numel() // x.shape[1]
    found = _biased(x)
    return {**found, "running_var": found["running_var"] * n / (n - 1)}


def _ghost(x):
    parts = [_unbiased(ghost) for ghost in x.split(4)]
    return {k: torch.stack([p[k] for p in parts]).mean(0) for k in parts[0]}


def _groups(x):
    of_groups = _unbiased(x.reshape(len(x), 3, -1))
    return {k: v.repeat_interleave(C // 3) for k, v in of_groups.items()}


def _l1(x):
    v = _by_channel(x)
    s = (v - v.mean(1, keepdim=True)).abs().mean(1) * math.sqrt(math.pi / 2)
    return {"running_mean": v.mean(1), "running_var": s**2}


def _whitening(x, eps=1e-5):
    v = _by_channel(x)
    mean = v.mean(1)
    found = []
    for rows in (v - mean[:, None]).split(C // 2):
        cov = rows @ rows.T / rows.shape[1] + eps * torch.eye(C // 2, dtype=x.dtype)
        trace, p = cov.trace(), torch.eye(C // 2, dtype=x.dtype)
        for _ in range(5):
            p = 1.5 * p - 0.5 * torch.linalg.matrix_power(p, 3) @ cov / trace
        found.append(p / trace.sqrt())
    return {"running_mean": mean, "running_whitening": torch.stack(found)}


TWINS = {
    "batch": _unbiased,
    "batch_renorm": _biased,
    "ghost_batch": _ghost,
    "batch_group": _groups,
    "batch_instance": _unbiased,
    "switchable": _biased,
    "l1_batch": _l1,
    "evonorm_b0": lambda x: {"running_var": _unbiased(x)["running_var"]},
    "iter_norm": _whitening,
    "power": lambda x: {"running_phi": (_by_channel(x) ** 2).mean(1)},
}


def merged(found, sizes):
    """By the law of total variance where there are mean and variance, else weighted averages."""
    n = torch.tensor(sizes, dtype=torch.float64)

    def average(values):
        return sum(w * v for w, v in zip(n, values, strict=True)) / n.sum()

    whole = {k: average([f[k] for f in found]) for k in found[0]}
    if {"running_mean", "running_var"} <= set(whole):
        gaps = [(f["running_mean"] - whole["running_mean"]) ** 2 for f in found]
        whole["running_var"] = whole["running_var"] + average(gaps)
    return whole


def statistics(layer):
    return {k: b.clone() for k, b in layer.named_buffers(recurse=False) if k.startswith("running_")}


def everything(model):
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "modes": [m.training for m in model.modules()],
        "options": [
            {k: v for k, v in vars(m).items() if isinstance(v, int | float | tuple | None)} for m in model.modules()
        ],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "tensors": [id(t) for m in model.modules() for t in (*m._parameters.values(), *m._buffers.values())],
        "requires": [p.requires_grad for p in model.parameters()],
    }


def assert_same(before, after, but=()):
    for key in before:
        if key != "state":
            assert before[key] == after[key], key
    assert before["state"].keys() == after["state"].keys()
    for k, v in before["state"].items():
        if not any(k.endswith(b) for b in but):
            assert torch.equal(v, after["state"][k]), k


RUNNING = ("running_mean", "running_var", "running_whitening", "running_phi")


def test_every_layer_of_the_zoo_with_statistics_has_a_twin():
    assert sorted(TWINS) == sorted(ZOO)


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("flat", [False, True])
def test_statistics_are_those_of_all_batches(name, flat):
    sizes = (8, 4, 12) if name == "ghost_batch" else SIZES
    data = batches(sizes, (C,) if flat else (C, 4, 3))
    layer = layer_of(name)
    model = nn.Sequential(layer)
    before = everything(model)
    assert reestimate_statistics(model, data) == 1
    assert_same(before, everything(model), but=RUNNING)
    found = statistics(layer)
    want = merged([TWINS[name](x) for x in data], sizes)
    assert found.keys() == want.keys()
    for key in found:
        assert_close(found[key], want[key], rtol=1e-10, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", ["batch_renorm", "switchable"])
def test_of_biased_variances_the_union_has_the_variance_exactly(name):
    data = batches()
    model = nn.Sequential(layer_of(name))
    reestimate_statistics(model, data)
    union = torch.cat(data)
    assert_close(model[0].running_mean, union.mean((0, 2, 3)), rtol=1e-12, atol=0)
    assert_close(model[0].running_var, union.var((0, 2, 3), correction=0), rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("count", [0, 3, 10**6])
def test_during_the_pass_layers_normalize_by_the_batch_alone(name, count):
    """Whatever the running statistics, the schedule and the mode: a twin made afresh, on its first batch."""
    data = batches((8,))[0]
    layer = layer_of(name)
    layer.num_batches_tracked.fill_(count)
    outputs = []
    layer.register_forward_hook(lambda _, x, y: outputs.append(y))
    model = nn.Sequential(layer).eval()
    reestimate_statistics(model, [data])
    assert not outputs[0].requires_grad
    plain = {"r_max": 1.0, "d_max": 0.0} if name == "batch_renorm" else {"warmup": 1} if name == "power" else {}
    twin = normzoo.create_norm(name, C, **{**OPTIONS.get(name, {}), **plain}).double().train()
    with torch.no_grad():
        assert_close(outputs[0], twin(data), rtol=1e-12, atol=1e-12)


def test_what_a_fused_layer_holds_stays_as_in_evaluation():
    layer = tl.norm_act.BatchNormAct2d(C, drop_layer=nn.Dropout, act_layer=nn.RReLU, inplace=False).double()
    outputs = []
    layer.register_forward_hook(lambda _, x, y: outputs.append(y))
    data = batches((8,))
    reestimate_statistics(nn.Sequential(layer, nn.Dropout()), data)
    twin = nn.BatchNorm2d(C).double()
    with torch.no_grad():
        assert_close(outputs[0], layer.act.eval()(twin(data[0])))


def torch_layers():
    return {
        "BatchNorm2d": nn.BatchNorm2d(C),
        "cumulative": nn.BatchNorm2d(C, momentum=None),
        "no affine": nn.BatchNorm2d(C, affine=False),
        "SyncBatchNorm": nn.SyncBatchNorm(C),
        "BatchNormAct2d": tl.norm_act.BatchNormAct2d(C, drop_layer=nn.Dropout),
        "SyncBatchNormAct": tl.norm_act.SyncBatchNormAct(C),
        "zoo, sync": normzoo.create_norm("batch", C, sync=True, act_layer=nn.ReLU),
    }


@pytest.mark.parametrize("name", torch_layers())
@pytest.mark.parametrize("training", [False, True])
def test_batch_norms_of_torch_and_timm(name, training):
    model = nn.Sequential(torch_layers()[name].double()).train(training)
    data = batches()
    before = everything(model)
    assert reestimate_statistics(model, data) == 1
    assert_same(before, everything(model), but=RUNNING)
    want = merged([_unbiased(x) for x in data], SIZES)
    for key, value in statistics(model[0]).items():
        assert_close(value, want[key], rtol=1e-10, atol=0)


def test_instance_norm_that_tracks():
    layer = nn.InstanceNorm2d(C, track_running_stats=True).double()
    data = batches()
    reestimate_statistics(nn.Sequential(layer), data)

    def of_batch(x):
        samples = [_unbiased(sample[None]) for sample in x]
        return {k: torch.stack([s[k] for s in samples]).mean(0) for k in samples[0]}

    want = merged([of_batch(x) for x in data], SIZES)
    for key, value in statistics(layer).items():
        assert_close(value, want[key], rtol=1e-10, atol=0)


def test_timms_evonorm_b0_with_and_without_its_activation():
    model = nn.Sequential(tl.evo_norm.EvoNorm2dB0(C), tl.evo_norm.EvoNorm2dB0(C, apply_act=False))
    assert reestimate_statistics(model, [x.float() for x in batches((4, 4))]) == 1
    want = merged([{"running_var": _unbiased(x)["running_var"]} for x in batches((4, 4))], (4, 4))
    assert_close(model[0].running_var.double(), want["running_var"], rtol=1e-5, atol=0)


@given(
    sizes=st.lists(st.integers(2, 6), min_size=1, max_size=6),
    seed=st.integers(0, 99),
    offset=st.sampled_from([0.0, 1e3, 1e6]),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=40)
def test_neither_order_nor_offset_matters(sizes, seed, offset, order):
    data = [x + offset for x in batches(sizes, (C,), seed=seed)]
    one, two = nn.Sequential(layer_of("batch")), nn.Sequential(layer_of("batch"))
    reestimate_statistics(one, data)
    want = merged([_unbiased(x) for x in data], sizes)
    assert_close(one[0].running_mean, torch.cat(data).mean(0), rtol=1e-12, atol=1e-12)
    assert_close(one[0].running_var, want["running_var"], rtol=1e-8, atol=0)
    order.shuffle(data)
    reestimate_statistics(two, data)
    for key, value in statistics(two[0]).items():
        assert_close(value, statistics(one[0])[key], rtol=1e-8, atol=1e-12)


def test_maps_of_several_sizes_weigh_by_their_values():
    data = [torch.randn(2, C, s, s, dtype=torch.float64) + s for s in (2, 3, 7)]
    model = nn.Sequential(layer_of("batch_renorm"))
    reestimate_statistics(model, data)
    union = torch.cat([_by_channel(x) for x in data], 1)
    assert_close(model[0].running_mean, union.mean(1))
    assert_close(model[0].running_var, union.var(1, correction=0))


def test_each_call_of_a_shared_layer_is_a_batch():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = self.same = layer_of("batch_renorm")
            self.never = layer_of("batch")

        def forward(self, x):
            return self.norm(x[:3]) + self.same(x=2 * x[3:6] + 1).sum()

    model, (x,) = Twice(), batches((6,))
    never = statistics(model.never)
    assert reestimate_statistics(model, [x]) == 1
    union = torch.cat([x[:3], 2 * x[3:] + 1])
    assert_close(model.norm.running_mean, union.mean((0, 2, 3)))
    assert_close(model.norm.running_var, union.var((0, 2, 3), correction=0))
    assert all(torch.equal(v, statistics(model.never)[k]) for k, v in never.items())


def resnet(norm="batch"):
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=4, drop_rate=0.5, drop_path_rate=0.2)
    if norm != "batch":
        options = {"groups": 8} if norm in ("iter_norm", "batch_group") else None
        normzoo.convert_norms(model, norm, options=options)
    return model


IMAGES = [(torch.randn(n, 3, 64, 64, generator=torch.Generator().manual_seed(n)), torch.zeros(n)) for n in (4, 2)]


@pytest.mark.parametrize("norm", ZOO)
def test_a_whole_model(norm):
    """The twin: a copy for each batch, in evaluation but for its norms, which take all of that batch."""
    model = resnet(norm).train()
    model.layer1[0].bn2.eval()
    found = []
    for x, _ in IMAGES:
        twin = copy.deepcopy(model).eval()
        norms = {n: m for n, m in twin.named_modules() if statistics(m)}
        for m in norms.values():
            m.train()
            m.momentum = 1.0
            for child in m.children():
                child.eval()
        with torch.no_grad():
            twin(x)
        found.append({(n, k): v.double() for n, m in norms.items() for k, v in statistics(m).items()})
    before, random_state = everything(model), torch.get_rng_state()
    assert reestimate_statistics(model, iter(IMAGES)) == len(norms) == 20
    assert torch.equal(torch.get_rng_state(), random_state)
    assert_same(before, everything(model), but=RUNNING)
    assert all(p.grad is None for p in model.parameters())
    for n in norms:
        want = merged([{k: v for (m, k), v in f.items() if m == n} for f in found], [len(x) for x, _ in IMAGES])
        for key, value in statistics(model.get_submodule(n)).items():
            assert_close(value.double(), want[key], rtol=1e-3, atol=1e-4, msg=lambda m, n=n, key=key: f"{n} {key}: {m}")
    with torch.no_grad():
        assert model.eval()(IMAGES[0][0]).isfinite().all()


def test_it_makes_evaluation_what_training_was_on_the_one_batch():
    model = resnet()
    (x, _), *_ = IMAGES
    reestimate_statistics(model, x)
    model.eval()
    with torch.no_grad():
        evaluated = model(x)
        for m in model.modules():
            m.training = isinstance(m, nn.BatchNorm2d)
        trained = model(x)
    assert_close(evaluated, trained, rtol=0.1, atol=0.1)  # but for the unbiased variance


def test_num_batches_takes_no_more_and_random_streams_stay():
    data = batches((4,) * 5)
    stream = iter(data)
    one, two = nn.Sequential(layer_of("batch")), nn.Sequential(layer_of("batch"))
    reestimate_statistics(one, stream, num_batches=3)
    assert len(list(stream)) == 2
    reestimate_statistics(two, data[:3])
    assert torch.equal(one[0].running_var, two[0].running_var)

    class Noisy(TensorDataset):
        def __getitem__(self, i):
            random.random(), np.random.rand(), torch.rand(1)
            return super().__getitem__(i)

    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    reestimate_statistics(one, DataLoader(Noisy(torch.cat(data)), batch_size=5, shuffle=True))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()


def test_batches_of_other_kinds_by_forward():
    data = batches()
    one, two = nn.Sequential(layer_of("batch")), nn.Sequential(layer_of("batch"))
    reestimate_statistics(one, [{"image": x} for x in data], forward=lambda model, batch: model(batch["image"]))
    reestimate_statistics(two, [[x, 0] for x in data])
    assert torch.equal(one[0].running_var, two[0].running_var)


def test_an_empty_batch_counts_for_nothing():
    data = batches()
    one, two = nn.Sequential(layer_of("batch")), nn.Sequential(layer_of("batch"))
    reestimate_statistics(one, [data[0], data[1][:0], data[1]])
    reestimate_statistics(two, data[:2])
    assert torch.equal(one[0].running_var, two[0].running_var)


def test_statistics_that_were_lost_are_found_again():
    model = nn.Sequential(nn.BatchNorm2d(C), nn.BatchNorm2d(C)).double()
    for m in model:
        m.running_mean.fill_(math.nan)
        m.running_var.fill_(math.inf)
    reestimate_statistics(model, batches())
    assert all(b.isfinite().all() for b in model.buffers())


def test_constant_channels_and_half_precision():
    model = nn.Sequential(nn.BatchNorm1d(C))
    reestimate_statistics(model, [torch.zeros(3, C), torch.zeros(2, C)])
    assert not model[0].running_mean.any()
    assert not model[0].running_var.any()
    half = nn.Sequential(nn.BatchNorm2d(C)).bfloat16()
    reestimate_statistics(half, [x.bfloat16() for x in batches()])
    assert half[0].running_var.dtype == torch.bfloat16
    want = merged([_unbiased(x) for x in batches()], SIZES)
    assert_close(half[0].running_var.double(), want["running_var"], rtol=0.02, atol=0)


def test_frozen_layers_and_streams_are_left_alone():
    left = [normzoo.create_norm("frozen_batch", C), torchvision.ops.misc.FrozenBatchNorm2d(C)]
    left += [tl.norm_act.FrozenBatchNormAct2d(C), normzoo.create_norm("online", C), nn.BatchNorm2d(C, affine=False)]
    model = nn.Sequential(*left, nn.BatchNorm2d(C, track_running_stats=False)).double()
    model[4] = nn.GroupNorm(2, C).double()
    before = everything(model)
    with pytest.raises(
        ValueError, match="Sequential has no layer with running statistics of batches; the stat.* 1 online"
    ):
        reestimate_statistics(model, batches())
    model.append(layer_of("batch"))
    before = everything(model)
    assert reestimate_statistics(model, batches()) == 1
    assert_same(before, everything(model), but=("6.running_mean", "6.running_var"))


class Subclass(nn.BatchNorm2d):
    """A forward of its own, which uses the old statistics and moves them with new tensors."""

    def forward(self, x):
        assert not self.training or (self.running_var > 0.4).all()
        if not self.training:
            return super().forward(x)
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
        self.running_mean = self.momentum * mean + (1 - self.momentum) * self.running_mean
        self.running_var = self.momentum * var + (1 - self.momentum) * self.running_var
        return x


class Kept(nn.BatchNorm2d):
    """Momentum as the share that is kept."""

    def forward(self, x):
        self.running_mean.mul_(self.momentum).add_((1 - self.momentum) * x.mean((0, 2, 3)))
        return x


class Other(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(C))

    def forward(self, x):
        return x


def test_layers_of_other_authors():
    model = nn.Sequential(Subclass(C).double())
    before = everything(model)
    for _ in range(2):  # once more finds the same
        assert reestimate_statistics(model, batches()[:1]) == 1
        assert_same(before, everything(model), but=RUNNING)
        assert_close(model[0].running_var, _unbiased(batches()[0])["running_var"])


class Raises(nn.Module):
    def forward(self, x):
        if len(x) == 5:
            raise RuntimeError("five")
        return x


def failing(case):
    good = nn.BatchNorm2d(C).double()
    data, error = batches(), ValueError
    if case == "five":
        return nn.Sequential(good, Raises()), data, "batch 2 could not be run: RuntimeError: five", error
    if case == "kind":
        return nn.Sequential(good), [data[0], {"image": data[1]}], "batch 1 is a dict, not a tensor or an", error
    if case == "channels":
        return nn.Sequential(good), [*data, data[0][:, :3]], "batch 4 could not be run: .*running_mean", error
    if case == "one value":
        return nn.Sequential(layer_of("batch")), [*data, data[0][:1, :, :1, :1]], "more than one value", error
    if case == "no batches":
        return nn.Sequential(good), [], "there are no batches to take statistics from", error
    if case == "not finite":
        return nn.Sequential(good), [*data, data[0] * math.nan], "statistics of 0 (BatchNorm2d) are not finite", error
    if case == "loader":

        def stops():
            yield data[0]
            raise KeyError("file")

        return nn.Sequential(good), stops(), "file", KeyError
    if case == "interrupt":

        def stopped():
            yield data[0]
            raise KeyboardInterrupt("now")

        return nn.Sequential(good), stopped(), "now", KeyboardInterrupt
    if case == "unreached":
        model = nn.Sequential(nn.Identity())
        model[0].spare = good
        return model, data, "none of the 1 layers with running statistics was called", error
    if case == "kept":
        return nn.Sequential(good, Kept(C).double()), data, "1 (Kept) did not write its statistics", error
    if case == "not tracked":
        good.track_running_stats = False
        return nn.Sequential(good), data, "0 (BatchNorm2d) did not write its statistics", error
    if case == "no momentum":
        return nn.Sequential(good, Other()), data, "1 (Other): it has no momentum", error
    if case == "split":
        return nn.Sequential(tl.split_batchnorm.SplitBatchNorm2d(C)), data, "0 (SplitBatchNorm2d): it splits", error
    if case == "lazy":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return nn.Sequential(nn.LazyBatchNorm2d()), data, "0 does not know its channels yet", error
    if case == "no layer":
        return nn.Sequential(nn.GroupNorm(2, C)), data, "Sequential has no layer with running statistics", error
    if case == "script":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.jit.script(nn.Sequential(good)), data, "the model is wrapped in ScriptModule", error
    raise AssertionError(case)


CASES = ["five", "kind", "channels", "one value", "loader", "interrupt", "no batches", "not finite", "not tracked"]
CASES += ["unreached", "kept", "no momentum", "split", "lazy", "no layer", "script"]


@pytest.mark.parametrize("case", CASES)
def test_after_an_error_the_model_is_as_it_was(case):
    model, data, message, error = failing(case)
    model.train()
    lazy = case in ("lazy", "script")
    before = None if lazy else everything(model)
    states = torch.get_rng_state()
    with pytest.raises(error) as caught:
        reestimate_statistics(model, data)
    pattern = message if ".*" in message else re.escape(message)
    assert re.search(pattern, str(caught.value)), str(caught.value)
    assert torch.equal(states, torch.get_rng_state())
    if not lazy:
        assert_same(before, everything(model))
    assert torch.is_grad_enabled()


def test_num_batches_is_checked():
    with pytest.raises(ValueError, match="num_batches must be at least 1, or None for all, not 0"):
        reestimate_statistics(nn.Sequential(layer_of("batch")), batches(), num_batches=0)


def test_compiled_models_and_parts():
    data = batches()
    want = nn.Sequential(nn.Sequential(layer_of("batch"), layer_of("batch")), nn.ReLU())
    outer, inner = copy.deepcopy(want), copy.deepcopy(want)
    reestimate_statistics(want, data)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(outer, backend=backend)
    inner[0].compile(backend=backend)
    for model in (compiled, inner):
        for training in (True, False):
            model.train(training)(data[0])
        made = len(graphs)
        assert made
        assert reestimate_statistics(model, data) == 2
        assert len(graphs) == made, "the pass was compiled"
        model(data[0])
    for model in (outer, inner):
        for key, value in want.state_dict().items():
            assert key.endswith("num_batches_tracked") or torch.equal(model.state_dict()[key], value), key


# Real processes.

DEADLINE = 60.0


def shards(world, seed=0):
    """Batches of each rank: uneven in number and size; the second rank of three has none."""
    data = batches((6, 2, 5, 3, 4), seed=seed)
    return [data[:3], [], data[3:]] if world == 3 else [data[:4], data[4:]]


def net(name):
    torch.manual_seed(1)

    def norm(channels):
        if name == "SyncBatchNorm":
            return nn.SyncBatchNorm(channels)
        options = dict(OPTIONS.get(name, {}))
        if name != "ghost_batch":
            options["sync"] = True
        else:
            options["ghost_size"] = 8
        return normzoo.create_norm(name, channels, **options)

    wide = C if name == "batch_group" else 8
    return nn.Sequential(norm(C), nn.Conv2d(C, wide, 2), nn.ReLU(), nn.Dropout(), norm(wide)).double()


KINDS_OF_NETS = [*ZOO, "SyncBatchNorm"]


def on_rank(rank, world, folder):
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            timeout = dt.timedelta(seconds=DEADLINE / 2)
            store = f"file://{folder}/store"
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timeout)
        found: dict[str, Any] = {"counted": {}, "states": {}, "errors": {}}
        mine = shards(world)[rank]
        calls = []
        gather, dist.all_gather = dist.all_gather, lambda *a, **k: (calls.append(1), gather(*a, **k))[1]
        for name in KINDS_OF_NETS:
            model = net(name)
            if rank == 1:  # running statistics differ by rank
                for m in (model[0], model[4]):
                    for b in statistics(m):
                        getattr(m, b).add_(0.25)
            wrapped = nn.parallel.DistributedDataParallel(model) if name == "batch" else model
            before = everything(model)
            calls.clear()
            found["counted"][name] = reestimate_statistics(wrapped, iter(mine)), len(calls)
            assert_same(before, everything(model), but=RUNNING)
            found["states"][name] = model.state_dict()
        model = net("batch")
        before = everything(model)
        for case, data in {
            "bad": [x[:, :3] for x in mine[:1]] if rank == 0 else mine,
            "none": [],
            "not finite": [x * math.nan for x in mine],
        }.items():
            try:
                reestimate_statistics(model, data)
                found["errors"][case] = None
            except ValueError as error:
                found["errors"][case] = str(error)
            assert_same(before, everything(model))
        torch.save(found, Path(folder) / f"rank{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (Path(folder) / f"rank{rank}.txt").write_text(traceback.format_exc())
        raise


@pytest.mark.skipif(not dist.is_gloo_available(), reason="no gloo in this build")
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_with_shards_equal_one_rank_with_all(world, tmp_path):
    context: Any = multiprocessing.get_context("fork" if not torch.cuda.is_available() else "spawn")
    processes = [context.Process(target=on_rank, args=(r, world, str(tmp_path)), daemon=True) for r in range(world)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forking a process with threads
        for p in processes:
            p.start()
    end = time.monotonic() + DEADLINE
    for p in processes:
        p.join(max(0.0, end - time.monotonic()))
    hung = [r for r, p in enumerate(processes) if p.is_alive()]
    for p in processes:
        if p.is_alive():
            p.kill()
            p.join(10)
    told = [path.read_text() for path in tmp_path.glob("rank*.txt")]
    assert not told, told[0]
    assert not hung
    ranks = [torch.load(tmp_path / f"rank{r}.pt") for r in range(world)]
    data = [x for shard in shards(world) for x in shard]
    for name in KINDS_OF_NETS:
        one = net(name)
        reestimate_statistics(one, data)
        for rank in ranks:
            assert rank["counted"][name] == (2, 1), name
            for key, value in one.state_dict().items():
                if any(key.endswith(r) for r in RUNNING):
                    assert_close(
                        rank["states"][name][key], value, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
                    )
                    assert torch.equal(rank["states"][name][key], ranks[0]["states"][name][key])
    for r, rank in enumerate(ranks):
        bad = "batch 0 could not be run" if r == 0 else "rank 0 failed, so that the statistics of none were replaced"
        assert rank["errors"]["bad"].startswith(bad)
        assert rank["errors"]["none"] == "there are no batches to take statistics from"
        assert rank["errors"]["not finite"] == "the statistics of 0 (BatchNorm) are not finite"


# Frozen norms.


def trained_a_little(model, images=IMAGES):
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
    for x, _ in images:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("norm", ["batch", "batch_renorm", "ghost_batch", "batch_group", "zoo batch"])
def test_freezing_changes_nothing_in_evaluation_and_stays(norm):
    model = resnet()
    if norm != "batch":
        normzoo.convert_norms(
            model, norm.removeprefix("zoo "), options={"groups": 8} if norm == "batch_group" else None
        )
    trained_a_little(model)
    x = IMAGES[0][0]
    original = copy.deepcopy(model).eval()
    report = freeze_norms(model)
    assert len(report) == 20
    assert report.to == "frozen_batch"
    assert {type(m).__name__ for m in model.modules() if kind_of(m)} == {"FrozenBatchNorm"}
    with torch.no_grad():
        assert_close(model.eval()(x), original(x), rtol=1e-5, atol=1e-5)
    buffers = {k: v.clone() for k, v in model.named_buffers()}
    assert sum("bn" in k and k.endswith("weight") for k in buffers) == 17
    weight = model.conv1.weight.clone()
    trained_a_little(model)
    assert not torch.equal(model.conv1.weight, weight)
    assert all(torch.equal(v, dict(model.named_buffers())[k]) for k, v in buffers.items())
    original.load_state_dict(model.state_dict())
    other = copy.deepcopy(model)
    other.load_state_dict(original.state_dict())
    with torch.no_grad():
        assert_close(original(x), model.eval()(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="ResNet has no layer to freeze; looked for batch norms with running"):
        freeze_norms(model)


def test_only_what_is_exactly_a_frozen_batch_norm_is_taken():
    taken = {
        "bn": nn.BatchNorm2d(C),
        "no affine": nn.BatchNorm2d(C, affine=False),
        "sync": nn.SyncBatchNorm(C),
        "act": tl.norm_act.BatchNormAct2d(C),
        "drop": tl.norm_act.BatchNormAct2d(C, drop_layer=nn.Dropout),
        "split": tl.split_batchnorm.SplitBatchNorm2d(C),
        "no bias": nn.BatchNorm2d(C, bias=False),
        **{n: layer_of(n) for n in ("batch", "batch_renorm", "ghost_batch", "batch_group")},
    }
    left = {
        "no statistics": nn.BatchNorm2d(C, track_running_stats=False),
        "instance": nn.InstanceNorm2d(C, track_running_stats=True),
        "group": nn.GroupNorm(2, C),
        "own": Subclass(C),
        "abn": InplaceAbn(C),
        "relu": nn.ReLU(),
        **{n: layer_of(n) for n in ("l1_batch", "switchable", "evonorm_b0", "iter_norm", "power", "batch_instance")},
    }
    made = {k: copy.deepcopy(v).double() for k, v in {**taken, **left}.items()}
    for k in taken:
        for name in ("running_mean", "running_var", "weight", "bias"):
            if (held := getattr(made[k], name, None)) is not None:
                with torch.no_grad():
                    held.uniform_(0.5, 1.5)
    model = nn.ModuleDict(made).eval()
    x = batches((3,))[0]
    with torch.no_grad():
        want = {k: model[k](x) for k in taken}
    report = freeze_norms(model)
    assert [s.name for s in report.sites] == list(taken)
    model.train()
    for k in taken:
        assert not list(model[k].parameters())
        model[k].eval() if k == "drop" else None
        assert_close(model[k](x), want[k], rtol=1e-12, atol=1e-12)
    for k in left:
        assert model[k] is made[k]


def test_which_are_frozen_can_be_chosen():
    def left(**chosen):
        model = resnet()
        freeze_norms(model, **chosen)
        return [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]

    everywhere = [n for n, m in resnet().named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert left() == []
    assert left(include="layer1.*") == [n for n in everywhere if not n.startswith("layer1.")]
    assert left(exclude="layer4.*") == [n for n in everywhere if n.startswith("layer4.")]
    assert left(exclude=["layer4.*", lambda n, m: n == "bn1"], include=nn.BatchNorm2d) == [
        n for n in everywhere if n.startswith("layer4.") or n == "bn1"
    ]
    assert left(exclude=lambda n, m: m.num_features > 64) == [
        n for n in everywhere if n[:6] in ("layer2", "layer3", "layer4")
    ]
    with pytest.raises(ValueError, match="none chosen by include and exclude"):
        left(exclude="*")


@pytest.mark.parametrize(
    "model", [nn.Sequential(nn.GroupNorm(2, C)), nn.Sequential(nn.BatchNorm2d(C, track_running_stats=False))]
)
def test_nothing_to_freeze_is_an_error(model):
    with pytest.raises(ValueError, match="Sequential has no layer to freeze"):
        freeze_norms(model)


# Parameter groups.


class OwnForward(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) + 1


class OwnZoo(type(normzoo.create_norm("batch", 2))):
    """A subclass that the registry does not know."""


def models():
    def small(name, **options):
        return timm.create_model(name, num_classes=3, **options)

    made = {
        "resnet18": (lambda: small("resnet18"), ["bn", "downsample.1"]),
        "vit": (lambda: small("vit_tiny_patch16_224", depth=2), ["norm"]),
        "convnext": (lambda: small("convnext_atto", depths=(1, 1, 1, 1)), ["norm", "downsample.0", "stem.1"]),
    }
    for norm in ("batch_renorm", "evonorm_b0", "filter_response", "switchable", "dynamic_tanh"):
        made[norm] = (lambda norm=norm: resnet(norm), ["bn", "downsample.1"])
    return made


@pytest.mark.parametrize("name", models())
@pytest.mark.parametrize("decay_biases", [False, True])
def test_each_parameter_is_in_one_group(name, decay_biases):
    make, norms = models()[name]
    model = make()
    groups = param_groups(model, 0.1, decay_biases=decay_biases)
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    assert all(g.keys() == {"params", "weight_decay"} for g in groups)
    decayed, spared = ({id(p) for p in g["params"]} for g in groups)
    for key, param in model.named_parameters():
        path, _, local = key.rpartition(".")
        last_two = ".".join(path.split(".")[-2:])
        a_norm = any(path.split(".")[-1].startswith(n) or last_two == n or path == n for n in norms)
        a_norm = a_norm or (name == "convnext" and last_two.endswith("downsample.0"))
        assert (id(param) in spared) == (a_norm or (local == "bias" and not decay_biases)), key
        assert (id(param) in decayed) != (id(param) in spared)
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    optimizer = torch.optim.AdamW(groups, lr=0.5)
    weights = {k: p.detach().clone() for k, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for k, p in model.named_parameters():
        assert_close(p.detach(), weights[k] * (1 - 0.05 * (id(p) in decayed)))


def test_all_parameters_of_norms_are_spared_whatever_their_name():
    for name in normzoo.list_norms():
        layer = normzoo.get_norm(name)(32)
        if list(layer.parameters()):
            groups = param_groups(layer, 0.1, decay_biases=True)
            assert [g["weight_decay"] for g in groups] == [0.0], name
            assert len(groups[0]["params"]) == len(list(layer.parameters()))


def test_norms_of_other_authors_gains_and_attention():
    conv = nn.Sequential(nn.Conv2d(4, 4, 1))
    normzoo.standardize_weights(conv, "scaled_ws")
    gru, attention = nn.GRU(4, 4), nn.MultiheadAttention(4, 2, add_bias_kv=True)
    model = nn.ModuleList([OwnForward(4), OwnZoo(4), conv, gru, attention, tl.evo_norm.EvoNorm2dS0(32), nn.PReLU()])
    spared = {id(p) for p in param_groups(model, 0.1)[1]["params"]}
    names = sorted(k for k, p in model.named_parameters() if id(p) in spared)
    gate = ["3.bias_ih_l0", "3.bias_hh_l0"]
    of_attention = ["4.in_proj_bias", "4.bias_k", "4.bias_v", "4.out_proj.bias"]
    of_norms = ["0.weight", "0.bias", "1.weight", "1.bias", "2.0.gain", "5.weight", "5.bias", "5.v"]
    assert names == sorted([*of_norms, "2.0.bias", *gate, *of_attention])
    biased = param_groups(model, 0.1, decay_biases=True)[1]["params"]
    assert sorted(map(id, biased)) == sorted(id(p) for k, p in model.named_parameters() if k in of_norms)


def test_shared_and_fixed_parameters():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.LayerNorm(4))
    model[2].weight, model[3].weight = model[0].weight, model[1].weight
    model[0].bias.requires_grad_(False)
    decayed, spared = param_groups(model, 0.1)
    assert [id(p) for p in decayed["params"]] == [id(model[0].weight)]
    assert [id(p) for p in spared["params"]] == [
        id(p) for p in (model[1].weight, model[1].bias, model[2].bias, model[3].bias)
    ]
    tied = nn.ModuleList([nn.Linear(4, 4), nn.LayerNorm(4)])
    tied[0].bias = tied[1].weight  # a norm's wherever else it is used
    assert len(param_groups(tied, 0.1, decay_biases=True)[1]["params"]) == 2


@given(
    kinds=st.lists(st.sampled_from(["linear", "norm", "batch", "fixed"]), min_size=1, max_size=6), biases=st.booleans()
)
@settings(max_examples=40)
def test_groups_partition_what_is_trained(kinds, biases):
    make = {
        "linear": lambda: nn.Linear(3, 3),
        "norm": lambda: nn.LayerNorm(3),
        "batch": lambda: normzoo.create_norm("batch", 3),
        "fixed": lambda: nn.Linear(3, 3).requires_grad_(False),
    }
    model = nn.Sequential(*(make[k]() for k in kinds))
    trained = [id(p) for p in model.parameters() if p.requires_grad]
    if not trained:
        with pytest.raises(ValueError, match="Sequential has no parameter that requires a gradient"):
            param_groups(model, 0.1, decay_biases=biases)
        return
    groups = param_groups(model, 0.1, decay_biases=biases)
    assert all(g["params"] for g in groups)
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(trained)
    torch.optim.SGD(groups, lr=0.1)


@pytest.mark.parametrize("decay", [-0.1, math.nan])
def test_a_negative_weight_decay_is_refused(decay):
    with pytest.raises(ValueError, match="weight_decay must not be negative"):
        param_groups(nn.Linear(2, 2), decay)
