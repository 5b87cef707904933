"""What stands between a Trainer and a measurement that is not in the script: no error of it ends the training."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]

from normzoo._errors import one_line
from normzoo._variable import VARIABLE
from normzoo.callbacks import Measurement
from normzoo.callbacks._run.facts import Run
from normzoo.callbacks._run.lightning import LightningRun
from normzoo.callbacks._run.rerun import all_come_here


class Guard:
    """Forwards calls to a measurement, and forwards none after one of them has raised an error.

    Before training begins the guard only keeps the error, so that the ranks can agree on which measurements to leave
    out. Once training has begun, a measurement that raises an error is left out at once on a single rank. On several
    ranks it is left out if all ranks raise an error; otherwise the error ends the run, since the other ranks wait for
    this one in a collective. A measurement whose record cannot be written goes on without a record. An error by which
    an action ends the run is raised.

    Args:
        measurement: that is guarded.
        trainer: of whose callbacks it is one.
        pl_module: that is trained.
        refused: is told why the measurement cannot measure, until training has begun.
        quiet: whether it is left out without a warning.

    Attributes:
        why: the reason for which the measurement was left out; empty if it measures, or if the ranks' values differ.
    """

    def __init__(
        self,
        measurement: Measurement,
        trainer: Trainer,
        pl_module: LightningModule,
        refused: Callable[[str], None],
        quiet: bool,
    ) -> None:
        self._measurement, self._refused, self._quiet = measurement, refused, quiet
        self._of = weakref.ref(trainer), weakref.ref(pl_module)
        self._began = self._silent = False
        self.why = ""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_measurement":  # asked for by copy, before there is one
            raise AttributeError(name)
        attribute = getattr(self._measurement, name)
        return partial(self._call, attribute) if callable(attribute) else attribute

    def training_begins(self) -> None:
        """From now on an error leaves the measurement out at once."""
        self._began = True

    def leave_out(self, why: str = "") -> None:
        """Take the measurement out of the Trainer's callbacks, and say why, once; without a reason, say nothing."""
        self._silent, self.why = True, self.why or why
        trainer: Any = self._of[0]()
        left = [callback for callback in trainer.callbacks if callback is not self._measurement]
        if len(left) == len(trainer.callbacks):
            return
        trainer.callbacks = left  # a new list: the Trainer may be going through the old one
        with contextlib.suppress(Exception):
            self._measurement.abandon()
        if why and not self._quiet:
            rank_zero_warn(f"{VARIABLE}: training goes on without {type(self._measurement).__name__}: {why}")

    def _open(self, step: int) -> None:
        """Open the record; if that fails, as in a folder that cannot be written to, measure without one."""
        self._recorded(self._measurement._open, step)

    def _write(self, *sample: Any) -> None:
        """Write a sample; if that fails, as on a full disk, measure without a record from then on."""
        self._recorded(self._measurement._write, *sample)

    def _recorded(self, method: Callable[..., None], *args: Any) -> None:
        # Only the rank that writes can fail here: without it in their collectives others would wait
        try:
            method(*args)
        except Exception as error:
            if self._measurement._record is not None:
                self._measurement._record.stop()
            rank_zero_warn(
                f"{VARIABLE}: {type(self._measurement).__name__} is not recorded from here on: {reason(error)}"
            )

    def _call(self, method: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if self._silent:
            return None
        try:
            return method(*args, **options)
        except Exception as error:
            if error is self._measurement.ends_the_run_by:
                raise
            self._silent = True
            if not self._began:
                self._refused(reason(error))
            elif all_come_here(self._run):
                self.leave_out(reason(error))
            else:
                raise
            return None

    @property
    def _run(self) -> Run:
        trainer, module = (weak() for weak in self._of)
        assert trainer is not None
        assert module is not None
        return LightningRun(trainer, module)  # type: ignore[arg-type]


def reason(error: Exception) -> str:
    """Why a measurement cannot measure: the sentence of a refusal, and what else was raised with its class."""
    text = one_line(error)
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"
