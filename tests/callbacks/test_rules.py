"""The rules of Divergence one by one: each against a twin that looks at the whole series, and on healthy series."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from normzoo.callbacks import (
    ActivationsAbove,
    Flag,
    GradientNotFinite,
    GradientSpike,
    LossAbove,
    LossSpike,
    Rule,
    Seen,
    SkippedSteps,
)
from normzoo.callbacks._run.loop import LoopRun

ODD = st.sampled_from([math.nan, math.inf, -math.inf])


def flags(rule: Rule, series: Iterable[Seen], cut: int | None = None) -> list[Flag | None]:
    """What a rule says of a series, of which it takes in what it lets pass; at ``cut`` its state goes to another."""
    rule, fresh = copy.deepcopy(rule), copy.deepcopy(rule)
    found: list[Flag | None] = []
    for i, seen in enumerate(series):
        if i == cut:
            state = json.loads(json.dumps(rule.state_dict()))
            rule = fresh
            rule.load_state_dict(state)
        found.append(rule.judge(seen))
        if found[-1] is None:
            rule.passed(seen)
    return found


def names(found: Iterable[Flag | None]) -> list[str | None]:
    return [None if flag is None else flag.rule for flag in found]


def losses(values: Iterable[float], **more: Any) -> list[Seen]:
    """One rank's."""
    return [Seen(step, losses=[value], **more) for step, value in enumerate(values)]


def norms(values: Iterable[float], **more: Any) -> list[Seen]:
    """One optimizer's."""
    return [Seen(step, norms={0: value}, **more) for step, value in enumerate(values)]


def test_what_has_come_is_told() -> None:
    assert Seen(3).kinds == Seen(3, losses=[None, None]).kinds == frozenset()
    assert Seen(3, losses=[None, 1.0], scale=2.0).kinds == {"loss", "scale"}
    assert Seen(3, norms={0: 1.0}).kinds == {"gradient_norm"}
    assert Seen(3, activations={("net.1", "output"): [1.0]}).kinds == {"activations"}


# Losses


@given(st.lists(st.none() | st.floats(-1e4, 1e4) | ODD, min_size=1, max_size=4), st.booleans())
def test_a_loss_above_is_the_largest_of_any_rank(values: list[float | None], scaler: bool) -> None:
    flag = LossAbove(1e3).judge(Seen(0, losses=values, scaler=scaler))
    odd = [r for r, v in enumerate(values) if v is not None and not math.isfinite(v)]
    high = [r for r, v in enumerate(values) if v is not None and math.isfinite(v) and v > 1e3]
    if odd and not scaler:
        assert flag is not None
        assert (flag.rule, flag.rank) == ("not finite", odd[0])
    elif high:
        assert flag is not None
        assert (flag.rule, flag.value) == ("threshold", max(v for v in values if v is not None and v < math.inf))
        assert values[flag.rank] == flag.value  # type: ignore[index]
    else:
        assert flag is None


def spike_twin(values: list[float], spike: float, window: int) -> list[str | None]:
    """The rule by numpy, with the window kept as a list of all losses that were let pass."""
    passed: list[float] = []
    verdicts: list[str | None] = []
    for loss in values:
        rule = None if math.isfinite(loss) else "not finite"
        if rule is None and len(passed) >= window:
            recent = np.array(passed[-window:])
            away = np.abs(recent - np.median(recent))
            # Where most losses are one value, the others tell the spread; where all are, a hundredth of it
            mad = np.median(away) or np.median(away[away > 0] if away.any() else [0])
            unit = 1.4826 * mad or 0.01 * abs(np.median(recent))
            rule = "spike" if loss - np.median(recent) > spike * unit else None
        verdicts.append(rule)
        passed += [loss] if rule is None else []
    return verdicts


@settings(deadline=None, max_examples=60)
@example([0, 0, 0, 14, 0, 0, 0, 0, 0, 0], 2.0, 3, -20.0, 4)  # a window with two of three of one value
@example([28, 35, 14, 49, 0, 50, 0], 2.0, 5, 0.0, 6)  # a window all of one value
@given(
    st.lists(st.integers(0, 50) | st.sampled_from([1000, math.nan, math.inf]), min_size=10, max_size=40),
    st.sampled_from([2.0, 3.0, 8.0]),
    st.sampled_from([3, 5, 8]),
    st.sampled_from([-20.0, 0.0, 8.0]),
    st.integers(0, 40),
)
def test_spikes_are_those_of_a_twin(values: list[float], spike: float, window: int, exponent: float, cut: int) -> None:
    # Steps of 7, so that the values differ by more than rounding
    values = [math.ldexp(loss + 7 * i * (-1) ** i, int(exponent)) for i, loss in enumerate(values)]
    rule = LossSpike(spike, window=window)
    assert names(flags(rule, losses(values), cut)) == spike_twin(values, spike, window)
    lower = [loss - math.ldexp(2**15, int(exponent)) for loss in values]  # of the other sign
    assert names(flags(rule, losses(lower))) == spike_twin(values, spike, window)


