"""Every module class of torch, torchvision, timm, Lightning and the zoo, and one object of each."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import warnings
from collections.abc import Iterator

import torch
from torch import nn

PACKAGES = (
    *("torch.nn", "torch.nn.utils.parametrizations", "timm.layers", "timm.models"),
    *("torchvision.models", "torchvision.ops", "torchvision.transforms", "torchvision.transforms.v2"),
    *("lightning.pytorch.plugins.layer_sync", "normzoo.layers"),
)
_ARGUMENTS = ((64,), (64, 64), (8, 64), (2,), ())  # of norms, of blocks with norms, of GroupNorm, of LocalResponseNorm


def classes() -> Iterator[tuple[str, type[nn.Module]]]:
    """(qualified name, class) of all subclasses of ``nn.Module`` in the packages, sorted."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for package in PACKAGES:
            importlib.import_module(package)
    named = {f"{cls.__module__}.{cls.__qualname__}": cls for cls in _subclasses(nn.Module)}
    for name, cls in sorted(named.items()):
        scripted = issubclass(cls, torch.jit.ScriptModule)
        if name.startswith(PACKAGES) and not scripted and not inspect.isabstract(cls):
            yield name, cls


def made(cls: type[nn.Module]) -> nn.Module | None:
    """A module of 64 channels of a class that says "norm", an empty one of another class; None if it takes more."""
    if not any("norm" in base.__name__.lower() or base.__name__ == "Affine" for base in cls.__mro__):
        module = nn.Module.__new__(cls)
        nn.Module.__init__(module)
        return module
    for arguments in _ARGUMENTS:
        with contextlib.suppress(Exception):  # of a class that takes other arguments any
            return cls(*arguments)
    return None


def _subclasses(cls: type[nn.Module]) -> Iterator[type[nn.Module]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)
