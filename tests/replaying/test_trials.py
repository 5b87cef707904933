"""What is tried on a replayed run, and whether it holds."""

from __future__ import annotations

import math
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planted_small import STEP, Planted, plant

from normzoo import load_capsule
from normzoo.replaying import course, trial, trials
from normzoo.replaying.fit import in_a_fit
from normzoo.replaying.stage import Stage
from normzoo.replaying.suspect import suspicious_parameter
from normzoo.replaying.trial import Trials, largest_that_holds


class Valley:
    """Stands in for a stage: gradient descent on curvature/2 * (w - target)^2, whose loss is 1 more.

    The learning rate from a step on, and the target of one step, are those of a run that diverges, or does not.
    """

    def __init__(
        self,
        *,
        rate: float = 0.1,
        later_rate: float | None = None,
        change: int = 12,
        bad_target: float = 0.0,
        curvature: float = 1.0,
        first: int = 200,
        count: int = 16,
        scaled: bool = False,
    ) -> None:
        self.steps = list(range(first, first + count))
        self.alarm = self.steps[-1]
        self.rate, self.later_rate, self.curvature = rate, later_rate or rate, curvature
        self.change, self.bad_target = first + change, bad_target
        self.passes: Counter[str] = Counter()
        self.notes: list[str] = []
        self.last_norm = math.nan
        self.capsule = SimpleNamespace(about={"kind": "divergence"})
        self.run = SimpleNamespace(automatic=True, named_modules=dict, optimizers=[])
        self.trainer = SimpleNamespace(gradient_clip_val=None, precision="32-true")
        self.scaled = scaled
        self.made: list[tuple[int, dict[str, Any]]] = []
        self.go_to(self.steps[0])
        losses, norms = [], []
        for step in self.steps:
            losses.append(self.train(step))
            norms.append(self.last_norm)
        self.course = {
            "loss": losses,
            "norm": norms,
            "onset": self.change if bad_target else min(self.change + 1, self.alarm),
            "onset_by": "loss",
            "median_loss": 1.0,
            "spread_loss": 0.05,
            "median_norm": norms[0],
            "passes": dict(self.passes),
        }

    def frame(self, step: int) -> Any:
        lr = self.rate if step < self.change else self.later_rate
        return SimpleNamespace(micro_batches=[None], scale=1.0 if self.scaled else None, lr=lr)

    def go_to(self, step: int) -> None:
        """As to a kept state, without making steps that count."""
        self.w = torch.tensor(0.5)
        made, passes = len(self.made), self.passes.copy()
        for earlier in range(self.steps[0], step):
            self.train(earlier)
        del self.made[made:]
        self.passes = passes

    def train(self, step: int, *, rate: float = 1.0, clip: float | None = None, batch_of: int | None = None) -> float:
        self.passes["steps"] += 1
        self.made.append((step, {"rate": rate, "clip": clip, "batch_of": batch_of}))
        source = step if batch_of is None else batch_of
        target = self.bad_target if source == self.change else 0.0
        gradient = self.curvature * (float(self.w) - target)
        self.last_norm = abs(gradient)
        loss = 1 + self.curvature / 2 * (float(self.w) - target) ** 2
        if clip is not None and abs(gradient) > clip:
            gradient *= clip / abs(gradient)
        self.w -= (self.frame(step).lr or 0) * rate * gradient
        return loss if math.isfinite(loss) and loss < 1e30 else math.inf

    def float32(self) -> Any:
        return nullcontext()

    def parameters(self) -> dict[str, torch.Tensor]:
        return {"w": self.w.clone()}

    def set_parameters(self, values: dict[str, torch.Tensor]) -> None:
        self.w = values["w"].clone()


def tried(stage: Any, **evidence: Any) -> dict[str, Any]:
    evidence = {"course": stage.course, **evidence}
    [(schema, rows)] = trials.ask(stage, evidence)
    assert all({*row} == {c.name for c in schema.columns} for row in rows)
    return evidence["trials"]


@given(st.integers(2, 600))
def test_the_largest_rate_is_found_where_all_smaller_ones_hold(limit: int) -> None:
    asked: list[float] = []
    found = largest_that_holds(lambda rate: asked.append(rate) or rate <= 1 / limit)  # type: ignore[func-returns-value]
    assert found == max((0.5**i for i in range(1, 11) if 0.5**i <= 1 / limit), default=None)
    assert len(asked) <= 4


