"""modified_z_score against a numpy twin, its symmetries, and the units of windows that hardly vary."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from normzoo.functional import modified_z_score

# Whole numbers, so that shifting and scaling by powers of two rounds nothing
WHOLE = st.integers(-(2**20), 2**20)
SMALL = st.integers(-(2**18), 2**18)  # of which a difference of one half is above rounding, shifted too
WINDOWS = st.lists(WHOLE, min_size=1, max_size=30)


def twin(value: float, window: list[float]) -> float:
    """By numpy, in the unit of the definition, for windows of which most values differ."""
    x = np.array(window, dtype=np.float64)
    mad = np.median(np.abs(x - np.median(x)))
    return float((value - np.median(x)) / (1.4826 * mad))


@settings(deadline=None)
@given(WHOLE, WINDOWS)
def test_it_is_the_distance_over_the_median_absolute_deviation(value: int, window: list[int]) -> None:
    x = np.array(window)
    assume(np.median(np.abs(x - np.median(x))) > 2.0**-21 * abs(np.median(x)))
    assert modified_z_score(value, window) == pytest.approx(twin(value, window), rel=1e-12, abs=0)


@settings(deadline=None)
@given(WHOLE, WINDOWS, st.integers(-120, 100), st.randoms(use_true_random=False))
def test_scale_sign_and_order(value: int, window: list[int], exponent: int, shuffle: object) -> None:
    score = modified_z_score(value, window)
    scaled = [math.ldexp(x, exponent) for x in window]
    assert modified_z_score(math.ldexp(value, exponent), scaled) == score
    assert modified_z_score(-value, [-x for x in window]) == -score
    shuffle.shuffle(window)  # type: ignore[attr-defined]
    assert modified_z_score(value, window) == score


@settings(deadline=None)
@given(SMALL, st.lists(SMALL, min_size=1, max_size=20), SMALL)
def test_a_shift_changes_nothing_where_values_differ(value: int, window: list[int], shift: int) -> None:
    assume(len(set(window)) > 1)  # of a constant window the level is the scale
    assert modified_z_score(value + shift, [x + shift for x in window]) == modified_z_score(value, window)


@settings(deadline=None)
@given(
    st.floats(-(2.0**126), 2.0**126, width=32),
    st.integers(1, 20),
    st.lists(st.integers(-3, 3), min_size=1, max_size=20),
)
def test_rounding_of_float32_is_no_spread(level: float, repeats: int, roundings: list[int]) -> None:
    assume(level == 0 or abs(level) > 1e-37)  # below, float32 rounds more coarsely
    noise = [level * (1 + k * 2.0**-24) for k in roundings] + [level] * repeats
    assert all(abs(modified_z_score(x, noise)) < 1e-4 for x in noise)


@pytest.mark.parametrize("level", [1e-38, 0.01, 14.0, -14.0, -1e38, 1e38])
def test_after_a_constant_the_unit_is_a_hundredth_of_it(level: float) -> None:
    constant = [level] * 9
    assert modified_z_score(level, constant) == 0
    assert modified_z_score(level + 0.03 * abs(level), constant) == pytest.approx(3)
    assert modified_z_score(level - 0.03 * abs(level), constant) == pytest.approx(-3)
    assert modified_z_score(level + 4 * abs(level), constant) == pytest.approx(400)


def test_after_zeros_anything_else_is_infinitely_far() -> None:
    assert [modified_z_score(x, [0.0] * 5) for x in (0.0, -0.0, 1e-30, -1e-30)] == [0, 0, math.inf, -math.inf]


def test_of_a_window_that_is_mostly_one_value_the_others_are_the_unit() -> None:
    """As of a hinge loss, 0 for most batches, or of losses in bfloat16."""
    hinge = [0.0] * 40 + [0.2, 0.3, 0.25, 0.4, 0.3]
    assert modified_z_score(0.5, hinge) == pytest.approx(0.5 / (1.4826 * 0.3))
    bfloat16 = [14.0] * 30 + [14.0625] * 5
    assert modified_z_score(14.125, bfloat16) == pytest.approx(2 / 1.4826)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.45])
def test_outliers_below_one_half_keep_the_unit_within_bounds(share: float) -> None:
    x = np.random.default_rng(0).standard_normal(200)
    x[: int(share * 200)] = 1e30
    assert 1 < modified_z_score(10.0, x.tolist()) < 11


@pytest.mark.parametrize(
    ("noise", "spike"),
    [("standard_normal", 5.0), ("standard_exponential", 15.0), ("gumbel", 15.0)],
)
def test_thresholds_of_the_documentation_pass_the_noise_of_2500_steps(noise: str, spike: float) -> None:
    x = getattr(np.random.default_rng(0), noise)(size=10_000)
    scores = [modified_z_score(x[i], x[i - 50 : i].tolist()) for i in range(50, len(x), 4)]
    assert spike / 2 < max(scores) < spike


def test_a_steady_rise_stays_below_one_and_a_half() -> None:
    for window in (10, 50, 500):
        assert modified_z_score(window, list(range(window))) < 1.5
    assert modified_z_score(50, list(range(50))) == pytest.approx(1.376, abs=1e-3)
