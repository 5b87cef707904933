"""The files of a capsule: written whole or not at all, and JSON with its checksum inside."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from normzoo._errors import one_line
from normzoo.records.seals import UNSEALED, seal_of, sealed

SCHEMA_VERSION = 1
_LONGEST = 1 << 28  # bytes of a JSON file


class CapsuleError(ValueError):
    """A capsule or a file of one is not there, is damaged, or is none; the message is one line and names it."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message, longest=500))


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of ``path`` when it is whole and on the disk, and is removed otherwise.

    The folder is made if it is not there: another rank that could not write may have removed it.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Have the names of the files in a folder on the disk; Windows does so by itself."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object with its version and checksum.

    Raises:
        OSError: if it could not be written; what was there before is then still there.
    """
    whole = {"check": UNSEALED, "schema_version": SCHEMA_VERSION, **content}
    with new_file(path) as file:
        file.write(sealed(json.dumps(whole, allow_nan=False, separators=(",", ":")).encode()))


def read_json(path: Path) -> dict[str, Any]:
    """The object that :func:`write_json` wrote.

    Raises:
        CapsuleError: if the file is not there, or not what was written, or of a later version.
    """
    data = read_bytes(path)
    try:
        content = json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise CapsuleError(f"{path} is damaged: it is not valid JSON") from error
    if not isinstance(content, dict) or "check" not in content:
        raise CapsuleError(f"{path} is not a file of a capsule: it holds no JSON object with a checksum")
    if seal_of(memoryview(data)) != str(content["check"]).encode():
        raise CapsuleError(f"{path} is damaged: its checksum is not that of what was written")
    version = content.get("schema_version")
    if type(version) is not int or version < 1:
        raise CapsuleError(f"{path} is not a file of a capsule: its schema_version is {version!r}")
    if version > SCHEMA_VERSION:
        raise CapsuleError(
            f"{path} is of schema_version {version}, and this normzoo reads up to {SCHEMA_VERSION}; use a newer normzoo"
        )
    return content


def read_bytes(path: Path) -> bytes:
    """The content of a file of limited size.

    Raises:
        CapsuleError: if the file cannot be read, or is too large to be a JSON file of a capsule.
    """
    try:
        with _open(path) as file:
            data = file.read(_LONGEST + 1)
    except OSError as error:
        raise CapsuleError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(data) > _LONGEST:
        raise CapsuleError(f"{path} is not a file of a capsule: it has more than {_LONGEST} bytes")
    return data


def _open(path: Path) -> BinaryIO:
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe would never end
        raise OSError("it is not a file")
    return path.open("rb")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
