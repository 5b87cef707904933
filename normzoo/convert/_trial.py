"""Trying what a module computes without touching it: on a copy, on the CPU, in float64, without hooks."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import random
import sys
import time
import warnings
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

MOST_VALUES = 2**20  # of a module's tensors: norms have a few for each channel
_MOST_OBJECTS = 1000
_PATIENCE = 10.0  # seconds; a norm takes a fraction of one
_ATOMS = (str, bytes, int, float, complex, bool, type(None), type, torch.dtype, torch.device, torch.Size)
_OUTSIDE = (ModuleType, FunctionType, BuiltinFunctionType)  # what a copy shares with the original


class CannotBeTriedError(ValueError):
    """The reason why a module is not tried."""


def is_of_hooks(name: str) -> bool:
    """Whether an attribute of a module holds its hooks, or what is to be known of them."""
    return "_hooks" in name and name.startswith("_")


def bare_copy(
    module: nn.Module,
    stand_ins: Mapping[str, nn.Module | None] | None = None,
    most_values: int = MOST_VALUES,
    dtype: torch.dtype = torch.float64,
) -> Any:
    """A copy of a module in one dtype on the CPU, without hooks, some of its submodules replaced.

    Raises:
        CannotBeTriedError: for tensors on the meta device, distributed or of unknown classes, for modules that hold
            many values or other modules outside of their registered ones, and for what cannot be copied.
    """
    stand_ins = stand_ins or {}
    _check_size(module, stand_ins, most_values)
    bare: Any = copy.copy(module)
    bare.__dict__ |= {name: OrderedDict() for name in vars(bare) if is_of_hooks(name)}
    bare._modules = {**module._modules, **stand_ins}
    forward = vars(bare).pop("forward", None)
    try:
        made = copy.deepcopy(bare).cpu().to(dtype)
    except Exception as error:  # whatever it holds decides what copying it raises
        raise CannotBeTriedError(f"it cannot be copied ({type(error).__name__}: {_line(error)})") from error
    if forward is not None:
        if not (isinstance(forward, MethodType) and forward.__self__ is module):
            raise CannotBeTriedError("this instance has a forward of its own that is no method")
        made.forward = MethodType(forward.__func__, made)
    return made


def _check_size(module: nn.Module, stand_ins: Collection[str], most_values: int) -> None:
    """Raise a CannotBeTriedError unless what a module refers to is plain data of small size."""
    held = {n: v for n, v in vars(module).items() if not is_of_hooks(n) and n != "_modules"}
    stack: list[Any] = [held, *(child for n, child in module._modules.items() if n not in stand_ins)]
    inside = {id(m) for m in module.modules()}
    seen: set[int] = set()
    values = 0
    while stack:
        value = stack.pop()
        if isinstance(value, _ATOMS + _OUTSIDE) or id(value) in seen:
            continue
        seen.add(id(value))
        if len(seen) > _MOST_OBJECTS:
            raise CannotBeTriedError("it refers to too many objects to be copied")
        if isinstance(value, Tensor):
            _check_tensor(value)
            values += value.numel()
            if values > most_values:
                raise CannotBeTriedError(f"it holds more than {most_values:,} values")
        elif isinstance(value, nn.Module) and id(value) not in inside:
            raise CannotBeTriedError(f"it refers to a {type(value).__name__} that is no submodule of it")
        elif isinstance(value, Mapping):
            stack += value.values()
        elif isinstance(value, list | tuple | set | frozenset):
            stack += value
        elif isinstance(value, MethodType):
            stack.append(value.__self__)
        else:
            stack += vars(value).values() if hasattr(value, "__dict__") else ()


def _check_tensor(tensor: Tensor) -> None:
    if tensor.is_meta:
        raise CannotBeTriedError("it is on the meta device")
    if type(tensor.data) is not Tensor:
        raise CannotBeTriedError(f"it holds a {type(tensor.data).__name__}")
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise CannotBeTriedError("it holds sparse or quantized values")


def required_arguments(module: nn.Module) -> tuple[list[str], list[str]]:
    """The names of the arguments that the module's forward requires, and of those that it may be given beside them.

    Raises:
        CannotBeTriedError: for a forward without a signature.
    """
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError) as error:
        raise CannotBeTriedError("its forward has no signature") from error
    plain = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    required = [p.name for p in plain if p.default is p.empty]
    return required, [p.name for p in parameters if p.name not in required]


class Trial:
    """A copy of a module that can be run; each run starts from the same tensors.

    Args:
        module: which to copy.
        stand_ins: submodules of the copy that replace the module's own, by name.
        dtype: of the copy, and of the inputs that it is given.

    Raises:
        CannotBeTriedError: see :func:`bare_copy`.
    """

    def __init__(
        self,
        module: nn.Module,
        stand_ins: Mapping[str, nn.Module | None] | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.dtype = dtype
        self.copy = bare_copy(module, stand_ins, dtype=dtype)
        self._outside = _Outside(type(module))
        self.reduced = False  # whether some operation's result was float32
        self.halved = False  # whether some operation's result was narrower
        self.problem = ""  # why the last run gave nothing
        self.mutates = False  # whether it changed an input
        self._seconds = 0.0
        self.keep()

    def keep(self) -> None:
        """Make the copy's tensors as they are now those that each run starts from."""
        self.start = {n: t.detach().clone() for n, t in _tensors(self.copy).items()}

    def tensors(self) -> dict[str, Tensor]:
        """The copy's own parameters and buffers."""
        return _tensors(self.copy)

    def restore(self) -> None:
        """Put the tensors back."""
        for name, tensor in self.start.items():
            holder = self.copy._parameters if name in self.copy._parameters else self.copy._buffers
            if isinstance(holder.get(name), Tensor) and holder[name].shape == tensor.shape:
                holder[name].data.copy_(tensor)
            else:
                holder[name] = tensor.clone()

    def run(self, x: Tensor, training: bool = False, fresh: bool = True) -> Tensor | None:
        """The output for ``x``, or None if the module raises, changes its input, or returns anything but such a tensor.

        Args:
            x: the input, which is not changed.
            training: in which mode.
            fresh: start from the tensors that were kept; else from those that the last run left.
        """
        if fresh:
            self.restore()
        if self._seconds > _PATIENCE:
            raise CannotBeTriedError(f"trying it takes more than {_PATIENCE} s")
        x = x.to(self.dtype)
        given, start = x.clone(), time.monotonic()
        try:
            self.copy.train(training)
            with self._outside, _Precision() as seen:
                y = self.copy.forward(given)
        except Exception as error:  # what a module raises for input that it does not take is its own choice
            self.problem = f"{type(error).__name__}: {_line(error)}"
            return None
        finally:
            self._seconds += time.monotonic() - start
            self.mutates |= not torch.equal(given, x)
        if not isinstance(y, Tensor) or y.shape != x.shape or not y.is_floating_point():
            self.problem = f"it returns {f'a shape {tuple(y.shape)}' if isinstance(y, Tensor) else type(y).__name__}"
            return None
        if self.mutates:
            self.problem = "it changes its input"
            return None
        self.reduced |= torch.float32 in seen.dtypes
        self.halved |= bool(seen.dtypes & {torch.float16, torch.bfloat16})
        return y.detach().to(torch.float64, copy=True)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {n: t for n, t in {**module._parameters, **module._buffers}.items() if t is not None}


