"""Schedules against their definitions, and samples taken when they say."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
from callbacks_small import SmallNet, loader, trainer
from sweeps import few

import normzoo
from normzoo.callbacks import GradientTails, RelativeLoss
from normzoo.callbacks.schedule import Every, LogSpaced, Warmup, as_schedule


def brute(schedule: Any, count: int) -> list[int]:
    return [step for step in range(count) if schedule(step)]


@pytest.mark.parametrize("per_decade", few([1, 2, 3, 5, 7, 10, 20, 33, 100, 1000], 1, 3, 10, 1000))
def test_log_spaced_against_its_points(per_decade: int) -> None:
    points = {0} | {round(10 ** (k / per_decade)) for k in range(5 * per_decade + 1)}
    found = brute(LogSpaced(per_decade), 100_000)
    assert found == sorted(p for p in points if p < 100_000)
    dense = int(per_decade / math.log(10))
    assert found[: dense + 1] == list(range(dense + 1))
    for low in (1_000, 10_000):
        assert abs(sum(low <= s < 10 * low for s in found) - min(per_decade, 9 * low)) <= 1
    for k in range(9 * per_decade, 10 * per_decade):  # far steps, and their neighbours
        far = round(10 ** (k / per_decade))
        around = {round(10 ** (j / per_decade)) for j in (k - 1, k, k + 1)}
        assert [LogSpaced(per_decade)(s) for s in (far - 1, far, far + 1)] == [
            s in around for s in (far - 1, far, far + 1)
        ]


@pytest.mark.parametrize(("start", "n"), itertools.product((0, 1, 5, 12), (1, 2, 5)))
def test_warmup_and_every_against_their_definition(start: int, n: int) -> None:
    expected = [s for s in range(50) if s >= start and s % n == 0]
    assert brute(Warmup(start, Every(n)), 50) == brute(Warmup(start, n), 50) == expected
    inner = LogSpaced(3)
    assert brute(Warmup(start, inner), 50) == [s for s in brute(inner, 50) if s >= start]


def test_schedules_are_values() -> None:
    for schedule in (Every(3), Warmup(2, 4), Warmup(2, LogSpaced(7)), LogSpaced()):
        assert pickle.loads(pickle.dumps(schedule)) == schedule
        assert hash(copy.deepcopy(schedule)) == hash(schedule)
        with pytest.raises(AttributeError):
            schedule.n = 4  # type: ignore[union-attr, misc]
    assert Warmup(2, 4) == Warmup(2, Every(4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Every(0), "n must be a whole number of at least 1, not 0"),
        (lambda: Every(2.0), "n must be a whole number of at least 1, not 2.0"),  # type: ignore[arg-type]
        (lambda: Every(True), "n must be a whole number of at least 1, not True"),
        (lambda: Warmup(-1), "start must be a whole number of at least 0, not -1"),
        (lambda: Warmup(3, 0), "inner must be at least 1, not 0"),
        (lambda: Warmup(3, "often"), "inner must be a whole number or a schedule such as LogSpaced"),  # type: ignore[arg-type]
        (lambda: LogSpaced(0), "per_decade must be a whole number of at least 1, not 0"),
        (lambda: GradientTails(0), "every_n_steps must be at least 1, not 0"),
        (lambda: GradientTails(2.5), "every_n_steps must be a whole number or a schedule"),  # type: ignore[arg-type]
        (lambda: RelativeLoss(True), "every_n_steps must be a whole number or a schedule"),
        (lambda: RelativeLoss(LogSpaced), "every_n_steps must be a whole number or a schedule"),  # type: ignore[arg-type]
    ],
)
def test_bad_schedules(make: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def odd(step: int) -> bool:
    return step % 2 == 1


@pytest.mark.parametrize("schedule", [LogSpaced(3), Warmup(4, 3), odd], ids=["log spaced", "warmup", "function"])
def test_callbacks_sample_when_the_schedule_says(tmp_path: Path, schedule: Any) -> None:
    trainer(str(tmp_path), callbacks=[GradientTails(schedule), RelativeLoss(schedule)]).fit(SmallNet(), loader())
    expected = brute(schedule, 20)
    frames = normzoo.load_run(tmp_path / "log")
    assert sorted(set(frames["gradient_tails"]["step"])) == frames["relative_loss"]["step"].tolist() == expected
    assert as_schedule(schedule) is schedule


def test_a_recipe_gives_a_schedule() -> None:
    from normzoo._components import component
    from normzoo._errors import RecipeError

    def made(every: Any) -> Any:
        return component(
            "callbacks[0]", {"name": "gradient_tails", "every_n_steps": every}, "x", kind="callbacks"
        ).make()

    where = "normzoo.callbacks.schedule."
    log_spaced = {"class_path": where + "LogSpaced", "init_args": {"per_decade": 5}}
    assert made(3).schedule == Every(3)
    assert made(log_spaced).schedule == LogSpaced(5)
    warmup = {"class_path": where + "Warmup", "init_args": {"start": 9, "inner": log_spaced}}
    assert made(warmup).schedule == Warmup(9, LogSpaced(5))
    bad = {"class_path": where + "LogSpaced", "init_args": {"per_decade": 0}}
    for value in (0, True, 1.5, "often", bad, {"per_decade": 3}):
        with pytest.raises(RecipeError, match=r"^x: callbacks\[0\]"):
            made(value)
