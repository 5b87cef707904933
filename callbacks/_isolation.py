"""Extra forward passes that leave no trace in the module, the metrics, the logs or the random streams."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.seed import isolate_rng

_CONTAINERS = (list, dict, set, deque)
_STRUCTURE = {"_parameters", "_buffers", "_modules"}


@contextmanager
def isolated(module: LightningModule) -> Iterator[None]:
    """Restore, on leaving: buffers, torchmetrics state, plain attributes, random streams; ``log`` does nothing inside.

    What a forward pass does outside the module (writing files, calling a logger directly) is not undone.
    """
    saved = [(m, _attributes(m)) for m in module.modules()]
    buffers = [(b, b.clone()) for b in module.buffers()]
    vars(module)["log"] = vars(module)["log_dict"] = _ignore
    try:
        with isolate_rng():
            yield
    finally:
        for m, attributes in saved:
            _restore(m, attributes)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Stands in for ``LightningModule.log``."""


def _attributes(module: torch.nn.Module) -> dict[str, tuple[Any, Any]]:
    """Each plain attribute and what to put back: the object itself, and a copy of a container's contents."""
    return {name: (value, _content(value)) for name, value in vars(module).items() if name not in _STRUCTURE}


def _content(value: Any) -> Any:
    if torch.is_tensor(value):  # the state of a torchmetrics metric, for one, is updated in place
        return value.detach().clone()
    return copy.copy(value) if type(value) in _CONTAINERS else value


def _restore(module: torch.nn.Module, attributes: dict[str, tuple[Any, Any]]) -> None:
    now = vars(module)
    for name in [n for n in now if n not in attributes and n not in _STRUCTURE]:
        del now[name]
    for name, (original, content) in attributes.items():
        now[name] = original
        if torch.is_tensor(original):
            with torch.no_grad():
                original.copy_(content)
        elif type(original) in _CONTAINERS:
            original.clear()
            (original.update if isinstance(original, dict | set) else original.extend)(content)
