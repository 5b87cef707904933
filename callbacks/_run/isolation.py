"""Extra forward passes that leave no trace in the module, the metrics, the logs or the random streams."""

from __future__ import annotations

import dataclasses
import random
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.lr_scheduler import LRScheduler

from normzoo.callbacks._run.facts import Run
from normzoo.callbacks._run.gradients import local_values
from normzoo.callbacks._run.ranks import is_sharded

_ATOMS = (type(None), bool, int, float, complex, str, bytes, type, FunctionType, MethodType, ModuleType)
_SILENCED = ("log", "print")  # log_dict calls log
_passes = 0  # that are isolated and go on
_NOT_KEPT = object()  # stands for the gradient of a leaf
_FOREIGN = ("torch", "lightning", "pytorch_lightning", "lightning_fabric")  # their objects reach the whole program


class Snapshot:
    """All that a forward pass of a module may change, as it is now.

    That is, from the module on: the attributes of each (submodules, parameters, buffers, metrics, flags, hooks), the
    values of tensors and arrays, the contents of containers, at any depth, random generators, and attributes of
    objects that hold nothing but such data, modules and each other, dataclasses among them. Of other objects (files,
    loggers, iterators, datasets) only which one it is.

    Args:
        module: what the pass goes through.
        *more: what else it could change: the batch.
        moved: parameters whose values the caller takes care of.
        copies: where the values of tensors go; by default each is cloned on its device.
        gradients: whether gradients are put back, and kept alive for it.
        apart: objects that stay as they are, whatever refers to them.
    """

    def __init__(
        self,
        module: nn.Module,
        *more: Any,
        moved: Iterable[Tensor] = (),
        copies: HostCopies | None = None,
        gradients: bool = True,
        apart: Iterable[Any] = (),
    ) -> None:
        self.module, self._copies, self._gradients = module, copies, gradients
        self._moved = {id(p) for p in moved}
        self._seen = {id(value) for value in apart}
        self._contents: list[tuple[Any, Any]] = []  # a container and its elements
        self._tensors: list[tuple[Tensor, Tensor]] = []
        self._leaves: list[tuple[Tensor, bool, Any]] = []  # whether it requires a gradient, and that
        self._arrays: list[tuple[np.ndarray, np.ndarray]] = []
        self._generators: list[tuple[Any, Any]] = []
        self._slots: list[tuple[Any, dict[str, Any]]] = []
        self.iterators: list[str] = []  # the classes of those that would go on if they were drawn from
        reshard(module)
        # Those of a module that torch.jit has made are attributes of no object of Python
        left: list[Any] = [module, more, (*module.parameters(), *module.buffers())]
        while left:
            left += self._keep(left.pop())

    @property
    def nbytes_of_arrays(self) -> int:
        """The memory that the values of arrays take."""
        return sum(values.nbytes for _, values in self._arrays)

    @torch.no_grad()
    def restore(self) -> None:
        """Put all of it back, bit for bit."""
        reshard(self.module)
        for container, content in self._contents:
            _refill(container, content)
        for leaf, requires_grad, grad in self._leaves:
            if leaf.grad_fn is not None and not leaf._is_view():  # an operation in place has made it one
                leaf.detach_()
            if leaf.is_leaf:
                leaf.requires_grad_(requires_grad)
                if grad is not _NOT_KEPT and leaf.grad is not grad:
                    leaf.grad = grad
        for tensor, value in self._tensors:  # the same values: a graph that holds the tensor stays valid
            (tensor.data if is_sharded(value) else local_values(tensor.data)).copy_(value)
        for array, values in self._arrays:
            array[...] = values
        for generator, state in self._generators:
            _set_state(generator, state)
        for value, slots in self._slots:
            for name, content in slots.items():
                object.__setattr__(value, name, content)  # a frozen dataclass, too

    def _keep(self, value: Any) -> Iterable[Any]:
        """Take in a value; what it holds."""
        if isinstance(value, _ATOMS) or id(value) in self._seen:
            return ()
        self._seen.add(id(value))
        if isinstance(value, Tensor):
            if not is_lazy(value):  # which has no values yet
                self._keep_tensor(value)
            return ()
        if isinstance(value, np.ndarray):
            if value.flags.writeable and not isinstance(value, np.memmap):  # a data set, on disk
                self._arrays.append((value, value.copy()))
            return ()
        state = _state(value)
        if state is not None:
            self._generators.append((value, state))
            return ()
        if isinstance(value, tuple):
            return value
        if dataclasses.is_dataclass(value) and not hasattr(value, "__dict__"):
            slots = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if hasattr(value, f.name)}
            self._slots.append((value, slots))
            return slots.values()
        content = value if isinstance(value, dict | list | set | deque) else _data(value)
        if content is None:
            self.iterators += [type(value).__name__] if isinstance(value, Iterator) else []
            return ()
        elements = dict(content) if isinstance(content, dict) else list(content)
        self._contents.append((content, elements))
        inside = list(elements.values()) if isinstance(elements, dict) else elements
        kinds = set(map(type, inside))
        if all(issubclass(kind, _ATOMS) for kind in kinds):  # a vocabulary, say: it is not walked in Python
            inside = []
        # A container may have attributes of its own
        return [*inside, vars(value)] if content is value and hasattr(value, "__dict__") else inside

    def _keep_tensor(self, tensor: Tensor) -> None:
        if tensor.is_leaf and (tensor.is_floating_point() or tensor.is_complex()) and not tensor.is_inference():
            self._leaves.append((tensor, tensor.requires_grad, tensor.grad if self._gradients else _NOT_KEPT))
        if id(tensor) not in self._moved and _writable(tensor):
            copied = tensor.detach().clone() if self._copies is None else self._copies.copy(tensor)
            self._tensors.append((tensor, copied))