def test_the_search_ends_without_an_answer() -> None:
    answers = iter([True, None])
    assert largest_that_holds(lambda rate: next(answers)) == 0.125
    assert largest_that_holds(lambda rate: None) is None
    assert largest_that_holds(lambda rate: False) is None


@pytest.mark.parametrize("later_rate", [2.5, 6.0, 30.0, 200.0])
def test_of_a_valley_the_rate_that_holds_is_the_one_by_which_steps_contract(later_rate: float) -> None:
    """A step multiplies w by 1 - rate * curvature."""
    found = tried(Valley(later_rate=later_rate, change=6))
    assert not found["control"]["holds"]
    assert not found["without_batch"]["holds"]
    tries = {row["rate"]: row["holds"] for row in found["rates"]}
    for rate, holds in tries.items():
        assert holds or abs(1 - rate * later_rate) > 0.9
    assert found["largest_rate"] == max(0.5**i for i in range(1, 11) if 0.5**i * later_rate < 2)
    assert found["lr"] == found["largest_rate"] * later_rate


def test_a_bad_batch_can_be_left_out_or_clipped() -> None:
    found = tried(Valley(rate=0.5, bad_target=1e6))
    assert not found["control"]["holds"]
    assert found["without_batch"]["holds"]
    assert (found["without_batch"]["step"], found["without_batch"]["instead"]) == (212, 211)
    assert found["without_batches"] is None
    assert found["without_batch"]["from"] == found["clip"]["from"] == 212  # what is before is not made again
    assert found["clip"]["holds"]


def test_if_the_run_goes_on_by_itself_nothing_is_tried() -> None:
    stage = Valley(rate=0.5, bad_target=4.0)
    found = tried(stage)
    assert found["control"]["holds"]
    assert (found["without_batch"], found["clip"], found["rates"], found["largest_rate"]) == (None, None, [], None)
    assert any("goes on without a change" in note for note in stage.notes)
    # Of the further steps each has a quiet batch, and the hyperparameters of the last step
    made = stage.made[len(stage.steps) :]
    more = made[-found["control"]["more"] :]
    assert {step for step, _ in more} == {stage.steps[-1]}
    assert {options["batch_of"] for _, options in more} <= set(range(200, 212))
    assert found["control"]["more"] == 5


@pytest.mark.parametrize("times", [10.0, 4.0])
def test_trials_take_at_most_ten_times_the_steps_and_say_what_was_left_out(
    monkeypatch: pytest.MonkeyPatch, times: float
) -> None:
    monkeypatch.setattr(trial, "_TIMES", times)
    stage = Valley(later_rate=2.3, change=3)  # by which the loss rises so slowly that no trial ends early
    tried(stage, parameters={"growth": [{"name": "w"}]}, about={"precision": "16-mixed"})
    assert stage.passes["steps"] <= times * len(stage.steps)
    left_out = [note for note in stage.notes if note.startswith("Not tried, as trials take at most ten times")]
    assert len(left_out) == (1 if times == 4 else 0)


def test_a_trial_ends_at_a_loss_a_hundred_times_the_quiet_one() -> None:
    """On a quiet batch; on those from the onset on, if the run's own loss was not as high."""
    found = tried(Valley(later_rate=40.0, change=8))
    for made in (found["control"], found["rates"][0]):
        assert (made["why"], made["more"]) == ("loss", 1)
    stage = Valley()
    of = Trials(stage, stage.course)  # type: ignore[arg-type]
    early = of.make("early", lambda place, step, batch_of: 500.0 if place == 5 else 1.0)
    assert early is not None
    assert (early["why"], early["more"], len(early["losses"])) == ("loss", 0, 6)


def test_the_bad_batch_itself_does_not_end_a_trial() -> None:
    """Its loss is what it was in the run; whether the trial holds is seen after it."""
    found = tried(Valley(rate=0.5, bad_target=1e6))
    assert max(found["clip"]["losses"]) > 1e9
    assert found["clip"]["holds"]


