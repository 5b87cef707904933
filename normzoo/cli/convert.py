"""``normzoo convert``: the norm layers in a checkpoint file replaced."""

from __future__ import annotations

import argparse
import copy
import functools
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normzoo._errors import RecipeError, shown
from normzoo._files import replacing
from normzoo._yaml_text import load_value
from normzoo.cli._terminal import terminal
from normzoo.cli.checkpoint_file import is_state_dict, read_checkpoint, safetensors_package, state_dicts
from normzoo.cli.recipe import is_experiment, read
from normzoo.convert import convert_norms
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
    if (arguments.calibrate is None) != (arguments.recipe is None):
        raise RecipeError("--calibrate takes the model and the batches of a recipe: give both --calibrate and --recipe")
    if arguments.calibrate is not None and arguments.calibrate < 1:
        raise RecipeError(f"--calibrate: expected a number of batches above 0, not {arguments.calibrate}")
    content, metadata = read_checkpoint(source)
    try:
        if arguments.recipe is None:
            content, converted = convert_content(content, arguments.to, options, arguments.exclude or ())
        else:
            content, converted = _calibrated(content, arguments, options)
    except RecipeError:  # a ValueError that already names its source
        raise
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
    if arguments.recipe is None:
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
    if is_state_dict(content):
        converted = convert_state_dict(content, to, options=options, exclude=exclude)
        return converted.state, {"": converted}
    states = state_dicts(content)
    if not states:
        raise ValueError(
            "it holds no state dict, neither itself nor under a key such as 'state_dict' or 'model'; its entries: "
            f"{', '.join(map(repr, content)) or 'none'}"
        )
    some = {key: value for key, value in states.items() if norm_entries(value)} or states
    parts = {key: convert_state_dict(value, to, options=options, exclude=exclude) for key, value in some.items()}
    return {**content, **{key: part.state for key, part in parts.items()}}, parts


def _calibrated(
    content: Mapping[str, Any], arguments: argparse.Namespace, options: Mapping[str, Any]
) -> tuple[Mapping[str, Any], dict[str, ConvertedState]]:
    """As :func:`convert_content`, in the model of a recipe, calibrated on batches of its data.

    Raises:
        ValueError: if a state dict with norm layers is not of that model, or it cannot be converted.
    """
    from normzoo.cli.build import ask, make_data, make_task, quiet_lightning, seed_of, without_options
    from normzoo.task import ImageClassification, calibration_batches, load_weights

    recipe = read(arguments.recipe, arguments.set or ())
    if is_experiment(recipe.config):
        raise RecipeError(f"{recipe.source}: is of an experiment; --recipe takes one of a training run")
    quiet_lightning()
    config, seed = without_options(recipe.config, "checkpoint", "convert"), seed_of(recipe.config, recipe.source)
    data = make_data(config, seed, recipe.source)
    task = make_task(config, data, seed, recipe.source)
    network = task.model if isinstance(task, ImageClassification) else task
    ask(data.prepare_data, recipe.source)
    ask(functools.partial(data.setup, "fit"), recipe.source)
    batches = calibration_batches(data, arguments.calibrate)
    states = state_dicts(content)
    converted: dict[str, ConvertedState] = {}
    for key, state in states.items():
        if not norm_entries(state) and len(states) > 1:
            continue
        layers = copy.deepcopy(network)
        prefix = load_weights(layers, state)
        own, parameters = {prefix + name for name in layers.state_dict()}, {*dict(layers.named_parameters())}
        report = convert_norms(layers, arguments.to, options=options, exclude=arguments.exclude, calibrate=batches)
        entries = {prefix + name: value for name, value in layers.state_dict().items()}
        others = {name: value for name, value in state.items() if name not in own}
        changed = parameters != {*dict(layers.named_parameters())}
        converted[key] = ConvertedState({**others, **entries}, report, changed)
    if "" in converted:
        return converted[""].state, converted
    return {**content, **{key: part.state for key, part in converted.items()}}, converted


def _any_changed(converted: Mapping[str, ConvertedState]) -> bool:
    return any(part.parameters_changed for part in converted.values())


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


def _write(content: Mapping[str, Any], metadata: dict[str, str] | None, out: Path) -> None:
    """Write the file whole or not at all."""
    try:
        with replacing(out) as partial:
            if out.suffix == _SAFE:
                partial.write_bytes(_as_safetensors(content, metadata, out))
            else:
                with partial.open("xb") as file:
                    torch.save(content, file)
    except OSError as error:
        raise RecipeError(f"cannot write {out}: {error.strerror or error}") from None


def _as_safetensors(content: Mapping[str, Any], metadata: dict[str, str] | None, out: Path) -> bytes:
    safetensors_package(out)
    if not all(isinstance(v, Tensor) for v in content.values()):
        raise RecipeError(f"{out}: safetensors holds tensors alone, and there is more; give --out another ending")
    save = importlib.import_module("safetensors.torch").save
    tensors = {k: v.contiguous().clone() for k, v in content.items()}  # which it wants not to share memory
    return bytes(save(tensors, metadata or {"format": "pt"}))