class _Precision(TorchDispatchMode):
    """Notes the floating-point dtypes of the results of all operations, single numbers left out.

    Raises:
        RuntimeError: in place of an operation that waits for other ranks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            raise RuntimeError("it communicates with other ranks")
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple | list) else (result,):
            if isinstance(t, Tensor) and t.is_floating_point() and t.numel() > 1:
                self.dtypes.add(t.dtype)
        return result


class _Outside:
    """Puts back what code changes, while it runs, of a class's attributes and of its methods' global names.

    These are numbers, strings and the like, and the entries of lists, dictionaries and sets.
    """

    def __init__(self, cls: type) -> None:
        own = [c for c in cls.__mro__ if c.__module__.partition(".")[0] not in ("torch", "builtins", "typing", "abc")]
        self._classes = own
        spaces = {
            id(f.__globals__): f.__globals__ for c in own for f in vars(c).values() if isinstance(f, FunctionType)
        }
        self._spaces = list(spaces.values())

    def _states(self) -> Iterator[tuple[Any, str, Any]]:
        yield from ((c, name, value) for c in self._classes for name, value in vars(c).items())
        yield from ((space, name, value) for space in self._spaces for name, value in space.items())

    def __enter__(self) -> None:
        self._plain = [(o, n, v) for o, n, v in self._states() if isinstance(v, int | float | str | tuple | None)]
        several = (v for _, _, v in self._states() if type(v) in (list, dict, set) and len(v) <= _MOST_OBJECTS)
        self._several = [(v, copy.copy(v)) for v in several]

    def __exit__(self, *_: object) -> None:
        for owner, name, value in self._plain:
            if isinstance(owner, dict):
                if owner.get(name) is not value:
                    owner[name] = value
            elif vars(owner).get(name) is not value:
                setattr(owner, name, value)
        for value, entries in self._several:
            if isinstance(value, list):
                value[:] = entries
            elif value.keys() != entries.keys() if isinstance(value, dict) else value != entries:
                value.clear()
                value.update(entries)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Inside, modules may draw random numbers, print and warn: nothing of it is noticed outside.

    Inside there are no gradients, no autocast, and compiled functions run as they were written, on the CPU.
    """
    numpy = sys.modules.get("numpy")
    states = random.getstate(), numpy.random.get_state() if numpy is not None else None
    with (
        torch.random.fork_rng([]),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        torch.device("cpu"),
        eagerly(),
    ):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            random.setstate(states[0])
            if numpy is not None:
                numpy.random.set_state(states[1])


@contextlib.contextmanager
def eagerly() -> Iterator[None]:
    """Inside, what is compiled runs as it was written."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return text if len(text) <= 120 else f"{text[:117]}..."
