"""benchmarks/planted_divergences.py: what is planted, and how findings are counted."""

import dataclasses
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from planted import faults
from planted.fit import NETS, Settings, Task, batches, fit, quiet, trainer_of
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
    for half in "abcd":
        own = [plan for plan in plans if plan.half == half]
        causes = Counter(plan.truth[0] for plan in own if len(plan.truth) == 1)
        assert len(own) > 40
        assert len(causes) == 8
        assert min(causes.values()) >= 4
        assert {plan.base.seed for plan in own}.isdisjoint(p.base.seed for p in plans if p.half != half)


@pytest.mark.parametrize(("half", "nets"), [("c", 10), ("d", 7)])
def test_later_halves_have_networks_and_optimizers_of_their_own(half, nets):
    own = [plan for plan in runs() if plan.half == half]
    others = [plan for plan in runs() if plan.half != half]
    counts = Counter(plan.truth[0] if len(plan.truth) == 1 else "two" for plan in own)
    assert len(own) >= 60
    assert len(counts) == 9
    assert min(counts.values()) >= 4
    assert {plan.base.net for plan in own}.isdisjoint(plan.base.net for plan in others)
    assert len({plan.base.net for plan in own}) == nets
    usual = {(plan.base.optimizer, json.dumps(plan.base.own)) for plan in others}
    assert usual.isdisjoint((plan.base.optimizer, json.dumps(plan.base.own)) for plan in own)
    assert len({(plan.base.net, plan.base.seed) for plan in own}) == len(own)


def test_what_counts_as_right_follows_the_rules():
    lenient = {"warm_up": ["learning_rate"]}
    for plan in runs():
        [cause, *_] = plan.truth
        expected = lenient.get(cause, [])
        if cause == "parameter" and plan.plant.get("rates"):
            expected = ["learning_rate"]
        if cause == "data" and plan.plant["poison"][0][0] == "label":
            expected = ["error"]
        if cause == "innocent" and plan.plant.get("poison", [[""]])[0][0] == "noise":
            expected = ["data"]
        if cause == "normalization" and plan.base.poison:
            expected = ["data"]
        assert [*plan.lenient] == ([] if len(plan.truth) > 1 else expected)


def test_each_cause_has_its_proofs():
    for plan in runs():
        changes = [change for change, _ in plan.proofs]
        alarms = [alarm for _, alarm in plan.proofs]
        if len(plan.truth) > 1:
            assert alarms == [True, True]
        elif plan.truth[0] == "warm_up":
            assert alarms == [False, False]
            assert all(change["warm_up"] == plan.base.warm_up > 0 for change in changes)
            assert len({plan.base.seed, *(change["seed"] for change in changes)}) == 3
        elif plan.truth[0] == "learning_rate" and "lr" in plan.plant:
            assert [(change["warm_up"], alarm) for change, alarm in plan.proofs] == [(40, True)]
        elif plan.truth[0] == "normalization":
            assert alarms == [False]
            assert plan.planted.options["eps"] <= 1e-12 < 1e-3 == plan.base.options["eps"]


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


def test_poison_is_put_where_it_is_said():
    settings = next(plan.base for plan in runs() if plan.base.net == "scan")
    [clean, *_] = batches(settings)
    g = torch.Generator().manual_seed(0)
    for kind in ("scale", "hard"):
        changed_batch = faults.poisoned(clean, kind, (3, 7), 10.0, NETS["scan"], g)
        same = (changed_batch[0] == clean[0]).flatten(1).all(1).tolist()
        assert same == [not 3 <= row < 7 for row in range(len(same))]
    flat = faults.poisoned(clean, "label", (5, 6), 99.0, NETS["scan"], g)[1].flatten()
    assert [*(flat == 99.0).nonzero().flatten()] == [5]


@pytest.mark.parametrize("net", sorted({plan.base.net for plan in runs() if plan.half in "cd"}))
def test_samples_follow_from_their_generator_and_hard_ones_have_the_same_shapes(net):
    one, other, hard = (
        NETS[net].samples(4, torch.Generator().manual_seed(3), hard=hard) for hard in (False, False, True)
    )
    for x, y, z in zip(one, other, hard, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
        assert (x.shape, x.dtype) == (z.shape, z.dtype)
    assert any(not torch.equal(x, z) for x, z in zip(one, hard, strict=True))


def test_stairs_halve_the_learning_rate_and_clipping_by_value_bounds_each_number(tmp_path):
    stairs = Settings("table", optimizer="sgd", lr=0.5, steps=5, stairs=2)
    configured = Task(stairs).configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(5):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == [0.5, 0.5, 0.25, 0.25, 0.125]
    clipped = Settings("table", optimizer="sgd", lr=0.5, steps=1, clip=1e-3, clip_by="value")
    trainer, task = trainer_of(clipped, tmp_path, []), Task(clipped)
    before = [p.detach().clone() for p in task.parameters()]
    quiet()
    trainer.fit(task, DataLoader(batches(clipped), batch_size=None))
    moved = [(p.detach() - old).abs().max() for p, old in zip(task.parameters(), before, strict=True)]
    assert max(moved) == pytest.approx(0.5 * 1e-3, rel=1e-3)


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
    assert "| 1 of set b | 0 (0%) |" in text
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
