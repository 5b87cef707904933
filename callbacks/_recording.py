"""What callbacks with a record share: whose run their state is of, when a record is continued, what must be written."""

from __future__ import annotations

import itertools
import os
import re
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from lightning.pytorch import LightningModule, Trainer

from normzoo._errors import one_line, shown
from normzoo._files import existing_folder
from normzoo.callbacks._record import Record
from normzoo.callbacks._tools import ToolNotice

_Path = TypeVar("_Path", str | None, str | Path | None)
_LABEL = re.compile(r"\w[\w.-]*")
_LONGEST_NAME = 255  # bytes of a folder's name on common file systems


class RecordingCallback(ToolNotice):
    """Base of the callbacks that read a result a step late and write it; subclasses implement :meth:`flush`.

    The state is that of one run. A fit in another Trainer starts without it, unless :meth:`load_state_dict` gave the
    state of that run; a second fit of the same Trainer continues it.
    """

    quantity: ClassVar[str]  # name of the record
    needs_optimizer: ClassVar[bool] = True
    dirpath: str | None = None
    label: str | None = None
    _asked: ClassVar[weakref.WeakKeyDictionary[RecordingCallback, int]] = weakref.WeakKeyDictionary()
    _order: ClassVar[Iterator[int]] = itertools.count()
    _record: Record
    _pending: Any = None
    _given_state = False  # by load_state_dict, for the next fit
    _trainer: weakref.ref[Trainer] | None = None  # that was set up last, for any stage
    _run: weakref.ref[Trainer] | None = None  # whose fit the state is of

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_trainer": None, "_run": None}  # weak references cannot be pickled

    @property
    def folder(self) -> Path | None:
        """Where the record of the last fit is; None before one, and under ``fast_dev_run``."""
        return self._record.folder if hasattr(self, "_record") else None

    @property
    def state_key(self) -> str:
        """The callback's name in checkpoints: that of its class, with label or ``dirpath`` beside others of the class.

        While no Trainer runs it, callbacks that only differ in other arguments have numbers, in the order in which they
        are asked: a Trainer would otherwise refuse them before :meth:`setup` can say what to do.
        """
        if (trainer := self._current_trainer()) is not None:
            return self._key_in(trainer)
        key, order = self._key(alone=False), self._asked.setdefault(self, next(self._order))
        number = sum(asked < order and c._key(alone=False) == key for c, asked in self._asked.items())
        return f"{key}#{number}" if number else key

    def flush(self, trainer: Trainer) -> None:
        """Read and write what was measured last, if anything."""
        raise TypeError(f"{type(self).__name__} does not define flush(trainer)")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start without the state of another run, and prepare the record, apart from those of other callbacks."""
        super().setup(trainer, pl_module, stage)
        self._trainer = weakref.ref(trainer)
        if stage != "fit":
            return
        continued = trainer.global_step > 0 and self._run is not None and self._run() is trainer
        if not (self._given_state or continued):
            self._forget_run()
        self._given_state, self._run = False, self._trainer
        self._record = Record(trainer, self.quantity, self.dirpath, self.label, self._log_prefix(trainer))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a fit without an optimizer, if its steps are what is measured."""
        super().on_fit_start(trainer, pl_module)
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        if self.needs_optimizer and not any(group["params"] for group in groups):
            name = type(self).__name__
            raise ValueError(
                f"{name} measures the steps of an optimizer, and configure_optimizers returned none that has "
                f"parameters; return an optimizer from it, or leave {name} out"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open a segment of the record, which takes the place of earlier ones from this step on."""
        self._pending = None  # left by a run that was cut short
        self._record.locate(trainer)
        places = [c.folder.resolve() for c in self._of_same_quantity(trainer) if c.folder is not None]
        if self.folder is not None and places.count(self.folder.resolve()) > 1:
            raise self._same_record(str(self.folder))
        self._record.start(trainer.global_step)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write what a run resumed from here would not measure again, and save the state that follows from it."""
        self.flush(trainer)
        if state := self.state_dict():  # Lightning took it before
            checkpoint["callbacks"].pop(self.state_key, None)
            checkpoint["callbacks"][self._key_in(trainer)] = state

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what was measured last."""
        self.flush(trainer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the checkpoint was, in the fit that runs or else in the next one.

        Validation, testing and prediction from a checkpoint leave the state as the last fit left it.
        """
        running = self._current_trainer()
        if running is not None and running.state.fn != "fit":
            return
        self._given_state = running is None
        self._restore(state_dict)

    def _restore(self, state_dict: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""

    def _forget_run(self) -> None:
        """Drop all that :meth:`state_dict` saves."""

    def _current_trainer(self) -> Trainer | None:
        """The Trainer that runs this callback now."""
        trainer = self._trainer() if self._trainer is not None else None
        state = getattr(trainer, "state", None)  # a plain loop has none
        return trainer if state is not None and state.status == "running" else None

    def _key_in(self, trainer: Trainer) -> str:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        return self._key(alone=sum(type(c) is type(self) for c in callbacks) <= 1)

    def _key(self, alone: bool) -> str:
        if self.label is not None:
            return self._generate_state_key(label=self.label)
        if self.dirpath and not alone:
            return self._generate_state_key(dirpath=str(self.dirpath))
        return type(self).__qualname__

    def _of_same_quantity(self, trainer: Trainer) -> list[RecordingCallback]:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        found = [c for c in callbacks if isinstance(c, RecordingCallback) and c.quantity == self.quantity]
        return found if self in found else [*found, self]  # another callback may hand its hooks on to this one

    def _log_prefix(self, trainer: Trainer) -> str:
        """What the log keys begin with: the label; without one nothing, or for all but one callback the folder's name.

        Raises:
            ValueError: if another callback would write the same record, or log under the same keys.
        """
        alike = self._of_same_quantity(trainer)
        places = [(c.label, c.dirpath and Path(c.dirpath).resolve()) for c in alike]
        if places.count((self.label, self.dirpath and Path(self.dirpath).resolve())) > 1:
            raise self._same_record(str(self.dirpath or "the folder of the run"))
        unnamed = sorted((c for c in alike if c.label is None), key=lambda c: bool(c.dirpath))
        prefixes = [c.label or ("" if c is unnamed[0] else Path(c.dirpath or "").resolve().name) for c in alike]
        own = prefixes[alike.index(self)]
        if trainer.loggers and prefixes.count(own) > 1:
            raise ValueError(
                f"two {type(self).__name__} would log under the same keys; give one of them a label, which its keys "
                "then begin with"
            )
        return own

    def _same_record(self, folder: str) -> ValueError:
        return ValueError(
            f"two {type(self).__name__} would write the same record in {folder}, the one hiding the other; give one of "
            "them a label or a dirpath"
        )


def checked_label(label: str | None) -> str | None:
    """The label that an argument gives, or None.

    Raises:
        ValueError: unless it can be the name of a folder and a part of a log key.
    """
    if label is None:
        return None
    if not (isinstance(label, str) and _LABEL.fullmatch(label)):
        raise ValueError(
            f"label must be letters, digits, '_', '-' and '.', such as 'late', as it names a folder, not {shown(label)}"
        )
    if (size := len(label.encode())) > _LONGEST_NAME:
        raise ValueError(
            f"label must be at most {_LONGEST_NAME} bytes long, as it names a folder; {shown(label)} has {size}, so "
            "give a shorter one"
        )
    return label


def checked_dirpath(dirpath: _Path) -> _Path:
    """The folder that an argument gives, or None.

    Raises:
        TypeError: unless it is a path.
        ValueError: if no folder can be made there, as where a file of that name exists.
    """
    if dirpath is None:
        return None
    if not isinstance(dirpath, str | os.PathLike):
        raise TypeError(
            f"dirpath must be the path of a folder, such as 'logs/tails', or None for the default, not {shown(dirpath)}"
        )
    try:
        existing_folder(dirpath)
    except ValueError as error:
        why = one_line(error, longest=120)
        raise ValueError(
            f"dirpath must be the path of a folder, existing or new, not {shown(str(dirpath))}: {why}; give "
            "another path"
        ) from None
    return dirpath
