"""What callbacks with a record share: when it is continued, and when what is on its way must be written."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer

from normzoo.callbacks._record import Record
from normzoo.callbacks._tools import ToolNotice


class RecordingCallback(ToolNotice):
    """Base of the callbacks that read a result a step late and write it; subclasses implement :meth:`flush`."""

    _record: Record
    _pending: Any = None

    def flush(self, trainer: Trainer) -> None:
        """Read and write what was measured last, if anything."""
        raise TypeError(f"{type(self).__name__} does not define flush(trainer)")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open a segment of the record, which takes the place of earlier ones from this step on."""
        ours = (self._record.quantity, self._record.folder)
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if other is self or not isinstance(other, RecordingCallback):
                continue
            if (other._record.quantity, other._record.folder) == ours:
                raise ValueError(
                    f"two {type(self).__name__} would write the same record in {self._record.folder}, the one hiding "
                    "the other; give one of them a dirpath"
                )
        self._pending = None  # left by a run that was cut short
        self._record.start(trainer.global_step)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write what a run resumed from here would not measure again, and save the state that follows from it."""
        self.flush(trainer)
        if state := self.saved_state():  # Lightning took state_dict() before
            checkpoint["callbacks"][self.state_key] = state

    def saved_state(self) -> dict[str, Any]:
        """What ``load_state_dict`` gets in a run that is resumed.

        A subclass that overrides this instead of ``state_dict`` can be refused by ``on_train_start`` if it comes twice;
        of the classes with a ``state_dict`` the Trainer refuses a second instance before, without saying what to do.
        """
        return self.state_dict()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what was measured last."""
        self.flush(trainer)
