"""The examples of docs/callbacks.md run as they stand: one process, DDP, and shards, on real processes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from ranks import run_ranks
from sweeps import slow

from normzoo import load_run

PAGE = Path(__file__).parents[2] / "docs" / "callbacks.md"
ALL = {"channel_moments", "divergence", "gradient_noise", "gradient_tails", "relative_loss"}


def blocks() -> list[str]:
    return re.findall(r"^```py\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(
    ("mark", "ranks", "quantities", "steps"),
    [
        slow("max_steps=6", 1, ALL, [0, 2, 4]),
        slow("# DDP", 2, ALL, [0, 2]),
        ("# FSDP2", 2, {"gradient_tails", "relative_loss"}, [0, 2]),
    ],
    ids=["trainer", "ddp", "fsdp2"],
)
def test_an_example_runs_and_leaves_its_records(
    tmp_path: Path, mark: str, ranks: int, quantities: set[str], steps: list[int]
) -> None:
    [block] = [b for b in blocks() if mark in b]
    run_ranks(tmp_path, block, ranks)
    frames = load_run(tmp_path / "lightning_logs" / "version_0")
    assert set(frames) == quantities
    for name in quantities - {"divergence"}:
        assert frames[name]["step"].unique().tolist() == steps, name


def test_every_example_is_run_by_a_test() -> None:
    """Those of watch and of reading records are run, and looked at, elsewhere."""
    run = ("max_steps=6", "# DDP", "# FSDP2", "normzoo.watch(", 'load_run("runs/quickstart")')
    assert [sum(mark in block for mark in run) for block in blocks()] == [1] * len(blocks()) == [1] * len(run)
