"""Norms of tensors, and the kinds of parameters that are compared with each other."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from normzoo.callbacks._run.facts import plain_name
from normzoo.recognition import is_norm
from normzoo.replaying.stage import Stage


def kinds_of(module: torch.nn.Module) -> dict[str, str]:
    """The kind of each parameter, by its name."""
    norm_layers = tuple(f"{name}." for name, m in module.named_modules() if name and is_norm(m))
    kinds: dict[str, str] = {}
    for name, p in module.named_parameters():
        if name.startswith(norm_layers) and p.dim() <= 1:
            kind = "norm bias" if name.endswith("bias") else "norm weight"
        elif p.numel() == 1:
            kind = "scalar"
        elif p.dim() > 1:
            kind = "matrix"
        else:
            kind = "bias" if name.endswith("bias") else "vector"
        kinds[plain_name(name)] = kind
    return kinds


def norms(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """The Euclidean norm of each tensor, accumulated in float64, of a DTensor that of all shards."""
    if not tensors:
        return {}
    sizes = [torch.linalg.vector_norm(x.abs() if x.is_complex() else x, dtype=torch.float64) for x in tensors.values()]
    whole = [size.full_tensor() if hasattr(size, "full_tensor") else size for size in sizes]
    return dict(zip(tensors, torch.stack([size.cpu() for size in whole]).tolist(), strict=True))


def gradient_norms(stage: Stage, gradient: Mapping[str, Tensor]) -> dict[str, float]:
    """The norms of gradients as a stage returns them: of a sharded parameter each rank has its part."""
    own = {plain_name(name): size for name, size in norms(gradient).items()}
    if stage.run.layout != "sharded":
        return own
    sharded = {name for name, p in stage.tensors().items() if hasattr(p, "full_tensor")}
    of_ranks = stage.gather(own)
    return {
        name: math.sqrt(sum(of_rank[name] ** 2 for of_rank in of_ranks)) if name in sharded else size
        for name, size in own.items()
    }


def all_finite(x: Tensor) -> bool:
    """Whether all values of a tensor are finite."""
    finite = x.detach().isfinite().all()
    return bool(finite.full_tensor() if hasattr(finite, "full_tensor") else finite)
