"""What callbacks with a record share: when it is continued, and when what is on its way must be written."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from normzoo.callbacks._record import Record


class RecordingCallback(Callback):
    """Base of the callbacks that read a result a step late and write it; subclasses implement :meth:`flush`."""

    _record: Record

    def flush(self, trainer: Trainer) -> None:
        """Read and write what was measured last, if anything."""
        raise TypeError(f"{type(self).__name__} does not define flush(trainer)")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue the record where a resumed run does."""
        self._record.rewind(trainer.global_step)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write what a run resumed from here would not measure again."""
        self.flush(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what was measured last."""
        self.flush(trainer)
