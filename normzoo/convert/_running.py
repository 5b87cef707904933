"""Running a model in evaluation on batches of any kind."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

Forward = Callable[[Any, Any], Any]

_A_LIST = re.compile(r"(<class )?['\"]?(typing\.|collections\.abc\.)?(list|sequence|iterable)\b", re.IGNORECASE)
_TYPE_COMMENT = re.compile(r"#\s*type:\s*\((?P<first>[^)]*)")


@contextlib.contextmanager
def evaluating(model: nn.Module, *others: nn.Module) -> Iterator[None]:
    """Inside, the model and the others are in evaluation mode; then each module is in the mode in which it was."""
    modes = [(m, m.training) for root in (model, *others) for m in root.modules()]
    for root in (model, *others):
        root.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def batches_of(loader: Iterable[Any]) -> Iterable[Any]:
    """The batches of a loader; a tensor is one batch, and so is a dict."""
    return [loader] if isinstance(loader, Tensor | Mapping) else loader


def run_example(model: nn.Module, example: Any) -> Any:
    """The model's outputs for one input: a tuple is several arguments, a dict keyword arguments.

    A dict that lacks a required argument is one argument.
    """
    return model(*example) if isinstance(example, tuple) else _run_one(model, example)


def run_batch(model: nn.Module, batch: Any, number: int, forward: Forward | None = None) -> Any:
    """The model's outputs for a batch of a loader.

    Args:
        model: any module.
        batch: without ``forward``, a tensor; a dict of keyword arguments, and of targets beside them; or a sequence
            that begins with as many inputs as the model's forward requires, such as (input, target); a list of tensors
            is one input if forward's first argument is annotated as a list, also in a type comment, as of torchvision's
            detectors. Tensors go to the model's device.
        number: which batch it is, for messages.
        forward: called as ``forward(model, batch)`` for batches of other kinds.

    Raises:
        ValueError: if the batch is of another kind, or the model cannot take it.
    """
    try:
        if forward is not None:
            return forward(model, batch)
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(batch)):
            raise _BatchError(
                f"batch {number} is a {type(batch).__name__} without tensors; give forward=lambda model, batch: ..."
            )
        first = next(itertools.chain(model.parameters(), model.buffers()), None)
        if first is not None:
            batch = tree_map_only(Tensor, lambda t: t.to(first.device, non_blocking=True), batch)
        return _run_inputs(model, batch, number)
    except (torch.OutOfMemoryError, _BatchError):
        raise
    except Exception as error:
        plain = forward is not None or isinstance(batch, Tensor)
        hint = "" if plain else "; forward=lambda model, batch: ... takes batches of any kind"
        text = " ".join(str(error).split())
        raise ValueError(f"batch {number} could not be run: {type(error).__name__}: {text}{hint}") from error


class _BatchError(ValueError):
    """The batch is not of a kind that can be given to a model."""


def _run_inputs(model: nn.Module, batch: Any, number: int) -> Any:
    if not isinstance(batch, tuple | list) or (isinstance(batch, list) and _takes_a_list(model, batch)):
        return _run_one(model, batch)
    names = _required(model)
    if len(batch) < len(names):
        raise _BatchError(
            f"batch {number} has {len(batch)} inputs and {type(model).__name__}.forward requires {len(names)} "
            f"({', '.join(names)}): give forward=lambda model, batch: ..."
        )
    return model(*batch[: len(names)]) if len(names) > 1 else _run_one(model, batch[0])


def _takes_a_list(model: nn.Module, batch: list[Any]) -> bool:
    """Whether tensors in a list are one input, as of torchvision's detectors, whose signature says so."""
    signature = _signature(model)
    first = next(iter(signature.parameters.values()), None) if signature else None
    if first is None or not all(isinstance(element, Tensor) for element in batch):
        return False
    kind = _type_comment(model) if first.annotation is first.empty else str(first.annotation)
    return _A_LIST.match(kind) is not None


def _type_comment(model: Any) -> str:
    """What the comment ``# type: (list[Tensor], ...) -> ...`` in a forward says of its arguments."""
    try:
        source = inspect.getsource(getattr(model, "_orig_mod", model).forward)
    except (OSError, TypeError):
        return ""
    found = _TYPE_COMMENT.search(source)
    return found["first"] if found else ""


def _run_one(model: nn.Module, x: Any) -> Any:
    """The model's outputs for one input; a dict with all required arguments is keyword arguments, others left out."""
    if isinstance(x, Mapping) and all(isinstance(k, str) for k in x):
        signature = _signature(model)
        if signature is None or _binds(signature, (), x):
            return model(**x)
        known = {k: v for k, v in x.items() if k in signature.parameters}
        if known and _binds(signature, (), known):
            return model(**known)
        if not _binds(signature, (x,), {}):
            return model(**x)
    return model(x)


def _signature(model: Any) -> inspect.Signature | None:
    try:
        return inspect.signature(getattr(model, "_orig_mod", model).forward)
    except (TypeError, ValueError):
        return None


def _binds(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _required(model: nn.Module) -> list[str]:
    """The names of the positional arguments of the model's forward that have no default."""
    signature = _signature(model)
    return [
        p.name
        for p in (signature.parameters.values() if signature else ())
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty
    ]
