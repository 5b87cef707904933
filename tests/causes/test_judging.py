"""Causes, from evidence by hand: what was planted is found, and no evidence, however odd, brings an error."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted_causes import ALARM, BAD_BATCH, BAD_WEIGHTS, CARRIED, HUGE, PLANTS, evidence, put_back, rising, trials

from normzoo.causes import CAUSES, findings_of, read_findings
from normzoo.causes.criteria import Criteria
from normzoo.causes.judging import ENOUGH, JUDGES
from normzoo.causes.observations import OBSERVATIONS, observe
from normzoo.causes.view import View

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.floats(),
    st.integers(-(10**20), 10**20),
    st.text(max_size=3),
    st.just([]),
    st.just({}),
    st.just([math.nan]),
    st.just([[None]]),
)


@pytest.mark.parametrize("name", PLANTS)
def test_what_was_planted_is_found(name):
    cause, given_evidence = PLANTS[name]
    findings = findings_of(given_evidence)
    assert findings.causes[0].cause == cause, str(findings)
    for finding in findings.causes:
        assert finding.refuted_by.startswith("Refuted if "), finding
        assert all(text.endswith((".", ")")) for text in (finding.sentence, finding.refuted_by, finding.suggestion))
    assert not re.search(r"\bNone\b|\?|unknown|  ", str(findings)), str(findings)


def test_every_cause_is_planted_and_every_observation_counts_somewhere():
    assert {cause for cause, _ in PLANTS.values()} == set(CAUSES)
    assert {judge.__name__.rpartition(".")[2] for judge in JUDGES} == set(CAUSES) - {"undetermined"}
    counted = {name for judge in JUDGES for name in (*judge.CRITERIA.points, *judge.CRITERIA.needs)}
    assert counted == set(OBSERVATIONS)
    seen = [observe(View(given_evidence)) for _, given_evidence in PLANTS.values()]
    scoring = {
        (name, i == 0)
        for judge in JUDGES
        for name, points in judge.CRITERIA.points.items()
        for i in (0, 1)
        if points[i]
    }
    never = {(name, value) for name, value in scoring if all(of_plant[name] is not value for of_plant in seen)}
    assert never == set()


def test_an_observation_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="there is no observation good_luck"):
        Criteria(needs=("good_luck",))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_no_evidence_brings_an_error(data):
    """Evidence in which some values have been replaced by others of any kind."""
    mutant = copy.deepcopy(PLANTS[data.draw(st.sampled_from(sorted(PLANTS)))][1])
    for _ in range(data.draw(st.integers(1, 6))):
        owner: Any = mutant
        while isinstance(owner, dict | list) and owner:
            keys = sorted(owner) if isinstance(owner, dict) else range(len(owner))
            key = data.draw(st.sampled_from(keys))
            if not isinstance(owner[key], dict | list) or data.draw(st.integers(0, 3)) == 0:
                owner[key] = copy.deepcopy(data.draw(ODD))
                break
            owner = owner[key]
    findings = findings_of(mutant)
    assert str(findings)
    assert all(math.isfinite(finding.score) for finding in findings.causes)


def test_two_causes_at_once_are_both_named_and_neither_is_certain():
    given_evidence = evidence(
        course=rising(),
        data_or_state={**BAD_WEIGHTS, "loss": [[90.0, 80.0], [4.0, 0.51]]},
        inputs=[HUGE],
        samples=CARRIED,
        trials=trials(rate=True, without_batch=False),
    )
    findings = findings_of(given_evidence)
    assert {finding.cause for finding in findings.causes} == {"data", "learning_rate"}
    assert {finding.confidence for finding in findings.causes} == {"low"}
    assert str(findings).splitlines()[1].startswith("Also possible, low confidence: ")


def test_confidence_is_high_only_with_an_intervention_that_agrees():
    _, given_evidence = PLANTS["learning rate too large, SGD"]
    assert findings_of(given_evidence).causes[0].confidence == "high"
    without = findings_of({**given_evidence, "trials": None}).causes[0]
    assert (without.cause, without.confidence) == ("learning_rate", "low")
    against = findings_of({**given_evidence, "trials": trials(rate=False)}).causes[0]
    assert against.confidence == "low"


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, (cause, e) in PLANTS.items()
        if e and e["about"]["kind"] == "divergence" and cause != "undetermined"
    ],
)
def test_steps_that_do_not_diverge_again_refute_what_was_found_in_them(name):
    _, given_evidence = PLANTS[name]
    same = {**given_evidence["same"], "first_difference": 40, "relative_difference": 0.5, "diverges_again": False}
    changed = {**given_evidence, "same": same, "trials": trials(control=True)}
    assert findings_of(changed).causes[0].cause in ("hardware", "data")


def test_rounding_that_differs_is_no_hardware():
    same = {"first_difference": 40, "relative_difference": 1e-7, "repeatable": False, "noise": 1e-7}
    given_evidence = evidence(same=same, course=rising(), data_or_state=BAD_WEIGHTS, trials=trials(rate=True))
    assert [finding.cause for finding in findings_of(given_evidence).causes] == ["learning_rate"]


def test_the_sentence_on_a_learning_rate_has_its_numbers():
    course = {**rising(), "lr": [0.072] * 17}
    given_trials = {**trials(rate=True, clip=True), "lr": 0.018}
    findings = findings_of(evidence(course=course, data_or_state=BAD_WEIGHTS, trials=given_trials))
    sentence = findings.causes[0].sentence
    assert sentence.startswith("The learning rate was too large: ")
    assert "0.018, a quarter of it, holds over the same batches, and 0.072 does not." in sentence
    assert "Clipping the gradient at the norm 1 holds as well." in sentence


def test_the_sentence_on_samples_names_them():
    finding = findings_of(PLANTS["samples 10^6 times too large, SGD"][1]).causes[0]
    assert "samples 1234 (row 3) and 99 (row 7)" in finding.sentence
    assert (
        "batch[0] has values up to 4e+06, where those of other batches are at most 4.2 (rows 3 and 7)"
        in finding.sentence
    )
    assert "these 2 samples carry 99% of its loss" in finding.sentence
    labels = findings_of(PLANTS["a label out of range, which raises an error"][1]).causes[0]
    assert "batch[1] has 1 values such as 77, where other batches have 0 to 9 (row 5)" in labels.sentence


def test_a_sample_whose_own_loss_is_small_is_named_if_the_batch_is_quiet_without_it():
    worst = [{"row": 1, "rank": 0, "micro_batch": 0, "id": 5, "loss": 95.0, "share": 0.04}]
    without = {"rows": [{"row": 9, "rank": 0, "micro_batch": 0, "id": 77}], "loss": 0.6}
    samples = {"possible": True, "samples": 32, "median": 90.0, "worst": worst, "batch_loss": 90.0, "without": without}
    given_evidence = evidence(data_or_state=BAD_BATCH, samples=samples, trials=trials(without_batch=True))
    assert "sample 77 (row 9)" in findings_of(given_evidence).causes[0].sentence
    for loss in (80.0, math.nan, None):
        odd = {**samples, "without": {**without, "loss": loss}}
        found = findings_of(evidence(data_or_state=BAD_BATCH, samples=odd, trials=trials(without_batch=True)))
        assert "sample 77" not in found.causes[0].sentence


def test_the_sentence_on_an_element_does_not_say_what_changed_it():
    sentence = findings_of(PLANTS["a flipped bit in a weight"][1]).causes[0].sentence
    assert "first.weight[0, 3] was 1e+37 in the run and is 0.05 in the replay" in sentence
    assert "a flipped bit, a race, or code outside of the step" in sentence


def test_facts_answer_the_questions_whatever_the_cause():
    given_evidence = evidence(
        data_or_state=BAD_BATCH,
        inputs=[HUGE],
        samples=CARRIED,
        parameters=put_back("scale"),
        fractions={"loss": [0.5, 0.6, 90.0], "largest_that_holds": 0.35},
        first_bad={"kind": "jump", "direction": "forward", "module": "head", "class": "Linear", "times": 340.0},
        norm_layers=[{"module": "norm", "class": "BatchNorm1d", "eps": 1e-5, "dead": 0, "channel": 2, "variance": 9e4}],
        trials=trials(rate=True, without_batch=True),
        about={"notes": ["Rank 1 is missing."]},
    )
    findings = findings_of(given_evidence)
    for text in (
        f"Steps 32 to {ALARM} were made again, with the losses of the run.",
        "Step 46 is the first out of line, by its loss",
        "up to 35% of the update it does not rise",
        "The batch of step 46 has the loss 90 and 80 at the weights of steps 46 and 32; that of step 38, 0.5 and 0.51",
        "samples 1234 (row 3) and 99 (row 7) carry its loss",
        "0.52 with scale",
        "The first bad module in the forward pass is head (Linear): its values are 340 times those of a quiet step.",
        "In norm (BatchNorm1d) the variance of channel 2 is 90000",
        "they hold with 0.25 times the learning rate and another batch at step 46",
    ):
        assert any(text in fact for fact in findings.facts), (text, findings.facts)
    assert findings.notes == ["Rank 1 is missing."]
    assert str(findings).endswith("\nNote: Rank 1 is missing.")


def test_findings_of_every_plant_are_read_as_they_were_written(tmp_path):
    for _, given_evidence in PLANTS.values():
        findings = findings_of(given_evidence)
        findings.write(tmp_path)
        assert str(read_findings(tmp_path)) == str(findings)


def test_a_cause_without_enough_points_is_not_named():
    assert all(
        f.score >= ENOUGH for _, e in PLANTS.values() for f in findings_of(e).causes if f.cause != "undetermined"
    )
    findings = findings_of(evidence())
    assert [finding.cause for finding in findings.causes] == ["undetermined"]
