"""Running statistics estimated anew, against slow and obvious twins."""

from __future__ import annotations

import copy
import math
import random
import re
import warnings

import numpy as np
import pytest
import timm.layers as tl
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from statistics_small import (
    IMAGES,
    OPTIONS,
    RUNNING,
    ZOO,
    C,
    Subclass,
    assert_same,
    batches,
    everything,
    layer_of,
    resnet,
    statistics,
)
from sweeps import few
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import normzoo
from normzoo import reestimate_statistics

SIZES = (8, 2, 5, 3)


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
    assert len(reestimate_statistics(model, data)) == 1
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
    assert len(reestimate_statistics(model, data)) == 1
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
    assert len(reestimate_statistics(model, [x.float() for x in batches((4, 4))])) == 1
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
    assert len(reestimate_statistics(model, [x])) == 1
    union = torch.cat([x[:3], 2 * x[3:] + 1])
    assert_close(model.norm.running_mean, union.mean((0, 2, 3)))
    assert_close(model.norm.running_var, union.var((0, 2, 3), correction=0))
    assert all(torch.equal(v, statistics(model.never)[k]) for k, v in never.items())


@pytest.mark.parametrize("norm", few(ZOO, "batch", "batch_renorm", "iter_norm"))
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
    assert len(reestimate_statistics(model, iter(IMAGES))) == len(norms) == 15
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
    for layer in (nn.BatchNorm2d(C), normzoo.create_norm("batch", C)):
        layer.track_running_stats = False  # as Lightning's BaseFinetuning.freeze
        model.append(layer.double())
    before = everything(model)
    with pytest.raises(
        ValueError, match="Sequential has no layer with running statistics of batches; the stat.* 1 online"
    ):
        reestimate_statistics(model, batches())
    model.append(layer_of("batch"))
    before = everything(model)
    assert len(reestimate_statistics(model, batches())) == 1
    assert_same(before, everything(model), but=("8.running_mean", "8.running_var"))


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
        assert len(reestimate_statistics(model, batches()[:1])) == 1
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
        return nn.Sequential(good), [data[0], {"image": data[1]}], "batch 1 could not be run: AttributeError", error
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
        return nn.Sequential(good), data, "Sequential has no layer with running statistics", error
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


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo looks at all of a tensor's
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
        assert len(reestimate_statistics(model, data)) == 2
        assert len(graphs) == made, "the pass was compiled"
        model(data[0])
    for model in (outer, inner):
        for key, value in want.state_dict().items():
            assert key.endswith("num_batches_tracked") or torch.equal(model.state_dict()[key], value), key
