"""Going on with what was cut short: ``--resume FOLDER`` of ``normzoo run`` and ``normzoo sweep``."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from normzoo._errors import RecipeError
from normzoo.cli.recipe import Recipe, read

RUN, SWEEP = "recipe.yaml", "sweep.yaml"  # the recipe in the folder of a run, and of a sweep
CHECKPOINTS = Path("metrics") / "checkpoints"  # in the folder of a run
_COMMANDS = {RUN: "normzoo run", SWEEP: "normzoo sweep"}


def asked_for(arguments: argparse.Namespace, file: str) -> tuple[Recipe, Path | None]:
    """The recipe that a command was given and no folder, or the recipe in the folder that is to be resumed.

    Args:
        arguments: of the command.
        file: the recipe's name in the folder.

    Raises:
        RecipeError: if both or neither are given, or the folder is none that the command writes.
    """
    command = _COMMANDS[file]
    if arguments.resume is None:
        if arguments.recipe is None:
            raise RecipeError(f"expected a recipe, or --resume FOLDER; see {command} --help")
        return read(arguments.recipe, arguments.overrides), None
    if arguments.recipe is not None or arguments.out is not None:
        what = "--out" if arguments.recipe is None else arguments.recipe
        raise RecipeError(f"--resume goes on with the recipe in its folder; leave out {what}")
    folder = Path(arguments.resume)
    if not (folder / file).is_file():
        [(other, instead)] = [item for item in _COMMANDS.items() if item[0] != file]
        hint = f"; it has a {other}: use {instead} --resume" if (folder / other).is_file() else ""
        raise RecipeError(f"--resume: {folder} is no folder of {command}, which has a {file}{hint}")
    return read(str(folder / file)), folder


def state_of(folder: Path) -> str:
    """What ``status.json`` says has become of a run; empty if it says nothing."""
    try:
        return str(json.loads((folder / "status.json").read_text(encoding="utf-8"))["state"])
    except (OSError, ValueError, TypeError, KeyError):
        return ""


def check_unfinished(folder: Path) -> None:
    """Refuse to go on with a training run that has finished or diverged, or that a process still trains.

    Raises:
        RecipeError: saying how it ended, and what can be done.
    """
    with locked(folder):
        state = state_of(folder)
    if state == "finished":
        raise RecipeError(f"--resume: {folder} has finished; its report is {folder / 'report.html'}")
    if state == "diverged":
        saved = "".join(
            f"; its state then is in {path}, from which a run with model.checkpoint={path} starts"
            for path in sorted(folder.rglob("diverged.ckpt"))[:1]
        )
        raise RecipeError(
            f"--resume: {folder} has diverged, and would again: normzoo replay {folder} finds out why{saved}"
        )


def clear(folder: Path) -> bool:
    """Delete what a run that was cut short has left in its folder, but its recipe; whether there was anything.

    Raises:
        RecipeError: if the folder holds files and is no run's.
    """
    left = [*folder.iterdir()] if folder.is_dir() else []
    if left and not any((folder / name).exists() for name in ("status.json", RUN)):
        raise RecipeError(f"{folder} holds files that are not of a run, and is not deleted")
    for path in left:
        if path.name == RUN:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return bool(left)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside, no other process can enter this context with the folder; the system unlocks it if the process is killed.

    Raises:
        RecipeError: if another process is in it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RecipeError(f"{folder}: another process is still running there") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)
