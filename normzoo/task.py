"""Image classification as a LightningModule; the optimizer and its schedule are passed in."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics.classification import MulticlassAccuracy

from normzoo.models import create_model

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
SchedulerFactory = Callable[[Optimizer], Any]


class ImageClassification(LightningModule):
    """Cross entropy on (images, labels), with accuracy in training and test.

    Logs ``train/loss`` and ``train/accuracy`` (of the mini-batch, each step the Trainer logs), and ``test/loss`` and
    ``test/accuracy`` over the whole test set.

    Args:
        arch: a timm architecture, or one of the CIFAR ResNets (``resnet20_cifar``, ...).
        norm: a norm's name, a mapping ``{name: ..., option: ...}``, a factory, or None for the architecture's own.
        num_classes: outputs.
        in_chans: channels of the images.
        model_options: further keyword arguments of ``timm.create_model``.
        channels_last: keep activations and weights in the channels-last memory format.
        compile: compile the network with ``torch.compile``.
        label_smoothing: of the training loss, in [0, 1].
        optimizer: makes the optimizer from the parameters; SGD with rate 0.1 and momentum 0.9 by default.
        lr_scheduler: makes a schedule from the optimizer, stepped once an epoch; none by default.

    Raises:
        ValueError: for an unknown architecture or norm, with the nearest names.

    Example:
        >>> task = ImageClassification("resnet20_cifar", norm="group", model_options={"drop_rate": 0.1})
        >>> task.model.bn1
        GroupNorm(16, eps=1e-05, affine=True, groups=1)
    """

    def __init__(
        self,
        arch: str = "resnet20_cifar",
        norm: str | dict[str, Any] | Callable[..., nn.Module] | None = None,
        *,
        num_classes: int = 10,
        in_chans: int = 3,
        model_options: dict[str, Any] | None = None,
        channels_last: bool = False,
        compile: bool = False,
        label_smoothing: float = 0.0,
        optimizer: OptimizerFactory | None = None,
        lr_scheduler: SchedulerFactory | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be from 0 to 1, not {label_smoothing}")
        options = {"num_classes": num_classes, "in_chans": in_chans, **(model_options or {})}
        self.model = create_model(arch, norm, **options)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.model.to(memory_format=self.memory_format)
        if compile:
            self.model.compile()
        self.label_smoothing = label_smoothing
        self.optimizer_factory, self.scheduler_factory = optimizer, lr_scheduler
        self.train_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, num_classes) logits."""
        return self.model(images.contiguous(memory_format=self.memory_format))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The mini-batch's loss."""
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        self.train_accuracy(logits, labels)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/accuracy", self.train_accuracy, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accumulate loss and accuracy on the test set."""
        images, labels = batch
        logits = self(images)
        self.test_accuracy.update(logits, labels)
        self.log(
            "test/loss",
            F.cross_entropy(logits, labels),
            batch_size=len(labels),
            on_epoch=True,
            sync_dist=True,
        )
        self.log("test/accuracy", self.test_accuracy, prog_bar=True, on_epoch=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """As in validation."""
        self.validation_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        """The optimizer, and the schedule if there is one."""
        if self.optimizer_factory is None:
            optimizer: Optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        else:
            optimizer = self.optimizer_factory(self.parameters())
        if self.scheduler_factory is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler_factory(optimizer)}}
