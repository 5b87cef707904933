"""Gradients of parts of a batch, evaluated apart from the run."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normzoo.callbacks._run.batches import leaves
from normzoo.callbacks._run.facts import Run, loss_factor
from normzoo.callbacks._run.gradients import squared_norm
from normzoo.callbacks._run.isolation import Snapshot, isolated, loss_of, own_random_streams

_SHARED = (type(None), bool, int, float, str, bytes)


def cut(batch: Any, samples: int, parts: int) -> list[Any]:
    """A batch in parts of consecutive samples, whose numbers differ by one at most; none if it has fewer samples.

    Tensors, arrays, and sequences of as many numbers or strings, have a sample at each place; other numbers and
    strings, and what holds nothing else, belong to all parts.

    Raises:
        ValueError: for a tensor with more or fewer places than samples, or an object that may hold any.
    """
    if samples < parts:
        return []
    ends = [samples * i // parts for i in range(parts + 1)]
    try:
        return [rows_of(batch, samples, slice(a, b)) for a, b in pairwise(ends)]
    except IndivisibleError as error:
        raise ValueError(
            f"GradientNoise cannot split {error}; pass split=f, a function of the batch that returns its parts, and "
            "samples=g if the number of samples in one is not the length of its first tensor"
        ) from error


class IndivisibleError(ValueError):
    """Says which value of a batch does not have a row for each sample."""


def rows_of(value: Any, samples: int, part: slice | Sequence[int], in_lists: bool = False) -> Any:
    """Some of the samples of a batch; the tensors of a slice are views.

    Args:
        value: a batch, or what is in one.
        samples: how many there are in the batch.
        part: which of them, a slice or their places.
        in_lists: whether lists and tuples of as many other values have a sample at each place, too.

    Raises:
        IndivisibleError: for a tensor or array with more or fewer places than samples, or an object that may hold any.
    """
    if isinstance(value, Tensor | np.ndarray):
        if value.ndim and len(value) != samples:
            kind = "a tensor" if isinstance(value, Tensor) else "an array"
            raise IndivisibleError(f"{kind} of shape {tuple(value.shape)} in a batch of {samples} samples")
        return _taken(value, part) if value.ndim else value
    if isinstance(value, _SHARED):
        return value
    if isinstance(value, Mapping):
        return _remade(value, {k: rows_of(v, samples, part, in_lists) for k, v in value.items()})
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value) if f.init]
        inside = {n: rows_of(getattr(value, n), samples, part, in_lists) for n in names}
        return dataclasses.replace(value, **inside)
    if not isinstance(value, list | tuple):
        raise IndivisibleError(f"a {type(value).__name__}")
    if len(value) == samples and all(isinstance(v, _SHARED) for v in value):
        return _taken(value, part)
    a_sample_each = in_lists and len(value) == samples
    if a_sample_each and not any(_has_rows(leaf, samples) for leaf in leaves(value)):
        return _taken(value, part)
    try:
        items = [rows_of(v, samples, part, in_lists) for v in value]
    except IndivisibleError:
        if a_sample_each:
            return _taken(value, part)
        raise
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def _taken(value: Any, part: slice | Sequence[int]) -> Any:
    if isinstance(part, slice):
        return value[part]
    return type(value)(value[i] for i in part) if isinstance(value, list | tuple) else value[list(part)]


def _has_rows(leaf: Any, samples: int) -> bool:
    return isinstance(leaf, Tensor | np.ndarray) and bool(leaf.ndim) and len(leaf) == samples


def _remade(mapping: Mapping[Any, Any], inside: dict[Any, Any]) -> Any:
    """A mapping of the same class with other values."""
    if isinstance(mapping, defaultdict):
        return defaultdict(mapping.default_factory, inside)
    try:
        found = type(mapping)(inside)  # type: ignore[call-arg]
    except TypeError as error:
        raise IndivisibleError(f"a {type(mapping).__name__}") from error
    if found.keys() != inside.keys():
        raise IndivisibleError(f"a {type(mapping).__name__}")
    return found


def squared_norms(run: Run, batch: Any, batch_idx: int, parts: Sequence[Any]) -> tuple[Tensor, Tensor] | None:
    """|g|^2 of the gradients of the parts, summed, and of their mean, as 0-d float64 tensors; None without a loss.

    Those of ``training_step`` on each part, uncompiled, from the module as it is and with the random draws that come
    next. The run is left as it was; ``.grad`` and the hooks that wait for it take no notice.
    """
    params = [p for group in run.optimizers[0].param_groups for p in group["params"] if p.requires_grad]
    small = torch.zeros((), dtype=torch.float64, device=run.device)
    total: dict[int, Tensor] = {}
    snapshot = Snapshot(run.module, batch)
    # Compiled code would be compiled again for the smaller batches, and the run might then take the new one
    with own_random_streams(), torch.compiler.set_stance("force_eager"):
        for number, part in enumerate(parts, 1):
            try:
                with isolated(snapshot, run, streams=False):
                    loss = loss_of(run.training_step(part, batch_idx))
                    if loss is None:
                        return None
                    _check_graph(loss)
                    factor = loss_factor(run, loss.detach())
                    found = torch.autograd.grad(loss * factor, params, allow_unused=True)
            except Exception as error:
                error.add_note(
                    f"Raised by part {number} of {len(parts)} of a batch, which GradientNoise(split=...) tried"
                )
                raise
            for i, g in enumerate(found):
                if g is not None:
                    g = g.to(torch.promote_types(g.dtype, torch.float32)) / factor
                    small += squared_norm(g)
                    total[i] = total[i] + g if i in total else g
    big = sum((squared_norm(g) for g in total.values()), torch.zeros_like(small))
    return small, big / len(parts) ** 2


def _check_graph(loss: Tensor) -> None:
    """Raise a ValueError if gradients of some parameters would be left out, as torch tells it only of others."""
    seen: set[Any] = set()
    left: list[Any] = [loss.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if "CheckpointFunction" in node.name():
            raise ValueError(
                "GradientNoise(split=...) takes gradients by torch.autograd.grad, which does not see into checkpoints "
                "with use_reentrant=True; pass use_reentrant=False"
            )
        left += [following for following, _ in node.next_functions]
