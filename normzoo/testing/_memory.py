"""Promises about memory and the device: what is kept for backward, what makes the host wait."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from normzoo.testing._compare import BrokenError, NotApplicableError
from normzoo.testing._inputs import MODES, sample, upstream, where
from normzoo.testing._promises import promise
from normzoo.testing._subject import Subject

SHARE = 0.15


@promise()
def saved_memory(subject: Subject) -> None:
    """Besides input and parameters, what training keeps for the backward pass is at most 15 % of the input's bytes."""
    channels = subject.num_features * -(-16 // subject.num_features)
    shape = (16, channels, *{4: (24, 24), 5: (8, 8, 8)}.get(len(subject.shape), [512] * (len(subject.shape) - 2)))
    for form in (torch.contiguous_format, torch.channels_last):
        if form is torch.channels_last and len(shape) != 4:
            continue
        layer = subject.make(channels).train()
        x = sample(shape).contiguous(memory_format=form).requires_grad_()
        saved: list[Tensor] = []

        def pack(t: Tensor, saved: list[Tensor] = saved) -> Tensor:
            saved.append(t.detach())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = layer(x)
        own = _storages([x, *layer.parameters(), *layer.buffers()])
        kept = {a: n for a, n in _storages([*saved, *_on_contexts(y)]).items() if a not in own}
        total, whole = sum(kept.values()), x.untyped_storage().nbytes()
        if total > SHARE * whole:
            sizes = ", ".join(str(n) for n in sorted(kept.values(), reverse=True)[:8])
            raise BrokenError(
                f"{where(True, x)}: {total} bytes in {len(kept)} tensors (the largest: {sizes}) are kept for backward, "
                f"{total / whole:.0%} of the input's {whole}; allowed {SHARE:.0%}"
            )


def _storages(values: Iterable[Tensor]) -> dict[int, int]:
    """Bytes by address."""
    return {v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in values if v.numel()}


def _on_contexts(y: Tensor) -> Iterator[Tensor]:
    """The tensors that functions keep as attributes of their contexts, past the hooks for saved tensors."""
    nodes, seen = [y.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes.extend(n for n, _ in node.next_functions)
            yield from _tensors_in(getattr(node, "__dict__", {}))


def _tensors_in(value: Any, depth: int = 4) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value.detach()
    elif depth and isinstance(value, Mapping | list | tuple | set):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_in(inner, depth - 1)
    elif depth and isinstance(value, FunctionType):
        for cell in value.__closure__ or ():
            yield from _tensors_in(cell.cell_contents, depth - 1)


@promise()
def no_host_sync(subject: Subject) -> None:
    """On a GPU neither the forward nor the backward pass makes the host wait for the device."""
    if not torch.cuda.is_available():
        raise NotApplicableError("there is no CUDA device")
    before = torch.cuda.get_sync_debug_mode()
    for training in MODES:
        for shape in subject.shapes:
            layer, x = subject.made().cuda().train(training), sample(shape).cuda().requires_grad_()
            dy = upstream(x.detach())
            layer(x).backward(dy)  # libraries start up
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                layer(x).backward(dy)
            except RuntimeError as error:
                raise BrokenError(f"{where(training, x)} on {x.device}: {error}") from error
            finally:
                torch.cuda.set_sync_debug_mode(before)
