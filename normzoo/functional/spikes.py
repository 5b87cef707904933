"""How far a value lies from those before it, in units that neither an outlier nor the level of the values moves."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

_PER_SIGMA = 1.4826  # times the median absolute deviation is the standard deviation of a Gaussian sample
_ROUNDING = 2.0**-21  # four roundings of float32, relative to the value
_LEVEL = 0.01


def modified_z_score(value: float, window: Sequence[float]) -> float:
    """The distance of a value from the median of a window, in robust standard deviations of the window.

    ``(value - median) / (1.4826 MAD)`` with MAD the median of ``|x - median|``: the z-score of a Gaussian sample, from
    which a share of outliers below one half keeps the unit within bounds. Shifted and scaled alike, value and window
    give the same score; negated, its negative.

    Where MAD is no more than rounding, ``2^-21 |median|``, most of the window is one value. Then the median deviation
    of the other values stands in for MAD, and if there are none, of a constant window, the unit is 1 % of ``|median|``:
    a window says nothing of the scale of the values then but their level. After nothing but zeros any other value is
    infinitely far.

    Args:
        value: finite.
        window: finite values, one or more, in any order.

    Returns:
        positive above the median, negative below it, infinite where the unit is 0.

    Source: Iglewicz & Hoaglin 1993, How to Detect and Handle Outliers, section 3.3.

    Example:
        >>> round(modified_z_score(-2.0, [-14.0, -13.0, -14.5, -15.0, -13.5]), 1)
        16.2
        >>> modified_z_score(-14.0, [-14.0] * 5), round(modified_z_score(15.4, [14.0] * 5), 1)
        (0.0, 10.0)
    """
    median = statistics.median(window)
    deviations = [abs(x - median) for x in window]
    rounding = _ROUNDING * abs(median)
    spread = statistics.median(deviations)
    if spread <= rounding:
        others = [d for d in deviations if d > rounding]
        spread = statistics.median(others) if others else 0.0
    unit = _PER_SIGMA * spread or _LEVEL * abs(median)
    distance = value - median
    if unit:
        return distance / unit
    return math.copysign(math.inf, distance) if distance else 0.0
