"""Modules of the kinds that users write, which a callback could disturb or be disturbed by."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from callbacks_small import images
from lightning.pytorch.loggers.logger import Logger
from perturbation import CellNet
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC, MulticlassF1Score, MulticlassPrecision

from normzoo import create_norm


class SmallGAN(pl.LightningModule):
    """Manual optimization of a generator and a discriminator with batch norm and dropout, in turn."""

    def __init__(self, toggle: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.toggle = toggle
        self.net_g = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 64))
        self.net_d = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 1))
        self.mean_loss = MeanMetric()
        self.losses: list[float] = []

    def turn(self, optimizer: Any, loss: Any) -> Tensor:
        if self.toggle:
            self.toggle_optimizer(optimizer)
        value = loss()
        optimizer.zero_grad()
        self.manual_backward(value)
        self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
        optimizer.step()
        if self.toggle:
            self.untoggle_optimizer(optimizer)
        return value.detach()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        real = batch[0].flatten(1)
        for_generator, for_discriminator = self.optimizers()
        fake = self.net_g(torch.randn(len(real), 4))
        d_loss = self.turn(for_discriminator, lambda: gan_loss(self, real, fake.detach()))
        g_loss = self.turn(for_generator, lambda: -self.net_d(fake).mean())
        self.mean_loss(g_loss)
        self.losses += [d_loss.item(), g_loss.item()]
        self.log_dict({"d": d_loss, "g": g_loss}, on_step=True, on_epoch=True)
        self.log("mean", self.mean_loss)
        return {"loss": d_loss}

    def configure_optimizers(self) -> Any:
        generator = torch.optim.AdamW(self.net_g.parameters(), lr=1e-2)
        discriminator = torch.optim.SGD(self.net_d.parameters(), lr=1e-2, momentum=0.9)
        schedulers = [torch.optim.lr_scheduler.StepLR(o, 3) for o in (generator, discriminator)]
        return [generator, discriminator], schedulers


def gan_loss(module: SmallGAN, real: Tensor, fake: Tensor) -> Tensor:
    return F.softplus(module.net_d(fake)).mean() + F.softplus(-module.net_d(real)).mean()


def gan_loss_of_a_batch(module: SmallGAN, batch: tuple[Tensor, Tensor]) -> Tensor:
    """What RelativeLoss is given: draws, updates running statistics, logs and calls a metric."""
    real = batch[0].flatten(1)
    loss = gan_loss(module, real, module.net_g(torch.randn(len(real), 4)))
    module.mean_loss(loss)
    module.log("mean", module.mean_loss)
    return loss


class MetricsNet(CellNet):
    """Metrics that share their state, that keep lists, that are wrapped in a plain dict, logged as objects."""

    def __init__(self) -> None:
        super().__init__()
        self.together = MetricCollection([MulticlassF1Score(4), MulticlassPrecision(4), MulticlassAccuracy(4)])
        self.loss_mean, self.area = MeanMetric(), MulticlassAUROC(4, thresholds=None)
        self.unregistered = {"accuracy": MulticlassAccuracy(4)}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        logits = self.net(x)
        loss = F.cross_entropy(logits, y)
        self.together.update(logits, y)
        self.loss_mean(loss)
        self.area.update(logits.softmax(1), y)
        self.unregistered["accuracy"](logits, y)
        self.log_dict(self.together, on_step=False, on_epoch=True)
        self.log("loss_mean", self.loss_mean, on_step=True, on_epoch=True)
        self.log("area", self.area, on_step=False, on_epoch=True)
        self.losses.append(self.unregistered["accuracy"].compute().item())
        return loss


@dataclass
class Tally:
    total: float = 0.0
    last: Tensor | None = None


class KeepingNet(CellNet):
    """Keeps state in every way there is, and makes the result depend on it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(4))
        self.own_stream = torch.Generator().manual_seed(1)
        self.own_numpy, self.own_random = np.random.default_rng(1), random.Random(1)
        self.counts: dict[int, int] = defaultdict(int)
        self.counter: Counter[int] = Counter()
        self.nested: dict[str, list[Tensor]] = {"queue": [torch.zeros(4)]}
        self.array, self.tally = np.zeros(4), Tally()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        x += 0.1 * torch.randn(x.shape, generator=self.own_stream)  # in the batch itself
        logits = self.net(x * self.own_numpy.uniform(0.9, 1.1) + self.own_random.random() / 10)
        self.average = 0.9 * self.average + 0.1 * logits.detach().mean(0)  # another tensor in its place
        self.nested["queue"][0].mul_(0.9).add_(logits.detach().mean(0))
        self.nested["queue"].append(logits.detach()[0])
        self.counts[int(y[0])] += 1
        self.counter.update(y.tolist())
        self.array += logits.detach().mean(0).numpy()
        self.tally.total += 1
        self.tally.last = self.nested["queue"][-1]
        self.losses += [*self.counts.values(), *self.counter.values(), *self.array.tolist(), self.tally.total]
        self.losses += [float(t.sum()) for t in self.nested["queue"]]
        target = self.average + self.nested["queue"][0] + 0.1 * self.tally.last + sum(self.losses) / 1e6
        loss = F.cross_entropy(logits, y) + 0.1 * (logits.mean(0) - target).square().mean()
        self.log("loss", loss, on_epoch=True)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: list[Tensor], batch_idx: int) -> None:
        self.losses.append(float(batch[0].sum()))


