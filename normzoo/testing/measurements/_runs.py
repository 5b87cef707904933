"""The promises about when there are rows, and about runs that go on, are copied, or are of other kinds."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from lightning.pytorch.plugins import MixedPrecision

from normzoo.callbacks.schedule import Every
from normzoo.testing._compare import BrokenError, NotApplicableError
from normzoo.testing._promises import promise
from normzoo.testing._running import where
from normzoo.testing.measurements._fits import Fit, OnSteps, Subject, quietly
from normzoo.testing.measurements._rows import of_steps, same_finite, same_rows
from normzoo.testing.measurements._task import EPOCH, Setting

EARLY = range(EPOCH)
SCALED = 1e-5  # rounding of loss scales that are powers of two is none, but some figures are computed in float32


@promise()
def schedule(subject: Subject) -> None:
    """Rows are of the steps that its schedule names and of no others, counted in optimizer steps from 0."""
    rows = subject.once("seldom", lambda: subject.rows(subject.fit(subject.make(OnSteps(0, 5)))))
    _check_steps("sampled at steps 0 and 5", rows, {0, 5})


@promise()
def accumulation(subject: Subject) -> None:
    """A step is sampled once, however many micro-batches it has; measurements of micro-batches are sampled for each."""
    measurement, _, two = subject.base
    setting = Setting(accumulation=1)
    fitted = subject.fit(subject.make(), setting=setting)
    try:
        other = subject.rows(fitted, may_refuse=True)
    except NotApplicableError:  # it compares several gradients
        setting = Setting(accumulation=4)
        other = subject.rows(subject.fit(subject.make(), setting=setting))
    times = setting.accumulation / 2 if measurement.unit == "micro-batch" else 1
    for step in sorted({*two["step"], *other["step"]}):
        found, expected = int((other["step"] == step).sum()), int((two["step"] == step).sum())
        if not min(expected, expected * times) <= found <= max(expected, expected * times):
            raise BrokenError(
                f"step {step} has {expected} rows when it has 2 micro-batches, and {found} when {setting.accumulation}"
            )


@promise()
def resume(subject: Subject) -> None:
    """The record of a run that was resumed from a checkpoint is that of one that was never interrupted, bit for bit."""
    rows = subject.base[2]
    first, checkpoint = _first_half(subject)
    second = subject.fit(subject.make(), folder=first.folder, checkpoint=checkpoint)
    same_rows("resumed at step 4 of 8", subject.rows(second), rows)


@promise()
def second_fit(subject: Subject) -> None:
    """In another Trainer it starts afresh; in a second fit of the same Trainer it goes on."""
    used, _, rows = subject.base
    again = subject.fit(used, epochs=1)
    same_rows("used before, in another Trainer", subject.rows(again), of_steps(rows, *EARLY))
    first, _ = _first_half(subject)
    second = subject.fit(folder=first.folder, module=first.module, trainer=first.trainer)
    same_rows("a second fit of the same Trainer", subject.rows(second), rows)


def _first_half(subject: Subject) -> tuple[Fit, Path]:
    """A fit of 4 steps, and a checkpoint of its end; the Trainer goes on from there for another 4."""

    def make() -> tuple[Fit, Path]:
        fitted = subject.fit(subject.make(), epochs=1)
        subject.rows(fitted)
        checkpoint = fitted.folder / "half.ckpt"
        with quietly():
            fitted.trainer.save_checkpoint(checkpoint)
        return fitted, checkpoint

    return subject.once("first half", make)


@promise()
def copies(subject: Subject) -> None:
    """copy.deepcopy and pickle give measurements that measure the same, and those of a used one have its state."""
    used, _, rows = subject.base
    for how, copied in (("copy.deepcopy", copy.deepcopy), ("pickle", lambda m: pickle.loads(pickle.dumps(m)))):
        try:
            new, after = copied(subject.make()), copied(used)
        except Exception as error:
            raise BrokenError(f"{how}: {where(error)}") from error
        if after.state_dict() != used.state_dict():
            raise BrokenError(f"{how}, after a fit: the state is {after.state_dict()}, not {used.state_dict()}")
        same_rows(how, subject.rows(subject.fit(new, epochs=1)), of_steps(rows, *EARLY))


@promise()
def two_of_a_class(subject: Subject) -> None:
    """Two in a Trainer are refused unless label or dirpath tells them apart; each then has its record, keys, state."""
    rows = of_steps(subject.base[2], *EARLY)
    twins = subject.fit(subject.make(), subject.make(), epochs=1)
    if twins.began or not isinstance(twins.error, ValueError) or "label" not in str(twins.error):
        found = "were not refused" if twins.error is None else f"raised {where(twins.error)}"
        raise BrokenError(f"two of the same record {found}; setup has to raise a ValueError that speaks of label")
    elsewhere = subject.new_folder() / "elsewhere"
    measurements = [subject.make(), subject.make(label="second"), subject.make(dirpath=str(elsewhere))]
    fitted = subject.fit(*measurements, epochs=1)
    for what, folder in (
        ("beside others", fitted.folder),
        ("with label='second'", fitted.folder / "second"),
        ("with a dirpath", elsewhere),
    ):
        same_rows(what, subject.rows(fitted, folder), rows)
    if len(set(fitted.keys)) < len(measurements):
        raise BrokenError(f"of three in a Trainer two save their states under the same key: {fitted.keys}")
    alone, together = (own_keys(of) for of in (subject.base[1], fitted))
    if len(together) != 3 * len(alone):
        raise BrokenError(f"three log under {len(together)} keys and one under {len(alone)}: {together}")


@promise()
def grad_scaler(subject: Subject) -> None:
    """Under a GradScaler figures are as without one; a step that it skips makes no other step's NaN or infinite."""

    def measured(what: str, scaler: bool = False, **changes: Any) -> pd.DataFrame:
        # With momentum, as some figures depend on whether the update is known to be a multiple of the gradient
        setting = Setting(optimizer="momentum", **changes)
        options = {"plugins": [ScalerAlone()]} if scaler else {}

        def make() -> pd.DataFrame:
            fitted = subject.fit(subject.make(), setting=setting, epochs=1, **options)
            return subject.rows(fitted, may_refuse=scaler)

        return subject.once(what, make)

    same_rows("with a GradScaler", measured("scaled", scaler=True), measured("not scaled"), SCALED)
    others = of_steps(measured("skipping", scaler=True, overflow=3), 0, 2, 3)
    others["step"] -= others["step"] > 1
    without = measured("without a step", omitted=(2, 3))
    same_finite("but for the second of four steps, which a GradScaler skips", others, without)


