"""What a model selects by its values (top-k, thresholds, NMS), recorded in one run and repeated in others.

Two runs of nearly the same computation may select differently: their outputs then differ in number, or belong to other
candidates, and cannot be compared. Repeating the first run's selections makes them comparable.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

# Operations whose results are positions or numbers for Python, by the name of their schema.
_POSITIONS = {
    *("aten::nonzero", "aten::nonzero_numpy", "aten::nonzero_static", "aten::argwhere", "torchvision::nms"),
    *("aten::argmax", "aten::argmin", "aten::argsort", "aten::searchsorted", "aten::bucketize", "aten::bincount"),
    *(
        "aten::multinomial",
        "aten::_local_scalar_dense",
        "aten::item",
        "aten::is_nonzero",
        "aten::equal",
        "aten::allclose",
    ),
}
# Those that return the values that they select, and their positions.
_VALUES_AND_POSITIONS = {
    *("aten::topk", "aten::sort", "aten::max", "aten::min", "aten::median", "aten::kthvalue", "aten::mode"),
}
_MASKED = {"aten::index", "aten::masked_select"}


@dataclass
class Selections:
    """The selections of one run, in the order of execution: operation, shapes of its inputs, and what it selected."""

    entries: list[tuple[str, list[torch.Size], Any]] = field(default_factory=list)

    @contextlib.contextmanager
    def recorded(self, skipped: Iterable[nn.Module] = ()) -> Iterator[None]:
        """Inside, what is selected is recorded, but for what the ``skipped`` modules select."""
        mode = _Record(self.entries)
        with _skipping(mode, skipped), mode:
            yield

    @contextlib.contextmanager
    def repeated(self, skipped: Iterable[nn.Module] = ()) -> Iterator[None]:
        """Inside, what was recorded is selected again, in its order; other selections are the model's own."""
        mode = _Repeat(self.entries)
        with _skipping(mode, skipped), mode:
            yield


class _Selecting(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self, entries: list[tuple[str, list[torch.Size], Any]]) -> None:
        super().__init__()
        self.entries, self.depth = entries, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(getattr(func, "_schema", None), "name", "")
        if self.depth or not (name in _POSITIONS or name in _VALUES_AND_POSITIONS or _masks(name, args)):
            return func(*args, **kwargs)
        shapes = [t.shape for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        return self.select(name, shapes, func, args, kwargs)

    def select(self, name: str, shapes: list[torch.Size], func: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError


class _Record(_Selecting):
    def select(self, name: str, shapes: list[torch.Size], func: Any, args: Any, kwargs: Any) -> Any:
        result = func(*args, **kwargs)
        if name in _MASKED:
            selected: Any = args[1:]
        elif name in _VALUES_AND_POSITIONS:
            if isinstance(result, Tensor):  # the largest of all values, without its position
                return result
            selected = result[1]
        else:
            selected = result
        self.entries.append((name, shapes, _cloned(selected)))
        return result


class _Repeat(_Selecting):
    def __init__(self, entries: list[tuple[str, list[torch.Size], Any]]) -> None:
        super().__init__(entries)
        self.next = 0

    def select(self, name: str, shapes: list[torch.Size], func: Any, args: Any, kwargs: Any) -> Any:
        if name in _VALUES_AND_POSITIONS and len(func._schema.returns) == 1:
            return func(*args, **kwargs)
        same = (i for i in range(self.next, len(self.entries)) if self.entries[i][:2] == (name, shapes))
        if (place := next(same, None)) is None:
            return func(*args, **kwargs)
        self.next = place + 1
        selected = _cloned(self.entries[place][2])
        if name in _MASKED:
            return func(args[0], *selected, **kwargs)
        if name in _VALUES_AND_POSITIONS:
            return _values_at(func, args, kwargs, selected), selected
        return selected


def _values_at(func: Any, args: Any, kwargs: Any, positions: Tensor) -> Tensor:
    """The values at the positions along the operation's dimension."""
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    x: Tensor = given["self"]
    if not x.ndim:
        return x.clone()
    dim = given.get("dim", next(a.default_value for a in func._schema.arguments if a.name == "dim"))
    if positions.ndim == x.ndim:
        return x.gather(dim, positions)
    return x.gather(dim, positions.unsqueeze(dim)).squeeze(dim)


def _masks(name: str, args: Any) -> bool:
    """Whether an operation selects by masks, so that its output's size depends on their values."""
    if name == "aten::where":
        return len(args) == 1
    return name in _MASKED and any(isinstance(t, Tensor) and t.dtype == torch.bool for t in tree_leaves(args[1:]))


def _cloned(value: Any) -> Any:
    return tree_map_only(Tensor, torch.clone, value)


@contextlib.contextmanager
def _skipping(mode: _Selecting, modules: Iterable[nn.Module]) -> Iterator[None]:
    def enter(*_: Any) -> None:
        mode.depth += 1

    def leave(*_: Any) -> None:
        mode.depth -= 1

    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        yield
