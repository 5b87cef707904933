"""Two ranks say of a capsule what one process says that stands for both."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from ranks import run_function
from replays_small import Net, run_ranks_of

from normzoo import load_capsule
from normzoo.callbacks._run.facts import rank_and_ranks
from normzoo.replaying import fractions, module_frames
from normzoo.replaying.fit import in_a_fit
from normzoo.replaying.stage import Stage

RUN = Path("lightning_logs/version_0")


def ask_on(folder: str) -> None:
    """On each rank: ask, and write what came of it."""

    def ask(stage: Stage) -> None:
        before = stage.losses(stage.steps[0])
        evidence: dict[str, Any] = {"course": {"fatal": stage.steps[-2], "onset": stage.steps[-1]}}
        asked = [*fractions.ask(stage, evidence), *module_frames.ask(stage, evidence)]
        records = {schema.name: rows for schema, rows in asked}
        stage.go_to(stage.steps[0])
        assert stage.losses(stage.steps[0]) == before
        rank, ranks = rank_and_ranks()
        path = Path(folder) / f"asked_{rank}_of_{ranks}.json"
        path.write_text(json.dumps({"evidence": evidence, "records": records}))

    in_a_fit(load_capsule(Path(folder) / RUN), Net(), ask)


def assert_close(one: Any, other: Any, where: str = "") -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_close(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_close(a, b, f"{where}[{i}]")
    elif isinstance(one, float) and not math.isnan(one):
        assert one == pytest.approx(other, rel=2e-3, abs=1e-4), where
    else:
        assert one == other or (one != one and other != other), where


@pytest.mark.slow
def test_two_ranks_say_what_one_process_says(tmp_path: Path) -> None:
    run_function(tmp_path / "train", run_ranks_of, 2, str(tmp_path), "whole")
    run_function(tmp_path / "two", ask_on, 2, str(tmp_path))
    ask_on(str(tmp_path))
    first, second, alone = (
        json.loads((tmp_path / f"asked_{name}.json").read_text()) for name in ("0_of_2", "1_of_2", "0_of_1")
    )
    assert_close(first, second)
    tails = [records["records"].pop("replay_gradient_tails") for records in (first, alone)]
    assert_close([{**row, "kurtosis": 0} for row in tails[0]], [{**row, "kurtosis": 0} for row in tails[1]])
    assert_close(first, alone)
    rows = first["records"]["replay_modules"]
    assert {row["frame"] for row in rows} == {"bad", "quiet"}
    assert len(first["records"]["replay_channels"]) == 21 * 4
