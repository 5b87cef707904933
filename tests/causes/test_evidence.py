"""Evidence and findings on disk, and what becomes of them when they are damaged."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from normzoo.causes import EvidenceError, Finding, Findings, evidence, read_evidence, read_findings, write_evidence
from normzoo.causes.titles import TITLES, TRIALS
from normzoo.records.reading import read_records
from normzoo.records.schema import Column, Schema

SCHEMA = Schema("replay_course", "a step", (Column("loss", "float", "loss"),))
EMPTY = Schema("replay_samples", "a sample", ())
FINDING = Finding("data", "high", "Sample 3 is NaN.", "Refuted if it is not.", TRIALS, "Leave it out.", 4.0)
FINDINGS = Findings([FINDING], ["It is so."], ["Rank 1 is missing."])


def test_a_replay_is_read_as_it_was_written(tmp_path):
    folder = tmp_path / "capsule" / "replay"
    given = {"course": {"loss": (0.5, math.nan, math.inf), "onset": np.int64(3)}, "inputs": [{"max": np.float32(2)}]}
    write_evidence(folder, given, [(SCHEMA, [{"step": 3, "loss": math.nan}]), (EMPTY, [])], FINDINGS)
    read = read_evidence(folder)
    assert set(read) == set(evidence.KEYS)
    assert str(read["course"]) == "{'loss': [0.5, nan, inf], 'onset': 3}"
    assert read["inputs"] == [{"max": 2.0}]
    assert read["same"] is None
    assert read_records(folder / "records")["replay_course"]["step"].tolist() == [3]
    found = read_findings(folder)
    assert (found.causes, found.facts, found.notes, found.folder) == ([FINDING], ["It is so."], FINDINGS.notes, folder)
    assert str(found).splitlines() == [
        "Likeliest cause, high confidence: Sample 3 is NaN. Refuted if it is not. Leave it out.",
        "- It is so.",
        "Note: Rank 1 is missing.",
    ]


def test_a_replay_takes_the_place_of_an_earlier_one_and_a_failed_one_does_not(tmp_path):
    folder = tmp_path / "replay"
    write_evidence(folder, {"seconds": {"step": 1.0}}, findings=FINDINGS)
    write_evidence(folder, {"seconds": {"step": 2.0}}, [(SCHEMA, [])])
    with pytest.raises(EvidenceError, match=r"is not a replay: it has no findings\.json"):
        read_findings(folder)
    with pytest.raises(TypeError, match="plain data, not object"):
        write_evidence(folder, {"seconds": object()})
    with pytest.raises(ValueError, match="columns differ"):
        write_evidence(folder, {}, [(SCHEMA, [{"step": 1, "lost": 0.0}])])
    assert read_evidence(folder)["seconds"] == {"step": 2.0}
    assert [path.name for path in tmp_path.iterdir()] == ["replay"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "is damaged: it is no JSON"),
        ("[" * 100_000, "is damaged: it is no JSON"),
        ("[]", "holds no JSON object"),
        ('{"course": []}', "course is of the type list"),
    ],
)
def test_damaged_evidence_is_refused_in_one_line(tmp_path, text, why):
    (tmp_path / "evidence.json").write_text(text, encoding="utf-8")
    with pytest.raises(EvidenceError, match=why) as error:
        read_evidence(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"causes": []},
        {"causes": [{"cause": "data"}]},
        {"causes": [{**vars(FINDING), "cause": "bad luck"}]},
        {"causes": [{**vars(FINDING), "score": "4"}]},
        {"causes": [{**vars(FINDING), "sentence": 4}]},
        {"causes": 4},
        {"facts": [4]},
        {"notes": None},
    ],
)
def test_damaged_findings_are_refused_in_one_line(tmp_path, change):
    FINDINGS.write(tmp_path)
    content = json.loads((tmp_path / "findings.json").read_text(encoding="utf-8"))
    (tmp_path / "findings.json").write_text(json.dumps({**content, **change}), encoding="utf-8")
    with pytest.raises(EvidenceError, match=r"findings\.json is not of a replay: ") as error:
        read_findings(tmp_path)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_or_a_folder_is_refused(tmp_path):
    with pytest.raises(EvidenceError, match=r"has no evidence\.json"):
        read_evidence(tmp_path)
    (tmp_path / "evidence.json").mkdir()
    with pytest.raises(EvidenceError, match="cannot be read"):
        read_evidence(tmp_path)


def test_a_finding_names_what_there_is():
    for field, what in (("cause", "cause"), ("confidence", "confidence"), ("figure", "title of a figure or table")):
        with pytest.raises(ValueError, match=f"not a known {what}"):
            Finding(**{**vars(FINDING), field: "luck"})
    assert len(set(TITLES)) == len(TITLES)
