"""Batch or weights, inputs, parameters and samples of capsules that fits have left."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from callbacks_small import trainer
from ranks import run_function
from replays_small import ALARM, At, Net, run_ranks_of
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from normzoo import load_capsule
from normzoo.callbacks import Divergence, GradientNorm, Record, Recorder, RecordingBatchSampler
from normzoo.replaying import data_or_state, samples
from normzoo.replaying.fit import in_a_fit

BAD = 37  # the sample that is poisoned


class Planted(pl.Callback):
    """Poisons a sample of the batch of a step."""

    def __init__(self, kind: str, step: int) -> None:
        self.kind, self.step = kind, step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            x, y = batch
            if self.kind == "scale":
                x[2] *= 1e5
            elif self.kind == "nan":
                x[2, 0, 1, 1] = math.nan
            elif self.kind == "label":
                y[2] = 1000


def capsule_of(folder: Path, kind: str, net: dict[str, Any] | None = None, alarm: int = ALARM, **options: Any) -> Any:
    pl.seed_everything(3)
    data = TensorDataset(torch.randn(240, 1, 6, 6), torch.arange(240) % 3)
    sampler = RecordingBatchSampler(RandomSampler(data), batch_size=8, drop_last=False)
    recorder = Recorder(steps=4)
    divergence = Divergence(rules=[At(alarm)], action=Record(), recorder=recorder)
    callbacks = [Planted(kind, alarm), GradientNorm(), divergence]
    fit = trainer(str(folder), max_steps=alarm + 3, callbacks=callbacks, **options)
    module = Net(**net or {})
    if kind == "label":
        with pytest.raises(IndexError):
            fit.fit(module, DataLoader(data, batch_sampler=sampler))
    else:
        fit.fit(module, DataLoader(data, batch_sampler=sampler))
    return load_capsule(folder / "log")


def asked(capsule: Any, net: dict[str, Any] | None = None) -> tuple[dict[str, Any], list[Any]]:
    def ask(stage: Any) -> tuple[dict[str, Any], list[Any]]:
        evidence = {"about": dict(capsule.about), "course": {"onset": stage.alarm}}
        stage.go_to(stage.steps[0])
        here = {name: t.clone() for name, t in stage.tensors().items()}
        records = [*data_or_state.ask(stage, evidence), *samples.ask(stage, evidence)]
        stage.go_to(stage.steps[0])
        assert all(torch.equal(t, here[name]) for name, t in stage.tensors().items() if t.isfinite().all())
        assert all(m.training for m in stage.module.modules())
        json.dumps(evidence)
        return evidence, records

    return in_a_fit(capsule, Net(**net or {}), ask)


@pytest.mark.parametrize("kind", ["scale", "nan"])
def test_a_poisoned_sample_is_found_and_named(tmp_path: Path, kind: str) -> None:
    capsule = capsule_of(tmp_path, kind)
    evidence, [(_, rows)] = asked(capsule)
    facts, found = evidence["data_or_state"], evidence["samples"]
    (bad, bad_first), (quiet, quiet_first) = facts["norm"]
    assert facts["batch"] == ALARM
    assert all(map(math.isfinite, (quiet, quiet_first, *facts["others"])))
    assert evidence["inputs"][0]["path"] == "batch[0]"
    assert evidence["inputs"][0]["rows"] == [2]
    ids = capsule.tree()["frames"][-2]["micro_batches"][0]["ids"]
    where = found if kind == "nan" else found["alone"]
    assert found["possible"], found["why_not"]
    assert (where["worst"][0]["row"], where["worst"][0]["id"]) == (2, ids[2])
    assert found["held"] == ["net.1"]
    assert found["dropout"]
    assert len(rows) == 8
    assert math.isnan(bad) == math.isnan(bad_first) == (kind == "nan")


def test_the_sample_that_raised_an_error_is_named(tmp_path: Path) -> None:
    capsule = capsule_of(tmp_path, "label")
    assert capsule.about["kind"] == "exception"
    evidence, records = asked(capsule)
    assert not records
    assert evidence["samples"]["raising"][0]["row"] == 2
    assert evidence["samples"]["raising"][0]["id"] is not None
    assert evidence["inputs"][0]["path"] == "batch[1]"
    assert evidence["inputs"][0]["far"] == 1
    assert evidence["data_or_state"]["raises"][1] == [None, None]
    assert all("Target 1000" in error for error in evidence["data_or_state"]["raises"][0])


@pytest.mark.parametrize(
    ("net", "options"),
    [
        ({}, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5}),
        ({"manual": True}, {}),
        ({}, {"precision": "bf16-mixed"}),
        ({}, {"precision": "64-true"}),
    ],
)
def test_loops_of_other_kinds(tmp_path: Path, net: dict[str, Any], options: dict[str, Any]) -> None:
    alarm = ALARM + bool(net)  # each batch brings a step of either optimizer
    evidence, _ = asked(capsule_of(tmp_path, "none", net, alarm, **options), net)
    assert evidence["data_or_state"]["batch"] == alarm
    assert evidence["samples"]["possible"], evidence["samples"]["why_not"]
    accumulated = "accumulate_grad_batches" in options
    assert evidence["samples"]["samples"] == (16 if accumulated else 8)  # the alarm came within a step
    assert evidence["parameters"]["growth"]


def ask_on(folder: str, kind: str) -> None:
    """On each rank: ask, and see that all ranks are told the same."""
    capsule = load_capsule(Path(folder) / "lightning_logs" / "version_0")

    def ask(stage: Any) -> None:
        evidence = {"about": dict(capsule.about), "course": {"onset": stage.alarm}}
        records = [*data_or_state.ask(stage, evidence), *samples.ask(stage, evidence)]
        told = stage.gather(json.dumps([evidence, [rows for _, rows in records]], sort_keys=True))
        assert len(set(told)) == 1
        if stage.rank == 0:
            (Path(folder) / f"told_{stage.ranks}.json").write_text(told[0])

    in_a_fit(capsule, Net(sharded=kind == "sharded"), ask)


@pytest.mark.slow
def test_two_ranks_are_told_the_same_and_one_process_that_stands_for_both_nearly_so(tmp_path: Path) -> None:
    run_function(tmp_path, run_ranks_of, 2, str(tmp_path), "ddp")
    run_function(tmp_path, ask_on, 2, str(tmp_path), "ddp")
    ask_on(str(tmp_path), "ddp")
    (two, rows_of_two), (one, rows_of_one) = (
        json.loads((tmp_path / f"told_{ranks}.json").read_text()) for ranks in (2, 1)
    )
    assert two["samples"]["samples"] == one["samples"]["samples"] == 16
    assert two["inputs"] == one["inputs"]
    places = [
        [(row["rank"], row["micro_batch"], row["row"]) for row in itertools.chain(*told)]
        for told in (rows_of_two, rows_of_one)
    ]
    assert places[0] == places[1]
    assert len(places[0]) == 16


@pytest.mark.slow
def test_two_ranks_of_a_sharded_model(tmp_path: Path) -> None:
    run_function(tmp_path, run_ranks_of, 2, str(tmp_path), "sharded")
    run_function(tmp_path, ask_on, 2, str(tmp_path), "sharded")
    told, _ = json.loads((tmp_path / "told_2.json").read_text())
    assert told["samples"]["possible"], told["samples"]["why_not"]
    assert told["samples"]["median_gradient"] is None
    assert told["parameters"]["growth"]
