"""``normzoo convert``: the norm layers in a checkpoint file replaced."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normzoo._errors import RecipeError, shown
from normzoo._yaml_text import load_value
from normzoo.cli._terminal import terminal
from normzoo.cli.file_kind import describe
from normzoo.convert._replace import target_norm
from normzoo.convert._state_dict import ConvertedState, convert_state_dict
from normzoo.recognition import norm_entries

_OF_TRAINING = ("optimizer_states", "lr_schedulers", "loops", "callbacks", "optimizer", "lr_scheduler")
_SAFE = ".safetensors"
_UNSEEN = (
    "not seen, as a file holds tensors only: layers without any, and eps, groups and activations, which the model has "
    "that the file is loaded into"
)


def execute(arguments: argparse.Namespace) -> int:
    """Convert a file; it is written whole or not at all."""
    source, out = Path(arguments.checkpoint), Path(arguments.out)
    _check_paths(source, out, arguments.force)
    options = load_value(arguments.options or "{}", "--options")
    if not isinstance(options, Mapping):
        raise RecipeError(f"--options: expected a mapping, as in '{{groups: 8}}', not {shown(options)}")
    try:
        target_norm(arguments.to, options)
    except (ValueError, TypeError) as error:
        raise RecipeError(str(error)) from error
    content, metadata = _load(source)
    try:
        content, converted = convert_content(content, arguments.to, options, arguments.exclude or ())
    except (ValueError, TypeError) as error:
        raise RecipeError(f"{source}: {error}") from error
    dropped = [key for key in _OF_TRAINING if key in content] if _any_changed(converted) else []
    content = {key: value for key, value in content.items() if key not in dropped} if dropped else content
    _write(content, metadata, out)
    console = terminal(file_width=180)
    for key, part in converted.items():
        console.print(f"{key}:" if key else "", part.report)
    if dropped:
        console.print(f"dropped, as the parameters are others now: {', '.join(dropped)}", soft_wrap=True)
    console.print(_UNSEEN, soft_wrap=True)
    console.print(f"wrote {out}", soft_wrap=True)
    return 0


def convert_content(
    content: Mapping[str, Any], to: str, options: Mapping[str, Any], exclude: Any = ()
) -> tuple[Mapping[str, Any], dict[str, ConvertedState]]:
    """What a file holds with every state dict in it converted, and these by their key, ``""`` for the whole.

    Raises:
        ValueError: if none has norm layers, or these cannot be converted.
    """
    if _is_state_dict(content):
        converted = convert_state_dict(content, to, options=options, exclude=exclude)
        return converted.state, {"": converted}
    states = {key: value for key, value in content.items() if _is_state_dict(value)}
    if not states:
        raise ValueError(
            "it holds no state dict, neither itself nor under a key such as 'state_dict' or 'model'; its entries: "
            f"{', '.join(map(repr, content)) or 'none'}"
        )
    some = {key: value for key, value in states.items() if norm_entries(value)} or states
    parts = {key: convert_state_dict(value, to, options=options, exclude=exclude) for key, value in some.items()}
    return {**content, **{key: part.state for key, part in parts.items()}}, parts


def _any_changed(converted: Mapping[str, ConvertedState]) -> bool:
    return any(part.parameters_changed for part in converted.values())


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and any(isinstance(v, Tensor) for v in value.values())
        and all(isinstance(v, Tensor) or str(k).endswith("_extra_state") for k, v in value.items())
        and all(isinstance(k, str) for k in value)
    )


def _check_paths(source: Path, out: Path, force: bool) -> None:
    try:
        if not source.is_file():
            what = "is a folder" if source.is_dir() else "is not a file" if source.exists() else "no such file"
            raise RecipeError(f"{source}: {what}")
        if out.exists() and out.samefile(source):
            raise RecipeError(f"--out {out} is the checkpoint itself; give another file")
        if out.is_dir():
            raise RecipeError(f"--out {out} is a folder; give a file")
        if out.exists() and not force:
            raise RecipeError(f"{out} exists and is not overwritten without --force")
    except OSError as error:
        raise RecipeError(f"{error.filename}: {error.strerror}") from None


def _load(source: Path) -> tuple[Mapping[str, Any], dict[str, str] | None]:
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
    except Exception as error:  # what is no pickle of torch.save fails anywhere within unpickling
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
    package = _safetensors(source)
    try:
        with package.safe_open(source, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    except (OSError, package.SafetensorError) as error:
        raise RecipeError(f"{source} cannot be read: it is a safetensors file cut short or damaged ({error})") from None


def _safetensors(path: Path) -> Any:
    try:
        return importlib.import_module("safetensors")
    except ImportError:
        raise RecipeError(f"{path}: files of this kind need the package safetensors") from None


def _beyond_tensors(source: Path, message: str) -> str:
    """The classes and functions that a file would call, sorted."""
    found = set(re.findall(r"GLOBAL ([\w.]+)", message))
    with contextlib.suppress(Exception):  # of a damaged file any
        found |= set(torch.serialization.get_unsafe_globals_in_checkpoint(source))
    return ", ".join(sorted(found))


def _write(content: Mapping[str, Any], metadata: dict[str, str] | None, out: Path) -> None:
    """Write beside the target and move it there."""
    beside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        if out.suffix == _SAFE:
            beside.write_bytes(_as_safetensors(content, metadata, out))
        else:
            with beside.open("xb") as file:
                torch.save(content, file)
        os.replace(beside, out)
    except OSError as error:
        raise RecipeError(f"cannot write {out}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):  # moved, or never there
            beside.unlink()


def _as_safetensors(content: Mapping[str, Any], metadata: dict[str, str] | None, out: Path) -> bytes:
    _safetensors(out)
    if not all(isinstance(v, Tensor) for v in content.values()):
        raise RecipeError(f"{out}: safetensors holds tensors alone, and there is more; give --out another ending")
    save = importlib.import_module("safetensors.torch").save
    tensors = {k: v.contiguous().clone() for k, v in content.items()}  # which it wants not to share memory
    return bytes(save(tensors, metadata or {"format": "pt"}))
