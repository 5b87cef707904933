"""All that needs a GPU, in one command: the tests marked ``gpu``, then both benchmarks, and a page of what came.

usage: python benchmarks/gpu.py [--minutes 8]        (make gpu)

The page, docs/benchmarks/gpu.md, is written anew after each part, so that a run that is cut short leaves what it has. A
part that would go on beyond its share of the minutes is ended, and the page says so. Without a GPU nothing is run or
written.
"""

from __future__ import annotations

import argparse
import datetime as dt
import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks" / "gpu.md"


@dataclass(frozen=True)
class Part:
    """A command, and its share of the time."""

    title: str
    command: tuple[str, ...]
    share: float
    last_lines: int  # of its output, which go to the page


PARTS = (
    Part("Tests", ("-m", "pytest", "-q", "-m", "gpu", "-n", "4", "--no-header", "-r", "f"), 0.5, 40),
    Part("Layers", ("benchmarks/norms.py", "--device", "cuda", "--rounds", "10", "--no-compiled"), 0.25, 40),
    Part("Callbacks", ("benchmarks/callbacks.py", "--device", "cuda", "--rounds", "4", "--only", "resnet50"), 0.25, 40),
)


def run(part: Part, seconds: float) -> str:
    """Run a part, showing its output as it comes; a section of the page."""
    start = time.monotonic()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    lines: list[str] = []
    process = subprocess.Popen(
        [sys.executable, *part.command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    previous = signal.signal(signal.SIGALRM, lambda *_: os.killpg(process.pid, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip("\n"))
        code = process.wait()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    took = time.monotonic() - start
    how = f"unfinished, ended after {took:.0f} s" if code == -signal.SIGKILL else f"exit code {code} after {took:.0f} s"
    shown = "\n".join(lines[-part.last_lines :])
    return f"## {part.title}\n\n`python {' '.join(part.command)}`: {how}.\n\n```\n{shown}\n```\n"


def head() -> str:
    """Where and with what it was measured."""
    device = torch.cuda.get_device_properties(0)
    memory = device.total_memory / 2**30
    return (
        "# Benchmarks: on a GPU\n\n"
        f"`make gpu` ran on {dt.date.today().isoformat()} on one {device.name} ({memory:.0f} GiB), "
        f"torch {torch.__version__}, CUDA {torch.version.cuda}, Python {platform.python_version()}. "
        "[layers](norms.md) and [callbacks](callbacks.md) say what the columns mean.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=8.0)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("make gpu needs a CUDA device, and torch finds none here; nothing was run")
    end, sections = time.monotonic() + 60 * arguments.minutes, [head()]
    for i, part in enumerate(PARTS):
        left = end - time.monotonic()
        share = part.share / sum(p.share for p in PARTS[i:])  # of what earlier parts have left
        sections.append(run(part, max(left * share, 1.0)))
        PAGE.write_text("\n".join(sections), encoding="utf-8")


if __name__ == "__main__":
    main()
