"""From a capsule to the cause, in Python."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from perturbation import differences
from replays_small import Net, run

import normzoo
from normzoo.causes import read_evidence, read_findings
from normzoo.causes.evidence import KEYS
from normzoo.records.reading import read_records


@pytest.fixture(scope="module")
def diverged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of plain gradient descent at a rate of 30."""
    return run(tmp_path_factory.mktemp("run"), net={"optimizer": "SGD", "rate": 30.0}, alarm=5)


def test_all_questions_are_answered_and_the_module_is_as_before(diverged: Path) -> None:
    module = Net(optimizer="SGD", rate=30.0)
    weights, streams = {k: v.clone() for k, v in module.state_dict().items()}, torch.get_rng_state()
    findings = normzoo.replay(diverged, module)
    assert not differences(weights, dict(module.state_dict()))
    assert torch.equal(streams, torch.get_rng_state())
    assert findings.folder is not None
    assert read_findings(findings.folder) == findings
    evidence = read_evidence(findings.folder)
    assert evidence["same"]["first_difference"] is None
    assert evidence["trials"]["control"]["holds"] is False
    assert all(evidence[key] is not None for key in KEYS if key not in ("inputs", "norm_layers"))
    steps = evidence["about"]["steps"]
    # Ten times the steps in course and trials; the other questions go to single steps again
    assert evidence["passes"]["steps"] <= 12 * (steps[1] - steps[0] + 1)
    assert {"replay_course", "replay_fractions", "replay_channels"} <= set(read_records(findings.folder / "records"))


def test_nothing_is_written_unless_asked_for(diverged: Path, tmp_path: Path) -> None:
    capsule = normzoo.load_capsule(diverged)
    before = sorted(capsule.path.rglob("*"))
    findings = normzoo.replay(capsule, Net(optimizer="SGD", rate=30.0), write=False)
    assert findings.folder is None
    assert sorted(capsule.path.rglob("*")) == before