class ReparametrizedNet(CellNet):
    """Spectral norm, whose power iteration is state; tied weights; a checkpointed segment; a recurrent layer."""

    def __init__(self) -> None:
        super().__init__("adamw")
        self.first = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))
        self.again = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.again.weight
        self.frozen = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)).requires_grad_(False)
        self.recurrent = nn.LSTM(8, 4, num_layers=2, dropout=0.2, batch_first=True)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x = self.first(batch[0][:, 0])
        x = x + checkpoint(lambda x: F.dropout(self.tied(self.again(x)), 0.2), x, use_reentrant=False)
        logits = self.recurrent(self.frozen(x))[0][:, -1]
        self.losses.append(float(logits.detach().sum()))
        return F.cross_entropy(logits, batch[1])


class ValidatedNet(CellNet):
    """Has losses and metrics of validation, test and prediction, with draws in them."""

    def __init__(self) -> None:
        super().__init__(layer="batch")
        self.validation_accuracy = MulticlassAccuracy(4)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        logits = self.net(batch[0]) + 0.01 * torch.randn(4)
        self.validation_accuracy(logits, batch[1])
        self.log("val_loss", F.cross_entropy(logits, batch[1]))
        self.log("val_accuracy", self.validation_accuracy)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self.net(batch[0]), batch[1]) + torch.rand(()))

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0])


class FindableNet(CellNet):
    def __init__(self) -> None:
        super().__init__(layer="batch")
        self.lr = 0.1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def optimizers(module: CellNet, name: str) -> Any:
    first, last = list(module.net[0].parameters()), list(module.net[5].parameters())
    if name == "lbfgs":
        return torch.optim.LBFGS(
            module.parameters(), lr=0.005, max_iter=3
        )  # without a line search: larger ones may diverge
    if name == "groups":
        return torch.optim.SGD([{"params": first, "lr": 0.1}, {"params": last, "weight_decay": 0.1}], lr=0.01)
    if name == "plateau":
        sgd = torch.optim.SGD(module.parameters(), lr=0.1)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(sgd, patience=0, threshold=10.0)
        return {"optimizer": sgd, "lr_scheduler": {"scheduler": plateau, "monitor": "loss_epoch"}}
    if name == "cycle":
        adam = torch.optim.Adam(module.parameters(), lr=torch.tensor(1e-2))
        cycle = torch.optim.lr_scheduler.OneCycleLR(adam, 0.1, total_steps=20)
        return {"optimizer": adam, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, fused=True)