@pytest.mark.parametrize("others_high", [True, False])
def test_a_run_that_weights_had_lost_does_not_hold_by_coming_back(others_high: bool) -> None:
    stage = Valley(rate=0.9, bad_target=30.0)
    stage.course["others_high"] = others_high
    found = tried(stage)
    assert max(stage.course["loss"][12:]) > 100
    assert found["control"]["holds"] is not others_high
    if others_high:
        assert found["control"]["why"] == "loss"
        assert found["without_batch"]["holds"]


def test_a_norm_that_stays_high_does_not_hold() -> None:
    """The loss hardly rises, while the norm of the gradient did by a hundred times."""
    stage = Valley(curvature=1.0)
    stage.course |= {"onset_by": "norm", "median_norm": 1e-4, "norm": [1e-4] * 13 + [1.0] * 3}
    of = Trials(stage, stage.course)  # type: ignore[arg-type]
    assert of.highest_norm == pytest.approx(1e-2)
    high = of.make("high", lambda place, step, batch_of: setattr(stage, "last_norm", 0.5) or 1.0, start=216)
    low = of.make("low", lambda place, step, batch_of: setattr(stage, "last_norm", 1e-3) or 1.0, start=216)
    assert high is not None
    assert low is not None
    assert (high["holds"], high["why"], high["norm"]) == (False, "norm", 0.5)
    assert low["holds"]


def test_a_scaler_skips_a_step_whose_loss_is_not_finite() -> None:
    for scaled in (False, True):
        stage = Valley(scaled=scaled)
        of = Trials(stage, stage.course)  # type: ignore[arg-type]
        found = of.make("nan", lambda place, step, batch_of: math.nan if place == 13 else 1.0)
        assert found is not None
        assert found["holds"] is scaled


def test_a_slower_run_is_compared_with_its_own_losses() -> None:
    """The run's losses fell from 8 to 1; those of a trial that fall more slowly are no divergence."""
    stage = Valley()
    stage.course |= {"loss": [8 * 0.87**i for i in range(16)], "median_loss": 1.2}
    of = Trials(stage, stage.course)  # type: ignore[arg-type]
    slow = of.make("slow", lambda place, step, batch_of: 8 * 0.97**place)
    assert slow is not None
    assert slow["holds"]
    rising = of.make("rising", lambda place, step, batch_of: 8 * (1 if place < 13 else 3))
    assert rising is not None
    assert not rising["holds"]


def test_a_warm_up_rises_to_the_full_rate_near_the_start_of_a_run() -> None:
    stage = Valley(later_rate=2.5, change=2, first=4)
    found = tried(stage)
    assert found["warm_up"]["steps"] == 32
    assert found["warm_up"]["holds"]
    assert len(found["warm_up"]["losses"]) == 16 + found["warm_up"]["more"] > 32
    rates = [options["rate"] for _, options in stage.made]
    assert 3 / 32 in rates  # no other trial has it
    assert 31 / 32 in rates
    assert tried(Valley(later_rate=2.5, change=2, first=4, count=40))["warm_up"]["steps"] == 40
    assert tried(Valley(later_rate=40.0, change=2, first=5000))["warm_up"] is None


def test_a_frozen_parameter_keeps_its_first_value() -> None:
    found = tried(Valley(later_rate=30.0, change=6), parameters={"growth": [{"name": "w"}]})
    assert found["frozen"]["name"] == "w"
    assert found["frozen"]["holds"]
    assert {*found["frozen"]["losses"]} == {1 + 0.5**2 / 2}


def test_without_a_quiet_batch_none_is_left_out() -> None:
    stage = Valley(rate=1e9, change=0, count=2)
    stage.course |= {"onset": 200, "median_loss": None, "spread_loss": None, "median_norm": None}
    stage.alarm = 201
    found = tried(stage)
    assert found["without_batch"] is None
    assert any("could not be left out" in note for note in stage.notes)
    assert found["control"] is not None


