"""Files of run folders as text and plain data. Errors name the damaged file."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from normzoo._errors import one_line
from normzoo._yaml_text import MAX_DEPTH, MAX_DUMPED, InvalidYamlError, parse
from normzoo.report.run import RunError, callback_name

_STATES = ("running", "finished", "diverged", "interrupted", "failed")


def text_of_file(path: Path) -> str | None:
    """The text of a file; None if there is no such file.

    Raises:
        RunError: if it cannot be read, or is not text in UTF-8.
    """
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


def json_mapping(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one if there is no such file.

    Raises:
        RunError: if the file holds something else.
    """
    text = text_of_file(path)
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


def status(path: Path) -> dict[str, Any]:
    """What a run's status file says; nothing if there is none.

    Raises:
        RunError: if it says what no run writes.
    """
    found = json_mapping(path)
    seconds = found.get("seconds", 0.0)
    written = (
        (not found or found.get("state") in _STATES)
        and isinstance(seconds, int | float)
        and 0 <= seconds < math.inf
        and isinstance(found.get("error", ""), str)
    )
    if not written:
        raise RunError(f"{path} is damaged: its state, seconds or error is none that a run writes")
    return found


def recipe(path: Path) -> dict[str, Any]:
    """A recipe's sections; reports read none of them but ``callbacks`` and ``sweep``, and print them all.

    Raises:
        RunError: if there is no such file, or it is no recipe.
    """
    text = text_of_file(path)
    if text is None:
        raise RunError(f"{path} is not there")
    try:
        config = parse(text, MAX_DUMPED)
    except InvalidYamlError as error:
        raise RunError(_no_yaml(path, error, "it is not a recipe in YAML")) from error
    config = {} if config is None else config
    callbacks = config.get("callbacks") if isinstance(config, dict) else None
    named = isinstance(callbacks or [], list) and all(isinstance(callback_name(c), str) for c in callbacks or [])
    if not isinstance(config, dict) or not named:
        raise RunError(f"{path} is damaged: it is not a mapping of sections, as a recipe is")
    return config


def hyperparameters(path: Path) -> dict[str, Any]:
    """The settings in Lightning's ``hparams.yaml`` or ``config.yaml``; none if there is no such file.

    Objects of Python in it are taken as text, the name of their class.

    Raises:
        RunError: if it is no mapping in YAML.
    """
    text = text_of_file(path)
    if text is None:
        return {}
    try:
        config = parse(text, MAX_DUMPED, objects=True)
    except InvalidYamlError as error:
        raise RunError(_no_yaml(path, error, "its settings cannot be read")) from error
    if not isinstance(config, dict | None):
        raise RunError(f"{path} is damaged: it is not a mapping of settings")
    return {str(name): value for name, value in (config or {}).items()}


def _no_yaml(path: Path, error: InvalidYamlError, what: str) -> str:
    where = "" if error.line is None else f", line {error.line}"
    return f"{path} is damaged{where}: {what} ({one_line(error, longest=120)})"