HEALTHY = {
    "falling below zero": [-1 - 0.1 * i for i in range(20)],
    "falling to zero": [2.0**-i for i in range(130)],
    "through zero": [5 - 0.5 * i for i in range(30)],
    "constant": [-14.0] * 20,
    "constant and tiny": [1e-38] * 20,
    "constant and huge": [-1e38] * 20,
    "zero": [0.0] * 20,
    "noise around a constant": [-14.0 + 0.1 * math.sin(7 * i) for i in range(40)],
    "rounding": [14.0 * (1 + 1e-7 * (i % 3)) for i in range(40)],
    "down to -1e38": [-(10.0 ** (i / 2)) for i in range(76)],
}


@pytest.mark.parametrize("values", HEALTHY.values(), ids=HEALTHY)
def test_a_healthy_run_is_no_spike(values: list[float]) -> None:
    assert set(flags(LossSpike(3.0, window=5 if len(values) < 40 else 20), losses(values))) == {None}


@pytest.mark.parametrize(
    "values",
    [
        [-14.0] * 10 + [500.0],
        [0.01] * 10 + [0.05],
        [-1e38] * 10 + [-1e36],
        [1e-38] * 10 + [3e-38],
        [-14.0, -14.1, -13.9, -14.05, -13.95, -14.0, -12.0],
        [-1e-3 * (1 + 0.01 * (i % 3)) for i in range(10)] + [-0.9e-3],
    ],
)
def test_a_rise_that_the_losses_before_do_not_explain_is_a_spike(values: list[float]) -> None:
    assert names(flags(LossSpike(3.0, window=5), losses(values))) == [None] * (len(values) - 1) + ["spike"]


def test_what_diverged_never_enters_the_window() -> None:
    values = [1.0, 1.1, 0.9, 1.05, 0.95, 80.0, math.nan, -math.inf, 90.0, 1.0, 80.0, 85.0, 1.1]
    rules = [None] * 5 + ["spike", "not finite", "not finite", "spike", None, "spike", "spike", None]
    assert names(flags(LossSpike(5.0, window=5), losses(values))) == rules


def test_a_drop_counts_if_both_sides_do() -> None:
    values = [1.0, 1.1, 0.9, 1.05, 0.95, -80.0, 1.0, 80.0]
    assert names(flags(LossSpike(5.0, window=5), losses(values))) == [None] * 7 + ["spike"]
    both = LossSpike(5.0, window=5, two_sided=True)
    assert names(flags(both, losses(values))) == [None] * 5 + ["drop", None, "spike"]
    assert set(flags(LossSpike(3.0, 5, two_sided=True), losses(HEALTHY["falling below zero"]))) == {None}


def test_the_largest_and_the_smallest_of_ranks_have_windows_of_their_own() -> None:
    usual = [Seen(i, losses=[1.0 + 0.01 * (i % 3), None, 3.0 - 0.01 * (i % 4)]) for i in range(6)]
    rule = LossSpike(8.0, window=5, two_sided=True)
    high, low = Seen(6, losses=[1.0, None, 9.0]), Seen(6, losses=[-9.0, None, 3.0])
    assert flags(rule, [*usual, high])[-1] == Flag("spike", 9.0, 2, flags(rule, [*usual, high])[-1].why)  # type: ignore[union-attr]
    assert (names(flags(rule, [*usual, low]))[-1], flags(rule, [*usual, low])[-1].rank) == ("drop", 0)  # type: ignore[union-attr]
    assert flags(rule, [*usual, Seen(6, losses=[3.0, None, 3.0])])[-1] is None


def test_a_step_that_a_scaler_skips_is_no_divergence_of_the_loss() -> None:
    series = losses([1.0, 1.1, 0.9, math.inf, 1.0, math.nan, 50.0], scaler=True)
    assert names(flags(LossSpike(5.0, window=3), series)) == [None] * 6 + ["spike"]
    assert names(flags(LossAbove(20.0), series)) == [None] * 6 + ["threshold"]


# Norms of gradients


