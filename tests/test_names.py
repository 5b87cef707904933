"""Short names for recipes: those of measurements are the measurements' own."""

from __future__ import annotations

from schemas import MEASUREMENTS

from normzoo.names import SHORT_NAMES


def test_the_short_names_of_measurements_are_their_names() -> None:
    ours = {name: path for name, path in SHORT_NAMES["callbacks"].items() if path.startswith("normzoo.")}
    assert ours == {m.name: f"normzoo.callbacks.{m.__name__}" for m in MEASUREMENTS.values()}
    assert len(ours) >= 5
