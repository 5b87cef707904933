"""Files and folders, for the parts that write them: whole files, and whether a folder can be made."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path


def existing_folder(path: str | os.PathLike[str]) -> Path:
    """The nearest of a path and its parents that exists, as an absolute path.

    Raises:
        ValueError: saying why no folder can be made at the path, such as ``/home/me/notes.txt is not a folder``.
    """
    try:
        absolute = Path(os.path.abspath(path))
        for part in (absolute, *absolute.parents):
            try:
                mode = part.stat().st_mode
            except (FileNotFoundError, NotADirectoryError):
                continue
            if stat.S_ISDIR(mode):
                return part
            raise ValueError(f"{part} is not a folder")
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    raise ValueError(f"{absolute.anchor} does not exist")


def write_whole(path: Path, text: str, errors: str = "backslashreplace") -> None:
    """Write a text file in UTF-8 so that no reader ever sees a part of it.

    Args:
        path: of the file; beside it one with the ending ``.part`` is written first.
        text: what is to be in it.
        errors: what is to be done with halves of surrogate pairs, as in :meth:`str.encode`.

    Raises:
        OSError: if it could not be written; what was there before is then still there.
    """
    partial = path.with_name(path.name + ".part")
    try:
        partial.write_text(text, encoding="utf-8", errors=errors)
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``, moved there when the context ends without an error, and else deleted."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield partial
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