def test_the_suspicious_parameter_restores_the_loss_or_has_grown_most() -> None:
    growth = [{"name": "grown"}]
    back = [
        {"name": "block", "parameters": ["block.a", "block.b"], "loss": [0.2, 1.0]},
        {"name": "block.a", "parameters": ["block.a"], "loss": [0.3, 1.0]},
        {"name": "fc", "parameters": ["fc"], "loss": [8.0, 9.0]},
    ]
    facts = {"growth": growth, "put_back": back, "loss_before": [9.0, 9.0], "loss_all_back": [0.2, 1.0]}
    assert suspicious_parameter({"parameters": facts}) == (back[1], True)
    assert suspicious_parameter({"parameters": {**facts, "loss_before": [math.nan, 9.0]}}) == (back[1], True)
    assert suspicious_parameter({"parameters": {**facts, "put_back": back[2:]}}) == (growth[0], False)
    assert suspicious_parameter({"parameters": {**facts, "loss_before": [0.25, 1.0]}}) == (growth[0], False)
    assert suspicious_parameter({"parameters": {**facts, "loss_all_back": [math.nan, 1.0]}})[1] is False
    assert suspicious_parameter({"parameters": {"put_back": [], "growth": []}}) == (None, False)
    assert suspicious_parameter({}) == (None, False)
    straight = {"name": "away", "from": 2.0, "to": 9.0, "share": 0.9, "straightness": 0.95}
    course = {"steps": [*range(12)], "loss": [1.0] * 12}
    assert suspicious_parameter({"course": course, "parameters": {**facts, "growth": [straight]}}) == (straight, True)
    wound = {**straight, "straightness": 0.5}
    assert suspicious_parameter({"course": course, "parameters": {**facts, "growth": [wound]}}) == (back[1], True)


# On runs


def asked(folder: Path, kind: str, more: Any = None, **options: Any) -> tuple[dict[str, Any], list[str]]:
    capsule = load_capsule(plant(folder, kind, **options))
    evidence: dict[str, Any] = {}
    notes: list[str] = []

    def ask(stage: Stage) -> None:
        course.ask(stage, evidence)
        evidence.update(more(stage) if more else {})
        trials.ask(stage, evidence)
        notes.extend(stage.notes)

    in_a_fit(capsule, Planted(kind), ask)
    return evidence, notes


def test_of_a_rate_that_jumps_a_smaller_one_holds(tmp_path: Path) -> None:
    evidence, _ = asked(tmp_path, "rate")
    found = evidence["trials"]
    assert not found["control"]["holds"]
    assert not found["without_batch"]["holds"]
    assert found["largest_rate"] <= 1 / 16
    assert 0.02 <= found["lr"] <= 0.5
    assert evidence["course"]["passes"]["steps"] + found["passes"]["steps"] <= 10 * len(evidence["course"]["steps"])


def test_of_a_bad_batch_leaving_it_out_holds(tmp_path: Path) -> None:
    found = asked(tmp_path, "batch")[0]["trials"]
    assert not found["control"]["holds"]
    assert found["without_batch"]["holds"]
    assert found["without_batch"]["step"] == STEP
    assert found["clip"]["holds"]


def test_a_hard_batch_is_survived(tmp_path: Path) -> None:
    evidence, notes = asked(tmp_path, "hard")
    assert evidence["trials"]["control"]["holds"]
    assert evidence["same"]["diverges_again"]
    assert any("goes on without a change" in note for note in notes)


def test_after_an_error_nothing_is_tried(tmp_path: Path) -> None:
    evidence, notes = asked(tmp_path, "error")
    assert evidence["trials"]["control"] is None
    assert notes == ["Nothing was tried on the steps, as an error and no divergence ended the run."]


def test_eps_and_float32_are_tried_where_they_may_matter_and_put_back(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def more(stage: Stage) -> dict[str, Any]:
        seen["module"] = stage.module
        seen["dtypes"] = {p.dtype for p in stage.module.parameters()}
        layers = [{"module": "net.0", "dead": 0}, {"module": "net.1", "dead": 3, "variance_quiet": 0.5}]
        return {"norm_layers": layers, "about": {"precision": "bf16-true"}}

    found = asked(tmp_path, "batch", more, precision="bf16-true")[0]["trials"]
    assert found["eps"]["module"] == "net.1"
    assert found["eps"]["eps"] == pytest.approx(0.001)  # the last one, as 0.05 does not hold either
    assert seen["module"].net[1].eps == 1e-5
    assert not found["eps"]["holds"]
    assert found["float32"] is not None
    assert not found["float32"]["holds"]
    assert seen["dtypes"] == {torch.bfloat16}
