"""Reading runs, finished or not: folders of ``normzoo run``, of Lightning's loggers, and of callbacks alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pandas as pd

from normzoo.capsules import Capsule, CapsuleError, load_capsule
from normzoo.capsules.folder import capsule_folders
from normzoo.causes import EvidenceError
from normzoo.records.reading import read_records
from normzoo.records.segments import RecordError
from normzoo.report.files import hyperparameters, json_mapping, recipe, status
from normzoo.report.folders import is_of_recipe, run_folders
from normzoo.report.logged import CSV, joined, read_csv, read_event_files, tidy
from normzoo.report.replay_reading import Replay, read_replay
from normzoo.report.run import Curve, DamagedRun, Run, RunError

__all__ = ["Curve", "DamagedRun", "Run", "RunError", "read_runs", "read_whole_runs"]

_SWEEP = "sweep.yaml"


def read_whole_runs(*folders: str | os.PathLike[str]) -> list[Run]:
    """The runs in folders, each itself a run or with runs up to three levels below, by name.

    Raises:
        ValueError: if there is none in one of them, or if a file of a run is damaged; the message names it.
    """
    sweeps: dict[Path, dict[str, Any]] = {}
    return [_load_run(path, name, sweeps) for path, name in run_folders(*folders).items()]


def read_runs(*folders: str | os.PathLike[str]) -> tuple[list[Run], list[DamagedRun]]:
    """As :func:`read_whole_runs`, but runs with a damaged file are given apart.

    Raises:
        ValueError: if there is none in one of the folders.
    """
    runs: list[Run] = []
    damaged: list[DamagedRun] = []
    sweeps: dict[Path, dict[str, Any]] = {}
    for path, name in run_folders(*folders).items():
        try:
            runs.append(_load_run(path, name, sweeps))
        except (RunError, RecordError) as error:
            damaged.append(DamagedRun(name, str(error)))
    return runs, damaged


def _load_run(folder: Path, name: str, sweeps: dict[Path, dict[str, Any]]) -> Run:
    """A run; of a folder that no recipe was run in, what a logger and callbacks wrote into it.

    Args:
        folder: of the run.
        name: of the run.
        sweeps: their sections ``sweep``, by the folders that hold the runs, so that each is read once.
    """
    if not is_of_recipe(folder):
        return _load_log(folder, name)
    found = status(folder / "status.json")
    environment = json_mapping(folder / "environment.json")
    config = recipe(folder / "recipe.yaml")
    metrics = read_csv(folder / "metrics" / CSV)
    records, capsules = _records(folder), _capsules(folder)
    if folder.parent not in sweeps:
        sweeps[folder.parent] = _sweep(folder.parent)
    return Run(
        name, config, found, environment, metrics, records, *capsules, folder=folder, sweep=sweeps[folder.parent]
    )


def _load_log(folder: Path, name: str) -> Run:
    """A folder of CSVLogger, of TensorBoardLogger, or of both, with the records of callbacks; or these alone.

    What is whole of event files and settings is read, and what is damaged is among the run's problems.
    """
    problems: list[str] = []
    config: dict[str, Any] = {}
    for path in (folder / "config.yaml", folder / "hparams.yaml"):  # LightningCLI's has all, and the seed
        try:
            found = hyperparameters(path)
        except RunError as error:
            problems.append(str(error))
        else:
            if path.name == "hparams.yaml" or {"trainer", "model"} <= found.keys():
                config = config or found
    try:
        scalars, damaged = read_event_files(folder)
    except OSError as error:
        raise RunError(f"{error.filename or folder} cannot be read: {error.strerror}") from error
    table = read_csv(folder / CSV) if os.path.lexists(folder / CSV) else tidy([])
    metrics = joined([table, scalars])
    problems += damaged
    records, capsules = _records(folder), _capsules(folder)
    return Run(name, config, {}, {}, metrics, records, *capsules, of_recipe=False, folder=folder, problems=problems)


def _sweep(folder: Path) -> dict[str, Any]:
    """The grid of the sweep in a folder; empty if there is none."""
    try:
        sweep = recipe(folder / _SWEEP).get("sweep")
    except RunError:  # a run on its own, or a sweep whose points tell what they are
        return {}
    return sweep if isinstance(sweep, dict) else {}


def _records(folder: Path) -> dict[str, pd.DataFrame]:
    try:
        return read_records(folder)
    except OSError as error:
        raise RunError(f"{error.filename or folder} cannot be read: {error.strerror}") from error


def _capsules(folder: Path) -> tuple[list[Capsule], list[str], dict[Path, Replay]]:
    """The capsules of a run, or a folder that is one, read but for tensors; what is wrong with others; and replays."""
    capsules: list[Capsule] = []
    problems: list[str] = []
    replays: dict[Path, Replay] = {}
    try:
        for path in [folder] if any(folder.glob("rank_*.json")) else capsule_folders(folder):
            try:
                capsule = load_capsule(path)
                _ = capsule.rows, capsule.records
                capsules.append(capsule)
                if (replay := read_replay(path)) is not None:
                    replays[path] = replay
            except (CapsuleError, EvidenceError, RecordError, OSError) as error:
                problems.append(str(error))
    except CapsuleError as error:
        problems.append(str(error))
    return capsules, problems, replays
