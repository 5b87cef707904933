"""The steps that a capsule holds, as a job of as many or fewer processes replays them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from normzoo.capsules import Capsule
from normzoo.capsules.tree import LeftOut


class ReplayError(ValueError):
    """A capsule cannot be replayed; the message says why, and what would help."""


@dataclass(frozen=True)
class RecordedStep:
    """One step of a capsule.

    Args:
        step: optimizer steps made before it.
        losses: for each micro-batch the losses of all ranks; None where they are not known.
        norm: of the gradient of the first optimizer, before clipping; None if it is not known.
        lr: learning rate of the first parameter group of the first optimizer.
        scale: of the GradScaler; None without one.
        hyperparameters: of each optimizer and parameter group.
        micro_batches: as they stand in the capsule, in the order in which this process trains on them.
        rank_of: the rank that each of these was on.
        complete: whether it is known to have all of its micro-batches.
    """

    step: int
    losses: list[list[float | None]]
    norm: float | None
    lr: float | None
    scale: float | None
    hyperparameters: list[list[dict[str, Any]]]
    micro_batches: list[dict[str, Any]] = field(repr=False)
    rank_of: list[int]
    complete: bool


def recorded_steps(
    capsule: Capsule, ranks: Sequence[int], batches: Callable[[list[Any]], Any] | None = None
) -> list[RecordedStep]:
    """The steps of a capsule with the micro-batches of some ranks, in order.

    Args:
        capsule: whose frames these are.
        ranks: whose micro-batches one process trains on; those of several stand one after the other, micro-batch by
            micro-batch.
        batches: makes a batch from the ids of its samples, for a capsule that holds these in its place.
    """
    frames = {rank: {frame["step"]: frame for frame in capsule.tree(rank)["frames"]} for rank in ranks}
    common = set.intersection(*(set(of_rank) for of_rank in frames.values()))
    return [
        _recorded_step([frames[rank][step] for rank in ranks], ranks, int(capsule.about["ranks"]), batches)
        for step in sorted(common)
    ]


def _recorded_step(
    frames: Sequence[dict[str, Any]], ranks: Sequence[int], of_run: int, batches: Callable[[list[Any]], Any] | None
) -> RecordedStep:
    first = frames[0]
    count = min(len(frame["micro_batches"]) for frame in frames)
    micro_batches = []
    for place in range(count):
        for frame in frames:
            micro = dict(frame["micro_batches"][place])
            if micro.get("batch") is None and micro.get("ids") and batches is not None:
                micro["batch"] = batches(list(micro["ids"]))
            micro_batches.append(micro)
    norms = [row for row in first.get("norms") or [] if not row.get("of") and not row.get("optimizer")]
    groups = first.get("hyperparameters") or [[{}]]
    lr = groups[0][0].get("lr") if groups[0] else None
    last = first["micro_batches"][count - 1] if count else {}
    return RecordedStep(
        step=int(first["step"]),
        losses=[list(micro["losses"]) or [None] * of_run for micro in first["micro_batches"][:count]],
        norm=norms[0].get("norm") if norms else None,
        lr=None if lr is None else float(lr),
        scale=first.get("scale"),
        hyperparameters=first.get("hyperparameters") or [],
        micro_batches=micro_batches,
        rank_of=list(ranks) * count,
        complete=bool(count) and bool(last.get("is_last") or count >= (last.get("accumulation") or 1)),
    )


def why_no_batches(steps: Sequence[RecordedStep]) -> str:
    """Why the micro-batches of steps cannot be trained on again, for people; empty if they can."""
    for recorded in steps:
        for micro in recorded.micro_batches:
            if isinstance(micro.get("batch"), LeftOut):
                return f"the batch of step {recorded.step} was left out: {micro['batch'].reason}"
            if micro.get("batch") is None:
                ids = micro.get("ids") is not None
                instead = "the ids of its samples" if ids else "a checksum of it"
                advice = (
                    "pass batches=, a function that makes a batch from a list of ids"
                    if ids
                    else ("give Recorder more max_memory or fewer steps, or its loader a RecordingBatchSampler")
                )
                return f"the capsule has {instead} in the place of the batch of step {recorded.step}; {advice}"
            if any(isinstance(leaf, LeftOut) for leaf in tree_leaves(micro["batch"])):
                return f"parts of the batch of step {recorded.step} were left out"
    return ""


def on_device(batch: Any, device: torch.device) -> Any:
    """A copy of a batch of a capsule on a device, whose tensors are leaves."""

    def copied(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.detach().to(device, copy=True).requires_grad_(leaf.requires_grad)

    return tree_map(copied, batch)
