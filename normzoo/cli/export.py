"""``normzoo export``: the network of a run or recipe as one ONNX file, checked against the network."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn

from normzoo._components import reason
from normzoo._errors import RecipeError
from normzoo._files import replacing
from normzoo.cli._going_on import newest_weights
from normzoo.cli._resume import RUN
from normzoo.cli._terminal import terminal
from normzoo.cli.build import make_data, make_task, quiet_lightning, seed_of, without_options
from normzoo.cli.checkpoint_file import read_state_dict
from normzoo.cli.recipe import Recipe, is_experiment, read
from normzoo.fold import fold_norms
from normzoo.task import ImageClassification, load_weights

TOLERANCE = 1e-4  # of an output, and of the largest output if that is above 1
BATCHES = (2, 5)  # sizes on which the file is compared
_MOST = 2**31  # bytes of a file of ONNX, which protobuf limits
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


class DifferentError(Exception):
    """The file does not compute what the network computes."""


def execute(arguments: argparse.Namespace) -> int:
    """Export, compare and only then put the file in its place; 1 if it differs from the network."""
    out = Path(arguments.out)
    missing = [package for package in _PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise RecipeError(f"export needs the packages {', '.join(missing)}: pip install 'normzoo[export]'")
    _check_out(out, arguments.force)
    recipe, checkpoint = _of(arguments)
    network, shape = _network(recipe, checkpoint, _shape(arguments.input))
    size = sum(t.numel() * t.element_size() for t in network.state_dict().values())
    if size >= _MOST:
        raise RecipeError(f"the network has {size:,} bytes of weights, and one ONNX file holds less than {_MOST:,}")
    network.eval()
    console = terminal(file_width=180)
    if arguments.fold:
        example = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
        try:
            console.print(f"folded {len(fold_norms(network, example=example))} norms")
        except ValueError as error:
            raise RecipeError(f"--fold: {error}") from error
    try:
        with replacing(out) as partial:
            _export(network, shape, partial)
            distance = _compare(network, shape, partial)
    except DifferentError as error:
        print(f"normzoo: {out} was not written: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        raise RecipeError(f"cannot write {out}: {error.strerror or error}") from None
    weights = "weights as the recipe makes them" if checkpoint is None else f"weights of {checkpoint}"
    sizes = " and ".join(map(str, BATCHES))
    console.print(
        f"wrote {out}: {weights}, input (N, {', '.join(map(str, shape))}); on random batches of {sizes} its outputs "
        f"are at most {distance:.1g} from the network's (accepted: {TOLERANCE:g})",
        soft_wrap=True,
    )
    return 0


def _of(arguments: argparse.Namespace) -> tuple[Recipe, Path | None]:
    """The recipe, and the checkpoint with the weights: by default the newest of a run's folder."""
    folder = Path(arguments.source)
    given = None if arguments.checkpoint is None else Path(arguments.checkpoint)
    overrides = arguments.set or ()
    if not folder.is_dir():
        recipe = read(arguments.source, overrides)
    elif (folder / RUN).is_file():
        recipe = read(str(folder / RUN), overrides)
        given = given or newest_weights(folder)
        if given is None:
            raise RecipeError(f"{folder} has no checkpoint; give one by --checkpoint")
    else:
        raise RecipeError(f"{folder} is not a folder that normzoo run has written: it has no {RUN}")
    if is_experiment(recipe.config):
        raise RecipeError(f"{recipe.source}: is of an experiment, which has no network to export")
    return recipe, given


def _shape(text: str | None) -> tuple[int, ...] | None:
    """What ``--input 3,32,32`` says."""
    if text is None:
        return None
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise RecipeError(f"--input: expected the shape of one input, as 3,32,32, not {text!r}")
    return tuple(map(int, parts))


def _network(
    recipe: Recipe, checkpoint: Path | None, shape: tuple[int, ...] | None
) -> tuple[nn.Module, tuple[int, ...]]:
    """The network with its weights, and the shape of one input."""
    quiet_lightning()
    seed = seed_of(recipe.config, recipe.source)
    config = without_options(recipe.config, "compile", *(["checkpoint"] if checkpoint is not None else []))
    conversion = config["model"].get("convert") if isinstance(config["model"], Mapping) else None
    if checkpoint is None and isinstance(conversion, Mapping) and conversion.get("calibrate"):
        raise RecipeError(
            f"{recipe.source}: model.convert.calibrate: the network is calibrated when a run starts; export the run's "
            "folder, or give --checkpoint"
        )
    data: LightningDataModule | None = None
    try:
        data = make_data(config, seed, recipe.source)
    except RecipeError as error:
        if shape is None:
            raise
        print(f"normzoo: exported without data: {error}", file=sys.stderr)
    task = make_task(config, data, seed, recipe.source)
    if shape is None:
        shapes = getattr(data, "shapes", lambda: None)()
        if not shapes:
            raise RecipeError(f"{recipe.source}: the data does not tell its shape; give that of one input by --input")
        shape = tuple(shapes["train"][1:])
    network: Any = task.model if isinstance(task, ImageClassification) else task
    if checkpoint is not None:
        state = read_state_dict(checkpoint)
        try:
            load_weights(network, state)
        except ValueError as error:
            raise RecipeError(f"{checkpoint}: {error}") from error
    return network, shape


def _check_out(out: Path, force: bool) -> None:
    if out.is_dir():
        raise RecipeError(f"{out} is a folder; give a file")
    if out.exists() and not force:
        raise RecipeError(f"{out} exists and is not overwritten without --force")
    if not out.absolute().parent.is_dir():
        raise RecipeError(f"cannot write {out}: there is no folder {out.parent}")


def _export(network: nn.Module, shape: tuple[int, ...], path: Path) -> None:
    with _quiet():
        try:
            torch.onnx.export(
                network,
                (torch.randn(2, *shape),),
                str(path),
                dynamo=True,
                external_data=False,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=["input"],
                output_names=["output"],
                verbose=False,
            )
        except Exception as error:  # the network may be a user's
            raise RecipeError(f"torch.onnx.export fails: {reason(error)}") from error


def _compare(network: nn.Module, shape: tuple[int, ...], path: Path) -> float:
    """How far the file's outputs are from the network's, relative to the largest output if that is above 1."""
    import onnxruntime  # type: ignore[import-untyped,unused-ignore]

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        pairs = [(x, session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]) for x in _inputs(shape)]
    except Exception as error:  # of onnxruntime, which has no common class of errors
        raise DifferentError(f"onnxruntime does not run it: {reason(error)}") from error
    far = 0.0
    for x, output in pairs:
        with torch.no_grad():
            expected = network(x)
        found = torch.from_numpy(output)
        if found.shape != expected.shape:
            raise DifferentError(f"it gives outputs of {(*found.shape,)}, and the network of {(*expected.shape,)}")
        distance = (found.double() - expected.double()).abs().max() / expected.abs().max().clamp(min=1).double()
        far = max(far, float("inf") if distance.isnan() else float(distance))
    if far > TOLERANCE:
        raise DifferentError(f"its outputs are {far:.2g} from the network's, and at most {TOLERANCE:g} is accepted")
    return far


def _inputs(shape: tuple[int, ...]) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    for count in BATCHES:
        yield torch.randn(count, *shape, generator=generator)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on operators of packages that are not there."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
