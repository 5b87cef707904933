"""What a replay has observed, each True, False, or None where it was not asked or cannot be told."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from normzoo.causes.observations import batch, network, steps, trials
from normzoo.causes.view import View

Seen = Mapping[str, bool | None]

OBSERVATIONS: dict[str, Callable[[View], bool | None]] = {
    function.__name__: function for part in (batch, steps, network, trials) for function in part.OBSERVATIONS
}
"""All observations by their names; the docstring of each says what it is if it is so."""


def observe(view: View) -> dict[str, bool | None]:
    """All observations by their names."""
    return {name: function(view) for name, function in OBSERVATIONS.items()}
