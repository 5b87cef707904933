"""Reading checkpoint files, of torch.save (a state dict, Lightning's, timm's) and safetensors, without running code."""

from __future__ import annotations

import contextlib
import importlib
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normzoo._errors import RecipeError
from normzoo.cli.file_kind import describe


def read_checkpoint(source: Path) -> tuple[Mapping[str, Any], dict[str, str] | None]:
    """What the file holds and, of safetensors, its metadata. Nothing that could run code is unpickled."""
    try:
        kind = describe(source)
    except OSError as error:
        raise RecipeError(f"{source}: {error.strerror}") from None
    if kind == "safetensors":
        return _load_safetensors(source)
    if kind != "torch":
        raise RecipeError(f"{source} is {kind}; expected a checkpoint of torch.save or safetensors")
    try:
        with warnings.catch_warnings(), source.open("rb") as file:  # given the name, torch goes by its ending
            warnings.simplefilter("ignore")  # of pickle protocols and old formats, which are read or refused anyway
            content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise RecipeError(f"{source}: {error.strerror or error}") from None
    except Exception as error:  # torch.load has no common class of errors for damaged files
        if isinstance(error, pickle.UnpicklingError) and (beyond := _beyond_tensors(source, str(error))):
            raise RecipeError(
                f"{source}: holds {beyond}, and reading more than tensors and plain values could run code; save its "
                "state dict alone"
            ) from None
        text = " ".join(str(error).split()).partition(". ")[0]
        raise RecipeError(
            f"{source} cannot be read: it is cut short, damaged, or a pickle that torch.save did not write "
            f"({type(error).__name__}: {text})"
        ) from None
    if not isinstance(content, Mapping):
        raise RecipeError(f"{source}: holds a {type(content).__name__}, not a state dict")
    return content, None


def _load_safetensors(source: Path) -> tuple[Mapping[str, Any], dict[str, str] | None]:
    package = safetensors_package(source)
    try:
        with package.safe_open(source, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    except (OSError, package.SafetensorError) as error:
        raise RecipeError(f"{source} cannot be read: it is a safetensors file cut short or damaged ({error})") from None


def safetensors_package(path: Path) -> Any:
    """The package that reads and writes a file of its kind."""
    try:
        return importlib.import_module("safetensors")
    except ImportError:
        raise RecipeError(f"{path}: files of this kind need the package safetensors") from None


def _beyond_tensors(source: Path, message: str) -> str:
    """The classes and functions that a file would call, sorted."""
    names = set(re.findall(r"GLOBAL ([\w.]+)", message))
    with contextlib.suppress(Exception):  # torch raises errors of any class for a damaged file
        names |= set(torch.serialization.get_unsafe_globals_in_checkpoint(source))
    return ", ".join(sorted(names))


def state_dicts(content: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The state dicts in a file by their key, ``""`` if the whole is one."""
    if is_state_dict(content):
        return {"": content}
    return {key: value for key, value in content.items() if is_state_dict(value)}


def read_state_dict(source: Path) -> Mapping[str, Any]:
    """The first state dict in a checkpoint file.

    Raises:
        RecipeError: if the file cannot be read, or holds no state dict.
    """
    content, _ = read_checkpoint(source)
    states = state_dicts(content)
    if not states:
        raise RecipeError(f"{source} holds no state dict")
    return next(iter(states.values()))


def is_state_dict(value: Any) -> bool:
    """Whether a value is a mapping from names to tensors."""
    return (
        isinstance(value, Mapping)
        and any(isinstance(v, Tensor) for v in value.values())
        and all(isinstance(v, Tensor) or str(k).endswith("_extra_state") for k, v in value.items())
        and all(isinstance(k, str) for k in value)
    )
