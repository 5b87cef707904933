"""The entry points that pyproject.toml declares, found by Lightning in tests as in an installation."""

from __future__ import annotations

import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SCANS = ("lightning.fabric.utilities.registry", "lightning_fabric.utilities.registry")


def entry_points(group: str) -> list[EntryPoint]:
    """Those of the package in a group, as ``importlib.metadata.entry_points`` returns them."""
    return [EntryPoint(name, value, group) for name, value in PROJECT["entry-points"].get(group, {}).items()]


def install(monkeypatch: pytest.MonkeyPatch, value: str | None = None) -> None:
    """Let Lightning in this process find the entry points, and set the variable."""
    for module in SCANS:
        monkeypatch.setattr(f"{module}.entry_points", entry_points)
    if value is None:
        monkeypatch.delenv("NORMZOO", raising=False)
    else:
        monkeypatch.setenv("NORMZOO", value)


def write_metadata(folder: Path) -> Path:
    """A folder for ``sys.path`` in which a process finds the package's metadata, before any that is installed."""
    info = folder / f"{PROJECT['name']}-{PROJECT['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PROJECT['name']}\nVersion: {PROJECT['version']}\n")
    groups = PROJECT["entry-points"].items()
    text = "".join(f"[{group}]\n" + "".join(f"{n} = {v}\n" for n, v in points.items()) for group, points in groups)
    (info / "entry_points.txt").write_text(text)
    return folder


def added(trainer: Any) -> list[Any]:
    """The measurements among a Trainer's callbacks that the variable has asked for."""
    return [callback for callback in trainer.callbacks if getattr(callback, "asked_by", "")]
