"""normzoo: normalization layers, stability measurements and recipes for PyTorch Lightning.

Importing normzoo does not import torch; what is used is imported then. The CIFAR ResNets are in timm's registry
from the first use of a function below if timm was imported by then, and always after ``import normzoo.models``.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from normzoo import callbacks, data, functional, layers, metrics, models, task, testing
    from normzoo.models import create_model, standardize_weights
    from normzoo.registry import NormInfo, create_norm, get_norm, list_norms, norm_info, register_norm

__version__ = "0.1.0"

_FROM = {
    "NormInfo": "registry",
    "create_model": "models",
    "standardize_weights": "models",
    "create_norm": "registry",
    "get_norm": "registry",
    "list_norms": "registry",
    "norm_info": "registry",
    "register_norm": "registry",
}
_SUBMODULES = ("callbacks", "data", "functional", "layers", "metrics", "models", "report", "task", "testing")

__all__ = [
    "NormInfo",
    "callbacks",
    "create_model",
    "create_norm",
    "data",
    "functional",
    "get_norm",
    "layers",
    "list_norms",
    "metrics",
    "models",
    "norm_info",
    "register_norm",
    "standardize_weights",
    "task",
    "testing",
]


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"normzoo.{name}")
    if name not in _FROM:
        raise AttributeError(f"module 'normzoo' has no attribute {name!r}")
    if "timm" in sys.modules:
        importlib.import_module("normzoo.models")
    return getattr(importlib.import_module(f"normzoo.{_FROM[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