class OptimizedNet(CellNet):
    def __init__(self, name: str) -> None:
        super().__init__(layer="batch")
        self.name = name

    def configure_optimizers(self) -> Any:
        return optimizers(self, self.name)


class Resumable(CellNet):
    """Takes all that its steps depend on along in the checkpoint."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        streams = (torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False))
        checkpoint["own"] = (streams, list(self.losses), self.calls, self.mean.clone(), self.examples)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.streams, self.losses, self.calls, self.mean, examples = checkpoint["own"]
        self.examples.copy_(examples)

    def on_train_start(self) -> None:
        if hasattr(self, "streams"):
            torch.set_rng_state(self.streams[0])
            random.setstate(self.streams[1])
            np.random.set_state(self.streams[2])
            del self.streams


class Batches:
    """The same batches in each epoch, going on where a checkpoint was."""

    def __init__(self) -> None:
        self.batches, self.taken = list(DataLoader(images(24), batch_size=4)), 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        start, self.taken = self.taken % len(self), self.taken % len(self)
        for batch in self.batches[start:]:
            self.taken += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.taken = state["taken"]


class Augmented(Dataset):
    """Images with random noise from the worker's stream."""

    def __init__(self) -> None:
        self.images = images(24)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.images[index]
        return x + 0.1 * torch.randn(x.shape), y


class Memory(Logger):
    """A logger of the user's own, which is asked for its hyperparameters and metrics only."""

    name, version = "memory", 0

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[dict[str, float], int | None]] = []

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to keep."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.seen.append((dict(metrics), step))


class SkippingNet(CellNet):
    """Returns no loss for some batches, and leaves some epochs early."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 4 and self.trainer.current_epoch % 2 else None

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx == 1 else loss


class PenalizedNet(CellNet):
    """Differentiates inside of its step."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        with torch.enable_grad():
            x = batch[0].clone().requires_grad_(True)
            loss = F.cross_entropy(self.net(x), batch[1])
            (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        return loss + gradient.square().sum()


class CompilableNet(CellNet):
    """With nothing in its step that breaks a graph or asks for another one."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss


class Adversarial(CellNet):
    """Trains on images moved along their gradient, which it leaves on the batch itself; after a change in place."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        x.sub_(0.1)
        with torch.enable_grad():
            x.requires_grad_(True)
            F.cross_entropy(self.net(x), y).backward(inputs=[x])
        assert x.grad is not None
        return F.cross_entropy(self.net(x.detach() + 0.1 * x.grad), y)


class AverageOfWeights:
    """No module, and holds one; counts and keeps an average of its weights."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module, self.count = module, 0
        self.average = {k: p.detach().clone() for k, p in module.named_parameters()}

    def update(self) -> None:
        self.count += 1
        for k, p in self.module.named_parameters():
            self.average[k].lerp_(p.detach(), 0.1)


class Averaged(CellNet):
    """Moves an average of its weights in each step, and trains towards it."""

    def __init__(self) -> None:
        super().__init__()
        self.ema = AverageOfWeights(self.net)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.ema.update()
        off = sum((p - self.ema.average[k]).square().sum() for k, p in self.net.named_parameters())
        return F.cross_entropy(self.net(batch[0]), batch[1]) + 0.01 * off * self.ema.count


class InPlace(CellNet):
    """Takes its batch apart, and changes the images where they are; each time it would do so gives another loss."""

    def __init__(self) -> None:
        super().__init__(layer="batch")

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        y, x = batch.pop("y"), batch["x"]
        x -= 0.5
        x.abs_()
        loss = F.cross_entropy(self.net(x), y)
        self.losses.append(loss.item())
        return loss


class SynchronizedNet(CellNet):
    """Its statistics are those of all ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.net[1] = create_norm("batch", 4, sync=True)
