"""``status.json``: what became of a run, true also where a signal or a full disk ends it."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path

from normzoo._files import write_whole

_RESERVED = 1024  # bytes of the first version, which later ones can overwrite without another block of the disk


class Status:
    """Writes the state of one run into its folder; of one that goes on, its time adds to what is there.

    Args:
        folder: the run's folder, which exists.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "status.json"
        self._started, self._clock = time.time(), time.monotonic()
        self._seconds_before = 0.0
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # there is none, or it is damaged
            before = json.loads(self._path.read_text(encoding="utf-8"))
            self._seconds_before, self._started = float(before["seconds"]), float(before["started"])

    def write(self, state: str, error: str = "") -> None:
        """Replace the file; on a full disk overwrite its bytes, with a shortened error.

        Args:
            state: ``running``, ``finished``, ``diverged``, ``interrupted`` or ``failed``.
            error: what a failed run raised, how one diverged, or the signal that interrupted one.
        """
        status = {
            "state": state,
            "started": self._started,
            "seconds": self._seconds_before + time.monotonic() - self._clock,
            "error": error,
        }
        try:
            write_whole(self._path, json.dumps(status).ljust(_RESERVED - 1) + "\n")
        except OSError as problem:
            status["error"] = error[: _RESERVED // 8]  # JSON writes a character in at most 6 bytes
            try:
                with self._path.open("r+b") as file:
                    file.write(json.dumps(status).encode().ljust(_RESERVED - 1) + b"\n")
                    file.truncate()
            except OSError:
                with contextlib.suppress(OSError):
                    print(f"normzoo: {self._path} cannot say that the run is {state}: {problem}", file=sys.stderr)
