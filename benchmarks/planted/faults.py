"""What is planted from outside of the module: samples unlike the others, and flipped bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from planted.images import Batch

Rows = int | Sequence[int]


def poisoned(batch: Batch, kind: str, rows: Rows, value: Any, net: Any, g: torch.Generator) -> Batch:
    """A batch of which some samples are others: the last ones, as many as ``rows``, or those of (first, end).

    Kinds: ``"scale"``, the first floating-point tensor times the value; ``"value"``, one number of it is the value;
    ``"target"``, the last tensor (or the one before of whole numbers) is the value; ``"weight"`` likewise of weights;
    ``"rare"``, one token of each is the value; ``"hard"``, samples of a harder kind; ``"noise"``, classes drawn anew.
    """
    parts = [x.clone() for x in batch]
    first = next((x for x in parts if x.is_floating_point()), parts[0])
    target = next((x for x in reversed(parts) if x.dtype == torch.long), parts[-1]) if kind == "label" else parts[-1]
    count = rows if isinstance(rows, int) else rows[1] - rows[0]
    which = slice(-rows, None) if isinstance(rows, int) else slice(*rows)
    if kind == "scale":
        first[which] *= value
    elif kind == "value":
        first[which].flatten(1)[:, 5 % first[0].numel()] = value
    elif kind in ("target", "weight"):
        parts[-1][which] = value
    elif kind == "label":
        target.flatten()[which] = value
    elif kind == "rare":
        parts[0][which, 4] = value
    elif kind == "hard":
        for part, other in zip(parts, net.samples(count, g, hard=True), strict=True):
            part[which] = other
    elif kind == "noise":
        parts[-1][which] = parts[-1][which][torch.randperm(count, generator=g)]
    else:
        raise ValueError(f"no poison {kind!r}")
    return tuple(parts)


class Flip(Callback):
    """Flips a bit of a value between two steps, as broken memory does.

    Args:
        flips: ``(kind, step, name, index, bit)`` each: kind is ``"parameter"`` or a name in the optimizer's state, and
            the value is the first one from the index on that becomes larger, of ``exp_avg_sq`` smaller.
        accumulation: micro-batches of a step.
    """

    def __init__(self, flips: tuple[tuple[Any, ...], ...], accumulation: int) -> None:
        self.flips, self.accumulation = flips, accumulation

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Flip the bits of this step."""
        for kind, step, name, index, bit in self.flips:
            if trainer.global_step == step and batch_idx % self.accumulation == 0:
                x = pl_module.net.get_parameter(name)
                x = x if kind == "parameter" else trainer.optimizers[0].state[x][kind]
                whole = x.detach().view(-1).view(torch.int32)
                falls = kind == "exp_avg_sq"  # whose small values make long updates
                able = ((whole >> bit & 1) == falls).nonzero().flatten()
                whole[able[able >= index][0]] ^= 1 << bit
