"""Access to what a run computes, without stalling it: strategies, losses, gradients, modules, copies to the host."""

from __future__ import annotations

import dataclasses
import fnmatch
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric, MetricCollection

from normzoo.recognition import is_norm

Key = TypeVar("Key")
_NOT_CALLED = (Metric, MetricCollection, nn.ModuleList, nn.ModuleDict)  # or not as a part of the network
_SUPPORTED, _SHARDED = {"SingleDeviceStrategy", "DDPStrategy"}, {"ModelParallelStrategy"}


def check_strategy(trainer: Trainer, callback: object, sharded: bool = False) -> None:
    """Raise a ValueError unless every rank holds whole parameters and whole reduced gradients, or DTensors of them.

    Args:
        trainer: whose strategy it is.
        callback: whose name the message has.
        sharded: whether the callback can do with DTensors.
    """
    # By name, so that the classes of pytorch_lightning are recognized as well.
    names = {c.__name__ for c in type(trainer.strategy).__mro__}
    if not names & (_SUPPORTED | _SHARDED if sharded else _SUPPORTED):
        supported = "one device, DDP and ModelParallelStrategy" if sharded else "one device and DDP"
        raise ValueError(
            f"{type(callback).__name__} supports {supported}; under {type(trainer.strategy).__name__} a rank "
            "does not hold whole gradients, and its figures would be wrong"
        )


def is_sharded(t: Tensor) -> bool:
    """Whether it is a DTensor, of which each rank holds a part."""
    return hasattr(t, "device_mesh")


def batch_loss(outputs: Any, trainer: Trainer) -> Tensor | None:
    """The mini-batch loss from what Lightning passes to ``on_train_batch_end``; None if there is none."""
    loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
    if not isinstance(loss, Tensor):
        return None
    automatic = trainer.lightning_module.automatic_optimization
    # Lightning has divided it by the number of accumulated batches
    return loss.detach() * (trainer.accumulate_grad_batches if automatic else 1)


def gradients(params: Iterable[tuple[Key, Tensor]]) -> dict[Key, Tensor]:
    """The gradients that have any values, dense, by the keys of their parameters."""
    found = {name: p.grad.detach() for name, p in params if p.grad is not None and p.grad.numel()}
    return {name: g.to_dense() if g.is_sparse else g for name, g in found.items()}


def gradients_in_use(trainer: Trainer, optimizer: Optimizer, params: Iterable[tuple[Key, Tensor]]) -> dict[Key, Tensor]:
    """The :func:`gradients` as the optimizer is about to use them, without the scale that it takes away by itself."""
    found = gradients(params)
    scaler = grad_scaler(trainer)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return found  # Lightning has unscaled them
    return {name: g / scaler.scale(torch.ones((), device=g.device)) for name, g in found.items()}


def grad_scaler(trainer: Trainer) -> Any:
    """The GradScaler of the trainer's precision, which skips steps of gradients that are not finite; None without."""
    return getattr(trainer.precision_plugin, "scaler", None)


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


def squared_norm(g: Tensor) -> Tensor:
    """|g|^2 as a 0-d float64 tensor; the sum runs in float32 or wider."""
    g = g.detach().coalesce().values() if g.is_sparse else g.detach()
    return torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)).double().square()


def loss_factor(trainer: Trainer, like: Tensor, scaled: bool = True) -> Tensor:
    """What Lightning has multiplied the loss of a micro-batch by, 0-d like ``like``: a scale is not on the host."""
    factor = like.new_full((), 1 / trainer.accumulate_grad_batches)
    scaler = grad_scaler(trainer) if scaled else None
    return factor if scaler is None else scaler.scale(factor)


def runs_step_hooks(optimizer: Optimizer) -> bool:
    """Whether the optimizer's ``step`` calls hooks; a wrapper that leaves out ``Optimizer.__init__`` has none."""
    return bool(getattr(type(optimizer).step, "hooked", False))


def check_several_gradients(trainer: Trainer, who: str, otherwise: str = "") -> None:
    """Raise a ValueError if no optimizer step is to be of more than one gradient."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    scheduled = [n for c in callbacks if _is_accumulation(c) for n in c.scheduling.values()]
    most = max([trainer.accumulate_grad_batches, *scheduled])
    if trainer.world_size * most < 2:
        raise ValueError(
            f"{who} compares the gradients of at least two micro-batches or ranks, and a step here has one; "
            f"set accumulate_grad_batches to 2 or more, or use several ranks{otherwise}"
        )


def _is_accumulation(callback: object) -> bool:
    return any(c.__name__ == "GradientAccumulationScheduler" for c in type(callback).__mro__)


class BackwardNorm:
    """|g|^2 of what one backward pass of this rank adds to the gradients, before ranks are reduced.

    A hook of a parameter is given the gradient of that pass alone: before it is added to ``.grad``, and before DDP's
    hook, which waits behind that addition, so a communication hook of the user's own is not touched.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        self._squares: dict[int, Tensor] = {}
        self._in_parts = False
        self._handles = [p.register_hook(partial(self._take, i)) for i, p in enumerate(params) if p.requires_grad]

    def _take(self, index: int, g: Tensor) -> None:
        self._in_parts |= index in self._squares
        with torch.no_grad():
            self._squares[index] = squared_norm(g)

    def close(self) -> Tensor | None:
        """Remove the hooks; the norm, 0-d float64, or None if no gradient came.

        Raises:
            ValueError: if a parameter got its gradient in parts, whose norms say nothing of that of their sum.
        """
        self.remove()
        if self._in_parts:
            raise ValueError(
                "a parameter got its gradient in several parts in one backward pass, as one used in two checkpointed "
                "segments does; checkpoint with use_reentrant=False"
            )
        return torch.stack(list(self._squares.values())).sum() if self._squares else None

    def remove(self) -> None:
        """Remove the hooks, whatever came."""
        for handle in self._handles:
            handle.remove()


