"""Divergence: the rules, the step it names, stopping, and the checkpoint."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from callbacks_small import SmallNet, loader, trainer
from hypothesis import example, given, settings
from hypothesis import strategies as st

from normzoo import load_run
from normzoo.callbacks import Divergence, Every, Run, Sample, Step
from normzoo.callbacks._run.lightning import LightningRun


class Scripted(SmallNet):
    """Returns a given loss at each batch."""

    def __init__(self, losses: dict[int, float]) -> None:
        super().__init__(lr=0.0)
        self.losses = losses

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        wanted = self.losses.get(batch_idx, 1.0)
        return self.net(batch[0]).sum() * 0 + wanted


def run(folder: Path, callback: Divergence, losses: dict[int, float], **options: Any) -> Any:
    t = trainer(str(folder), callbacks=[callback], **options)
    t.fit(Scripted(losses), loader())
    return t


@pytest.mark.parametrize(
    ("loss", "rule"),
    [(1000.5, "threshold"), *((float(v), "not finite") for v in ("nan", "inf", "-inf"))],
)
def test_the_step_and_the_rule(tmp_path: Path, loss: float, rule: str) -> None:
    callback = Divergence()
    assert run(tmp_path, callback, {6: loss, 9: 1e9}).global_step == 20
    assert callback.step == 6
    [row] = load_run(tmp_path / "log")["divergence"].to_dict("records")
    assert row["loss"] == (loss if loss == 1000.5 else float("inf"))
    assert (row["step"], row["rule"], row["stopped"]) == (6, rule, False)


def test_a_loss_at_the_threshold_has_not_diverged(tmp_path: Path) -> None:
    callback = Divergence()
    run(tmp_path, callback, {3: 1000.0})
    assert callback.step is None


def test_stop_ends_training_one_step_later(tmp_path: Path) -> None:
    callback = Divergence(stop=True)
    assert run(tmp_path, callback, {6: 2e3}).global_step == 8
    assert callback.step == 6


def test_the_last_step_is_judged_too(tmp_path: Path) -> None:
    callback = Divergence()
    run(tmp_path, callback, {19: 2e3})
    assert callback.step == 19


def test_a_spike_over_the_running_median(tmp_path: Path) -> None:
    callback = Divergence(spike=5.0, window=4)
    run(tmp_path, callback, {2: 5.5, 10: 5.5})
    assert callback.step == 10  # at step 2 the window was not full


def judged(losses: list[float], **options: Any) -> list[str | None]:
    """The verdict on each loss of a sequence."""
    callback, verdicts = Divergence(**{"threshold": math.inf, "window": 5, **options}), []
    for loss in losses:
        verdicts.append(callback.verdict(loss))
        judge(callback, loss, loss)
    return verdicts


def judge(callback: Divergence, largest: float, smallest: float) -> None:
    """Hand a loss to the callback, as it comes a step later."""
    sample = Sample(Step(Run(), 0), {})
    callback.rows(sample, {"extremes": torch.tensor([largest, -smallest])})


def twin(losses: list[float], spike: float, window: int) -> list[str | None]:
    """The rule by numpy, with the window kept as a list of all losses that were let pass."""
    passed: list[float] = []
    verdicts: list[str | None] = []
    for loss in losses:
        rule = None if math.isfinite(loss) else "not finite"
        if rule is None and len(passed) >= window:
            recent = np.array(passed[-window:])
            away = np.abs(recent - np.median(recent))
            # Where most losses are one value, the others tell the spread; where all are, a hundredth of it
            mad = np.median(away) or np.median(away[away > 0] if away.any() else [0])
            unit = 1.4826 * mad or 0.01 * abs(np.median(recent))
            rule = "spike" if loss - np.median(recent) > spike * unit else None
        verdicts.append(rule)
        passed += [loss] if rule is None else []
    return verdicts


@settings(deadline=None, max_examples=60)
@example([0, 0, 0, 14, 0, 0, 0, 0, 0, 0], 2.0, 3, -20.0)  # a window with two of three of one value
@example([28, 35, 14, 49, 0, 50, 0], 2.0, 5, 0.0)  # a window all of one value
@given(
    st.lists(st.integers(0, 50) | st.sampled_from([1000, math.nan, math.inf]), min_size=10, max_size=40),
    st.sampled_from([2.0, 3.0, 8.0]),
    st.sampled_from([3, 5, 8]),
    st.sampled_from([-20.0, 0.0, 8.0]),
)
def test_verdicts_are_those_of_a_twin(losses: list[float], spike: float, window: int, exponent: float) -> None:
    # Steps of 7, so that the values differ by more than rounding
    losses = [math.ldexp(loss + 7 * i * (-1) ** i, int(exponent)) for i, loss in enumerate(losses)]
    assert judged(losses, spike=spike, window=window) == twin(losses, spike, window)
    lower = [loss - math.ldexp(2**15, int(exponent)) for loss in losses]  # of the other sign
    assert judged(lower, spike=spike, window=window) == twin(losses, spike, window)


HEALTHY = {
    "falling below zero": [-1 - 0.1 * i for i in range(20)],
    "falling to zero": [2.0**-i for i in range(130)],
    "through zero": [5 - 0.5 * i for i in range(30)],
    "constant": [-14.0] * 20,
    "constant and tiny": [1e-38] * 20,
    "constant and huge": [-1e38] * 20,
    "zero": [0.0] * 20,
    "noise around a constant": [-14.0 + 0.1 * math.sin(7 * i) for i in range(40)],
    "rounding": [14.0 * (1 + 1e-7 * (i % 3)) for i in range(40)],
    "down to -1e38": [-(10.0 ** (i / 2)) for i in range(76)],
}


@pytest.mark.parametrize("losses", HEALTHY.values(), ids=HEALTHY)
def test_a_healthy_run_is_no_spike(losses: list[float]) -> None:
    assert set(judged(losses, spike=3.0, window=5 if len(losses) < 40 else 20)) == {None}


@pytest.mark.parametrize(
    "losses",
    [
        [-14.0] * 10 + [500.0],
        [0.01] * 10 + [0.05],
        [-1e38] * 10 + [-1e36],
        [1e-38] * 10 + [3e-38],
        [-14.0, -14.1, -13.9, -14.05, -13.95, -14.0, -12.0],
        [-1e-3 * (1 + 0.01 * (i % 3)) for i in range(10)] + [-0.9e-3],
    ],
)
def test_a_rise_that_the_losses_before_do_not_explain_is_a_spike(losses: list[float]) -> None:
    assert judged(losses, spike=3.0) == [None] * (len(losses) - 1) + ["spike"]


def test_what_diverged_never_enters_the_window() -> None:
    losses = [1.0, 1.1, 0.9, 1.05, 0.95, 80.0, math.nan, -math.inf, 90.0, 1.0, 80.0, 85.0, 2e3, 1.1]
    rules = [None] * 5 + ["spike", "not finite", "not finite", "spike", None, "spike", "spike", "threshold", None]
    assert judged(losses, spike=5.0, threshold=1e3) == rules
    assert judged([2e3, 1.0, 1.1, 0.9, 1.05, 60.0, 50.0], spike=5.0, threshold=1e3)[5:] == [None, "spike"]  # full at 60


def test_a_drop_counts_if_both_sides_do() -> None:
    losses = [1.0, 1.1, 0.9, 1.05, 0.95, -80.0, 1.0, 80.0]
    assert judged(losses, spike=5.0) == [None] * 7 + ["spike"]
    assert judged(losses, spike=5.0, two_sided=True) == [None] * 5 + ["drop", None, "spike"]
    falling = [-1 - 0.1 * i for i in range(20)]
    assert set(judged(falling, spike=3.0, two_sided=True)) == {None}


def test_a_drop_is_recorded_with_its_loss(tmp_path: Path) -> None:
    callback = Divergence(spike=5.0, window=4, two_sided=True)
    run(tmp_path, callback, {8: -9.0})
    [row] = load_run(tmp_path / "log")["divergence"].to_dict("records")
    assert (row["step"], row["loss"], row["rule"]) == (8, -9.0, "drop")


@pytest.mark.filterwarnings("ignore:.*`training_step` returned `None`")
def test_a_step_without_a_loss_is_not_judged(tmp_path: Path) -> None:
    class Skips(Scripted):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx % 3 == 1 else super().training_step(batch, batch_idx)

    callback = Divergence(spike=5.0, window=4)
    fitted = trainer(str(tmp_path), callbacks=[callback], max_steps=10)
    fitted.fit(Skips({i: -14.0 + 0.01 * (i % 5) for i in range(20)}), loader())
    assert callback.step is None
    assert max(callback.state_dict()["recent"]) < -13


def test_accumulation_counts_optimizer_steps_and_undoes_the_division(tmp_path: Path) -> None:
    callback = Divergence(threshold=90.0)
    run(tmp_path, callback, {7: 100.0}, accumulate_grad_batches=4, max_steps=5)
    assert callback.step == 1
    assert callback.loss == pytest.approx(100.0)


def test_the_checkpoint_remembers(tmp_path: Path) -> None:
    first = Divergence(spike=2.0, window=3)
    for loss in (1.0, 2.0, 3.0):
        first._recent.append(loss)
        first._smallest.append(loss)
    first.step, first.loss = 4, 5.0
    second = Divergence(spike=2.0, window=3)
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict()
    assert second.verdict(4.9) is None
    assert second.verdict(5.0) == "spike"  # 3 above the median, and one robust standard deviation is 1.4826


def test_the_checkpoint_of_an_earlier_version_is_read() -> None:
    callback = Divergence(spike=2.0, window=3, two_sided=True)
    callback.load_state_dict({"step": None, "loss": None, "rule": None, "recent": [1.0, math.inf, 2.0, 3.0]})
    assert (callback.verdict(4.9), callback.verdict(5.0), callback.verdict(-1.0)) == (None, "spike", "drop")


def test_manual_optimization_without_a_loss_is_refused(tmp_path: Path) -> None:
    class Manual(SmallNet):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.optimizers().step()

    with pytest.raises(ValueError, match="return\\s+{'loss': loss}"):
        trainer(str(tmp_path), callbacks=[Divergence()]).fit(Manual(), loader())


def test_an_unsupported_strategy_is_refused_at_setup(tmp_path: Path) -> None:

    class FSDPStrategy: ...

    with pytest.raises(ValueError, match="supports one device and DDP; under FSDPStrategy"):
        Divergence().admit(LightningRun(SimpleNamespace(strategy=FSDPStrategy()), SmallNet()))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options", [{"threshold": 0.0}, {"spike": -1.0}, {"threshold": None}, {"spike": "5"}, {"spike": True}]
)
def test_bad_arguments(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be a number above 0, not"):
        Divergence(**options)


def test_a_window_is_whole_and_both_sides_need_a_spike() -> None:
    for window in (2.5, 0, "5"):
        with pytest.raises(ValueError, match=f"window must be a whole number of losses above 0, not {window!r}"):
            Divergence(spike=3.0, window=window)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="two_sided=True is about the rule spike; pass spike="):
        Divergence(two_sided=True)


def test_a_number_without_a_name_is_the_threshold_for_one_more_version() -> None:
    with pytest.warns(
        UserWarning, match=r"Divergence\(500\) is read as its threshold; .* pass threshold=500, or every"
    ):
        callback = Divergence(500)
    assert (callback.threshold, callback.schedule) == (500, Every(1))
    assert Divergence(Every(3)).schedule == Divergence(every_n_steps=3).schedule == Every(3)
    with pytest.raises(TypeError, match="one argument without a name, a schedule, not 2"):
        Divergence(Every(2), 5.0)
    with pytest.raises(TypeError, match="every_n_steps must be a whole number or a schedule"):
        Divergence("2")  # type: ignore[arg-type]
