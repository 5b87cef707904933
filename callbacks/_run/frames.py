"""What is kept of the steps of a run: their micro-batches, and snapshots of the state before them."""

from __future__ import annotations

import itertools
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from normzoo.callbacks._run.batches import HostTensor, checksums, hexadecimal
from normzoo.callbacks._run.facts import Run, plain_name
from normzoo.callbacks._run.gradients import local_values
from normzoo.callbacks._run.isolation import HostCopies, Snapshot
from normzoo.callbacks._run.ranks import Reading, is_sharded

MOST_OF_A_STEP = 1024  # micro-batches that are kept of one step


@dataclass
class MicroBatch:
    """What is kept of a micro-batch; see :meth:`tree`."""

    place: dict[str, Any]
    streams: dict[str, Any]
    batch: Any = None
    nbytes: int = 0  # of the batch
    ids: list[Any] | None = None
    checksums: list[Reading] | None = None
    losses: list[float] = field(default_factory=list)
    scale: float | None = None
    arrived: torch.cuda.Event | None = None  # of a copy from a GPU

    def keep(self, batch: Any, nbytes: int, device: torch.device) -> None:
        """Take in a copy of the batch, which may be on its way from the device."""
        self.batch, self.nbytes = batch, nbytes
        if device.type == "cuda":
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def tree(self) -> dict[str, Any]:
        """For the capsule."""
        return {
            **self.place,
            "losses": self.losses,
            "batch": apply_to_collection(self.batch, HostTensor, lambda copied: copied.value),
            "ids": self.ids,
            "hash": " ".join(hexadecimal(c.read()) for c in self.checksums) if self.checksums is not None else None,
            "random": self.streams,
        }


@dataclass
class Frame:
    """One step: from the first of its micro-batches to the optimizer's update."""

    step: int
    hyperparameters: list[list[dict[str, Any]]]
    group_sizes: list[list[int]]  # the number of parameters in each group of each optimizer
    micro_batches: deque[MicroBatch] = field(default_factory=deque)
    count: int = 0  # of micro-batches, also of those that are not kept
    norms: list[dict[str, Any]] = field(default_factory=list)
    saved: SavedState | None = None  # the state before it
    began: float = field(default_factory=time.monotonic)

    def append(self, micro: MicroBatch) -> None:
        """Take in a micro-batch, in the place of the first one if there are too many."""
        self.count += 1
        self.micro_batches.append(micro)
        if len(self.micro_batches) > MOST_OF_A_STEP:
            self.micro_batches.popleft()

    def wait(self) -> None:
        """Wait until what is on its way from a GPU has arrived."""
        for event in (micro.arrived for micro in self.micro_batches):
            if event is not None:
                event.synchronize()
        if self.saved is not None:
            self.saved.copies.wait()

    def tree(self) -> dict[str, Any]:
        """For the capsule."""
        scales = [m.scale for m in self.micro_batches if m.scale is not None]
        return {
            "step": self.step,
            "epoch": self.micro_batches[0].place["epoch"] if self.micro_batches else None,
            "hyperparameters": self.hyperparameters,
            "norms": self.norms,
            "scale": scales[-1] if scales else None,
            "micro_batches": [m.tree() for m in self.micro_batches],
        }


def snapshot_of(frame: Frame) -> SavedState:
    """The snapshot of a frame that has one."""
    assert frame.saved is not None
    return frame.saved