def plain_name(name: str) -> str:
    """A module's or parameter's name without the prefixes that ``torch.compile`` inserts."""
    return f"{name}.".replace("_orig_mod.", "")[:-1]


def find_modules(
    root: nn.Module, wanted: str | Sequence[str], norms: Collection[nn.Module] = ()
) -> dict[str, nn.Module]:
    """The modules below ``root`` that are norms, for ``"norms"``, or whose names match a pattern, in their order.

    ``norms`` are further modules that are norms.
    A norm inside a norm is a part of it. Metrics are none of the network.
    """
    patterns = [wanted] if isinstance(wanted, str) else wanted
    found: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for full, module in root.named_modules():
        name = plain_name(full)
        if not name or isinstance(module, _NOT_CALLED) or hasattr(module, "_orig_mod") or name.startswith(inside):
            continue  # of what torch.compile wraps, the wrapped
        if "norms" in patterns and (is_norm(module) or module in norms):
            found[name] = module
            inside = (*inside, f"{name}.")
        elif any(fnmatch.fnmatchcase(name, p) for p in patterns):
            found[name] = module
    return found


def overrides(owner: object, method: str) -> bool:
    """Whether a module or callback has a method of its own in the place of one of Lightning's."""
    found = getattr(type(owner), method, None)
    return found is not None and found.__module__.split(".")[0] not in ("lightning", "pytorch_lightning")


def makes_modules_later(pl_module: LightningModule) -> bool:
    """Whether it has a ``configure_model`` of its own, which runs after setup."""
    return overrides(pl_module, "configure_model")


def compiled_modules(pl_module: LightningModule) -> set[nn.Module]:
    """The modules in what ``torch.compile`` makes, which does not run hooks that are set later."""
    return {module for root in _compiled_roots(pl_module) for module in root.modules()}


def scripted_modules(pl_module: LightningModule) -> set[nn.Module]:
    """The modules that ``torch.jit`` has made, which run no hooks of Python functions."""
    roots = (m for m in pl_module.modules() if "ScriptModule" in {c.__name__ for c in type(m).__mro__})
    return {module for root in roots for module in root.modules()}


def _compiled_roots(pl_module: LightningModule) -> Iterator[nn.Module]:
    if getattr(pl_module, "_compiler_ctx", None) is not None:  # Lightning unwraps what is passed to fit
        yield pl_module
    for module in pl_module.modules():
        if type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
            yield module
        for value in _inside(vars(module).values()):  # self.forward = torch.compile(self.forward), also in a list
            owner = getattr(_compiled(value), "__self__", None) or getattr(value, "_orig_mod", None)
            if isinstance(owner, nn.Module):
                yield owner
        if any(_compiled(function) is not None for c in type(module).__mro__ for function in vars(c).values()):
            yield module  # a method with @torch.compile


def _inside(values: Iterable[Any]) -> Iterator[Any]:
    """The values, and what is in lists, tuples, sets and dictionaries among them."""
    seen: set[int] = set()
    left = list(values)
    while left:
        value = left.pop()
        if not isinstance(value, list | tuple | set | dict):
            yield value
        elif id(value) not in seen:
            seen.add(id(value))
            left += value.values() if isinstance(value, dict) else value


def _compiled(function: object) -> Callable[..., Any] | None:
    """The function that ``torch.compile`` was given; None if this is none of its results."""
    if not callable(function) or getattr(function, "_torchdynamo_disable", False):
        return None
    original = getattr(function, "_torchdynamo_orig_callable", None)
    return original and inspect.unwrap(original)


class Reading:
    """A small tensor on its way to the host, reduced over ranks or gathered if asked, to be read a step later.

    Args:
        value: a tensor of this call's own; it is overwritten by the reduction.
        reduce: ``dist.ReduceOp``, or None to leave each rank its own. Every rank must construct alike.
        gather: of all ranks, along a new first dimension, which there is in one process as well.
    """

    def __init__(self, value: Tensor, reduce: dist.ReduceOp.RedOpType | None = None, gather: bool = False) -> None:
        self._work: Any = None
        self._event: torch.cuda.Event | None = None
        distributed = dist.is_available() and dist.is_initialized()
        if gather:
            own, value = value, value[None]
            if distributed:
                value = own.new_empty(dist.get_world_size(), *own.shape)
                self._work = dist.all_gather(list(value), own, async_op=True)  # into the rows
        elif reduce is not None and distributed:
            self._work = dist.all_reduce(value, op=reduce, async_op=True)
        self._value = value
        if value.is_cuda:
            if self._work is not None:
                self._work.wait()  # orders the streams, does not block the host
                self._work = None
            host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            self._value = host.copy_(value, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> Tensor:
        """The value on the host; waits if it has not arrived."""
        if self._work is not None:
            self._work.wait()
        if self._event is not None:
            self._event.synchronize()
        return self._value
