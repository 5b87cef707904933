"""The promise of synchronized statistics, held in real processes over gloo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from normzoo.testing._compare import BrokenError, agree
from normzoo.testing._inputs import sample, state, upstream
from normzoo.testing._processes import in_ranks
from normzoo.testing._promises import promise
from normzoo.testing._subject import Subject

DEADLINE = 60.0  # seconds for the processes of one job
STEPS = 2
JOBS: dict[int, tuple[tuple[int, ...], ...]] = {2: ((5, 3), (4, 0)), 4: ((4, 2, 1, 3),)}


@promise()
def sync(subject: Subject) -> None:
    """With sync=True several ranks, with batches of any size or none, equal one process on the whole batch."""
    subject.need_option("sync")
    subject.made(), subject.shape  # found once, for the ranks to have
    for world, splits in JOBS.items():
        found = in_ranks(_of_rank, subject, world, DEADLINE)
        for split in splits:
            for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
                _compare(subject, split, dtype, [of_rank[_key(split, dtype)] for of_rank in found], tolerance)


def _key(split: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{split} {dtype}"


def _compare(
    subject: Subject, split: tuple[int, ...], dtype: torch.dtype, found: list[dict[str, Any]], tolerance: float
) -> None:
    whole = _steps(subject.made(sync=True, dtype=dtype), _batches(subject, sum(split), dtype))
    text = f"{len(split)} ranks with batches of {split}, {dtype}"
    for i in range(STEPS):
        for name in ("output", "gradient of the input"):
            parts = whole[name][i].split(split)
            for rank, (of_rank, want) in enumerate(zip(found, parts, strict=True)):
                agree(f"{text}: {name}, rank {rank}, step {i}", of_rank[name][i], want, tolerance=tolerance)
    for name, want in whole["gradients"].items():
        of_ranks = [of_rank["gradients"][name] for of_rank in found]
        missing = [str(rank) for rank, g in enumerate(of_ranks) if g is None]
        if missing and want is not None:
            raise BrokenError(f"{text}: rank {', '.join(missing)} has no gradient of {name}")
        agree(f"{text}: gradient of {name}, summed over ranks", sum(of_ranks), want, tolerance=tolerance)
    for name, want in whole["state"].items():
        for rank, of_rank in enumerate(found):
            agree(f"{text}: {name} afterwards, rank {rank}", of_rank["state"][name], want, tolerance=tolerance)


def _batches(subject: Subject, size: int, dtype: torch.dtype) -> list[Tensor]:
    return [sample((size, *subject.shape[1:]), dtype, seed=i) for i in range(STEPS)]


def _steps(layer: nn.Module, batches: list[Tensor], rows: slice = slice(None)) -> dict[str, Any]:
    """A few steps of training on some rows of each batch; gradients of parameters add up."""
    outputs, of_inputs = [], []
    layer.train()
    for i, batch in enumerate(batches):
        x = batch[rows].clone().requires_grad_()
        y = layer(x)
        y.backward(upstream(batch, seed=i)[rows])
        outputs.append(y.detach())
        of_inputs.append(torch.zeros_like(x) if x.grad is None else x.grad)
    gradients = {k: p.grad for k, p in layer.named_parameters()}
    return {"output": outputs, "gradient of the input": of_inputs, "gradients": gradients, "state": state(layer)}


def _of_rank(subject: Subject, rank: int, world: int, note: Callable[[str], None]) -> dict[str, Any]:
    """What one rank sees of each job."""
    results = {}
    for split in JOBS[world]:
        start = sum(split[:rank])
        rows = slice(start, start + split[rank])
        for dtype in (torch.float64, torch.float32):
            note(f"batches of {split}, {dtype}")
            layer = subject.made(sync=True, dtype=dtype)
            results[_key(split, dtype)] = _steps(layer, _batches(subject, sum(split), dtype), rows)
    return results
