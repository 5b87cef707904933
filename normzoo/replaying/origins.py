"""Which operations, parameters and inputs values that are not finite have come from."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from normzoo.replaying.calls import dense, tensors_in

FINITE, INFINITE, NAN = range(3)
_UNSET = ("empty", "new_empty", "resize")  # whose values are what was in memory before
_OF_RANKS = ("c10d", "_c10d_functional", "_c10d_functional_autograd")  # whose values may arrive later
_NOTHING: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Origin:
    """Where values that are not finite have come from.

    Attributes:
        kind: ``"operation"``, ``"weight"`` (a parameter or buffer) or ``"input"`` (the batch).
        name: of the operation as PyTorch's dispatcher has it, such as ``aten.mul``, or of the tensor.
        module: in whose forward or backward the operation was called.
        backward: whether that was in a backward pass.
        dtype: of the operation's result.
        input_max: the largest magnitude among its inputs; None if none has floating-point values.
        result: ``INFINITE`` or ``NAN``.
    """

    kind: str
    name: str
    module: str = ""
    backward: bool = False
    dtype: torch.dtype | None = None
    input_max: float | None = None
    result: int = NAN


class _Look(NamedTuple):
    """A tensor's values at a glance: whether all are finite, its origins, and the largest magnitude."""

    state: int
    origins: frozenset[int]
    largest: float | None


class Origins(TorchDispatchMode):
    """Follows values that are not finite from operation to operation while it is entered and :attr:`active`.

    An operation is an origin if its result is not finite though its inputs are, or if its result is NaN though its
    inputs are infinities that were written on purpose, such as a mask that leaves an attention nothing. Any other
    result carries the origins of its inputs that are not finite. So the origins of a loss that is NaN are what made it
    so, and an infinity that a softmax turns into 0 is not among them. Each operation waits for its result.

    Args:
        where: tells the name of the module that runs, and whether it is its backward.
    """

    supports_higher_order_operators = True

    def __init__(self, where: Callable[[], tuple[str, bool]]) -> None:
        super().__init__()
        self.origins: list[Origin] = []  # numbered in this order
        self.active = False
        self._pauses = 0
        self._where = where
        self._of: dict[int, frozenset[int]] = {}  # by the memory that values are in

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is called inside is not followed."""
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1

    def mark(self, kind: str, tensors: Mapping[str, Tensor], masks: bool = True) -> list[str]:
        """Take those of some tensors that are not finite for origins, and return their names.

        With ``masks`` a tensor whose only values of that kind are minus infinity is a mask, and no origin.
        """
        names = []
        for name, t in tensors.items():
            look = self._look(t)
            if look.state == NAN or (look.state and not (masks and bool((dense(t) != torch.inf).all()))):
                self._set(t, look.origins | self._new(Origin(kind, name, result=look.state)))
                names.append(name)
        return names

    def of(self, tensors: Iterable[Tensor]) -> frozenset[int]:
        """The numbers of the origins of those tensors that are not finite."""
        return _NOTHING.union(*(look.origins for look in map(self._look, tensors) if look.state))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call an operation, and look at its results."""
        kwargs = kwargs or {}
        if not self.active or self._pauses:
            return func(*args, **kwargs)
        written = {id(t): self._look(t) for t in _written(func, args, kwargs)}  # which are others after it
        inputs = [*tensors_in([args, kwargs])]
        result = func(*args, **kwargs)
        given = {_memory(t) for t in inputs}
        results = [*tensors_in(result), *(t for t in inputs if id(t) in written)]
        unknown = getattr(func, "namespace", "") in _OF_RANKS or _name(func).startswith(_UNSET)
        for t in {id(t): t for t in results}.values():
            fresh, whole = _memory(t) not in given, _fills_its_memory(t)
            if fresh or (id(t) in written and whole):
                self._forget(t)
            if not unknown and (fresh or id(t) in written) and (state := _glance(t)[0]):  # others are views
                looks = [written.get(id(i)) or self._look(i) for i in inputs]
                origins = self._origins_of(func, t, state, looks, (args, kwargs))
                self._set(t, origins | (_NOTHING if whole else self._known(t)))
        return result

    def _origins_of(self, func: Any, t: Tensor, state: int, looks: list[_Look], given: Any) -> frozenset[int]:
        """The origins of a result that is not finite."""
        origins = _NOTHING.union(*(look.origins for look in looks if look.state))
        numbers = [_state_of(x) for x in tree_leaves(given) if isinstance(x, float)]
        worst = max([*(look.state for look in looks), *numbers], default=FINITE)
        if origins or worst == NAN or (worst == INFINITE and state == INFINITE):
            return origins
        largest = max((look.largest for look in looks if look.largest is not None), default=None)
        name = f"{getattr(func, 'namespace', '')}.{_name(func)}".lstrip(".")
        return self._new(Origin("operation", name, *self._where(), t.dtype, largest, state))

    def _new(self, origin: Origin) -> frozenset[int]:
        self.origins.append(origin)
        return frozenset([len(self.origins) - 1])

    def _look(self, t: Tensor) -> _Look:
        state, largest = _glance(t)
        return _Look(state, self._known(t), largest)

    def _known(self, t: Tensor) -> frozenset[int]:
        return self._of.get(_memory(t), _NOTHING)

    def _set(self, t: Tensor, origins: frozenset[int]) -> None:
        if memory := _memory(t):
            self._of[memory] = origins

    def _forget(self, t: Tensor) -> None:
        self._of.pop(_memory(t), None)


def all_finite(t: Tensor) -> bool:
    """Whether all values of a tensor are finite."""
    return _glance(t)[0] == FINITE


def _glance(t: Tensor) -> tuple[int, float | None]:
    """Whether all values are finite, and their largest magnitude; None of a tensor that holds no such numbers."""
    t = dense(t)
    if t.is_complex():
        t = torch.view_as_real(t)
    if not t.is_floating_point() or t.is_meta or not t.numel():
        return FINITE, None
    low, high = torch.stack((t.float() if t.itemsize == 1 else t).aminmax()).tolist()
    return max(_state_of(low), _state_of(high)), max(abs(low), abs(high))


def _state_of(number: float) -> int:
    return NAN if math.isnan(number) else INFINITE if math.isinf(number) else FINITE


def _memory(t: Tensor) -> int:
    """Where a tensor's values are; 0 for nowhere, as of one without values."""
    try:
        return dense(t).untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # a tensor without memory of its own, as those of functorch
        return 0


def _fills_its_memory(t: Tensor) -> bool:
    t = dense(t)
    return not _memory(t) or t.nbytes >= t.untyped_storage().nbytes()


def _name(func: Any) -> str:
    return str(func.name() if callable(getattr(func, "name", None)) else func).split("::")[-1].split(".")[0]


def _written(func: Any, args: Any, kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors among an operation's arguments that it writes to."""
    values = [args[i] if i < len(args) else kwargs.get(name) for i, name in _written_arguments(func)]
    return [*tensors_in(values)]


@functools.cache
def _written_arguments(func: Any) -> list[tuple[int, str]]:
    arguments = func._schema.arguments if hasattr(func, "_schema") else []
    return [(i, a.name) for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]
