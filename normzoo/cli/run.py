"""``normzoo run``: train one recipe in a folder of its own."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from normzoo._errors import RecipeError
from normzoo.cli.recipe import read
from normzoo.cli.yaml_text import dump

_PACKAGES = ("normzoo", "torch", "torchvision", "lightning", "timm", "torchmetrics", "numpy")
# Tells the processes that a launcher starts by running this command again which folder is theirs
_FOLDER = "NORMZOO_RUN_FOLDER"


def execute(arguments: argparse.Namespace) -> int:
    """Train the recipe, then write its report."""
    recipe = read(arguments.recipe, arguments.overrides)
    if not is_first_process():  # started by the first one, or by torchrun; writes nothing
        return train(recipe.config, Path(os.environ.get(_FOLDER, ".")), recipe.source)
    from normzoo.cli.build import build
    from normzoo.cli.report import write_report

    build(recipe.config, recipe.source).trainer(logger=False)  # bad input leaves no folder behind
    folder = new_folder(arguments.out, recipe.name)
    os.environ[_FOLDER] = str(folder)
    try:
        code = train(recipe.config, folder, recipe.source)
    finally:
        del os.environ[_FOLDER]
    write_report(folder)
    return code


def train(config: Mapping[str, Any], folder: Path, source: str) -> int:
    """Train one config in ``folder``; 0, or 1 if it failed, or 130 after Ctrl-C. The folder is readable always."""
    from normzoo.cli.build import build

    if is_first_process():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(dump(config), encoding="utf-8")
        (folder / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n", encoding="utf-8")
    started = time.time()
    state, error = "running", ""
    _write_status(folder, state, started)
    try:
        experiment = build(config, source)
        trainer = experiment.trainer(logger=_loggers(folder), callbacks=_progress_bar(), default_root_dir=str(folder))
        trainer.fit(experiment.task, experiment.data)
        state = "finished"
    except (
        KeyboardInterrupt,
        SystemExit,
    ):  # Lightning turns Ctrl-C into SystemExit after closing the loggers
        state = "interrupted"
    except Exception as problem:
        state, error = "failed", f"{type(problem).__name__}: {problem}"
        traceback.print_exc()
    _write_status(folder, state, started, error)
    return {"finished": 0, "interrupted": 130}.get(state, 1)


def new_folder(out: str | None, name: str) -> Path:
    """Make the folder for a run or a sweep: ``out``, which must not exist, or ``runs/NAME-TIME``."""
    if out is not None:
        try:
            Path(out).mkdir(parents=True)
        except FileExistsError:
            raise RecipeError(f"--out: {out} exists, and a run folder is never overwritten") from None
        except OSError as error:
            raise RecipeError(f"--out: cannot make {out}: {error.strerror}") from None
        return Path(out)
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for suffix in ("", *(f"-{i}" for i in range(2, 1000))):
        folder = Path("runs") / f"{stem}{suffix}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise RecipeError(f"runs/{stem} and 998 more of its name exist; give a folder with --out")


def is_first_process() -> bool:
    """Whether this is the process that writes; launchers say so in the environment before any process group is."""
    return all(int(os.environ.get(v) or 0) == 0 for v in ("RANK", "LOCAL_RANK", "NODE_RANK"))


def environment() -> dict[str, Any]:
    """What a run depended on: versions, machine, command and git state."""
    import torch

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    status = git("status", "--porcelain")
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": {p: importlib.metadata.version(p) for p in _PACKAGES},
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "git": {"commit": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)},
    }


def _write_status(folder: Path, state: str, started: float, error: str = "") -> None:
    if not is_first_process():
        return
    status = {"state": state, "started": started, "seconds": time.time() - started, "error": error}
    partial = folder / "status.json.part"
    partial.write_text(json.dumps(status) + "\n", encoding="utf-8")
    partial.replace(folder / "status.json")


def _loggers(folder: Path) -> list[Any]:
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

    # The callbacks write where the first logger does
    return [
        CSVLogger(str(folder), name="metrics", version=""),
        TensorBoardLogger(str(folder), name="tensorboard", version="", default_hp_metric=False),
    ]


def _progress_bar() -> list[Any]:
    from lightning.pytorch.callbacks import RichProgressBar

    return [RichProgressBar(leave=True)]
