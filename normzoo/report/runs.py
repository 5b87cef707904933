"""Reading run folders, finished or not."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from normzoo._errors import one_line
from normzoo._yaml_text import MAX_DEPTH, MAX_DUMPED, InvalidYamlError, parse
from normzoo.capsules import Capsule, CapsuleError, load_capsule
from normzoo.capsules.folder import capsule_folders
from normzoo.causes import EvidenceError
from normzoo.records.reading import read_records
from normzoo.records.segments import RecordError
from normzoo.report.replay_reading import Replay, read_replay

Curve = tuple[list[int], list[float]]
_STATES = ("running", "finished", "diverged", "interrupted", "failed")


@dataclass(frozen=True)
class Run:
    """What one run folder holds.

    Attributes:
        name: the folder's name.
        config: its resolved recipe.
        status: ``state`` (running, finished, diverged, interrupted, failed), ``seconds``, ``error``; empty if not
            written.
        environment: versions, machine and git state.
        metrics: rows of the metrics file, numbers only, with ``step``.
        records: the callbacks' records, quantity -> data frame.
        capsules: those that can be read.
        capsule_problems: a sentence for each that cannot, and for each replay that cannot.
        replays: those that can be read, by the paths of their capsules.
        of_recipe: whether ``normzoo run`` wrote the folder; one that only callbacks wrote has records and capsules.
    """

    name: str
    config: dict[str, Any]
    status: dict[str, Any]
    environment: dict[str, Any]
    metrics: list[dict[str, float]] = field(repr=False)
    records: dict[str, pd.DataFrame] = field(repr=False)
    capsules: list[Capsule] = field(default_factory=list, repr=False)
    capsule_problems: list[str] = field(default_factory=list, repr=False)
    replays: dict[Path, Replay] = field(default_factory=dict, repr=False)
    of_recipe: bool = True

    def curve(self, metric: str) -> Curve:
        """Steps and finite values of one metric."""
        rows = [(int(r["step"]), r[metric]) for r in self.metrics if metric in r and math.isfinite(r[metric])]
        return [s for s, _ in rows], [v for _, v in rows]

    def end(self, metric: str) -> float | None:
        """The last finite value of a metric; None of a run that has none, did not finish or has diverged."""
        values = self.curve(metric)[1]
        return values[-1] if values and self.state == "finished" and self.diverged_at is None else None

    def record(self, quantity: str) -> pd.DataFrame:
        """The record of a quantity, with no rows if the run has none."""
        return self.records.get(quantity, pd.DataFrame({"step": []}))

    @property
    def state(self) -> str:
        """``finished``, ``diverged``, ``interrupted``, ``failed``, ``unfinished`` (runs, or was killed), or ``–``."""
        if not self.of_recipe:
            return "–"
        state = self.status.get("state", "running")
        return "unfinished" if state == "running" else state

    @property
    def diverged_at(self) -> int | None:
        """The step of the first divergence on record."""
        record = self.record("divergence")
        return None if record.empty else int(record["step"].iloc[0])

    @property
    def ended_by(self) -> str | None:
        """The error or signal that has cut the run short, and its step, by its capsule; None if the run went on."""
        cut_short = [capsule.about for capsule in self.capsules if capsule.about.get("kind") in ("exception", "signal")]
        if not cut_short:
            return None
        about = cut_short[-1]
        step = about.get("step")
        ends = [record["step"].max() for record in self.records.values() if "step" in record and not record.empty]
        if isinstance(step, int) and max(ends, default=step) > step:  # resumed, in the same folder
            return None
        error = "signal" if about["kind"] == "signal" else str(about.get("error")).partition(":")[0]
        return f"{error} at step {step}"

    @property
    def last_loss(self) -> float | None:
        """The training loss of the last step of which it is known."""
        logged = [row["train/loss"] for row in self.metrics if "train/loss" in row]
        measured = self.record("relative_loss")
        if logged or measured.empty or "loss" not in measured:
            return logged[-1] if logged else None
        return float(measured["loss"].iloc[-1])

    @property
    def watched(self) -> bool:
        """Whether the run looked for divergence at all."""
        if "divergence" in self.records:
            return True
        return any("divergence" in _callback_name(c).lower() for c in self.config.get("callbacks") or [])


@dataclass(frozen=True)
class DamagedRun:
    """A run folder that cannot be read: its name, and which file is damaged in what way."""

    name: str
    problem: str


class RunError(ValueError):
    """A file of a run folder is damaged; the message names it."""


def load_runs(folder: str | os.PathLike[str]) -> list[Run]:
    """The run in ``folder``, or the runs in the folders right below it, by name.

    Raises:
        ValueError: if there is none, or if a file of one is damaged; the message names it.
    """
    return [_load_run(f) for f in _run_folders(Path(folder))]


def read_runs(folder: str | os.PathLike[str]) -> tuple[list[Run], list[DamagedRun]]:
    """As :func:`load_runs`, but runs with a damaged file are given apart.

    Raises:
        ValueError: if there is none.
    """
    runs: list[Run] = []
    damaged: list[DamagedRun] = []
    for path in _run_folders(Path(folder)):
        try:
            runs.append(_load_run(path))
        except (RunError, RecordError) as error:
            damaged.append(DamagedRun(path.name, str(error)))
    return runs, damaged


def _run_folders(folder: Path) -> list[Path]:
    """Folders of ``normzoo run``, those that callbacks wrote records or capsules into, and capsules."""
    if _is_run(folder):
        return [folder]
    try:
        folders = sorted(path for path in folder.iterdir() if _is_run(path))
    except OSError as error:
        raise ValueError(f"no runs in {folder}: {error.strerror}") from None
    if not folders:
        deeper = sorted({path.parent for path in folder.glob("*/*/") if _is_run(path)})
        if deeper:
            raise ValueError(f"no runs in {folder}; did you mean {deeper[0]}?")
        raise ValueError(
            f"no runs in {folder}: neither it nor a folder right below it holds a recipe.yaml, records "
            "(QUANTITY-NNN.arrows) or capsules"
        )
    return folders


def _is_run(folder: Path) -> bool:
    written = ("*.arrows", "capsules/*/rank_*.json", "rank_*.json")  # the last in a capsule itself
    return _is_of_recipe(folder) or (folder.is_dir() and any(any(folder.glob(files)) for files in written))


def _is_of_recipe(folder: Path) -> bool:
    """Whether it holds a recipe.yaml, or a status.json, which is written before it."""
    return any(os.path.lexists(folder / name) for name in ("recipe.yaml", "status.json"))


def _load_run(folder: Path) -> Run:
    """A run; of a folder that no recipe was run in, what callbacks wrote into it."""
    name = folder.resolve().name
    if not _is_of_recipe(folder):
        return Run(name, {}, {}, {}, [], _records(folder), *_capsules(folder), of_recipe=False)
    status = _mapping(folder / "status.json")
    if not _is_status(status):
        raise RunError(f"{folder / 'status.json'} is damaged: its state, seconds or error is none that a run writes")
    environment = _mapping(folder / "environment.json")
    recipe = folder / "recipe.yaml"
    text = _text(recipe)
    if text is None:
        raise RunError(f"{recipe} is not there")
    config = _config(text, recipe)
    metrics = _metrics(folder / "metrics" / "metrics.csv")
    return Run(name, config, status, environment, metrics, _records(folder), *_capsules(folder))


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


def _text(path: Path) -> str | None:
    """The text of a file; None if there is no such file."""
    if not os.path.lexists(path):
        return None
    if not path.is_file():  # a pipe would never end
        raise RunError(f"{path} is not a file")
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RunError(f"{path} is damaged: byte {error.start} is not UTF-8") from error


def _mapping(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one if there is no such file."""
    text = _text(path)
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is damaged: it is not valid JSON") from error
    if not isinstance(value, dict):
        raise RunError(f"{path} is damaged: it holds no JSON object")
    parts: list[Any] = [value]
    for _ in range(MAX_DEPTH + 1):
        parts = [p for part in parts for p in (part.values() if isinstance(part, dict) else part)]
        parts = [p for p in parts if isinstance(p, dict | list)]
    if parts:
        raise RunError(f"{path} is damaged: lists and objects are more than {MAX_DEPTH} deep in each other")
    return value


