"""Headrooms of a record, each a value and what it bounds: their quantiles, and how readers see them."""

from __future__ import annotations

import math
from collections.abc import Sequence

_BOUNDS = {"below": "<", "above": ">"}


def headroom_quantile(samples: Sequence[tuple[float, str | None]], quantile: float) -> tuple[float, str | None]:
    """The smallest sample of which at least the share ``quantile`` of all samples are no larger.

    A sample below a multiple of the step is smaller than one at it, and one above it is larger. Samples that are NaN
    are left out; without others the quantile is NaN.

    Args:
        samples: pairs of a headroom and its bound, ``"below"``, ``"above"`` or None.
        quantile: a share above 0, 0.5 for the (lower) median.

    Example:
        >>> headroom_quantile([(2.0, None), (0.5, "below"), (0.5, None)], 0.1)
        (0.5, 'below')
    """
    rank = {"below": -1, None: 0, "above": 1}
    known = sorted((s for s in samples if not math.isnan(s[0])), key=lambda s: (s[0], rank[s[1]]))
    return known[max(math.ceil(quantile * len(known)), 1) - 1] if known else (math.nan, None)


def headroom_text(value: float, bound: str | None) -> str:
    """A headroom as text: ``0.312``, ``<1/64``, ``>8``, or a dash if it is NaN.

    Example:
        >>> headroom_text(0.3125, None), headroom_text(0.015625, "below"), headroom_text(8.0, "above")
        ('0.312', '<1/64', '>8')
    """
    if math.isnan(value):
        return "–"
    part = 1 / value if bound and value else 0.0
    number = f"1/{part:.0f}" if part >= 2 and part == round(part) else f"{value:.3g}"
    return _BOUNDS.get(bound or "", "") + number
