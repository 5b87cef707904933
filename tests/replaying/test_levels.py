"""Where a series of losses or norms leaves the line, on planted series."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normzoo.replaying.levels import Level, excess, find_fatal, find_onset, is_accelerating, level_of

QUIET = [2.0, 2.2, 1.9, 2.1, 2.0, 1.8, 2.1, 2.2, 1.9, 2.0]
values = st.lists(st.floats(0.01, 100.0), min_size=1, max_size=20)


def noise(count: int, sigma: float, seed: int, trend: float = 0.0) -> list[float]:
    draw = random.Random(seed)
    return [math.exp(trend * i + sigma * draw.gauss(0, 1)) for i in range(count)]


def twin(value: float, before: list[float]) -> float:
    """The excess by numpy, in the units of the docstring."""
    x, y = np.log(before), np.log(value)
    pairs = [(x[j] - x[i]) / (j - i) for i in range(len(x)) for j in range(i + 1, len(x))]
    falls = len(x) >= 4 and np.mean(np.array(pairs) < 0) >= 0.9
    slope = np.median(pairs) if falls else 0.0
    rest = x - slope * (np.arange(len(x)) - len(x))
    deviation = 1.4826 * np.median(np.abs(rest - np.median(rest)))
    return float((y - np.median(rest)) / (max(deviation, 0.05) * (1 + 5 / len(x))))


@settings(deadline=None)
@given(st.floats(0.01, 1e6), values)
def test_the_excess_is_the_formula_and_has_no_scale(value: float, before: list[float]) -> None:
    [found] = excess([value], before)
    assert found == pytest.approx(twin(value, before), rel=1e-6, abs=1e-9)
    assert excess([8 * value], [8 * x for x in before]) == [pytest.approx(found, rel=1e-6, abs=1e-6)]


@pytest.mark.parametrize(
    ("losses", "norms", "expected"),
    [
        ([*QUIET, 40.0], [1.0] * 11, (10, "loss")),
        ([*QUIET, 40.0, 3.0, 90.0], [1.0] * 13, (10, "loss")),  # a batch between two high losses may be low
        ([*QUIET, 2.0, 30.0], [1.0] * 10 + [50.0, 60.0], (10, "norm")),
        ([*QUIET, math.nan], [1.0] * 11, (10, "nonfinite")),
        ([*QUIET, 2.0, math.nan], [1.0] * 10 + [math.inf, 1.0], (10, "nonfinite")),
        (QUIET, [1.0] * 10, (9, "alarm")),
        ([*QUIET[:4], 40.0, *QUIET, 40.0], [None] * 16, (15, "loss")),  # the run came back from the first
        ([*QUIET[:4], 40.0, *QUIET, 2.2], [None] * 16, (15, "alarm")),
        ([2.0 * 0.7**i for i in range(12)] + [0.2], [1.0] * 13, (12, "loss")),  # which is low, but had fallen further
        ([1.2**i for i in range(20)], [1.0] * 20, (19, "alarm")),
        ([*QUIET, 9.0, 2.0, 9.0], [*[1.0] * 10, 1.0, 1.0, 900.0], (12, "loss")),  # back in line before the alarm
        ([*QUIET, 9.0, 7.0, 9.0], [*[1.0] * 10, 1.0, 1.0, 900.0], (10, "loss")),
        ([*QUIET, 9.0, 8.0, 9.0, 4.0, 4.2, math.nan], [*[1.0] * 15, math.nan], (15, "nonfinite")),  # it had come down
        ([*QUIET, 9.0, 8.0, 9.0, 10.0, 11.0, math.nan], [*[1.0] * 15, math.nan], (10, "loss")),
        ([5.0], [1.0], (0, "alarm")),
        ([math.nan], [None], (0, "nonfinite")),
        ([5.0, 500.0], [1.0, 1.0], (1, "loss")),
        ([5.0, 8.0], [1.0, 1.0], (1, "alarm")),
        ([1e-9, 0.0, 2e-9, 1e-9, 0.0, 3e-9, 5.0], [1e-3] * 7, (6, "loss")),
        ([-3.0, -3.2, -3.1, -2.9, -3.0, 4.0], [1.0] * 6, (5, "loss")),
        ([None] * 8, [1.0, 1.2, 0.9, 1.0, 1.1, 1.0, 0.9, 80.0], (7, "norm")),
        ([None] * 3, [None] * 3, (2, "alarm")),
    ],
)
def test_planted_onsets(losses: list[float], norms: list[float], expected: tuple[int, str]) -> None:
    assert find_onset(losses, norms, len(losses) - 1) == expected


def test_steps_after_the_alarm_do_not_count_and_a_scaler_skips_infinite_norms() -> None:
    assert find_onset([*QUIET, 40.0, math.nan], [1.0] * 12, last=9) == (9, "alarm")
    norms = [math.inf, 1.0, math.inf, *[1.0] * 8]
    assert find_onset([*QUIET, 40.0], norms, last=10) == (0, "nonfinite")
    assert find_onset([*QUIET, 40.0], norms, last=10, scaled=True) == (10, "loss")


@pytest.mark.parametrize(("sigma", "least"), [(0.05, 0.99), (0.2, 0.95)])
def test_in_noise_a_jump_is_found_at_its_step_and_nothing_without_one(sigma: float, least: float) -> None:
    found = alarms = 0
    for seed in range(100):
        losses, norms = noise(24, sigma, seed, trend=-0.02), noise(24, sigma, 1000 + seed)
        alarms += find_onset(losses, norms, 23)[0] < 23
        place = 21 + seed % 3
        losses = [loss * (20.0 if i >= place else 1.0) for i, loss in enumerate(losses)]
        found += find_onset(losses, norms, 23)[0] == place
    assert found >= least * 100
    assert alarms <= 2


def test_the_level_is_of_the_calmest_values_and_noise_has_no_trend() -> None:
    assert level_of([]) is None
    assert level_of([math.nan, None]) is None
    assert level_of([3.0]) == Level(3.0, 0.0)
    falling = level_of([10.0, 8.0, 6.0, 4.0, *QUIET])
    rising = level_of([*QUIET, 4.0, 6.0, 8.0, 10.0, 12.0])
    assert falling is not None
    assert rising is not None
    assert falling.middle == rising.middle == 2.0
    assert falling.spread < 1.0
    normal = level_of([10 + x for x in np.random.default_rng(0).standard_normal(400)])
    assert normal is not None
    assert normal.spread == pytest.approx(1.0, rel=0.2)


@given(st.floats(-100, 100), st.floats(0, 10), st.floats(2, 100))
def test_times_the_level_is_above_it_whatever_its_sign(middle: float, spread: float, factor: float) -> None:
    level = Level(middle, spread)
    assert level.times(factor) >= middle
    assert level.times(1) == middle
    if middle > 3 * spread:
        assert level.times(factor) == pytest.approx(factor * middle)


def test_the_fatal_step() -> None:
    losses, after = [1.0, 1.0, 1.0, 9.0, 50.0], [0.9, 0.9, 8.0, 9.0, 60.0]
    assert find_fatal(losses, after, 3, others_high=True, gradual=False, last=4) == 2
    assert find_fatal(losses, after, 3, others_high=False, gradual=False, last=4) == 3
    assert find_fatal(losses, after, 4, others_high=False, gradual=True, last=4) == 2
    assert (
        find_fatal(losses, [*after[:4], None], 4, others_high=False, gradual=False, last=4) == 2
    )  # a step without an update
    assert find_fatal(losses, after, 0, others_high=True, gradual=False, last=4) == 0
    assert find_fatal([1.0, 1.0], [math.nan, 1.0], 1, others_high=False, gradual=True, last=4) == 0
    # An update up to the alarm that has done far more than that before the onset
    assert find_fatal([2.3, 2.3, 5.0, 9e5], [2.3, 5.0, 5e4, None], 2, others_high=True, gradual=False, last=2) == 2
    assert find_fatal([2.3, 2.3, 5.0, 9e5], [2.3, 5.0, 5e4, None], 2, others_high=True, gradual=False, last=1) == 1
    assert find_fatal([2.3, 2.3, 5.0, 9e5], [2.3, 5.0, 40.0, None], 2, others_high=True, gradual=False, last=2) == 1
    assert find_fatal([None, None], [None, None], 1, others_high=False, gradual=False, last=4) == 1


def test_rises_accelerate_or_not() -> None:
    assert is_accelerating([1.4**i for i in range(9)])
    assert is_accelerating([*QUIET, *(2 * 1.5**i for i in range(8))])
    assert not is_accelerating([*QUIET, 400.0])
    assert not is_accelerating([*QUIET, 400.0, 410.0])
    assert not is_accelerating(QUIET)
    assert not is_accelerating([10 - 8 * 0.5**i for i in range(9)])  # it flattens
    assert not is_accelerating([1.0, 100.0])
    assert not is_accelerating([-2.0, -1.0, 0.0, 1.0, 2.0, 4.0])
