"""Runs with one planted cause each, from the run to the finding."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest
from caused_runs import AT, CAUSED, run

import normzoo
from normzoo.causes import CAUSES, read_evidence, read_findings


@pytest.mark.slow
@pytest.mark.parametrize("cause", CAUSED)
def test_the_cause_of_a_run_is_found(tmp_path: Path, cause: str) -> None:
    capsule = run(tmp_path, cause)
    pl.seed_everything(11, verbose=False)  # weights come from the capsule
    findings = normzoo.replay(capsule, CAUSED[cause].module())
    assert findings.causes[0].cause == cause, str(findings)
    assert str(read_findings(capsule / "replay")) == str(findings)
    sentence = findings.causes[0].sentence
    if cause == "data":
        assert "rows 3 and 7" in sentence
    if cause == "learning_rate":
        assert f"it rose from 0.05 to 3 at step {AT}" in sentence
    if cause == "normalization":
        assert "norm (LayerNorm)" in sentence
    if cause == "parameter":
        assert "net.gain" in sentence
    if cause not in ("normalization", "innocent"):
        assert findings.causes[0].confidence == "high", str(findings)
    assert read_evidence(capsule / "replay")["about"]["steps"][0] <= AT


def test_every_cause_but_the_undetermined_is_planted() -> None:
    assert {*CAUSED} == {*CAUSES} - {"undetermined"}
