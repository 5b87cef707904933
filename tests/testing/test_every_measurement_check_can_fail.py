"""For each check of measurements one that breaks the promise, which the suite reports by name and with numbers."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import planted_measurements as planted
import pytest
import torch
from sweeps import slow

from normzoo.callbacks import Measurement
from normzoo.testing import MEASUREMENT_CHECKS, MeasurementCheckError, check_measurement
from normzoo.testing.measurements import _ranks
from normzoo.testing.measurements._fits import Subject
from normzoo.testing.measurements._path import Path

# The check, the measurement, and what the report has to say
PLANTS: list[tuple[str, type[Measurement], str]] = [
    ("record", planted.DrawsNoHistogram, "figure 'Norms': KeyError: 'mantissa_bits'"),
    ("record", planted.SaysNothing, "column 'norm' does not say what its values mean"),
    ("record", planted.LeavesNoRows, "every step is sampled leaves no row"),
    ("schedule", planted.IgnoresItsSchedule, r"sampled at steps 0 and 5: .* \[0, 1, 2.*, not of \[0, 5\]"),
    ("zero_perturbation", planted.DrawsARandomNumber, r"differences in weights \(\d+\), .*, torch stream \(1\); "),
    ("zero_perturbation", planted.RoundsAWeight, "weights.net.stem.weight: largest difference "),
    ("interruption", planted.LeavesAHook, r"fails_in forward: there are differences in .*hooks \(1\);"),
    ("no_host_read", planted.ReadsAValue, r"_local_scalar_dense at planted_measurements.py:\d+ \(\d+ times\)"),
    ("no_host_read", planted.ReadsAtOnce, "rows of step 0 are made in the batch in which it was measured"),
    ("cost", planted.MeasuresEveryStep, r"micro-batch \d+, of a step that is not sampled, has more operations: aten"),
    ("cost", planted.ListensUnasked, r"with the needs \['batch', 'gradients'\] has 1 forward hooks of modules"),
    ("accumulation", planted.MeasuresEachPass, "step 0 has 24 rows when it has 2 micro-batches, and 12 when 1"),
    ("grad_scaler", planted.KeepsTheScale, "with a GradScaler: norm at step 0, .* came out, .* was expected"),
    ("grad_scaler", planted.AddsUp, "which a GradScaler skips: norm at step 1: (nan|inf) came out"),
    (
        "manual_optimization",
        planted.CountsBatches,
        r"third of 8 steps: .* the steps \[2, 5\], not of \[0, 3, 6\]",
    ),
    (
        "manual_optimization",
        planted.RefusesWithoutAName,
        "has to be one line that names RefusesWithoutAName; it is 'automatic optimization only'",
    ),
    ("several_optimizers", planted.CountsAllSteps, r"steps \[0, 4, 8, 12\], not of \[0, 1, 8, 9\]"),
    ("resume", planted.ForgetsItsCount, "resumed at step 4 of 8: samples at step 4, .*: 1 came out, 5 was expected"),
    ("second_fit", planted.RemembersItsCount, "in another Trainer: samples at step 0, .*: 9 came out, 1 was expected"),
    ("second_fit", planted.ForgetsAlways, "second fit of the same Trainer: samples at step 4, .*: 1 came out, 5 was"),
    ("two_of_a_class", planted.HasOneKey, "RuntimeError: Found more than one stateful callback"),
    ("two_of_a_class", planted.HasNoLabel, "two HasNoLabel would write the same record"),
    ("copies", planted.HoldsALambda, "pickle: .*lambda"),
    ("copies", planted.LosesItsState, "copy.deepcopy, after a fit: the state is {'samples': 0}, not {'samples': 8}"),
    ("watch", planted.AsksTheTrainer, "in a plain loop: norm at step 0, .* came out, .* was expected"),
    ("ranks", planted.OfOneRank, "2 ranks under DDP: norm at step 0, row 0 of 4: .* came out, .* was expected"),
    ("ranks", planted.WritesOnEachRank, r"under DDP: the ranks have written \[2, 0\] files, not 1 and 0"),
    ("ranks", planted.WaitsAlone, "2 ranks: "),
    ("sharded_gradients", planted.OfOneShard, "2 ranks under fully_shard: norm at step 0, .* was expected"),
    (
        "perturbation_on_ranks",
        planted.DrawsOnOneRank,
        r"2 ranks under DDP: rank 1: there are differences in torch stream \(1\); ",
    ),
    ("state_keys", planted.HashesItsLabel, "the keys in this process are .*, and in another "),
    ("elsewhere", planted.DrawnHereAlone, r"rows, columns and figures elsewhere are .*\[\]\], and here .*\['Norms'\]"),
]
SLOW = {name for name, check in MEASUREMENT_CHECKS.items() if check.slow}


@pytest.mark.parametrize(
    ("check", "measurement", "text"),
    [
        (slow if check in SLOW or check == earlier else pytest.param)(check, *rest, id=f"{check}-{rest[0].__name__}")
        for (earlier, *_), (check, *rest) in pairwise([("",), *PLANTS])  # of several of a check the first is fast
    ],
)
def test_the_fault_is_reported(
    check: str, measurement: type[Measurement], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if measurement is planted.WaitsAlone:
        monkeypatch.setattr(_ranks, "DEADLINE", 10.0)
    with pytest.raises(MeasurementCheckError) as caught:
        check_measurement(measurement, checks=[check])
    report = str(caught.value)
    assert report.startswith(f"{measurement.__name__}() breaks 1 promise (none passed):\n\n  {check}: ")
    assert MEASUREMENT_CHECKS[check].__doc__ in report
    assert re.search(text, report), report


def test_every_check_has_a_measurement_that_breaks_it() -> None:
    assert {check for check, _, _ in PLANTS} == MEASUREMENT_CHECKS.keys()


@pytest.mark.parametrize("measurement", [planted.Branches, slow(planted.Counted)])
@pytest.mark.slow
def test_what_the_faults_are_planted_in_has_none(measurement: Any) -> None:
    fast = [name for name in MEASUREMENT_CHECKS if name not in SLOW]
    results = {result.name: result for result in check_measurement(measurement, checks=fast)}
    refused = {name: result.detail for name, result in results.items() if result.status == "skipped"}
    assert refused.keys() == {"sharded_gradients"}
    assert refused["sharded_gradients"].startswith(f"refused: {measurement.__name__} supports one device and DDP; ")


@pytest.mark.gpu
def test_a_value_read_on_a_gpu_is_reported() -> None:
    with pytest.raises(MeasurementCheckError, match="called a synchronizing CUDA operation"):
        check_measurement(planted.ReadsAValue, checks=["no_host_read"])
    [result] = check_measurement(planted.Norms, checks=["no_host_read"])
    assert result.status == "passed"


@pytest.mark.parametrize("measurement", [planted.ReadsAValue, planted.Norms])
def test_a_value_read_where_the_cpu_stands_in_for_the_gpu_ends_the_fit(
    measurement: type[Measurement], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What CUDA's debug mode does, when a value is read in it."""
    modes, item = ["default"], torch.Tensor.item

    def read(x: torch.Tensor) -> Any:
        if modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        return item(x)

    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch.Tensor, "item", read)
    made = measurement(1)
    fitted = Subject(measurement).fit(made, callbacks=[Path(made, on_gpu=True)], epochs=1)
    assert "error" in modes
    assert modes[-1] == "default"
    if measurement is planted.ReadsAValue:
        assert str(fitted.error) == "called a synchronizing CUDA operation"
    else:
        assert fitted.error is None
