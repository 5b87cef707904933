"""Each measurement of the package keeps what the suite promises, or refuses what it may refuse."""

from __future__ import annotations

import random
import signal
import unittest
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from schemas import MEASUREMENTS
from torch import Tensor, nn

from normzoo.callbacks import (
    ChannelMoments,
    ClassGradients,
    Divergence,
    GradientNoise,
    GradientNorm,
    GradientPredictiveness,
    GradientSums,
    GradientTails,
    LossAbove,
    ParameterNorms,
    RelativeLoss,
    Sharpness,
)
from normzoo.testing import (
    MEASUREMENT_CHECKS,
    CheckResult,
    MeasurementCheckError,
    check_measurement,
    measurement_checks,
)

ALL = frozenset(MEASUREMENT_CHECKS)
SLOW = {name for name, check in MEASUREMENT_CHECKS.items() if check.slow}
ONE_SLOW = ("gradient_tails", "elsewhere")  # which is run with the fast ones: it does not import torch
MANUAL = frozenset({"manual_optimization", "several_optimizers"})


def loss_of_a_batch(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


@dataclass(frozen=True)
class Case:
    """A measurement, what it refuses, what it declares, and the checks that are run with the fast tests."""

    factory: Callable[..., Any]
    refused: frozenset[str] = frozenset()
    exceptions: dict[str, str] = field(default_factory=dict)
    union: str = "batch"
    fast: frozenset[str] = ALL


LARGEST_OF_RANKS = dict.fromkeys(
    ("ranks", "sharded_gradients"), "the loss recorded is the largest of a rank, and the union has one loss"
)
CASES = {
    "gradient_tails": Case(GradientTails),
    "gradient_tails-sources": Case(
        partial(GradientTails, of=["gradient", "update", "noise"]),
        refused=MANUAL | {"watch", "sharded_gradients"},
        exceptions={"ranks": "the noise is that of each rank's last micro-batch, and one rank has a single last one"},
        union="micro-batches",
        fast=frozenset({"accumulation", "grad_scaler"}),
    ),
    "relative_loss": Case(
        RelativeLoss,
        refused=MANUAL | {"watch"},
        fast=frozenset({"resume"}),
    ),
    "relative_loss-loss": Case(partial(RelativeLoss, loss=loss_of_a_batch), fast=MANUAL),
    "channel_moments": Case(
        ChannelMoments,
        refused=frozenset({"sharded_gradients"}),
        fast=frozenset({"accumulation"}),
    ),
    "gradient_noise": Case(
        GradientNoise,
        refused=MANUAL | {"watch", "sharded_gradients"},
        union="micro-batches",
        fast=frozenset({"cost"}) | MANUAL,
    ),
    "gradient_noise-split": Case(
        partial(GradientNoise, split=2),
        refused=MANUAL | {"watch", "sharded_gradients"},
        union="micro-batches",
        fast=frozenset({"no_host_read", "resume"}),
    ),
    "gradient_norm": Case(GradientNorm, fast=frozenset({"several_optimizers", "sharded_gradients"})),
    "parameter_norms": Case(ParameterNorms, fast=frozenset({"record", "ranks"})),
    "gradient_predictiveness": Case(
        GradientPredictiveness,
        refused=MANUAL | {"watch", "sharded_gradients"},
        fast=frozenset({"record", "no_host_read"}),
    ),
    "gradient_predictiveness-update": Case(
        partial(GradientPredictiveness, along="update", loss=loss_of_a_batch),
        refused=frozenset({"sharded_gradients"}),
        fast=frozenset({"watch"}),
    ),
    "class_gradients": Case(
        ClassGradients,
        refused=MANUAL | {"watch", "sharded_gradients"},
        fast=frozenset({"record", "ranks"}),
    ),
    "class_gradients-loss": Case(
        partial(ClassGradients, loss=loss_of_a_batch),
        refused=frozenset({"sharded_gradients"}),
        fast=frozenset({"watch"}),
    ),
    "gradient_sums": Case(
        partial(GradientSums, channels="*"),
        refused=MANUAL | {"watch", "sharded_gradients"},
        fast=frozenset({"no_host_read", "ranks"}),
    ),
    "gradient_sums-loss": Case(
        partial(GradientSums, loss=loss_of_a_batch, channels="*"),
        refused=frozenset({"sharded_gradients"}),
        fast=frozenset({"watch"}),
    ),
    "sharpness": Case(
        partial(Sharpness, products=3),
        refused=MANUAL | {"watch", "sharded_gradients"},
        fast=frozenset({"record", "no_host_read", "grad_scaler", "resume"}),
    ),
    "sharpness-loss": Case(
        partial(Sharpness, products=3, loss=loss_of_a_batch),
        refused=frozenset({"sharded_gradients"}),
        fast=frozenset({"watch"}),
    ),
    "divergence": Case(
        partial(Divergence, rules=[LossAbove(1e-9)]),
        exceptions={
            **LARGEST_OF_RANKS,
            "cost": "the recorder takes in each step, whichever are judged",
        },
        fast=frozenset({"second_fit", "copies", "watch"}),
    ),
    "divergence-no_recorder": Case(
        partial(Divergence, rules=[LossAbove(1e-9)], recorder=False),
        exceptions=LARGEST_OF_RANKS,
        fast=frozenset({"cost"}),
    ),
}


def _checks() -> list[Any]:
    parameters = []
    for name, case in CASES.items():
        for check, run in measurement_checks(case.factory, union=case.union, exceptions=case.exceptions):
            slow = check not in case.fast or (check in SLOW and (name, check) != ONE_SLOW)
            marks = [pytest.mark.slow] if slow else []
            parameters.append(pytest.param(case, check, run, id=f"{name}-{check}", marks=marks))
    return parameters


@pytest.mark.parametrize(("case", "check", "run"), _checks())
def test_a_measurement_keeps_its_promises(case: Case, check: str, run: Callable[[], CheckResult]) -> None:
    if check in case.refused:
        with pytest.raises(unittest.SkipTest, match="refused: "):
            run()
    else:
        assert run().status == ("excepted" if check in case.exceptions else "passed")


def test_every_measurement_is_checked() -> None:
    assert CASES.keys() >= MEASUREMENTS.keys()


def test_the_docs_list_every_promise() -> None:
    page = Path(__file__).parents[2] / "docs" / "conformance.md"
    text = page.read_text(encoding="utf-8").split("\n## Measurements\n")[1].split("\n## ")[0]
    promises = [f"| `{n}`{' (slow)' if c.slow else ''} | {c.__doc__} |" for n, c in MEASUREMENT_CHECKS.items()]
    assert [line for line in text.splitlines() if line.startswith("| `")] == promises


def test_every_check_states_its_promise_in_one_line() -> None:
    for name, check in MEASUREMENT_CHECKS.items():
        assert check.__name__ == name
        assert check.__doc__ is not None
        assert "\n" not in check.__doc__
        assert check.__doc__.endswith(".")


@pytest.mark.parametrize("function", [check_measurement, measurement_checks])
@pytest.mark.parametrize(
    ("factory", "options", "error", "message"),
    [
        (GradientTails(), {}, TypeError, "factory must be a class or a function that makes a measurement, not <"),
        (GradientTails, {"net": nn.Flatten()}, TypeError, "net must be a function that makes a network, not Flatten"),
        (GradientTails, {"union": "both"}, ValueError, "union must be one of 'batch', 'micro-batches', not 'both'"),
        (GradientTails, {"checks": ["rank"]}, ValueError, "'rank' is not a known check; did you mean 'ranks'"),
        (GradientTails, {"exceptions": {"wach": "?"}}, ValueError, "'wach' is not a known check; did you mean 'watch'"),
    ],
)
def test_bad_arguments_are_refused_at_once(
    function: Any, factory: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        function(factory, **options)


def test_a_factory_that_makes_no_measurement_is_reported() -> None:
    with pytest.raises(MeasurementCheckError, match="the factory returned 3, not a Measurement"):
        check_measurement(lambda every_n_steps: 3, checks=["record"])


def test_the_process_is_left_as_it_was() -> None:
    handler = signal.getsignal(signal.SIGINT)
    streams = random.getstate(), torch.get_rng_state(), np.random.get_state()
    threads, item = torch.get_num_threads(), torch.Tensor.item
    check_measurement(GradientTails, checks=["interruption", "no_host_read", "watch"])
    assert signal.getsignal(signal.SIGINT) is handler
    assert random.getstate() == streams[0]
    assert torch.equal(torch.get_rng_state(), streams[1])
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), streams[2], strict=True))
    assert torch.get_num_threads() == threads
    assert torch.Tensor.item is item
    assert "item" not in vars(torch.Tensor)


def test_a_network_of_ones_own_is_trained() -> None:
    made = []

    def net() -> nn.Module:
        made.append(nn.Sequential(nn.Flatten(), nn.Linear(3 * 6 * 6, 4)))
        return made[-1]

    check_measurement(GradientTails, net=net, checks=["record", "ranks"])
    assert made
    with pytest.raises(MeasurementCheckError, match="no module is a normalization layer"):
        check_measurement(ChannelMoments, net=net, checks=["record"])
