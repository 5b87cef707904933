"""benchmarks/planted_divergences.py: what is planted, and how findings are counted."""

import dataclasses
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from planted.fit import NETS, Settings, Task, batches, fit
from planted.page import BEGIN, END, TITLE, matrix, outcome, page, write
from planted.plan import changed
from planted.runs import runs


def verdict(truth, first, confidence="high", half="a", lenient=(), listed=()):
    return {
        "name": "a01",
        "half": half,
        "truth": [*truth],
        "lenient": [*lenient],
        "first": first,
        "confidence": confidence,
        "listed": [*listed],
        "ratio": 3.0,
        "seconds": 1.0,
    }


def test_each_half_has_more_than_forty_runs_of_all_causes():
    plans = runs()
    for half in "ab":
        own = [plan for plan in plans if plan.half == half]
        causes = Counter(plan.truth[0] for plan in own if len(plan.truth) == 1)
        assert len(own) > 40
        assert len(causes) == 8
        assert min(causes.values()) >= 4
        assert {plan.base.seed for plan in own}.isdisjoint(p.base.seed for p in plans if p.half != half)


def test_settings_survive_json_and_make_the_same_module_and_batches():
    for plan in runs()[::6]:
        settings = plan.planted
        read = Settings(**json.loads(json.dumps(dataclasses.asdict(settings))))
        module, again = Task(settings), Task(read)
        for one, other in zip(module.parameters(), again.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
        short = dataclasses.replace(read, steps=2)
        assert len(batches(short)) == 2 * settings.accumulation


def test_what_is_planted_changes_the_run():
    for plan in runs():
        assert plan.planted != plan.base
        assert plan.planted.seed == plan.base.seed


@pytest.mark.parametrize("net", list(NETS))
def test_networks_learn_from_batches(net):
    settings = Settings(net, steps=1)
    loss = Task(settings).net(batches(settings)[0])
    loss.backward()
    assert loss.isfinite()


def test_poison_changes_the_last_samples_of_one_batch():
    plan = next(plan for plan in runs() if plan.truth == ("data",))
    kind, at, rows, _ = plan.planted.poison[0]
    assert kind == "scale"
    for step, (clean, poisoned) in enumerate(zip(batches(plan.base), batches(plan.planted), strict=True)):
        same = [torch.equal(a, b) for a, b in zip(clean[0], poisoned[0], strict=True)]
        assert same == [not (step == at and row >= len(same) - rows) for row in range(len(same))]


def test_a_flipped_bit_raises_an_alarm_and_the_run_without_it_none(tmp_path):
    base = Settings("table", optimizer="adam", lr=1e-2, steps=8, seed=3)
    flipped = changed(base, {"flip": (("parameter", 4, "head.weight", 2, 30),)})
    assert fit(base, tmp_path / "base")["alarm"] is None
    run = fit(flipped, tmp_path / "run")
    assert run["alarm"] == 4
    assert run["capsules"] == ["capsules/000_step_00000004"]


def test_outcomes():
    assert outcome(verdict(["data"], "data")) == "right"
    assert outcome(verdict(["learning_rate", "data"], "data")) == "right"
    assert outcome(verdict(["warm_up"], "learning_rate", lenient=["learning_rate"])) == "lenient"
    assert outcome(verdict(["warm_up"], "data", "low")) == "wrong, low"
    assert outcome(verdict(["warm_up"], "hardware")) == "wrong, high"
    assert outcome(verdict(["warm_up"], "undetermined", "low")) == "undetermined"


def test_the_page_counts():
    verdicts = [
        verdict(["data"], "data"),
        verdict(["data"], "hardware", half="b"),
        verdict(["warm_up"], "learning_rate", lenient=["learning_rate"]),
        verdict(["hardware", "data"], "data", listed=[["data", "high", ""], ["hardware", "low", ""]]),
    ]
    text = page(verdicts)
    assert "| 4 | 2 (50%) | 3 (75%) | 1 (25%) | 0 (0%) | 0 (0%) |" in text
    assert "| 1 of half b | 0 (0%) |" in text
    assert "Of 1 runs with two causes at once, 1 have both" in text
    assert "| data | **1** |  |  |  |  |  | 1 |  |  |" in matrix(verdicts)


def test_the_section_is_written_between_its_markers(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for _ in range(2):
        write(path, "new")
        assert path.read_text() == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"
    path.write_text("another page\n")
    for _ in range(2):
        write(path, "new")
        assert path.read_text() == f"another page\n\n{TITLE}\n\n{BEGIN}\n\nnew\n\n{END}\n"