class SavedState:
    """A snapshot of a run's state in host memory.

    Args:
        run: whose state it is.
        free: copies whose memory may be used again.
    """

    def __init__(self, run: Run, free: HostCopies | None) -> None:
        self.step = run.step
        self.copies = HostCopies(free)
        self._gradients = [(p, None if p.grad is None else self.copies.copy(p.grad)) for p in _carrying(run)]
        self.all = Snapshot(
            run.module, beside_the_module(run), copies=self.copies, gradients=False, apart=hooks_of_optimizers(run)
        )
        tensors = module_tensors(run)
        self._placements = {name: str(t.placements) for name, t in tensors.items() if is_sharded(t)}  # type: ignore[attr-defined]
        state = {
            "module": tensors,
            "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
            "trainer": run.state(),
        }
        self._tree = apply_to_collection(state, Tensor, self.copies.copy)
        self.copies.complete()

    @property
    def nbytes(self) -> int:
        """The memory that it takes."""
        return self.copies.nbytes + self.all.nbytes_of_arrays

    def restore(self, run: Run) -> None:
        """Put the run back to where it was."""
        self.copies.wait()
        self.all.restore()
        for p in leaves_with_gradients(run):
            p.grad = None
        for p, values in self._gradients:
            p.grad = None if values is None else _gradient_of(p, values)

    def tree(self) -> dict[str, Any]:
        """For the capsule."""
        about = {"step": self.step, "placements": self._placements, "checksums": checksums(self._tree["module"])}
        return {**about, **self._tree}


def size_of_state(run: Run) -> int:
    """Bytes of parameters, buffers and optimizer states of this rank; without states yet, what is usual."""
    size = sum(local_values(t.detach()).nbytes for t in module_tensors(run).values())
    for optimizer in run.optimizers:
        states = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        if states:
            size += sum(local_values(v.detach()).nbytes for v in states)
            continue
        for group in optimizer.param_groups:  # Adam keeps two moments, SGD with momentum one buffer
            copies = 2 if "betas" in group else 1 if group.get("momentum") or "lr_decay" in group else 0
            size += copies * sum(local_values(p.detach()).nbytes for p in group["params"] if not is_lazy(p))
    return size


def hyperparameters(optimizer: Optimizer) -> list[dict[str, Any]]:
    """What an optimizer's groups hold beside parameters."""
    return [
        {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in group.items() if k != "params"}
        for group in optimizer.param_groups
    ]


def module_tensors(run: Run) -> dict[str, Tensor]:
    """Parameters and all buffers, by name."""
    both = itertools.chain(run.module.named_parameters(), run.module.named_buffers())
    return {plain_name(name): t for name, t in both if not is_lazy(t)}


def is_complete(run: Run) -> bool:
    """Whether all parameters have values, which those of lazy modules have after their first batch."""
    return not any(map(is_lazy, itertools.chain(run.module.parameters(), run.module.buffers())))


def beside_the_module(run: Run) -> list[Any]:
    """What a step may move beside the module."""
    scaler = [vars(run.scaler)] if run.scaler is not None else []
    return [*map(vars, run.optimizers), *scaler, *map(vars, run.schedulers)]


def leaves_with_gradients(run: Run) -> list[Tensor]:
    """What may have gradients: the parameters of the module and of the optimizers, each once."""
    optimized = (p for o in run.optimizers for group in o.param_groups for p in group["params"])
    return [*dict.fromkeys(itertools.chain(run.module.parameters(), optimized))]


def _carrying(run: Run) -> list[Tensor]:
    """Parameters whose gradients a step may find from those before, as only the code of the user drops them."""
    optimized = {id(p) for o in run.optimizers for group in o.param_groups for p in group["params"]}
    return [p for p in leaves_with_gradients(run) if not run.automatic or id(p) not in optimized]


def _gradient_of(p: Tensor, values: Tensor) -> Tensor:
    """A gradient of a parameter, of the values that this rank had."""
    if values.layout != torch.strided:
        return values.to(p.device)
    gradient = torch.empty_like(p, dtype=values.dtype, requires_grad=False)
    local_values(gradient).copy_(values)
    return gradient


def hooks_of_optimizers(run: Run) -> list[Any]:
    """Where optimizers keep their hooks, which come and go with measurements."""
    return [hooks for optimizer in run.optimizers for name, hooks in vars(optimizer).items() if name.endswith("_hooks")]
