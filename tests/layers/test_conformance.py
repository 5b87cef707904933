"""Every registered layer, with the options of ``norm_cases.py``, keeps what ``normzoo.testing`` promises.

Each layer is held to what concerns its formula and its statistics, the layers of ``REPRESENTATIVES`` to everything;
the other cells of the matrix are slow tests.
"""

from __future__ import annotations

import unittest

import pytest
import torch
from norm_cases import CASES, CHANNELS, DEGENERATE, IMAGE, ONE_EACH, Case, every_case, every_layer, sample
from torch import nn

import normzoo
from normzoo import registry
from normzoo.testing import CHECKS, Subject, check_norm, norm_checks

# Of each family and each way to compute: a kernel of torch, corrections by running statistics, a backward that moves a
# state, statistics of groups, of positions, of several kinds, and none.
REPRESENTATIVES = ("batch", "batch_renorm", "power", "group", "rms", "switchable", "dynamic_tanh")
SLOW_FOR = "batch_renorm"  # the layer whose slow checks are run with the fast ones
OF_OPTIONS = {"reference", "gradcheck", "state_dict", "running_statistics"}
OF_LAYERS = OF_OPTIONS | {
    "signature",
    "ranks",
    "channel_dim",
    "large_offset",
    "degenerate",
    "one_value",
    "empty",
    "bad_input",
    "train_eval",
    "batch_dependence",
    "num_batches_tracked",
    "momentum_none",
    "activation",
}
# What a layer without statistics, or a machine without a GPU or compilers, may leave out
MAY_NOT_APPLY = {
    "running_statistics",
    "num_batches_tracked",
    "momentum_none",
    "sync",
    "no_host_sync",
    "compile",
    "onnx",
}
# Options of all layers, given with the layer rather than by the suite
GIVEN = (
    Case("batch", {"affine": False}, id="batch-plain"),
    Case("layer_channel", {"channel_dim": -1}, id="layer_channel-last"),
)


def _is_fast(case: Case, check: str) -> bool:
    if case not in ONE_EACH:
        return check in OF_OPTIONS
    if CHECKS[check].slow:
        return case.name == SLOW_FOR and check != "compile"  # tests/layers/test_checkpointed_models.py compiles it
    if check in OF_LAYERS:
        return True
    exceptions = normzoo.norm_info(case.name).exceptions if case.exceptions is None else case.exceptions
    if check == "gradgradcheck" and check in exceptions:
        return False  # a failure is computed a second time, element by element, for its message
    return case.name in REPRESENTATIVES


def _cells() -> list:
    cells = []
    for case in (*CASES, *GIVEN):
        names = [n for n, check in CHECKS.items() if case in ONE_EACH or not (check.slow or n == "sync")]
        checks = norm_checks(case.factory, reference=case.reference, exceptions=case.exceptions, checks=names)
        for name, check in checks:
            marks = [] if _is_fast(case, name) else [pytest.mark.slow]
            cells.append(pytest.param(name, check, id=f"{case}-{name}", marks=marks))
    return cells


@pytest.mark.parametrize(("name", "check"), _cells())
def test_promise(name, check):
    try:
        check()
    except unittest.SkipTest as reason:
        if name not in MAY_NOT_APPLY:
            pytest.fail(f"{name} must apply to every layer: {reason}")
        raise


def test_every_registered_layer_has_a_case(monkeypatch):
    def without() -> set[str]:
        return set(normzoo.list_norms()) ^ {case.name for case in CASES}

    assert without() == set()
    monkeypatch.setitem(registry._NORMS, "planted", normzoo.norm_info("batch"))
    assert without() == {"planted"}
    assert len({str(case) for case in CASES}) == len(CASES)
    assert set(REPRESENTATIVES) <= {case.name for case in ONE_EACH}
    assert {normzoo.norm_info(n).family for n in REPRESENTATIVES} == {normzoo.norm_info(c.name).family for c in CASES}


@every_layer
def test_what_a_layer_holds_shows_in_its_formula(case):
    """The suite moves parameters and buffers far enough off their start for a wrong use of them to be seen."""
    subject, of_backward = Subject(case.factory), ("drift_mean", "drift_scale", "ema_gz")
    fresh, x = subject.make(dtype=torch.float64).state_dict(), sample(IMAGE)
    for name, value in subject.made(dtype=torch.float64).state_dict().items():
        if name in of_backward or name == "num_batches_tracked":
            continue
        assert (value - fresh[name]).abs().max() > 0.01, name
        differences = []
        for training in (True, False):
            layer, other = (subject.made(dtype=torch.float64).train(training) for _ in range(2))
            other.state_dict()[name].mul_(1.5).add_(0.2)
            differences.append((case.expect(layer, x)[0] - case.expect(other, x)[0]).abs().max().item())
        assert max(differences) > 1e-3, name


@every_case
def test_a_layer_takes_the_shapes_it_is_made_for(case):
    """The suite looks at all shapes that a layer takes, whichever those are; here they are listed, and the refusals."""
    assert sorted(map(len, Subject(case.factory).shapes)) == list(case.ranks)
    for shape in DEGENERATE:
        for training in (True, False):
            layer = case.made().train(training)
            if case.refuses_shape(shape, training):
                with pytest.raises(ValueError, match=case.refusal):
                    layer(sample(shape, torch.float32))
            else:
                assert layer(sample(shape, torch.float32)).isfinite().all()


@pytest.mark.parametrize("case", [case for case in CASES if case.like_torch], ids=str)
def test_the_state_of_a_batch_norm_is_that_of_torch(case):
    """The suite compares with torch's layer those whose state has the same names, whichever those are."""
    assert list(case.make().state_dict()) == list(nn.BatchNorm2d(CHANNELS).state_dict())


@every_layer
def test_the_last_options_are_those_of_all_layers(case):
    last = ["affine", "act_layer", "channel_dim", "device", "dtype"]
    assert list(Subject(normzoo.norm_info(case.name).layer_class).parameters)[-5:] == last


class FlatGhostBatchNorm(normzoo.norm_info("ghost_batch").layer_class):
    def normalize(self, x):
        if x.ndim > 2:
            raise ValueError(f"no maps: {tuple(x.shape)}")
        return super().normalize(x)


def test_the_variance_of_samples_without_space_is_not_kept():
    (result,) = check_norm(FlatGhostBatchNorm, checks=["saved_memory"])
    assert result.status == "passed"
