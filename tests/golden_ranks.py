"""The golden fits of two ranks on gloo, all in one start of two processes."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from golden_files import Golden, read, write
from golden_fits import FEW, RANKS, SOURCES, Memory, Run, quiet
from golden_nets import Net, batch_loss, images, linear
from lightning.pytorch.strategies import ModelParallelStrategy
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import normzoo
from normzoo.callbacks import (
    ChannelMoments,
    Divergence,
    GradientNoise,
    GradientTails,
    LossAbove,
    LossSpike,
    RelativeLoss,
    Stop,
)

DEADLINE = 240  # seconds
STEPS = 5
SIZES = [7, 1, 3, 5]  # samples of the micro-batches of a step, two on each rank
SCRIPT = """
import os, sys
sys.path.insert(0, os.environ["TESTS"])
import golden_ranks
golden_ranks.run_all(sys.argv[1])
"""


def rank() -> int:
    return int(os.environ["RANK"])


class Parted(Net):
    """A linear network whose parameters are shared out over the ranks in the way asked for."""

    def __init__(self, how: str) -> None:
        super().__init__("momentum", nn.Identity())
        self.how, self.rare = how, nn.Identity()

    def configure_model(self) -> None:
        if not isinstance(self.net, nn.Identity):
            return
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Flatten(), nn.Linear(36, 9), nn.LayerNorm(9), nn.Tanh(), nn.Linear(9, 8), nn.Linear(8, 4)
        )
        if self.how == "sharded":
            mesh = self.device_mesh["data_parallel"]
            fully_shard(net[1], mesh=mesh)
            fully_shard(net, mesh=mesh)
        elif self.how == "split":
            plan = {"4": ColwiseParallel(), "5": RowwiseParallel()}
            parallelize_module(net, self.device_mesh["tensor_parallel"], plan)
        self.net = net

    def loss(self, batch: Any) -> Tensor:
        if len(batch[0]) == 1:  # on the first rank only
            self.rare(batch[0])
        return batch_loss(self, batch)

    def configure_optimizers(self) -> Any:
        # foreach does not mix parameters that are split with others
        return torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.1, foreach=False)


def uneven(alike: bool = False) -> DataLoader[Any]:
    """The micro-batches of this rank, or the same on both."""
    ends = [sum(SIZES[:i]) for i in range(len(SIZES) + 1)]
    mine = range(2) if alike else range(2 * rank(), 2 * rank() + 2)
    sampler = [
        list(range(step * ends[-1] + ends[i], step * ends[-1] + ends[i + 1])) for step in range(STEPS) for i in mine
    ]
    return DataLoader(images(STEPS * ends[-1]), batch_sampler=sampler)


def lightning(run: Run, how: str, *callbacks: Any, module: Net | None = None, **options: Any) -> None:
    strategy: Any = "ddp"
    if how != "whole":
        sizes = (RANKS, 1) if how == "sharded" else (1, RANKS)
        strategy = ModelParallelStrategy(*sizes, process_group_backend="gloo")
    options = {"accumulate_grad_batches": 2, "max_steps": STEPS, "use_distributed_sampler": False, **options}
    trainer = run.trainer(*callbacks, strategy=strategy, devices=RANKS, num_sanity_val_steps=0, **options)
    trainer.fit(Parted(how) if module is None else module, uneven(alike=how == "split"))
    run.states["end"] = {f"{type(c).__name__} {i}": c.state_dict() for i, c in enumerate(callbacks)}


def ddp(run: Run) -> None:
    lightning(
        run,
        "whole",
        GradientTails(2, of=SOURCES),
        GradientTails(2, by="module", budget=None, label="module"),
        RelativeLoss(2, multiples=FEW),
        Divergence(rules=[LossAbove(), LossSpike(5.0, window=3)]),
        ChannelMoments(2, sites=["norms", "net.4", "rare"], where="both"),
        GradientNoise(2, population=80, factor="(N-b)/N"),
        GradientNoise(2, split=2, label="split"),
    )


def ddp_diverges(run: Run) -> None:
    """On the last rank, which stops both."""
    planted = {3: 2e3} if rank() == RANKS - 1 else {}
    tails = GradientTails(1, of=["gradient", "noise"], budget=16)
    lightning(
        run,
        "whole",
        Divergence(action=Stop(None)),
        tails,
        module=Net("plain", linear(), planted=planted),
        accumulate_grad_batches=1,
    )


def parted(how: str) -> Callable[[Run], None]:
    def run_it(run: Run) -> None:
        lightning(
            run,
            how,
            GradientTails(2, of=["gradient", "update"]),
            GradientTails(2, budget=16, by="parameter", label="budget"),
            RelativeLoss(2, multiples=FEW),
            RelativeLoss(2, multiples=FEW, along="gradient", label="gradient"),
        )

    return run_it


def watch(run: Run, *callbacks: Any, wrap: Callable[[nn.Module], nn.Module], planted: float = 0.0) -> None:
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    model = wrap(linear())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    data = images(8 * STEPS * RANKS)
    with normzoo.watch(model, optimizer, *callbacks, dirpath=run.path("log"), logger=Memory(run.writer)) as watching:
        for step in range(STEPS):
            start = 8 * (RANKS * step + rank())
            batch = data[start : start + 8]
            optimizer.zero_grad()
            loss = batch_loss(model, batch)
            loss.backward()
            watching.batch(batch)
            watching.loss(loss + (planted if step == 2 and rank() == 1 else 0.0))
            if watching.should_stop:
                break
            optimizer.step()
        run.states["inside"] = watching.state_dict()
    run.states["end"] = watching.state_dict()


def watch_ddp(run: Run) -> None:
    watch(
        run,
        GradientTails(2, of=["gradient", "update"]),
        ChannelMoments(2, where="both"),
        RelativeLoss(2, multiples=FEW, loss=batch_loss),
        Divergence(action=Stop(None)),
        wrap=DistributedDataParallel,
        planted=2e3,
    )


def watch_sharded(run: Run) -> None:
    def wrap(model: nn.Module) -> nn.Module:
        return fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))

    relative = RelativeLoss(2, multiples=FEW, loss=batch_loss)
    watch(run, GradientTails(2, of=["gradient", "update"]), relative, wrap=wrap)


FITS: dict[str, Callable[[Run], None]] = {
    "ranks/ddp": ddp,
    "ranks/ddp_diverges": ddp_diverges,
    "ranks/sharded": parted("sharded"),
    "ranks/tensor_parallel": parted("split"),
    "ranks/watch_ddp": watch_ddp,
    "ranks/watch_sharded": watch_sharded,
}


def run_all(folder: str) -> None:
    """On each of the ranks: rank zero leaves the records and what was logged, all leave their callbacks' states."""
    golden: Golden = {}
    for name, fit in FITS.items():
        with quiet():
            torch.manual_seed(1)
            run = Run(Path(folder) / name)
            run.folder.mkdir(parents=True, exist_ok=True)
            fit(run)
            golden[name] = run.recorded_states() if rank() else run.recording()
    write(Path(folder) / f"rank{rank()}.npz", golden)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def record_ranks(folder: Path) -> Golden:
    """Of all ranks, with the rank in front of each path."""
    run_ranks(folder, SCRIPT, RANKS, str(folder), deadline=DEADLINE)
    files = [read(folder / f"rank{r}.npz")[1] for r in range(RANKS)]
    return {name: {f"rank{r}/{path}": s for r, f in enumerate(files) for path, s in f[name].items()} for name in FITS}
