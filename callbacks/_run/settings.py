"""How a run was set up, which a capsule says so that its steps can be made again: torch, the Trainer, the module."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException  # type: ignore[attr-defined]

_PACKAGES = ("lightning", "pytorch-lightning", "normzoo", "numpy")
_MAKERS = ("torch", "lightning", "pytorch_lightning")  # make classes of others' at run time, as ``fully_shard`` does
_LONGEST = 100_000  # items of hyperparameters


def torch_settings(device: torch.device) -> dict[str, Any]:
    """What decides, beside code and data, which bits torch computes in this process.

    Args:
        device: where the module computes.

    Returns:
        plain data; None where torch does not say.
    """
    matmul: Any = torch.backends.cuda.matmul
    return {
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "deterministic_warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "cudnn_allow_tf32": _asked(lambda: torch.backends.cudnn.allow_tf32),
        "cublas_workspace_config": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        "float32_matmul_precision": _asked(torch.get_float32_matmul_precision),
        "cuda_matmul_fp32_precision": _asked(lambda: matmul.fp32_precision),
        "default_dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "flush_denormal": _flushes_denormals(),
        "detect_anomaly": torch.is_anomaly_enabled(),
        "device": str(device),
        "processor": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "versions": _versions(),
    }


def trainer_settings(trainer: Any) -> dict[str, Any]:
    """What a Trainer was given: precision, clipping, accumulation, devices, strategy, length of the run.

    Args:
        trainer: of either package of Lightning, in a fit.
    """
    strategy = trainer.strategy
    algorithm = trainer.gradient_clip_algorithm
    return {
        "precision": str(trainer.precision),
        "gradient_clip_val": trainer.gradient_clip_val,
        "gradient_clip_algorithm": getattr(algorithm, "value", algorithm),
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "accelerator": type(trainer.accelerator).__name__,
        "strategy": type(strategy).__name__,
        "strategy_options": _strategy_options(strategy),
        "sync_batchnorm": getattr(strategy, "_layer_sync", None) is not None,
        "devices": trainer.num_devices,
        "num_nodes": trainer.num_nodes,
        "world_size": trainer.world_size,
        "max_steps": trainer.max_steps,
        "max_epochs": trainer.max_epochs,
        "num_training_batches": trainer.num_training_batches,
        "estimated_stepping_batches": _estimated_steps(trainer),
        "datamodule": None if trainer.datamodule is None else class_path(type(trainer.datamodule)),
        "optimizers": [type(optimizer).__name__ for optimizer in trainer.optimizers],
        "callbacks": [class_path(type(callback)) for callback in trainer.callbacks],
    }


def module_settings(module: torch.nn.Module) -> dict[str, Any]:
    """Where a module's class is, and the hyperparameters that a LightningModule has saved.

    Returns:
        ``module``, its class path; ``module_file``, the file that the class is in, None if it is not known;
        ``hparams``, those that are plain data; ``hparams_left_out``, names of others; ``hparams_name``, the argument
        of ``__init__`` that all of them are, ``"kwargs"`` if they are its arguments, None if there are none.
    """
    cls = own_class(module)
    file = getattr(sys.modules.get(cls.__module__), "__file__", None) or _file_of_functions(cls)
    saved = getattr(module, "hparams", {})
    saved = saved if isinstance(saved, Mapping) else {}
    hparams = {str(name): plain(value) for name, value in saved.items()}
    return {
        "module": class_path(cls),
        "module_file": str(Path(file).absolute()) if file else None,
        "hparams": {name: value for name, value in hparams.items() if value is not _NOT_PLAIN},
        "hparams_left_out": [name for name, value in hparams.items() if value is _NOT_PLAIN],
        "hparams_name": getattr(module, "_hparams_name", None) if saved else None,
    }


def own_class(module: torch.nn.Module) -> type:
    """The class of a module as its author wrote it, without those that torch derives from it at run time.

    ``fully_shard`` makes a class of two bases, of which the one of torch is no module.

    Example:
        >>> layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 2))
        >>> type(layer).__name__, own_class(layer).__name__
        ('ParametrizedLinear', 'Linear')
    """
    classes = [cls for cls in type(module).__mro__ if issubclass(cls, torch.nn.Module)]
    for cls in classes:
        made = getattr(sys.modules.get(cls.__module__), cls.__qualname__.partition(".")[0], None) is None
        if not (made and cls.__module__.split(".")[0] in _MAKERS):
            return cls
    return classes[0]


def class_path(cls: type) -> str:
    """``package.module:Class``.

    Example:
        >>> class_path(torch.nn.Linear)
        'torch.nn.modules.linear:Linear'
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None) if cls.__module__ == "__main__" else None
    return f"{cls.__module__ if spec is None else spec.name}:{cls.__qualname__}"  # the name in python -m