def gradient_twin(values: list[float], deviations: float, factor: float, window: int, least: int) -> list[bool]:
    passed: list[float] = []
    verdicts = []
    for norm in values:
        recent = np.array(passed[-window:])
        spike = False
        if len(recent) >= least and math.isfinite(norm) and np.median(recent) > 0:
            away = np.abs(recent - np.median(recent))
            mad = np.median(away) or np.median(away[away > 0] if away.any() else [0])
            unit = 1.4826 * mad or 0.01 * np.median(recent)
            spike = norm > factor * np.median(recent) and norm - np.median(recent) > deviations * unit
        verdicts.append(bool(spike))
        passed += [norm] if math.isfinite(norm) and not spike else []
    return verdicts


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.125, 1.25, 3.0, 9.0, 30.0, 500.0, math.inf, math.nan]), max_size=40),
    st.sampled_from([2.0, 50.0]),
    st.sampled_from([2.0, 10.0]),
    st.sampled_from([(3, 2), (8, 8)]),
    st.integers(0, 40),
)
def test_spikes_of_the_gradient_are_those_of_a_twin(
    values: list[float], deviations: float, factor: float, sizes: tuple[int, int], cut: int
) -> None:
    rule = GradientSpike(deviations, factor, *sizes)
    found = [flag is not None for flag in flags(rule, norms(values), cut)]
    assert found == gradient_twin(values, deviations, factor, *sizes)
    assert [flag is not None for flag in flags(rule, norms([v * 2.0**40 for v in values]))] == found


def test_optimizers_are_judged_each_by_its_own_norms() -> None:
    both = [Seen(i, norms={i % 2: 1.0 + 0.1 * (i % 3) if i % 2 else 1e4}) for i in range(20)]
    assert set(flags(GradientSpike(), both)) == {None}
    flag = flags(GradientSpike(), [*both, Seen(21, norms={1: 1e4})])[-1]
    assert flag is not None
    assert (flag.rule, flag.value, flag.rank) == ("gradient spike", 1e4, None)
    assert "times the median of the last 10" in flag.why


def test_a_norm_that_is_not_finite_has_a_rule_of_its_own() -> None:
    for value in (math.nan, math.inf):
        flag = GradientNotFinite().judge(Seen(0, norms={0: 1.0, 1: value}))
        assert flag is not None
        assert flag.rule == "gradient not finite"
        assert GradientNotFinite().judge(Seen(0, norms={0: value}, scaler=True)) is None
    assert GradientNotFinite().judge(Seen(0, norms={0: 1e30})) is None


DRAWS: dict[str, tuple[Callable[[Any, int], Any], float]] = {
    # The rates that the docstring of GradientSpike states, rounded up
    "lognormal 0.5": (lambda rng, n: rng.lognormal(0, 0.5, n), 1e-5),
    "lognormal 1": (lambda rng, n: rng.lognormal(0, 1, n), 2e-4),
    "Student 3": (lambda rng, n: np.abs(rng.standard_t(3, n)), 1e-4),
    "norms of 100 of Student 3": (lambda rng, n: np.sqrt((rng.standard_t(3, (n, 100)) ** 2).sum(1)), 1e-4),
}


@pytest.mark.parametrize("name", DRAWS)
def test_healthy_norms_with_heavy_tails_are_rarely_a_spike(name: str) -> None:
    draw, rate = DRAWS[name]
    count = 20_000
    found = sum(flag is not None for flag in flags(GradientSpike(), norms(draw(np.random.default_rng(1), count))))
    expected = rate * count
    assert found <= expected + 4 * math.sqrt(expected)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.floats(0.01, 0.4), st.floats(0.97, 1.02))
def test_noise_around_a_slow_trend_is_no_spike(seed: int, spread: float, growth: float) -> None:
    rng = np.random.default_rng(seed)
    values = growth ** np.arange(200) * rng.lognormal(0, spread, 200)
    assert set(flags(GradientSpike(), norms(values.tolist()))) == {None}
    values[-1] = values[-2] * 1e4
    assert names(flags(GradientSpike(), norms(values.tolist())))[-1] == "gradient spike"


# The scale of a GradScaler


