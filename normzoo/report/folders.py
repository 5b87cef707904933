"""Which folders are runs, and what each is called among several."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from normzoo.report.event_files import PATTERN
from normzoo.report.logged import CSV

_DEEPEST = 3  # folders below a given one in which runs are looked for
_OWN = ("recipe.yaml", "status.json")  # status.json is written first
_RECORDS = ("*.arrows", "capsules/*/rank_*.json", "rank_*.json")  # the last in a capsule itself


def is_of_recipe(folder: Path) -> bool:
    """Whether ``normzoo run`` has written it."""
    return any(os.path.lexists(folder / name) for name in _OWN)


def run_folders(*folders: str | os.PathLike[str]) -> dict[Path, str]:
    """The runs in folders, each with a name that no other one has.

    A folder that is itself no run is looked through, up to three levels down; nothing within a run is one. A run's name
    is the last part of its path, or as many of the last parts as tell all runs apart.

    Raises:
        ValueError: if there is no run in one of the folders.
    """
    found: dict[Path, Path] = {}  # by their real paths, so that none counts twice
    for folder in map(Path, folders):
        try:
            runs = [folder] if _is_run(folder) else [*_below(folder, 1)]
        except OSError as error:
            raise ValueError(f"no runs in {folder}: {error.strerror}") from None
        if not runs:
            raise ValueError(
                f"no runs in {folder}: neither it nor a folder below it holds a recipe.yaml, records "
                "(QUANTITY-NNN.arrows), capsules, or what Lightning's loggers write: metrics.csv, TensorBoard's event "
                "files (events.out.tfevents...) or hparams.yaml"
            )
        for run in runs:
            found.setdefault(run.resolve(), run)
    return dict(zip(found.values(), _names([*found]), strict=True))


def _below(folder: Path, depth: int) -> Iterator[Path]:
    inside = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    for path in sorted(inside, key=_by_number):
        if _is_run(path):
            yield path
        elif depth < _DEEPEST:
            try:
                yield from _below(path, depth + 1)
            except OSError:  # not ours to read
                continue


def _by_number(path: Path) -> list[tuple[str, int]]:
    """Sorts ``version_2`` before ``version_10``, and else by text."""
    return [(text, int(digits or -1)) for text, digits in re.findall(r"([^0-9]*)([0-9]*)", path.name)]


def _is_run(folder: Path) -> bool:
    if is_of_recipe(folder):
        return True
    return folder.is_dir() and (any(any(folder.glob(files)) for files in _RECORDS) or is_log(folder))


def is_log(folder: Path) -> bool:
    """Whether it holds what a logger of Lightning writes."""
    if os.path.lexists(folder / "hparams.yaml") or any(folder.glob(PATTERN)):
        return True
    return _has_steps(folder / CSV)


def _has_steps(path: Path) -> bool:
    """Whether the first line of a table names a column ``step``, as CSVLogger's does and others need not."""
    if not path.is_file():  # a pipe would never end
        return False
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return "step" in file.readline(2**16).strip().split(",")
    except OSError:
        return False


def _names(paths: Sequence[Path]) -> list[str]:
    """The same number of last parts of all paths, the smallest that tells them apart."""
    for parts in range(1, max((len(path.parts) for path in paths), default=1) + 1):
        names = [str(Path(*path.parts[-parts:])) for path in paths]
        if len({*names}) == len(names):
            break
    return names