def _file_of_functions(cls: type) -> str | None:
    """The file of a class by its functions, if it is there: ``runpy`` leaves no module, a notebook no file."""
    files = (function.__code__.co_filename for function in vars(cls).values() if isinstance(function, FunctionType))
    return next((file for file in files if Path(file).is_file()), None)


_NOT_PLAIN = object()


def plain(value: Any) -> Any:
    """A copy of plain data: numbers, text, None, lists, tuples and dictionaries whose keys are text.

    Example:
        >>> plain({"lr": 0.1, "sizes": (1, 2)}), plain([print]) is _NOT_PLAIN
        ({'lr': 0.1, 'sizes': (1, 2)}, True)
    """
    budget = [_LONGEST]

    def copied(value: Any) -> Any:
        budget[0] -= 1
        if budget[0] < 0:
            return _NOT_PLAIN
        if value is None or isinstance(value, bool | int | float | str):
            return value if type(value) in (type(None), bool, int, float, str) else _NOT_PLAIN
        if isinstance(value, np.bool_ | np.integer | np.floating):
            return value.item()
        if isinstance(value, Mapping):
            items: Any = {name: copied(item) for name, item in value.items()}
            whole = all(isinstance(name, str) for name in items) and _NOT_PLAIN not in items.values()
            return items if whole else _NOT_PLAIN
        if type(value) in (list, tuple):
            items = [copied(item) for item in value]
            return _NOT_PLAIN if any(item is _NOT_PLAIN for item in items) else type(value)(items)
        return _NOT_PLAIN

    return copied(value)


def _strategy_options(strategy: Any) -> dict[str, Any]:
    """How a strategy distributes: what DDP was given, and the sizes of ModelParallelStrategy."""
    options = dict(getattr(strategy, "_ddp_kwargs", {}))
    for name in ("data_parallel_size", "tensor_parallel_size"):
        if (size := getattr(strategy, f"_{name}", None)) is not None:
            options[name] = size
    return {name: value for name, value in options.items() if plain(value) is not _NOT_PLAIN}


def _estimated_steps(trainer: Any) -> float | None:
    """What ``trainer.estimated_stepping_batches`` tells ``configure_optimizers``; None if it cannot be told."""
    if trainer.train_dataloader is None:  # the Trainer would load it
        return None
    try:
        return trainer.estimated_stepping_batches
    except MisconfigurationException:  # accumulation that changes from epoch to epoch
        return None


def _asked(setting: Any) -> Any:
    """A setting of torch, which refuses to tell some that were set in two ways."""
    try:
        return setting()
    except (RuntimeError, AttributeError):
        return None


def _flushes_denormals() -> bool:
    """Whether the CPU takes numbers too small for normal floats for 0, which torch does not tell."""
    return bool(torch.full((), 2.0**-126, dtype=torch.float32, device="cpu").mul(0.5) == 0)


@functools.cache
def _processor() -> str:
    """The name of the processor, as the system has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:  # another system than Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


@functools.cache
def _versions() -> dict[str, str]:
    """Versions of packages that are installed, of Python and of CUDA."""
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # of the two packages of Lightning, one is enough
            continue
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    return versions
