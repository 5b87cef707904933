"""Test accuracy by statistics of the batch and by running averages, and what training on running averages does."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normzoo.experiments._batches import training_batches
from normzoo.experiments.experiment import Column, Experiment, Figure
from normzoo.functional import update_running
from normzoo.statistics import reestimate_statistics

_BATCH, _RUNNING, _FROZEN, _AGAIN = "batch statistics", "running averages", "frozen averages", "re-estimated averages"
TRAININGS = (_BATCH, _RUNNING, _FROZEN)
_DIVERGED = 1e3  # the loss of a mini-batch beyond which Bjorck et al. 2018 call a run diverged
_LATER = 1_000_000  # epoch from which batches to re-estimate on are taken, after all that training may take


class RunningAverages(Experiment):
    """Why evaluation takes running averages, and training does not.

    The network is trained from the same initialization and on the same batches in three ways: normalized by statistics
    of the batch; by running averages, which start from those of the untrained network and move with each batch, but
    are constants to the gradient; and by averages that stay those of the untrained network, in evaluation mode. The
    learning rate falls linearly to 0.

    The network of the first way is then evaluated on the test images in batches of each size, drawn anew in each part,
    by statistics of the batch; by its running averages; and by averages over further training batches
    (:func:`normzoo.reestimate_statistics`), again drawn anew in each part.

    Args:
        data: gives batches of (images, labels) to train on, and to test on.
        task: the network, with batch normalization, and its optimizer.
        steps: optimizer steps of each training.
        batch_sizes: of test batches; each must divide the number of test images, so that all are of the same images.
        draws: how often test batches, and batches to re-estimate on, are drawn.
        reestimate_batches: training batches that statistics are re-estimated on.
        seed: of the draws.

    Raises:
        ValueError: for numbers below 1, a network without batch normalization, or with other layers that have running
            averages; before the first part, for batch sizes that do not divide the number of test images.

    Source: Bjorck et al. 2018, arXiv 1806.02375, on evaluation; Ioffe & Szegedy 2015, arXiv 1502.03167, section 3.1.
    """

    name = "running_averages"
    row = "a way to train and to evaluate, of one draw; or of some training steps their loss"
    columns = (
        Column("training", "text", "what the layers normalized by in training"),
        Column("evaluation", "text", "what the layers normalized by on the test images; empty in rows of the loss"),
        Column("draw", "int", "number of the draw of batches; none in rows of the loss"),
        Column("batch_size", "curve", "images in a test batch; first and last where the accuracy is that of all sizes"),
        Column("accuracy", "curve", "share of the test images that are classified rightly, for each batch size"),
        Column("training_step", "int", "optimizer steps made before the loss"),
        Column("loss", "float", "training loss, mean over the mini-batches since the last row; none if diverged"),
        Column("diverged", "int", "the step whose loss was beyond 1000 or not finite; none if there was none"),
    )
    figures = (
        Figure(
            "Test accuracy by batch size",
            "curve",
            x="batch_size",
            y="accuracy",
            lines=("training", "evaluation"),
            x_scale="log",
            x_label="images in a test batch",
            y_label="test accuracy",
        ),
        Figure(
            "Training loss of each way to normalize",
            "line",
            x="training_step",
            y="loss",
            lines=("training",),
            y_scale="log",
            x_label="optimizer steps",
            y_label="training loss",
        ),
    )

    def __init__(
        self,
        data: LightningDataModule,
        task: LightningModule,
        steps: int = 600,
        batch_sizes: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128, 256),
        draws: int = 10,
        reestimate_batches: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        for name, value in (("steps", steps), ("draws", draws), ("reestimate_batches", reestimate_batches)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if not batch_sizes or min(batch_sizes) < 1:
            raise ValueError(f"batch_sizes must be at least 1, not {[*batch_sizes]}")
        if not batch_norms(task):
            raise ValueError("the network has no batch normalization; give it some, as by model.norm=batch")
        self.data, self.task, self.steps, self.draws = data, task, steps, draws
        self.batch_sizes, self.reestimate_batches = sorted(batch_sizes), reestimate_batches

    def parts(self) -> list[dict[str, Any]]:
        """Each way to train; then each draw."""
        return [{"training": way} for way in TRAININGS] + [{"draw": i} for i in range(self.draws)]

    def prepare(self) -> None:
        """Load the test images, and train by statistics of the batch; the network is kept in the run's folder."""
        self.data.prepare_data()
        self.data.setup("test")
        batches = [*self.data.test_dataloader()]
        self.images, self.labels = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
        if odd := [b for b in self.batch_sizes if len(self.labels) % b]:
            raise ValueError(f"batch_sizes must divide the {len(self.labels)} test images, which {odd[0]} does not")
        self.trained = copy.deepcopy(self.task)
        kept = None if self.folder is None else self.folder / "trained.pt"
        if kept is not None and kept.exists():
            state = torch.load(kept, weights_only=True)
            self.trained.load_state_dict(state["network"])
            self.losses = state["losses"]
            return
        self.losses = [*self._train(self.trained, _BATCH)]
        if kept is not None:
            partial = kept.with_suffix(".part")
            torch.save({"network": self.trained.state_dict(), "losses": self.losses}, partial)
            partial.replace(kept)

    def rows(self, part: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The losses of a way to train, and its accuracy by running averages; or the accuracies of a draw."""
        if "draw" in part:
            yield from self._accuracies(part["draw"])
            return
        way, network = part["training"], self.trained
        losses = self.losses
        if way != _BATCH:
            network = copy.deepcopy(self.task)
            losses = [*self._train(network, way)]
        yield from losses
        if way != _BATCH:
            order = torch.arange(len(self.labels))
            yield self._row(way, _FROZEN if way == _FROZEN else _RUNNING, 0, *self._constant(network, order))

    def _accuracies(self, draw: int) -> Iterator[dict[str, Any]]:
        order = torch.randperm(len(self.labels))
        network = copy.deepcopy(self.trained).eval()
        yield self._row(_BATCH, _RUNNING, draw, *self._constant(network, order))
        reestimate_statistics(network, self._batches(_LATER + draw), num_batches=self.reestimate_batches)
        yield self._row(_BATCH, _AGAIN, draw, *self._constant(network, order))
        for layer in batch_norms(network):
            layer.train()
        accuracies = [self._accuracy(network, order, b) for b in self.batch_sizes]
        yield self._row(_BATCH, _BATCH, draw, self.batch_sizes, accuracies)

    def _constant(self, network: nn.Module, order: Tensor) -> tuple[list[int], list[float]]:
        """The accuracy of a network whose layers are in evaluation, which has it for all batch sizes."""
        accuracy = self._accuracy(network.eval(), order, self.batch_sizes[-1])
        return [self.batch_sizes[0], self.batch_sizes[-1]], [accuracy] * 2

    @torch.no_grad()
    def _accuracy(self, network: nn.Module, order: Tensor, batch_size: int) -> float:
        batches = order.split(batch_size)
        right = sum((network(self.images[i]).argmax(1) == self.labels[i]).sum().item() for i in batches)
        return right / len(self.labels)

    def _batches(self, epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Training batches without end, from an epoch on."""
        while True:
            yield from training_batches(self.data, epoch)
            epoch += 1

    def _train(self, network: LightningModule, way: str) -> Iterator[dict[str, Any]]:
        """Train a network, and yield the rows of its loss."""
        made: Any = network.configure_optimizers()
        optimizer = made["optimizer"] if isinstance(made, Mapping) else made
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, self.steps)
        every = max(1, self.steps // 50)
        recent: list[float] = []
        with _normalizing_by(network, way, self._batches(_LATER - 1), self.reestimate_batches):
            for step, (images, labels) in zip(range(self.steps), self._batches(), strict=False):
                loss = F.cross_entropy(network(images), labels)
                recent.append(loss.item())
                if not recent[-1] <= _DIVERGED:
                    yield self._loss(way, step, None, step)
                    return
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                if (step + 1) % every == 0:
                    yield self._loss(way, step, math.fsum(recent) / len(recent))
                    recent.clear()

    @staticmethod
    def _loss(way: str, step: int, loss: float | None, diverged: int | None = None) -> dict[str, Any]:
        nothing = {"evaluation": None, "draw": None, "batch_size": None, "accuracy": None}
        return {"training": f"trained on {way}", **nothing, "training_step": step, "loss": loss, "diverged": diverged}

    @staticmethod
    def _row(way: str, by: str, draw: int, sizes: Sequence[int], accuracies: Sequence[float]) -> dict[str, Any]:
        of_draw = {"draw": draw, "batch_size": [float(b) for b in sizes], "accuracy": [*accuracies]}
        about = {"training": f"trained on {way}", "evaluation": f"tested on {by}"}
        return {**about, **of_draw, "training_step": None, "loss": None, "diverged": None}


def batch_norms(network: nn.Module) -> list[_BatchNorm]:
    """The batch normalization layers of a network that keep running averages."""
    return [m for m in network.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


@contextlib.contextmanager
def _normalizing_by(network: nn.Module, way: str, batches: Iterator[Any], count: int) -> Iterator[None]:
    """Inside, the network trains, with its batch normalization by one of the three ways."""
    if way != _BATCH:
        reestimate_statistics(network, batches, num_batches=count)
    network.train()
    hooks = []
    for layer in batch_norms(network) if way != _BATCH else ():
        layer.eval()
        if way == _RUNNING:
            hooks.append(layer.register_forward_pre_hook(_move_averages))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _move_averages(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Move the running averages of a layer in evaluation by the batch that it is about to normalize."""
    assert isinstance(layer, _BatchNorm)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    variance, mean = torch.var_mean(inputs[0], [0, *range(2, inputs[0].ndim)])
    update_running(layer.running_mean, mean, layer.momentum or 0.1)
    update_running(layer.running_var, variance, layer.momentum or 0.1)
