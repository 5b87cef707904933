"""The callback that adds the measurements of the environment variable to a Trainer."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn  # type: ignore[attr-defined]

from normzoo._errors import one_line
from normzoo._variable import VARIABLE
from normzoo.callbacks import Measurement
from normzoo.callbacks._run.lightning import LightningRun
from normzoo.callbacks._run.rerun import of_all_ranks
from normzoo.capsules.folder import listed_ranks
from normzoo.plugin.asking import DEFAULT, asked_for
from normzoo.plugin.guard import Guard
from normzoo.plugin.notices import Notices

_VALUE = "value"  # the subject of the notices that say what a rank was asked for
_KEPT = "measurements_of_normzoo"  # the attribute by which a Trainer keeps them


@dataclass
class _Added:
    """The measurements of one Trainer, which keeps them for further fits.

    Attributes:
        measurements: of this Trainer alone.
        labels: those that they were asked for with.
        notices: of the ranks, in this fit.
        said: whether the user was told what is measured in this fit.
    """

    measurements: list[Measurement]
    labels: list[str | None]
    notices: Notices
    said: bool = False


class AddedMeasurements(Callback):
    """Adds measurements to the Trainer that it is a callback of, when a stage is set up.

    Only then: Lightning puts what an entry point returns into the list that the script gave, which may be the list of
    a second Trainer as well, and a Trainer refuses two callbacks with the same state. Of several of these callbacks in
    one Trainer the last one acts, which this Trainer has asked for itself.

    Args:
        value: of the environment variable.

    Raises:
        RecipeError: naming what is wrong in the value and what is accepted.
    """

    def __init__(self, value: str) -> None:
        self._asked = asked_for(value)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the measurements behind this callback, so that the Trainer sets them up next.

        They measure fits alone; in other stages the Trainer looks for those whose states are in a checkpoint.
        """
        if not self._acts_in(trainer):
            return
        added = self._added_to(trainer)
        added.notices, added.said = Notices(), False
        added.notices.leave(_VALUE, json.dumps([asked.spec for asked in self._asked]))
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        others = [c for c in callbacks if not any(c is m for m in added.measurements)]
        unlabelled = {c.name for c in others if isinstance(c, Measurement) and c.label is None}
        for i, (measurement, label) in enumerate(zip(added.measurements, added.labels, strict=True)):
            # Beside one that the script has made, in a folder and under log keys of its own
            measurement.label = VARIABLE if label is None and measurement.name in unlabelled else label
            refused = partial(added.notices.leave, str(i))
            measurement._guard = Guard(measurement, trainer, pl_module, refused, quiet=self._asked[i].by_default)
            for name in ("log", "log_dict"):  # which Lightning has given to the callbacks that were there before
                setattr(measurement, name, getattr(pl_module, name))
        place = others.index(self) + 1
        callbacks[:] = [*others[:place], *added.measurements, *others[place:]]  # in place: the Trainer goes on to them

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All ranks have been set up: leave out what one of them refuses, and everything if they differ."""
        added = self._of(trainer)
        if added is None:
            return
        values = added.notices.read(_VALUE)
        if len({*values}) > 1:
            warnings.warn(_difference(values), stacklevel=2)
            for measurement in added.measurements:
                measurement._guard.leave_out()
            return
        whys = [added.notices.read(str(i)) for i in range(len(added.measurements))]
        self._leave_out(added, whys)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Training is about to start: leave out what a rank refuses, now that the module and optimizers are whole."""
        added = self._of(trainer)
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if added is None or not any(m in callbacks for m in added.measurements):
            return
        run = LightningRun(trainer, pl_module)
        for measurement in added.measurements:
            measurement._guard.check_complete(run)
        own = [added.notices.own(str(i)) for i in range(len(added.measurements))]
        self._leave_out(added, [*zip(*of_all_ranks(own, run), strict=True)])
        for measurement in added.measurements:
            measurement._guard.training_begins()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say once what is measured, and where its records are."""
        added = self._of(trainer)
        if added is None or added.said:
            return
        added.said = True
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        measuring = [m for m in added.measurements if m in callbacks]
        if not measuring:
            whys = [m._guard.why for m in added.measurements]
            if any(whys) and all(asked.by_default for asked in self._asked):  # of which each is left out without a word
                rank_zero_warn(
                    f"{VARIABLE}: no measurement of {DEFAULT} fits this run: {'; '.join(filter(None, whys))}"
                )
            return
        names = ", ".join(m.name if m.label is None else f"{m.name} ({m.label})" for m in measuring)
        folders = dict.fromkeys(m.folder for m in measuring if m.folder is not None)
        where = " and ".join(f"normzoo report {folder}" for folder in folders) or "fast_dev_run writes no records"
        rank_zero_info(f"{VARIABLE} measures {names}; {where}")

    def _acts_in(self, trainer: Trainer) -> bool:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        return next((c for c in reversed(callbacks) if isinstance(c, AddedMeasurements)), None) is self

    def _of(self, trainer: Trainer) -> _Added | None:
        """What was added to a Trainer, if this callback acts in it."""
        added: _Added | None = getattr(trainer, _KEPT, None)
        return added if self._acts_in(trainer) else None

    def _added_to(self, trainer: Trainer) -> _Added:
        """What was added to a Trainer, made for its first fit."""
        added = self._of(trainer)
        if added is None:
            measurements = [asked.make() for asked in self._asked]
            for measurement in measurements:
                measurement.asked_by = VARIABLE
            added = _Added(measurements, [m.label for m in measurements], Notices())
            setattr(trainer, _KEPT, added)
        return added

    def _leave_out(self, added: _Added, whys: Sequence[Sequence[str | None]]) -> None:
        """Leave out the measurements that a rank refuses; for each of them what the ranks say."""
        for measurement, of_ranks in zip(added.measurements, whys, strict=True):
            if (why := next(filter(None, of_ranks), None)) is not None:
                measurement._guard.leave_out(why)


def _difference(values: Sequence[str | None]) -> str:
    """The sentence on ranks that were asked for different measurements."""
    said = {value: [rank for rank, other in enumerate(values) if other == value] for value in values}
    parts = [
        f"{'none' if value is None else one_line(value, longest=80)} on {listed_ranks(ranks)}"
        for value, ranks in said.items()
    ]
    return (
        f"{VARIABLE} differs between ranks, so nothing is measured: {', '.join(parts)}; set it alike on all of them, "
        "where normzoo has to be installed"
    )