@promise()
def manual_optimization(subject: Subject) -> None:
    """Under manual optimization its steps are counted right, or it is refused before training by one clear line."""
    setting = Setting(mode="manual", accumulation=1)
    rows = subject.rows(subject.fit(subject.make(Every(3)), setting=setting), may_refuse=True)
    _check_steps("every third of 8 steps", rows, {0, 3, 6})


@promise()
def several_optimizers(subject: Subject) -> None:
    """Of several optimizers each one's steps are counted, or they are refused before training by one clear line."""
    measurement, setting = subject.make(Every(4)), Setting(mode="several", accumulation=1)
    rows = subject.rows(subject.fit(measurement, setting=setting), may_refuse=True)
    expected = {0, 1, 8, 9} if measurement.unit == "step" else {0, 4, 8, 12}
    _check_steps("two optimizers make a step each in 8 batches, sampled every fourth", rows, expected)


def own_keys(fitted: Fit) -> list[str]:
    """The keys under which measurements have logged."""
    return sorted(fitted.logged.keys() - {"epoch", "loss_step", "loss_epoch", "accuracy"})


def _check_steps(what: str, rows: pd.DataFrame, expected: set[int]) -> None:
    found = set(rows["step"])
    if not found or not found <= expected:
        raise BrokenError(f"{what}: there are rows of the steps {sorted(found)}, not of {sorted(expected)}")


class ScalerAlone(MixedPrecision):
    """Scales losses, by a power of two, and does not autocast, so that nothing else differs from a run without."""

    def __init__(self) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))

    @contextlib.contextmanager
    def forward_context(self) -> Iterator[None]:
        """Nothing."""
        yield
