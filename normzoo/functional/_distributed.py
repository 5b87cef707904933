"""Statistics over all ranks of the default process group."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def several_ranks() -> bool:
    """Whether this process is one of several in a job."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def all_gather_moments(mean: Tensor, var: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance of the union of what all ranks hold, and its count, a 0-d tensor.

    One collective; ranks may hold different counts, or nothing.

    Args:
        mean: (1, C), this rank's.
        var: (1, C), biased.
        count: number of values that each was taken over.

    Source: Chan, Golub & LeVeque 1983, equation 2.1.
    """
    own = torch.cat([mean.new_full((1,), count), mean.flatten(), var.flatten()])
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, own)
    n, means, variances = torch.stack(gathered).split([1, mean.numel(), var.numel()], dim=1)
    share = n / n.sum().clamp(min=1)
    whole = (share * means).sum(0, keepdim=True)
    return whole, (share * (variances + (means - whole).square())).sum(0, keepdim=True), n.sum()


def all_reduce_sum(tensors: list[Tensor]) -> list[Tensor]:
    """Each tensor summed over ranks, in one collective."""
    packed = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(packed)
    return [p.view_as(t) for p, t in zip(packed.split([t.numel() for t in tensors]), tensors, strict=True)]


def all_reduce_mean(total: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The sum over ranks of ``total``, divided by that of ``count``, and the latter, a 0-d tensor; one collective."""
    packed = torch.cat([total, total.new_full((1,), count)])
    dist.all_reduce(packed)
    return packed[:-1] / packed[-1].clamp(min=1), packed[-1]
