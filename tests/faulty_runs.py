"""Fits that are broken on purpose, on one rank or several; importable in processes that tests start."""

from __future__ import annotations

import errno
import json
import os
import pkgutil
import resource
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from callbacks_small import trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from perturbation import every_callback, snapshot
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchmetrics import MeanMetric

from normzoo.callbacks import (
    Divergence,
    Flag,
    GradientNorm,
    GradientNotFinite,
    LossAbove,
    Raise,
    Record,
    Recorder,
    Rule,
    Seen,
    SkippedSteps,
    Stop,
    recorder,
)
from normzoo.callbacks._run import rerun
from normzoo.testing import FaultInjector

AT, EVERY, EPOCH, STEPS = 6, 3, 4, 12  # the faulty step; steps between snapshots, of an epoch, of a fit
BATCH = 4  # samples of a micro-batch
PATIENCE = 0.5  # seconds that ranks wait for each other's files
ACTIONS = {"record": Record, "stop": Stop, "raise": Raise}


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


class FaultyNet(pl.LightningModule):
    """A network in which no norm shields the loss from large values; it draws random numbers, counts and logs.

    Args:
        sharded: by ``fully_shard``.
        several: two optimizers, under manual optimization.
    """

    def __init__(self, sharded: bool = False, several: bool = False) -> None:
        super().__init__()
        self.sharded, self.automatic_optimization = sharded, not several
        # Under fully_shard each rank has running statistics of its own, and a checkpoint those of the first
        self.first, self.norm = nn.Linear(6, 8), nn.LayerNorm(8) if sharded else nn.BatchNorm1d(8)
        self.tail, self.head = nn.Linear(8, 1), nn.Linear(8, 1)
        self.mean = MeanMetric()
        self.calls = 0

    def configure_model(self) -> None:
        if self.sharded and not hasattr(self.first, "reshard"):
            for part in (self.first, self.norm, self.tail, self.head):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        x, y = batch
        if batch_idx == 0:  # of a resumed run as well, whose streams nobody has saved
            torch.manual_seed(100 * self.current_epoch + self.global_rank)
        h = self.first(x + 0.01 * torch.randn_like(x))
        loss = F.mse_loss(self.head(torch.relu(h)) + self.tail(self.norm(h)), y)
        self.mean(loss.detach())
        self.calls += 1
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        if self.automatic_optimization:
            return loss
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        return {"loss": loss.detach()}

    def configure_optimizers(self) -> Any:
        if self.automatic_optimization:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.9)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
        halves = ((self.first, self.norm), (self.tail, self.head))
        return [torch.optim.SGD([p for m in half for p in m.parameters()], lr=1e-2, momentum=0.9) for half in halves]


def samples(accumulation: int, ranks: int) -> TensorDataset:
    """Those of an epoch."""
    x = torch.randn(EPOCH * accumulation * BATCH * ranks, 6, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, x.sum(1, keepdim=True))


def batches_of(step: int, of_rank: int, accumulation: int, ranks: int) -> list[list[Tensor]]:
    """The micro-batches of a step on a rank."""
    own = [t[of_rank::ranks] for t in samples(accumulation, ranks).tensors]
    places = range(step % EPOCH * accumulation, (step % EPOCH + 1) * accumulation)
    return [[t[BATCH * i : BATCH * (i + 1)] for t in own] for i in places]


