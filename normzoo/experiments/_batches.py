"""The training batches of a data module, without a Trainer."""

from __future__ import annotations

from collections.abc import Iterator

from lightning.pytorch import LightningDataModule
from torch import Tensor


def training_batches(data: LightningDataModule, epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches (images, labels) of one epoch, as a run on one device has them."""
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    if sampler is not None and hasattr(sampler, "set_epoch"):  # as Lightning tells it
        sampler.set_epoch(epoch)
    yield from loader