class HostCopies:
    """Copies of tensors in host memory, pinned where the tensors are on a GPU: the copying does not wait for it.

    Args:
        earlier: copies that are not needed any more, whose memory is used again.
    """

    def __init__(self, earlier: HostCopies | None = None) -> None:
        self._free = earlier._of if earlier is not None else {}
        self._of: dict[int, Tensor] = {}
        self._on_gpu = False
        self._arrived: torch.cuda.Event | None = None

    def copy(self, tensor: Tensor) -> Tensor:
        """The values of a tensor, of a DTensor those of this rank, as they are now; the same copy if asked again."""
        if (made := self._of.get(id(tensor))) is not None:
            return made
        local = local_values(tensor.detach())
        self._on_gpu |= local.is_cuda
        free = self._free.pop(id(tensor), None)
        if local.layout != torch.strided:
            free = local.cpu() if local.is_cuda else local.clone()
        elif free is None or (free.shape, free.dtype, free.stride()) != (local.shape, local.dtype, local.stride()):
            free = torch.empty_like(local, device="cpu", pin_memory=local.is_cuda)
        if local.layout == torch.strided:
            free.copy_(local, non_blocking=True)
        self._of[id(tensor)] = free
        return free

    def complete(self) -> None:
        """All copies have been asked for: let go of memory that was not used again."""
        self._free = {}
        if self._on_gpu:
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def wait(self) -> None:
        """Wait until the values have arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()

    @property
    def nbytes(self) -> int:
        """The memory that the copies take."""
        return sum(copied.nbytes for copied in self._of.values() if copied.layout == torch.strided)


@contextmanager
def own_random_streams() -> Iterator[None]:
    """What is drawn inside is drawn from the random streams' present state, to which they return."""
    error: BaseException | None = None
    with isolate_rng():
        try:
            yield
        except BaseException as raised:  # with which isolate_rng would not restore them
            error = raised
    if error is not None:
        raise error


@contextmanager
def isolated(snapshot: Snapshot, run: Run, streams: bool = True) -> Iterator[None]:
    """A pass after which all is as in the snapshot, and the random streams and the run as on entering.

    Inside, what the module logs or prints goes nowhere. What a pass does elsewhere (writing files, drawing from an
    iterator, stepping a scheduler) is not undone. Without ``streams`` the random streams go on.
    """
    global _passes
    caches = torch.is_autocast_cache_enabled()
    for m in snapshot.module.modules():
        if hasattr(m, "log_dict"):  # a LightningModule, of either package
            vars(m).update(dict.fromkeys(_SILENCED, _ignore))
    _passes += 1
    try:
        torch.set_autocast_cache_enabled(False)  # it may hold the parameters as they were
        with run.aside(), own_random_streams() if streams else nullcontext():
            yield
    finally:
        _passes -= 1
        torch.set_autocast_cache_enabled(caches)
        snapshot.restore()


def isolated_passes() -> int:
    """How many isolated passes go on, one inside the other; 0 while the module is trained."""
    return _passes


def loss_of(output: Any) -> Any:
    """The loss in what ``training_step`` returns."""
    return output.get("loss") if isinstance(output, Mapping) else output


def reshard(module: nn.Module) -> None:
    """Drop what ``fully_shard`` has gathered, so that the next pass sees the parameters as they are then."""
    for m in module.modules():
        if any(c.__name__ == "FSDPModule" for c in type(m).__mro__):
            m.reshard()  # type: ignore[operator]


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Stands in for ``LightningModule.log``."""


def _data(value: Any, holders: frozenset[int] = frozenset()) -> dict[str, Any] | None:
    """The attributes of a module, or of an object that holds nothing but data; None for others.

    Args:
        value: any object.
        holders: the ids of objects that hold it, which it may refer to.
    """
    attributes = getattr(value, "__dict__", None)
    if isinstance(value, nn.Module | LRScheduler):
        return attributes
    if not isinstance(attributes, dict) or any(c.__module__.split(".")[0] in _FOREIGN for c in type(value).__mro__):
        return None
    if dataclasses.is_dataclass(value):
        return attributes
    holders |= {id(value)}
    return attributes if all(_is_data_or_module(v, holders) for v in attributes.values()) else None


def _is_data_or_module(value: Any, holders: frozenset[int]) -> bool:
    kinds = (*_ATOMS, BuiltinFunctionType, Tensor, np.ndarray, np.generic, dict, list, set, deque, tuple, frozenset)
    if isinstance(value, (*kinds, nn.Module)):  # such as an average of a module's weights holds
        return True
    known = id(value) in holders or dataclasses.is_dataclass(value) or _state(value) is not None
    return known or _data(value, holders) is not None


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, np.random.RandomState):
        return generator.get_state()
    return None


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)


def _writable(tensor: Tensor) -> bool:
    """Whether values can be written in place: not if there are none, nor if they share memory, expanded over it."""
    if tensor.is_meta:
        return False
    return tensor.layout != torch.strided or all(
        stride or size < 2 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


def _refill(container: Any, content: Any) -> None:
    """Give a container the elements that it had; one that still has them is not touched."""
    if isinstance(container, dict):
        if len(container) != len(content) or any(
            a is not b or v is not w for (a, v), (b, w) in zip(container.items(), content.items(), strict=True)
        ):
            # Of the class itself: a subclass may count, check or convert what is put in
            kind = OrderedDict if isinstance(container, OrderedDict) else dict
            kind.clear(container)
            kind.update(container, content)
    elif len(container) != len(content) or any(a is not b for a, b in zip(container, content, strict=True)):
        base: Any = next(kind for kind in (list, set, deque) if isinstance(container, kind))
        base.clear(container)
        (base.update if base is set else base.extend)(container, content)
