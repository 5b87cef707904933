"""How observations speak for and against a cause: points, added up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from normzoo.causes.observations import OBSERVATIONS, Seen


@dataclass(frozen=True)
class Criteria:
    """What speaks for and against a cause.

    An observation that decides among causes has 3 or 4 points, one that is typical 2, a hint 1. An observation that
    was not made has none.

    Args:
        needs: observations of which one at least must be made, or the cause is not considered.
        points: of an observation, (if it is so, if it is not so).
        interventions: observations in which something was changed, the most telling first; if the first of them that
            was made is so, the confidence may be high.

    Raises:
        ValueError: for an observation that there is not.
    """

    needs: tuple[str, ...]
    points: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    interventions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if unknown := {*self.needs, *self.points, *self.interventions} - OBSERVATIONS.keys():
            raise ValueError(f"there is no observation {', '.join(sorted(unknown))}")

    def score(self, seen: Seen) -> float | None:
        """The points of all observations; None if the cause is not considered."""
        if not any(seen.get(name) for name in self.needs):
            return None
        known = ((points, seen.get(name)) for name, points in self.points.items())
        return float(sum(points[0 if value else 1] for points, value in known if value is not None))

    def confidence(self, seen: Seen) -> str:
        """``"high"`` if the first intervention that was made agrees, else ``"low"``."""
        made = [seen.get(name) for name in self.interventions if seen.get(name) is not None]
        return "high" if made and made[0] else "low"
