"""Image classification as a LightningModule; the optimizer and its schedule are passed in."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics.classification import MulticlassAccuracy

from normzoo.convert import convert_norms
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
        weights: entries for the network, such as a checkpoint's ``state_dict``, with any prefix before their names.
        convert: arguments of :func:`normzoo.convert_norms` for the network with these weights; ``calibrate`` is the
            number of batches of training data on which it is calibrated as training starts: those that the data
            module's ``calibration_batches`` returns, or else the first of its ``train_dataloader``.

    Raises:
        ValueError: for an unknown architecture or norm, with the nearest names; for weights of another network; for a
            conversion that :func:`normzoo.convert_norms` refuses.

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
        weights: Mapping[str, Any] | None = None,
        convert: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be from 0 to 1, not {label_smoothing}")
        options = {"num_classes": num_classes, "in_chans": in_chans, **(model_options or {})}
        self.model = create_model(arch, norm, **options)
        if weights is not None:
            load_weights(self.model, weights)
        self._conversion = dict(convert or {})
        self._batches: int = self._conversion.pop("calibrate", 0)
        self._before: list[nn.Module] = []  # the network before its conversion, until it is calibrated
        if self._conversion:
            if self._batches:
                self._before = [copy.deepcopy(self.model)]
            convert_norms(self.model, **self._conversion)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.model.to(memory_format=self.memory_format)
        if compile:
            self.model.compile()
        self.label_smoothing = label_smoothing
        self.optimizer_factory, self.scheduler_factory = optimizer, lr_scheduler
        self.train_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def setup(self, stage: str) -> None:
        """Calibrate the network if it was converted, unless the run goes on from a checkpoint; alike on all ranks."""
        if stage != "fit" or not self._before:
            return
        network, device = self._before.pop(), self.trainer.strategy.root_device
        if self.trainer.ckpt_path is not None:
            return
        data = getattr(self.trainer, "datamodule", None)
        if data is None:
            raise ValueError("convert: calibrate takes batches of a data module, and the Trainer was given none")
        batches = [batch.to(device) for batch in calibration_batches(data, self._batches)]
        convert_norms(network.to(device), **self._conversion, calibrate=batches)
        state = {name: value.cpu() for name, value in network.state_dict().items()}
        self.model.load_state_dict(self.trainer.strategy.broadcast(state))

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


def calibration_batches(data: Any, count: int) -> list[Tensor]:
    """Images of ``count`` batches: from the data module's ``calibration_batches``, or the first of its training data.

    Raises:
        ValueError: if the training data has fewer batches.
    """
    if hasattr(data, "calibration_batches"):
        return data.calibration_batches(count)
    with isolate_rng():
        batches = [images for images, _ in itertools.islice(data.train_dataloader(), count)]
    if len(batches) < count:
        raise ValueError(f"{count} batches were asked for to calibrate on, and the training data has {len(batches)}")
    return batches


def load_weights(network: nn.Module, entries: Mapping[str, Any]) -> str:
    """Load entries into a network, whose names stand in them behind a prefix such as ``model.``.

    Returns:
        the prefix.

    Raises:
        ValueError: naming an entry that is missing, or has another shape.
    """
    own = network.state_dict()
    first = next(iter(own))
    prefixes = [name.removesuffix(first) for name in entries if name == first or name.endswith(f".{first}")]
    missing = {prefix: [name for name in own if prefix + name not in entries] for prefix in prefixes}
    if not prefixes or all(missing.values()):
        absent = min(missing.values(), key=len) if missing else [*own]
        raise ValueError(f"weights: {len(absent)} of the network's {len(own)} entries are missing, as {absent[0]!r}")
    prefix = next(prefix for prefix in prefixes if not missing[prefix])
    for name, value in own.items():
        if (given := entries[prefix + name]).shape != value.shape:
            raise ValueError(
                f"weights: {prefix + name!r} has the shape {(*given.shape,)}, and the network's is {(*value.shape,)}"
            )
    network.load_state_dict({name: entries[prefix + name] for name in own})
    return prefix
