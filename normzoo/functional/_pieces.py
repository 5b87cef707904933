"""How a formula runs on a large tensor: left whole for a compiler, or in pieces that stay in the processor's cache."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from normzoo._shapes import HALF

# Elements of a piece: a chain of operations on 7 MB of float32 runs in cache and uses its temporaries again.
PIECE = 7 * 2**18

Formula = Callable[..., Tensor]


_whole = False


@contextlib.contextmanager
def whole_formulas() -> Iterator[None]:
    """Inside, formulas run as they are written and autograd differentiates them: the twin of the fast paths."""
    global _whole
    before, _whole = _whole, True
    try:
        yield
    finally:
        _whole = before


def traced(x: Tensor) -> bool:
    """Whether ``x`` is being compiled, exported, transformed by functorch or has no data: formulas stay whole."""
    if _whole or torch.compiler.is_compiling() or x.is_meta:
        return True
    return torch._C._are_functorch_transforms_active() or torch._C._is_tracing()  # the latter is torch.jit.trace


def refuse_jit_trace(layer: str) -> None:
    """Raise a RuntimeError under ``torch.jit.trace``, which cannot record a backward pass that is not a gradient."""
    if torch._C._is_tracing():
        raise RuntimeError(
            f"torch.jit.trace cannot record {layer} in training, as its backward pass is not the gradient of its "
            "output: call eval() before tracing"
        )


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Inside, matrix products and convolutions keep the dtype of their arguments."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def pieces(x: Tensor) -> list[slice]:
    """Slices that cut the batch into pieces for the cache; one slice on devices other than the CPU."""
    n = x.shape[0]
    if x.device.type != "cpu" or x.numel() <= PIECE:
        return [slice(0, n)]
    count = min(n, -(-x.numel() // PIECE))
    return [slice(n * i // count, n * (i + 1) // count) for i in range(count)]


def cut(x: Tensor, rows: slice) -> Tensor:
    """``x[rows]``, or ``x`` itself where that is all of it: a view costs as much as a pass over a small tensor."""
    return x if rows.stop - rows.start == x.shape[0] else x[rows]


def summed(parts: Iterable[Tensor]) -> Tensor:
    """The sum of one or more tensors."""
    return functools.reduce(torch.add, parts)


def by_sample(formula: Formula, x: Tensor, *tensors: Tensor | None) -> Tensor:
    """``formula(x, *tensors)``, keeping nothing for backward but the arguments.

    Backward evaluates the formula again, piece by piece, and differentiates it there: on a CPU the pieces are small
    enough for the cache, so that this costs less than keeping intermediate results would. A formula may have

    - ``write(y, x, *tensors)``, which puts the output into ``y`` in fewer passes than autograd could follow, and
      returns small tensors for each sample that backward may use, or nothing;
    - ``vjp(x, dy, *tensors, kept, out)``, the gradient for x and a list of those for the tensors in closed form; the
      gradient may be put into ``out`` if that is not None;
    - ``one_pass = True`` if either way is a single pass, so that cutting it gains nothing.

    Args:
        formula: of a batch (n, ...), for each sample alone; returns a tensor of the same shape and dtype.
        x: (N, ...).
        *tensors: what else the formula takes and receives gradients for, or None.
    """
    return formula(x, *tensors) if traced(x) else _BySample.apply(formula, x, *tensors)


class _BySample(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, formula: Formula, x: Tensor, *tensors: Tensor | None) -> Tensor:
        ctx.formula = formula
        kept: tuple[Tensor, ...] = ()
        parts = _pieces_for(formula, x)
        if hasattr(formula, "write"):
            y = torch.empty_like(x)
            of_parts = [formula.write(y[rows], x[rows], *tensors) or () for rows in parts]
            kept = tuple(t[0] if len(t) == 1 else torch.cat(t) for t in zip(*of_parts, strict=True))
        elif len(parts) == 1:
            y = formula(x, *tensors)
            y = y.clone() if y._is_view() else y  # a view could not be overwritten by what follows
        else:
            y = torch.empty_like(x)
            for rows in parts:
                y[rows] = formula(x[rows], *tensors)
        ctx.save_for_backward(x, *tensors, *kept)
        ctx.arguments = 1 + len(tensors)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: a checkpoint gives them a single time
        (x, *tensors), kept = saved[: ctx.arguments], saved[ctx.arguments :]
        needed = ctx.needs_input_grad[1:]
        if by_formula(dy):
            return None, *gradients_of_formula(ctx.formula, [x, *tensors], needed, dy)
        parts = _pieces_for(ctx.formula, x)
        if len(parts) == 1:
            return None, *_of_piece(ctx.formula, x, tensors, dy, needed, kept, None)
        dx = torch.empty_like(x)
        totals: list[Tensor | None] = [None] * len(tensors)
        for rows in parts:
            out = dx[rows]
            part, *found = _of_piece(ctx.formula, x[rows], tensors, dy[rows], needed, tuple(t[rows] for t in kept), out)
            if part is not None and part is not out:
                out.copy_(part)
            totals = [t if g is None else g if t is None else t.add_(g) for t, g in zip(totals, found, strict=True)]
        return None, dx, *totals


def _pieces_for(formula: Formula, x: Tensor) -> list[slice]:
    return [slice(0, x.shape[0])] if getattr(formula, "one_pass", False) else pieces(x)


def _of_piece(
    formula: Formula,
    x: Tensor,
    tensors: list[Tensor | None],
    dy: Tensor,
    needed: tuple[bool, ...],
    kept: tuple[Tensor, ...],
    out: Tensor | None,
) -> list[Tensor | None]:
    """The gradients for x, which may lie in ``out``, and the tensors."""
    if hasattr(formula, "vjp"):
        dx, found = formula.vjp(x, dy, *tensors, kept=kept, out=None if x.dtype in HALF else out)
        return [dx, *found]
    inputs = [x, *tensors]
    leaves = [t if t is None else t.detach().requires_grad_(n) for t, n in zip(inputs, needed, strict=True)]
    with torch.enable_grad():
        y = formula(*leaves)
    return [
        torch.zeros_like(t) if g is None and t is not None and t.requires_grad else g
        for t, g in zip(leaves, gradients(y, leaves, dy), strict=True)
    ]


def gradients(
    y: Tensor | tuple[Tensor, ...], inputs: Sequence[Tensor | None], dy: Tensor | tuple[Tensor, ...], **options: Any
) -> Iterator[Tensor | None]:
    """The gradient for each input, None for those that are None or need none."""
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(y, wanted, dy, allow_unused=True, **options))
    for t in inputs:
        yield next(found) if t is not None and t.requires_grad else None


def by_formula(dy: Tensor, *, sync: bool = False) -> bool:
    """Whether a backward pass must differentiate the plain formula.

    It must where gradients are differentiated again (``create_graph=True``) and where they are batched by ``vmap``
    (``is_grads_batched=True``, ``torch.vmap`` over ``torch.autograd.grad``), which fast forms cannot be.

    Raises:
        RuntimeError: if it must, with statistics over several ranks, which the plain formula lacks.
    """
    again = torch.is_grad_enabled()
    if not again and not is_batched(dy):
        return False
    if sync:
        lacks, use = ("second derivative", "create_graph=True") if again else ("batched gradient", "vmap")
        raise RuntimeError(f"a layer with sync=True has no {lacks} over several ranks; use sync=False with {use}")
    return True


def is_batched(dy: Tensor) -> bool:
    """Whether a gradient stands for several, as a tensor of ``torch.vmap`` or of autograd's own ``vmap``."""
    return torch._C._functorch.is_legacy_batchedtensor(dy) or torch._C._are_functorch_transforms_active()


def refuse_batched(dy: Tensor, layer: str) -> None:
    """Raise a RuntimeError if ``dy`` is batched: a backward pass that moves a state takes gradients one by one."""
    if is_batched(dy):
        raise RuntimeError(
            f"{layer} in training has no batched gradient, as each backward pass moves its state: take gradients one "
            "by one (vectorize=False, is_grads_batched=False, no vmap) or call eval()"
        )


def gradients_of_formula(
    formula: Formula, inputs: Sequence[Tensor | None], needed: tuple[bool, ...], dy: Tensor
) -> list[Tensor | None]:
    """The gradients for inputs by autograd, which can be differentiated again where gradients are enabled."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # views: one input may be computed from another, and its share belongs to the graph outside
        inputs = [None if t is None else t.view_as(t) for t in inputs]
        y = formula(*inputs)
    asked = [t if need else None for t, need in zip(inputs, needed, strict=True)]
    return list(gradients(y, asked, dy, create_graph=again))
