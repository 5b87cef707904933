"""Files and folders, for the parts that write them: whether a folder can be made."""

from __future__ import annotations

import os
import stat
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
