"""Parameters, gradients and losses of a run as an optimizer is about to use them, on their device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import TensorWeakRef

from normzoo.callbacks._run.facts import Run, plain_name

Key = TypeVar("Key")


# Names of an optimizer's parameters in a module, by ``id``, as looking them up takes a walk through all its modules.
# References to parameters are weak: a parameter may refer to its module, as a hook does, which would never be freed.
_Names = dict[int, tuple[str, TensorWeakRef]]
_NAMES: WeakKeyDictionary[nn.Module, WeakKeyDictionary[Optimizer, _Names]] = WeakKeyDictionary()


def trainable_parameters(run: Run, optimizer: Optimizer) -> dict[str, Tensor]:
    """The trainable parameters of an optimizer by name, without the prefixes that ``torch.compile`` inserts.

    They are in the order of the module, and keep their names until the optimizer has other parameters.
    """
    own = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    of_module = _NAMES.setdefault(run.module, WeakKeyDictionary())
    names = of_module.get(optimizer, {})
    if names.keys() != own.keys() or any(ref() is not own[i] for i, (_, ref) in names.items()):
        found = ((name, p) for name, p in run.module.named_parameters() if id(p) in own)
        names = of_module[optimizer] = {id(p): (plain_name(name), TensorWeakRef(p)) for name, p in found}
    return {name: own[i] for i, (name, _) in names.items() if own[i].requires_grad}


def gradients(params: Iterable[tuple[Key, Tensor]]) -> dict[Key, Tensor]:
    """The gradients that have any values, dense, by the keys of their parameters."""
    found = ((name, p.grad) for name, p in params)
    dense = {name: g.to_dense() if g.is_sparse else g for name, g in found if g is not None and g.numel()}
    return {name: g.detach() if g.requires_grad else g for name, g in dense.items()}


def gradients_in_use(run: Run, optimizer: Optimizer, params: Iterable[tuple[Key, Tensor]]) -> dict[Key, Tensor]:
    """The :func:`gradients` as the optimizer is about to use them, without the scale that it takes away by itself."""
    found = gradients(params)
    if run.scaler is None or not unscales_itself(optimizer):
        return found  # they have been unscaled
    return {name: g / run.scaler.scale(torch.ones((), device=g.device)) for name, g in found.items()}


def unscales_itself(optimizer: Optimizer) -> bool:
    """Whether the optimizer takes the scale of a GradScaler away in its step, and not the driver before it."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def withhold_gradients(optimizer: Optimizer) -> None:
    """Leave an optimizer without gradients, so that its step changes neither parameters nor its state.

    The optimizers of torch pass over parameters without a gradient, for weight decay and momentum as well.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = None


def gradient_step(run: Run, optimizer: Optimizer) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters with a gradient, and the learning rate of their group times it."""
    params, steps = [], []
    for group in optimizer.param_groups:
        found = gradients_in_use(run, optimizer, enumerate(group["params"]))
        params += [group["params"][i] for i in found]
        steps += [g * group["lr"] for g in found.values()]
    return params, steps


def is_gradient_step(run: Run, optimizer: Optimizer) -> bool:
    """Whether the update is known to be the learning rate times the gradient, as it is measured before the step.

    It is known for ``torch.optim.SGD`` itself, without momentum, weight decay and ``maximize``, where nothing comes
    between gradient and step: clipping by the Trainer, a GradScaler, hooks of the module, or other callbacks' hooks.
    """
    options = ("momentum", "weight_decay", "maximize")
    plain = type(optimizer) is torch.optim.SGD and not any(g[name] for g in optimizer.param_groups for name in options)
    return plain and not run.changes_steps


class GradientVersions:
    """Tells whether the gradients of parameters are still the same tensors with the same values, without keeping them.

    A value written through ``.data`` goes unnoticed.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        self._seen = [None if p.grad is None else (TensorWeakRef(p.grad), p.grad._version) for p in params]

    def are_those_of(self, params: Iterable[Tensor]) -> bool:
        """Whether these parameters, in the same order, have the same gradients, unchanged."""
        now = [p.grad for p in params]
        return len(now) == len(self._seen) and all(map(_is_unchanged, self._seen, now))


def _is_unchanged(seen: tuple[TensorWeakRef, int] | None, g: Tensor | None) -> bool:
    if seen is None or g is None:
        return seen is None and g is None
    ref, version = seen
    return ref() is g and g._version == version


def squared_norm(g: Tensor) -> Tensor:
    """|g|^2 as a 0-d float64 tensor; the sum runs in float32 or wider."""
    g = g.detach().coalesce().values() if g.is_sparse else g.detach()
    return torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)).double().square()


def local_values(tensor: Any) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def batch_size(batch: Any) -> int | None:
    """The length of the first tensor in a batch that has one, inside of other containers as well; None without."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else None
    if dataclasses.is_dataclass(batch):
        batch = [getattr(batch, f.name) for f in dataclasses.fields(batch)]
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, str) or not isinstance(batch, Sequence):
        return None
    return next((n for n in map(batch_size, batch) if n is not None), None)


def runs_step_hooks(optimizer: Optimizer) -> bool:
    """Whether the optimizer's ``step`` calls hooks; a wrapper that leaves out ``Optimizer.__init__`` has none."""
    return bool(getattr(type(optimizer).step, "hooked", False))


def check_several_gradients(run: Run, who: str, otherwise: str = "") -> None:
    """Raise a ValueError if no optimizer step is to be of more than one gradient."""
    if run.ranks * run.most_accumulation < 2:
        raise ValueError(
            f"{who} compares the gradients of at least two micro-batches or ranks, and a step here has one; "
            f"set accumulate_grad_batches to 2 or more, or use several ranks{otherwise}"
        )


def check_differentiable(loss: Any, who: str) -> None:
    """Raise an error unless a loss is a tensor of one value whose graph leads back to all parameters."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"one of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise TypeError(f"{who} needs a loss that is a tensor of one value, not {found}")
    if not loss.requires_grad:
        raise ValueError(
            f"{who} differentiates the loss, and this one requires no gradient; return it as it is computed, without "
            "detach() and outside of torch.no_grad()"
        )
    seen: set[Any] = set()
    left: list[Any] = [loss.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if "CheckpointFunction" in node.name():  # parameters inside would silently have no gradient
            raise ValueError(
                f"{who} takes gradients by torch.autograd.grad, which does not see into checkpoints with "
                "use_reentrant=True; pass use_reentrant=False"
            )
        left += [following for following, _ in node.next_functions]


class BackwardHooks:
    """Hands the gradients that one backward pass brings on this rank to a function, by the keys of their parameters.

    A hook of a parameter is given the gradient of that pass alone: before it is added to ``.grad``, and before DDP's
    hook, which waits behind that addition, so a communication hook of the user's own is not touched. The tensor may
    become ``.grad`` itself.
    """

    def __init__(self, params: Iterable[tuple[Key, Tensor]], take: Callable[[Key, Tensor], None]) -> None:
        self._handles = [p.register_hook(partial(take, key)) for key, p in params if p.requires_grad]

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