def _is_status(status: dict[str, Any]) -> bool:
    seconds = status.get("seconds", 0.0)
    return (
        (not status or status.get("state") in _STATES)
        and isinstance(seconds, int | float)
        and 0 <= seconds < math.inf
        and isinstance(status.get("error", ""), str)
    )


def _config(text: str, path: Path) -> dict[str, Any]:
    """A recipe's sections; reports read none of them but ``callbacks``, and print them all."""
    try:
        config = parse(text, MAX_DUMPED)
    except InvalidYamlError as error:
        where = "" if error.line is None else f", line {error.line}"
        raise RunError(
            f"{path} is damaged{where}: it is not a recipe in YAML ({one_line(error, longest=120)})"
        ) from error
    config = {} if config is None else config
    callbacks = config.get("callbacks") if isinstance(config, dict) else None
    named = isinstance(callbacks or [], list) and all(isinstance(_callback_name(c), str) for c in callbacks or [])
    if not isinstance(config, dict) or not named:
        raise RunError(f"{path} is damaged: it is not a mapping of sections, as a recipe is")
    return config


def _callback_name(callback: Any) -> Any:
    if isinstance(callback, dict):
        return callback.get("name", callback.get("class_path"))
    return callback


def _metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics file; a last line without an end was being written when the process was killed."""
    text = _text(path) if path.parent.is_dir() else None
    if not text or "\n" not in text:
        return []
    lines = csv.reader(io.StringIO(text[: text.rindex("\n") + 1], newline=""), strict=True)
    rows: list[dict[str, float]] = []
    texts: dict[str, int] = {}  # columns in which a value is no number -> its line
    try:
        header = next(lines)
        if "step" not in header or len(set(header)) < len(header):
            raise RunError(f"{path} is damaged: line 1 is not a header of different columns with a step among them")
        for line in lines:
            if len(line) != len(header):
                raise RunError(
                    f"{path} is damaged: line {lines.line_num} has {len(line)} values for {len(header)} columns"
                )
            numbers = {name: _number(value) for name, value in zip(header, line, strict=True) if value}
            step = numbers.get("step")
            if step is None or not 0 <= step < 2**63 or step != int(step):
                raise RunError(f"{path} is damaged: the step in line {lines.line_num} is not a whole number")
            for name in (name for name, value in numbers.items() if value is None):
                texts.setdefault(name, lines.line_num)
            rows.append({name: value for name, value in numbers.items() if value is not None})
    except (csv.Error, StopIteration) as error:
        raise RunError(f"{path} is damaged: line {lines.line_num} is not CSV") from error
    for name, number in texts.items():
        if any(name in row for row in rows):
            raise RunError(f"{path} is damaged: the value of {name!r} in line {number} is not a number")
    return rows


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
