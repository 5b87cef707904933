"""normzoo: normalization layers, stability measurements and recipes for PyTorch Lightning.

Importing normzoo does not import torch; what is used is imported then. The CIFAR ResNets are in timm's registry
from the first use of a function below if timm was imported by then, and always after ``import normzoo.models``.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from normzoo import callbacks, convert, data, experiments, functional, layers, metrics, models, task, testing, timm
    from normzoo.callbacks._run.loop import watch
    from normzoo.capsules import Capsule, load_capsule
    from normzoo.causes import Findings
    from normzoo.convert import ConversionReport, convert_norms
    from normzoo.fold import fold_norms
    from normzoo.models import create_model, standardize_weights
    from normzoo.records.reading import load_run
    from normzoo.registry import NormInfo, create_norm, get_norm, list_norms, norm_info, register_norm
    from normzoo.replaying import replay
    from normzoo.report.frames import load_runs
    from normzoo.statistics import freeze_norms, param_groups, reestimate_statistics

__version__ = "0.1.0"

_FROM = {
    "Capsule": "capsules",
    "ConversionReport": "convert",
    "Findings": "causes",
    "NormInfo": "registry",
    "convert_norms": "convert",
    "create_model": "models",
    "standardize_weights": "models",
    "create_norm": "registry",
    "fold_norms": "fold",
    "freeze_norms": "statistics",
    "get_norm": "registry",
    "list_norms": "registry",
    "load_capsule": "capsules",
    "load_run": "records.reading",
    "load_runs": "report.frames",
    "norm_info": "registry",
    "param_groups": "statistics",
    "reestimate_statistics": "statistics",
    "register_norm": "registry",
    "replay": "replaying",
    "watch": "callbacks._run.loop",
}
_SUBMODULES = (
    "callbacks",
    "convert",
    "data",
    "experiments",
    "functional",
    "layers",
    "metrics",
    "models",
    "report",
    "task",
    "testing",
    "timm",
)

__all__ = [
    "Capsule",
    "ConversionReport",
    "Findings",
    "NormInfo",
    "callbacks",
    "convert",
    "convert_norms",
    "create_model",
    "create_norm",
    "data",
    "experiments",
    "fold_norms",
    "freeze_norms",
    "functional",
    "get_norm",
    "layers",
    "list_norms",
    "load_capsule",
    "load_run",
    "load_runs",
    "metrics",
    "models",
    "norm_info",
    "param_groups",
    "reestimate_statistics",
    "register_norm",
    "replay",
    "standardize_weights",
    "task",
    "testing",
    "timm",
    "watch",
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
