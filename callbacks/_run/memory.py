"""How much memory this machine can give."""

from __future__ import annotations

import math
import os
from pathlib import Path

_LIMITS = (  # of a control group, of its versions 2 and 1: the limit, and what is in use
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
_UNITS = ("B", "kB", "MB", "GB", "TB")


def available_memory() -> int | None:
    """Bytes that can be taken without swapping, within the limit of a container; None where the system says none."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines) if rest}
    free = [sizes["MemAvailable"]] if "MemAvailable" in sizes else []
    for limit, used in _LIMITS:
        try:
            free.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # no control group, or the text "max", which stands for no limit
            continue
    return max(min(free), 0) if free else None


def ranks_of_this_machine(ranks: int) -> int:
    """How many of the ranks share this machine's memory, as launchers say it; all of them if none does."""
    said = os.environ.get("LOCAL_WORLD_SIZE", "")
    return min(int(said), ranks) if said.isdecimal() and int(said) > 0 else ranks


def size_text(nbytes: float) -> str:
    """A size for people.

    Example:
        >>> size_text(5_300_000), size_text(1500), size_text(0)
        ('5.3 MB', '1.5 kB', '0 B')
    """
    power = min(int(math.log10(max(nbytes, 1))) // 3, len(_UNITS) - 1)
    return f"{nbytes / 1000**power:.3g} {_UNITS[power]}"
