"""The steps of a capsule made again: the same or not, and the course that they take."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from planted_small import STEP, Planted, plant
from ranks import run_function
from replays_small import ALARM, Net, run, run_ranks_of

from normzoo import load_capsule
from normzoo.capsules import Capsule
from normzoo.records.schema import Schema
from normzoo.replaying import course, trials
from normzoo.replaying.fit import in_a_fit
from normzoo.replaying.levels import Level
from normzoo.replaying.stage import Stage

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated and clipped": {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5},
    "momentum": {"net": {"optimizer": "SGD", "rate": 0.1}},
    "manual": {"net": {"manual": True}, "alarm": 12},
    "bfloat16": {"precision": "bf16-mixed"},
}
Records = list[tuple[Schema, list[dict[str, Any]]]]


def asked(capsule: Capsule, module: pl.LightningModule) -> tuple[dict[str, Any], Records, list[str]]:
    evidence: dict[str, Any] = {}
    records: Records = []
    notes: list[str] = []

    def ask(stage: Stage) -> None:
        records.extend(course.ask(stage, evidence))
        notes.extend(stage.notes)

    in_a_fit(capsule, module, ask)
    for schema, rows in records:
        assert all({*row} == {c.name for c in schema.columns} for row in rows)
    json.dumps(evidence)
    return evidence, records, notes


@pytest.fixture(scope="module")
def capsules(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Capsule]:
    """The capsule of a run with a planted cause; each run is made once."""
    return functools.cache(lambda kind: load_capsule(plant(tmp_path_factory.mktemp(kind), kind)))


def replayed(capsules: Callable[[str], Capsule], kind: str) -> dict[str, Any]:
    return asked(capsules(kind), Planted(kind))[0]


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (case in ("momentum", "bfloat16"))) for case in CASES]
)
def test_a_run_made_again_does_not_differ_and_norms_are_those_that_were_measured(tmp_path: Path, case: str) -> None:
    options = CASES[case]
    capsule = load_capsule(run(tmp_path, **options))
    evidence, records, notes = asked(capsule, Net(**options.get("net", {})))
    same = evidence["same"]
    assert (same["first_difference"], same["tensor"], same["raises"]) == (None, None, None)
    assert all("before step 11 had all of its micro-batches" in note for note in notes)
    assert len(notes) == (case == "accumulated and clipped")
    assert (same["diverges_again"], same["repeatable"], same["noise"], same["deterministic"]) == (True, True, 0.0, None)
    found = evidence["course"]
    recorded = capsule.frames.groupby("step")["norm"].first()
    for step, norm in zip(found["steps"], found["norm"], strict=True):
        assert norm is not None
        if not math.isnan(recorded[step]):
            assert norm == pytest.approx(recorded[step], rel=1e-5)
    measured = capsule.records["parameter_norms"].set_index(["step", "layer"])
    rows = [row for row in records[-1][1] if (row["step"], row["layer"]) in measured.index and row["update"]]
    assert len(rows) >= 4 * 7
    for row in rows:
        if case == "manual" and row["layer"] == "scale":  # both optimizers step in each step of the loop
            continue
        other = measured.loc[(row["step"], row["layer"])]
        for name in ("weight", "gradient", "update"):
            assert row[name] == pytest.approx(other[name], rel=1e-3, abs=1e-7)


def test_the_course_has_the_losses_of_the_run_and_those_after_the_updates(tmp_path: Path) -> None:
    capsule = load_capsule(run(tmp_path))
    evidence, records, _ = asked(capsule, Net())
    found = evidence["course"]
    steps = found["steps"]
    recorded = capsule.frames.set_index("step")["loss"]
    assert found["loss"][:-1] == [recorded[step] for step in steps[:-1]]  # that of the last had not come yet
    assert found["lr"] == [capsule.frames.set_index("step")["lr"][step] for step in steps]
    twin: dict[str, list[float]] = {"after": [], "relative": []}

    def again(stage: Stage) -> None:
        for step in stage.steps:
            before = stage.parameters()
            stage.train(step)
            twin["after"].append(stage.loss(step))
            after = stage.parameters()
            matrices = [name for name, p in before.items() if p.dim() > 1]
            ratios = [
                float((after[n].double() - before[n].double()).norm() / before[n].double().norm()) for n in matrices
            ]
            twin["relative"].append(sum(ratios) / 2)

    in_a_fit(capsule, Net(), again)
    assert found["after"] == twin["after"]
    assert found["relative_update"] == pytest.approx(twin["relative"], rel=1e-4)
    by_name = {schema.name: rows for schema, rows in records}
    assert [*by_name] == ["replay_losses", "replay_course", "replay_parameters"]
    assert [row["loss"] for row in by_name["replay_losses"] if row["when"] == "after the update"] == found["after"]
    assert [row["norm"] for row in by_name["replay_course"]] == found["norm"]
    assert (found["onset"], found["onset_by"]) == (ALARM, "alarm")


@pytest.mark.parametrize(
    ("kind", "onset", "by", "fatal", "others_high"),
    [
        ("rate", STEP + 1, "loss", STEP, True),
        ("batch", STEP, "loss", STEP, False),
        ("nan", STEP, "nonfinite", STEP, False),
        ("hard", STEP, "alarm", STEP, False),
    ],
)
def test_the_onset_and_the_fatal_step(
    capsules: Callable[[str], Capsule], kind: str, onset: int, by: str, fatal: int, others_high: bool
) -> None:
    evidence = replayed(capsules, kind)
    found = evidence["course"]
    assert (found["onset"], found["onset_by"], found["fatal"]) == (onset, by, fatal)
    assert found["others_high"] is others_high
    assert 0.1 < found["median_loss"] < 0.6
    assert evidence["same"]["first_difference"] is None
    assert evidence["same"]["diverges_again"]
    assert evidence["seconds"]["step"] * len(found["steps"]) == pytest.approx(evidence["seconds"]["steps"], rel=0.9)


def test_a_flipped_bit_is_a_difference_at_its_step_and_the_steps_do_not_diverge_again(
    capsules: Callable[[str], Capsule],
) -> None:
    evidence = replayed(capsules, "bit")
    same = evidence["same"]
    assert (same["first_difference"], same["first_difference_of"]) == (STEP, "loss")
    assert same["relative_difference"] > 1e-4
    assert not same["diverges_again"]
    assert same["repeatable"]
    assert max(evidence["course"]["loss"]) < 2


@pytest.mark.parametrize(
    ("again", "of_run", "expected"),
    [
        (0.27, math.inf, False),  # above what is quiet, and far from what the run had
        (math.nan, math.inf, True),
        (1.0, math.inf, True),
        (0.9, 1.0, True),
        (0.4, 1.0, False),
        (2.0, 1.0, True),
    ],
)
def test_steps_diverge_again_if_they_come_half_of_the_way(again: float, of_run: float, expected: bool) -> None:
    assert course._comes_half_way(again, of_run, Level(0.05, 0.01)) is expected


def test_of_a_step_that_is_not_whole_the_update_is_made_of_what_is_there(tmp_path: Path) -> None:
    capsule = load_capsule(run(tmp_path, accumulate_grad_batches=3))
    found = asked(capsule, Net())[0]["course"]
    assert len(capsule.batches(found["steps"][-1])) == 2
    assert found["norm"][-1] > 0
    assert found["relative_update"][-1] > 1e-3
    assert found["after"][-1] < found["loss"][-1]


def test_a_norm_that_differs_is_a_difference_if_it_was_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    capsule = load_capsule(run(tmp_path))
    frame = Stage.frame

    def other(stage: Stage, step: int) -> Any:
        recorded = frame(stage, step)
        return replace(recorded, norm=recorded.norm * 1.01) if step == 10 and recorded.norm else recorded

    monkeypatch.setattr(Stage, "frame", other)
    same = asked(capsule, Net())[0]["same"]
    assert (same["first_difference"], same["first_difference_of"]) == (10, "norm")
    assert same["relative_difference"] == pytest.approx(0.01, rel=0.02)
    assert same["tensor"] is None  # as the weights are the same


class Writer(pl.Callback):
    """Writes into a weight between two steps, by a hook that is not called again."""

    def __init__(self, step: int, trained: bool = True) -> None:
        self.step, self.trained = step, trained

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            with torch.no_grad():
                pl_module.net[5].weight[2, 70] += 0.25


@pytest.mark.parametrize(("at", "seen"), [(9, ALARM + 1), (ALARM + 1, ALARM + 1)])
def test_a_weight_that_was_written_between_steps_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, seen: int
) -> None:
    monkeypatch.setattr("replays_small.GradientNorm", lambda: Writer(at))
    same = asked(load_capsule(run(tmp_path)), Net())[0]["same"]
    tensor = same["tensor"]
    assert (tensor["name"], tensor["element"]) == ("net.5.weight", [2, 70])
    assert tensor["recorded"] - tensor["replayed"] == pytest.approx(0.25, abs=0.05)
    assert tensor["times"] > 50
    assert (same["first_difference"], same["tensor_step"]) == (at, seen)
    assert same["first_difference_of"] == ("loss" if at == 9 else "weights")


def test_a_step_that_does_not_repeat_has_noise(capsules: Callable[[str], Capsule]) -> None:
    evidence = replayed(capsules, "race")
    same = evidence["same"]
    assert same["first_difference"] == evidence["course"]["steps"][0]
    assert same["repeatable"] is same["deterministic"] is False
    assert 1e-8 < same["noise"] < 1e-3
    assert same["diverges_again"]
    assert evidence["course"]["onset"] == STEP


class Careless(Planted):
    """Has noise unless deterministic algorithms are asked for, or has none of them."""

    def __init__(self, names: str = "") -> None:
        super().__init__("race")
        self.names = names

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if torch.are_deterministic_algorithms_enabled():
            if self.names:
                raise RuntimeError(f"{self.names} does not have a deterministic implementation, but. You can")
            self.kind = ""
        loss = super().training_step(batch, batch_idx)
        self.kind = "race"
        return loss


@pytest.mark.parametrize("names", ["", "scatter_add_cuda_kernel"])
def test_a_step_that_does_not_repeat_is_tried_by_deterministic_algorithms(
    capsules: Callable[[str], Capsule], names: str
) -> None:
    evidence, _, notes = asked(capsules("race"), Careless(names))
    assert evidence["same"]["repeatable"] is False
    assert evidence["same"]["deterministic"] is (names == "")
    assert not torch.are_deterministic_algorithms_enabled()
    assert any(names in note for note in notes) is bool(names) or not notes


def test_an_error_is_raised_again_and_said(capsules: Callable[[str], Capsule]) -> None:
    evidence = replayed(capsules, "error")
    same, found = evidence["same"], evidence["course"]
    assert same["raises"].startswith("ValueError: the targets are between")
    assert same["raises_step"] == found["onset"] == found["fatal"] == STEP
    assert same["to"] == found["steps"][-1] == STEP - 1
    assert (same["repeatable"], same["noise"], same["first_difference"]) == (None, None, None)
    assert same["diverges_again"]


def test_an_error_that_is_not_raised_again_is_no_error_of_the_steps(capsules: Callable[[str], Capsule]) -> None:
    class Mended(Planted):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            x, y = batch
            return super().training_step((x, y.clamp(-10, 10)), batch_idx)

    evidence, _, _ = asked(capsules("error"), Mended())
    assert evidence["same"]["raises"] is None
    assert evidence["same"]["repeatable"]
    assert evidence["course"]["steps"][-1] == STEP


def test_of_an_error_passes_beside_the_steps_may_raise_too(capsules: Callable[[str], Capsule]) -> None:
    """A batch raises in other passes than that of its step, as where a counter or the weights bring the error about."""

    class Worn(Planted):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if not torch.is_grad_enabled():
                raise ValueError("worn out")
            return super().training_step(batch, batch_idx)

    evidence, _, _ = asked(capsules("error"), Worn())
    assert evidence["same"]["raises_step"] == STEP
    assert evidence["same"]["first_difference"] is None
    assert set(evidence["course"]["after"]) == {None}


def test_other_errors_are_not_hidden(capsules: Callable[[str], Capsule]) -> None:
    class Broken(Planted):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            raise KeyError("of the code that replays")

    with pytest.raises(KeyError, match="of the code that replays"):
        asked(capsules("batch"), Broken())


def replay_on(folder: str, kind: str) -> None:
    """On each rank: ask, and write the evidence."""
    from normzoo.callbacks._run.facts import rank_and_ranks

    capsule = load_capsule(Path(folder) / "lightning_logs" / "version_0")
    evidence: dict[str, Any] = {}

    def ask(stage: Stage) -> None:
        records = [*course.ask(stage, evidence), *trials.ask(stage, evidence)]
        evidence["notes"] = stage.notes
        evidence["rows"] = {schema.name: len(rows) for schema, rows in records}
        evidence["norms"] = [row["gradient"] for row in records[2][1]]
        (Path(folder) / f"evidence_{rank_and_ranks()[0]}.json").write_text(json.dumps(evidence))

    in_a_fit(capsule, Net(sharded=kind == "sharded"), ask)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whole", "sharded"])
def test_on_ranks_all_know_the_same_and_nothing_differs(tmp_path: Path, kind: str) -> None:
    run_function(tmp_path / "train", run_ranks_of, 2, str(tmp_path), kind, deadline=120)
    run_function(tmp_path / "replay", replay_on, 2, str(tmp_path), kind, deadline=120)
    of_ranks = [json.loads((tmp_path / f"evidence_{rank}.json").read_text()) for rank in range(2)]
    for evidence in of_ranks:
        evidence.pop("seconds")
        evidence["trials"].pop("seconds")
    assert of_ranks[0] == of_ranks[1]
    same = of_ranks[0]["same"]
    assert (same["first_difference"], same["repeatable"], same["diverges_again"]) == (None, True, True)
    capsule = load_capsule(tmp_path / "lightning_logs" / "version_0")
    measured = capsule.records["parameter_norms"]
    assert of_ranks[0]["norms"][: len(measured)] == pytest.approx(measured["gradient"].tolist(), rel=1e-3)


@pytest.mark.slow
def test_one_process_compares_what_several_ranks_had_by_a_tolerance(tmp_path: Path) -> None:
    run_function(tmp_path / "train", run_ranks_of, 2, str(tmp_path), "whole", deadline=120)
    evidence, _, notes = asked(load_capsule(tmp_path / "lightning_logs" / "version_0"), Net())
    assert evidence["same"]["first_difference"] is None
    assert any("had 2 ranks" in note and "1%" in note for note in notes)