class Witness(pl.Callback):
    """Writes the losses of this rank, [step, loss], whatever becomes of the run."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / f"losses{rank()}.json"
        self.losses: list[list[float]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append([self.step, float(outputs["loss"]) * trainer.accumulate_grad_batches])
        self.path.write_text(json.dumps(self.losses))


class At(Rule):
    """Flags a step of a healthy run."""

    def judge(self, seen: Seen) -> Flag | None:
        return Flag("at", 0.0) if seen.step == AT else None


class FullDisk(pl.Callback):
    """From the first batch on no file can grow beyond a size, which fails as on a full disk."""

    def __init__(self, size: int) -> None:
        self.size = size

    def on_train_batch_start(self, *_: Any) -> None:
        _limit_files(self.size)


def _limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def fit(
    folder: Path,
    how: str = "ddp",
    *,
    watched: bool = True,
    every: bool = False,
    alarm: bool = False,
    action: str = "record",
    threshold: float = 1e3,
    accumulation: int = 1,
    scaled: bool = False,
    several: bool = False,
    resumed: bool = False,
    fault: str | None = None,
    point: str | None = None,
    killed: str | None = None,
    failing: str | None = None,
    disk: int | None = None,
    memory: int | None = None,
    ranks: list[int] | None = None,
) -> None:
    """A fit, after which each rank writes what is left.

    Args:
        folder: of the run.
        how: ``"ddp"``, ``"fsdp"``, or ``"one"`` for a single process.
        watched: by ``Divergence`` and ``GradientNorm``.
        every: by all other measurements as well.
        alarm: at a step of a healthy run.
        action: at an alarm.
        threshold: of losses.
        accumulation: micro-batches of a step.
        scaled: float16, under a GradScaler.
        several: optimizers.
        resumed: from the last checkpoint.
        fault: of ``FAULTS``, on ``ranks``.
        point: where it happens.
        killed: a function, ``MODULE.NAME``, in which the process is killed on ``ranks``.
        failing: a function that raises an error on ``ranks``.
        disk: size to which files can grow on ``ranks``.
        memory: that the recorder may take on ``ranks``.
        ranks: that are broken; none by default.
    """
    broken = rank() in (ranks or ())
    folder.mkdir(parents=True, exist_ok=True)
    recorder.PATIENCE = rerun.PATIENCE = PATIENCE
    if broken and killed is not None:
        _replace(killed, _die)
    if broken and failing is not None:
        _replace(failing, _fail)
    checkpoints = folder / "checkpoints"
    newest = max(checkpoints.glob("*.ckpt"), key=lambda path: path.stat().st_mtime) if resumed else None
    callbacks: list[Any] = [Witness(folder), ModelCheckpoint(checkpoints, save_top_k=-1, save_on_train_epoch_end=True)]
    if fault is not None:
        callbacks.insert(0, FaultInjector(fault, step=AT, ranks=ranks, point=point))
    if broken and disk is not None:
        callbacks.append(FullDisk(disk))
    if every:
        measurements = [c for c in every_callback(several=world() > 1) if not isinstance(c, Divergence)]
        callbacks += [c for c in measurements if how != "fsdp" or c.shards]
    rules = [LossAbove(threshold), GradientNotFinite(), SkippedSteps(), *([At()] if alarm else [])]
    ring = Recorder(EVERY, max_memory=memory if broken else None)
    divergence = Divergence(rules=rules, action=ACTIONS[action](), recorder=ring)
    if watched:
        callbacks += [GradientNorm(), divergence]
    strategies: dict[str, Any] = {
        "one": lambda: "auto",
        # Four ranks sum in another order once DDP has put gradients into other buckets, which it then does not
        "ddp": lambda: DDPStrategy(process_group_backend="gloo", find_unused_parameters=world() > 2),
        "fsdp": lambda: ModelParallelStrategy(world(), 1, process_group_backend="gloo"),
    }
    made = trainer(
        str(folder),
        callbacks=callbacks,
        strategy=strategies[how](),
        devices=world(),
        max_steps=-1,
        max_epochs=STEPS // EPOCH,
        accumulate_grad_batches=accumulation,
        plugins=MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu")) if scaled else None,
        enable_checkpointing=True,
        use_distributed_sampler=False,  # it would shuffle
    )
    pl.seed_everything(0, verbose=False)
    net = FaultyNet(how == "fsdp", several)
    of_epoch = samples(accumulation, world())
    own = Subset(of_epoch, range(rank(), len(of_epoch), world()))
    try:
        made.fit(net, DataLoader(own, BATCH), ckpt_path=newest, weights_only=False)
    finally:
        _limit_files(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    torch.save({"state": snapshot(made, net), "verdict": divergence.state_dict()}, folder / f"left{rank()}.pt")


def _replace(place: str, function: Any) -> None:
    owner, name = place.rsplit(".", 1)
    setattr(pkgutil.resolve_name(owner), name, function)


def _die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _fail(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def fits(folder: str, plans: str) -> None:
    """Fits, one after the other in the same processes: a dictionary, as JSON, of the options of each by its name."""
    for name, plan in json.loads(plans).items():
        fit(Path(folder) / name, **plan)