def scale_twin(series: list[Seen], steps: int) -> list[str | None]:
    """All scales that have been seen, step by step, looked at anew each time."""
    found: list[str | None] = []
    for i in range(1, len(series) + 1):
        scales = [0.0, *(seen.scale or 0.0 for seen in series[:i])]
        fell = [(seen.step, b < a) for seen, a, b in zip(series, scales, scales[1:], strict=False)]
        skips = {step for step, skipped in fell if skipped}
        last = fell[-1][0]
        first_made = next((step for step in range(1, last + 1) if step not in skips), last)
        in_a_row = next(n for n in range(last + 1 - first_made) if last - n not in skips) if last > first_made else 0
        low = scales[-1] < 1
        found.append("skipped steps" if fell[-1][1] and in_a_row >= steps else "scale" if low else None)
    return found


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.tuples(st.integers(1, 3), st.sampled_from([-1, 0, 1])), max_size=14),
    st.integers(1, 3),
    st.integers(0, 30),
)
def test_skipped_steps_are_those_of_a_twin(path: list[tuple[int, int]], steps: int, cut: int) -> None:
    """Each step has micro-batches, of which the last sees the scale that the step leaves."""
    scale, series = 4.0, []
    for step, (micro, change) in enumerate(path):
        series += [Seen(step, losses=[1.0], scale=scale)] * (micro - 1)
        scale *= 2.0**change
        series.append(Seen(step, losses=[1.0], scale=scale))
    assert names(flags(SkippedSteps(steps), series, cut)) == scale_twin(series, steps)


def test_the_scale_of_a_real_scaler() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    weight = nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    series = []
    for step, factor in enumerate([1.0, 1.0, math.inf, 1.0, *[math.nan] * 8, 1.0]):
        optimizer.zero_grad()
        scaler.scale(weight * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        series.append(Seen(step, losses=[factor], scale=scaler.get_scale(), scaler=True))
    assert names(flags(SkippedSteps(), series)) == [None] * 11 + ["skipped steps", None]
    assert names(flags(SkippedSteps(3), series)) == [None] * 6 + ["skipped steps"] * 6 + [None]
    assert set(flags(SkippedSteps(3), series[4:])) == {None}  # no step was made before those


# Activations


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(2, 2), nn.LayerNorm(2), nn.ReLU(), nn.LayerNorm(2))


def loop_run(net: nn.Module) -> LoopRun:
    return LoopRun(net, [], [], 0)


def test_the_first_site_above_the_threshold_is_named() -> None:
    rule = ActivationsAbove(10.0)
    assert set(rule.sites(loop_run(Net()))) == {("1", "output"), ("3", "output")}

    def seen(first: list[float | None], second: list[float | None], other: float = 1e9) -> Seen:
        here: Mapping[tuple[str, str], Any] = {("1", "output"): first, ("3", "output"): second, ("0", "input"): [other]}
        return Seen(0, activations=here)

    assert rule.judge(seen([10.0, None], [None, -1.0])) is None
    flag = rule.judge(seen([1.0, 2.0], [9.0, 11.0]))
    assert flag is not None
    assert (flag.rule, flag.value, flag.rank) == ("activations of 3", 11.0, 1)
    flag = rule.judge(seen([1.0, math.nan], [9.0, 11.0]))
    assert flag is not None
    assert (flag.rule, flag.rank) == ("activations of 1", 1)
    inputs = ActivationsAbove(10.0, ["2", "0"], where="input")
    assert set(inputs.sites(loop_run(Net()))) == {("0", "input"), ("2", "input")}


def test_activations_of_no_module_are_refused() -> None:
    with pytest.raises(
        ValueError, match="ActivationsAbove has nothing to follow: no module matches 'x'; there are 0, 1"
    ):
        ActivationsAbove(1.0, "x").sites(loop_run(Net()))
    with pytest.raises(ValueError, match="no module is a normalization layer"):
        ActivationsAbove(1.0).sites(loop_run(nn.Sequential(nn.Linear(2, 2))))


# Arguments


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LossAbove(0.0), "threshold must be a number above 0, not 0.0"),
        (lambda: LossAbove(None), "threshold must be a number above 0, not None"),
        (lambda: LossSpike(-1.0), "deviations must be a number above 0, not -1.0"),
        (lambda: LossSpike("5"), "deviations must be a number above 0, not '5'"),
        (lambda: LossSpike(True), "deviations must be a number above 0, not True"),
        (lambda: LossSpike(window=2.5), "window must be a whole number of at least 1, not 2.5"),
        (lambda: GradientSpike(factor=0), "factor must be a number above 0, not 0"),
        (lambda: GradientSpike(window=5), "least must be at most window, which is 5, not 10"),
        (lambda: GradientSpike(least=0), "least must be a whole number of at least 1, not 0"),
        (lambda: SkippedSteps(0), "steps must be a whole number of at least 1, not 0"),
        (lambda: ActivationsAbove(1.0, []), "sites must be 'norms' or at least one"),
        (lambda: ActivationsAbove(1.0, where="both"), "where must be one of 'input', 'output', not 'both'"),
    ],
)
def test_bad_arguments(make: Callable[[], Rule], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
