"""What is in line in a series of losses or gradient norms, and where such a series leaves the line. Plain numbers."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

_PER_SIGMA = 1.4826  # times the median absolute deviation is the standard deviation of a Gaussian sample
_FLOOR = 0.05  # of a robust unit: on a log scale, or relative to the level where values may be 0 or negative
_UNITS = 6.0  # above the values before that are out of line
_SCARCE = 5.0  # values that are as uncertain about their spread as it is large
_FALLING = 0.9  # of pairs of values: a trend
_STAY = 0.9  # of the steps from the onset to the alarm that are out of line as well
_WINDOW = 5  # successive values of which the calmest tell the level
_LAST = 9  # values that tell whether a rise accelerates
_FEW_HIGH = 2  # steps out of line, which are too few to come down from a height

Series = Sequence[float | None]


@dataclass(frozen=True)
class Level:
    """Where quiet values lie.

    Attributes:
        middle: the smallest median of five successive values, of all if there are fewer: neither an earlier part from
            which they fell nor a later rise counts.
        spread: the standard deviation of their noise, from the differences of successive values, which no trend moves.
    """

    middle: float
    spread: float

    def times(self, factor: float) -> float:
        """So many times the middle; where values may be negative as far above it as that is for their magnitude.

        Values that spread more than their middle count by three spreads in its place.
        """
        return self.middle + (factor - 1) * max(abs(self.middle), 3 * self.spread)


def level_of(values: Series) -> Level | None:
    """The level of a series; None without finite values.

    Example:
        >>> level_of([9.0, 5.0, 2.0, 2.2, 1.8, 2.1, 1.9, 2.0]).middle
        2.0
    """
    known = [x for x in values if x is not None and math.isfinite(x)]
    if not known:
        return None
    windows = [known[i : i + _WINDOW] for i in range(max(len(known) - _WINDOW + 1, 1))]
    steps = [abs(b - a) for a, b in itertools.pairwise(known)]
    spread = _PER_SIGMA / math.sqrt(2) * statistics.median(steps) if steps else 0.0
    return Level(min(map(statistics.median, windows)), spread)


def excess(values: Series, before: Series) -> list[float]:
    """How far values lie above those before them, in robust units.

    The unit is the standard deviation of the values before, from their median absolute deviation, at least 5 %, and
    times ``1 + 5 / n`` after ``n`` values, which tell less of their spread the fewer they are. Positive values are
    compared on a log scale. If the values before fell steadily, what they would have fallen to is compared with.

    Args:
        values: those that follow.
        before: finite ones; others are passed over.

    Returns:
        for each value its excess, negative below; infinite for a value that is not finite, 0 for None, or if there is
        nothing before.
    """
    known = [(i, x) for i, x in enumerate(before) if x is not None and math.isfinite(x)]
    finite = [x for x in values if x is not None and math.isfinite(x)]
    if not known:
        return [0.0 if x is None or math.isfinite(x) else math.inf for x in values]
    is_log = min([x for _, x in known] + finite) > 0
    points = [(i, math.log(x) if is_log else x) for i, x in known]
    slope = _fall(points)
    rest = [y - slope * (i - len(before)) for i, y in points]
    middle = statistics.median(rest)
    deviation = _PER_SIGMA * statistics.median(abs(y - middle) for y in rest)
    unit = max(deviation, _FLOOR * (1.0 if is_log else abs(middle))) * (1 + _SCARCE / len(rest))
    found = []
    for x in values:
        if x is None:
            found.append(0.0)
        elif not math.isfinite(x):
            found.append(math.inf)
        else:
            above = (math.log(x) if is_log else x) - middle
            found.append(above / unit if unit else math.copysign(math.inf, above) if above else 0.0)
    return found


def _fall(points: Sequence[tuple[int, float]]) -> float:
    """The median slope of all pairs (Theil 1950, Sen 1968) if nine of ten fall, which noise seldom does; else 0."""
    if len(points) < 4:
        return 0.0
    slopes = [(b - a) / (j - i) for (i, a), (j, b) in itertools.combinations(points, 2)]
    return statistics.median(slopes) if sum(x < 0 for x in slopes) >= _FALLING * len(slopes) else 0.0


def find_onset(losses: Series, norms: Series, last: int, scaled: bool = False) -> tuple[int, str]:
    """The first step that is out of line with those before it, and by what.

    Out of line is a step whose loss or norm is more than six units (:func:`excess`) above the steps before it, if from
    there to the alarm all steps but one, or one in ten, are more than three units above them: a high loss from which
    the run came back is no onset. Nor is one from which it has come down just before the alarm: where loss and norm of
    the step before it are in line again, or where a value that is not finite follows steps at less than half of the
    highest. A rise so steady that the steps before lead to expect each next one has no onset but the alarm.

    Args:
        losses: of the steps; None where not known.
        norms: of their gradients, likewise.
        last: index of the alarm.
        scaled: whether a GradScaler skips steps whose norm is not finite, which is no divergence.

    Returns:
        the index, at most ``last``, and ``"loss"``, ``"norm"``, ``"nonfinite"`` or ``"alarm"``.

    Example:
        >>> find_onset([2.0, 2.1, 1.9, 2.0, 40.0, 90.0], [None] * 6, last=5)
        (4, 'loss')
        >>> find_onset([8.0, 4.0, 2.0, 1.0, 1.5, 1.2, 1.6, 1.3, 1.7], [None] * 9, last=8)
        (8, 'alarm')
    """
    if scaled:
        norms = [x if x is None or math.isfinite(x) else None for x in norms]
    over = 0  # steps before this one are part of what was over before the alarm
    for i in range(last + 1):
        if any(x is not None and not math.isfinite(x) for x in (losses[i], norms[i])):
            return i, "nonfinite"
        for series, by in ((losses, "loss"), (norms, "norm")):
            value, level = series[i], level_of(series[:i])
            # Values that fell may fall less than was expected of them
            if i < over or value is None or level is None or value <= level.middle:
                continue
            above = excess([x for x in series[i : last + 1] if x is not None], series[:i])
            back = sum(x <= _UNITS / 2 for x in above)
            if above[0] > _UNITS and back <= max((1 - _STAY) * len(above), len(above) > 2):
                over = _end_of_another(losses, norms, i, last)
                if over == i:
                    return i, by
    return last, "alarm"


def _is_in_line(value: float | None, before: Series) -> bool:
    level = level_of(before)
    return (
        level is not None and value is not None and (value <= level.middle or excess([value], before)[0] <= _UNITS / 2)
    )


def _end_of_another(losses: Series, norms: Series, onset: int, last: int) -> int:
    """The step of the alarm, if what began at a step is over before it: then it has another reason; else the step."""
    steps = range(onset, last + 1)
    alarm = next((i for i in steps if any(x is not None and not math.isfinite(x) for x in (losses[i], norms[i]))), None)
    end = last if alarm is None else alarm
    if end - onset < 2 or losses[end - 1] is None:
        return onset
    pairs = [(series[onset:end], series[:onset]) for series in (losses, norms) if series[end - 1] is not None]
    halves = alarm is not None and end - onset > _FEW_HIGH
    over = all(_is_in_line(high[-1], before) or (halves and _has_halved(high)) for high, before in pairs)
    return end if over else onset


def _has_halved(values: Series) -> bool:
    """Whether the last two values are less than half of the highest."""
    known, ending = ([x for x in some if x is not None] for some in (values, values[-2:]))
    return max(ending) < max(known) / 2


def find_fatal(losses: Series, after: Series, onset: int, others_high: bool, gradual: bool, last: int) -> int:
    """The step whose update did most to the loss.

    Args:
        losses: of the steps.
        after: of the same batches after the steps' own updates; None for steps without one.
        onset: index of the first step out of line.
        others_high: whether at the onset's weights other batches have high losses too.
        gradual: whether the onset ends a rise over several steps.
        last: index of the alarm.

    Returns:
        its index: the step before the onset, if all losses have become high with its update, or, if that did not
        raise the loss of its own batch tenfold, one up to the alarm that did ten times as much; the onset, if its loss
        alone is high; of a gradual rise, that of the last steps until there with the largest rise on its own batch.
    """
    until = max(onset - others_high, 0)
    if not gradual and after[until] is not None:
        later = range(until, min(last + 1, len(after))) if others_high else [until]
        most = max(later, key=lambda i: _rise(losses[i], after[i]))
        rise = max(_rise(losses[until], after[until]), 0.0)
        outdone = rise < math.log(10) < _rise(losses[most], after[most]) - rise
        return most if outdone else until
    return max(range(max(until - _LAST, 0), until + 1), key=lambda i: (_rise(losses[i], after[i]), i == until))


def _rise(before: float | None, after: float | None) -> float:
    if before is None or after is None or not math.isfinite(before):
        return -math.inf
    if not math.isfinite(after):
        return math.inf
    return math.log(after / before) if min(before, after) > 0 else after - before


def is_accelerating(values: Series) -> bool:
    """Whether the last values rise to more than double over several steps, by ever more, and not at one step.

    Example:
        >>> is_accelerating([1.0, 1.1, 1.0, 1.3, 1.7, 2.4, 3.6, 6.0]), is_accelerating([1.0, 1.1, 1.0, 1.1, 1.0, 50.0])
        (True, False)
    """
    known = [x for x in values if x is not None and math.isfinite(x)][-_LAST:]
    if len(known) < 5 or min(known) <= 0:
        return False
    rise = known[known.index(min(known)) :]
    gains = [math.log(b / a) for a, b in itertools.pairwise(rise)]
    if len(rise) < 4 or sum(gains) <= math.log(2) or max(gains) > 2 / 3 * sum(gains):
        return False
    added = [b - a for a, b in itertools.pairwise(known)]
    half = len(added) // 2
    return statistics.mean(added[half:]) > statistics.mean(added[:half])
