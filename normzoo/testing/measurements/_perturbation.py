"""The promises that a measurement changes nothing of the run."""

from __future__ import annotations

import itertools
from typing import Any

from normzoo.testing._compare import BrokenError, NotApplicableError
from normzoo.testing._promises import promise
from normzoo.testing._running import where
from normzoo.testing.measurements._fits import Fit, Subject
from normzoo.testing.measurements._rows import same_rows
from normzoo.testing.measurements._snapshot import difference_text
from normzoo.testing.measurements._task import PLACES, PlantedError, Setting

AXES: dict[str, list[Any]] = {
    "optimizer": ["momentum", "adamw"],
    "extra": ["dropout", "batch"],
    "accumulation": [2, 1],
    "clipping": [None, 0.05],
    "precision": ["32-true", "bf16-mixed"],
}
CELLS = [dict(zip(AXES, values, strict=True)) for values in itertools.product(*AXES.values())]


def pairs_of(cell: dict[str, Any]) -> set[tuple[tuple[str, Any], ...]]:
    """The pairs of values of two axes in a cell."""
    return set(itertools.combinations(cell.items(), 2))


def pairwise(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Few of the cells, in which every two values of different axes come together at least once."""
    chosen: list[dict[str, Any]] = []
    missing = set().union(*map(pairs_of, cells))
    while missing:
        chosen.append(max(cells, key=lambda cell: len(pairs_of(cell) & missing)))
        missing -= pairs_of(chosen[-1])
    return chosen


@promise()
def zero_perturbation(subject: Subject) -> None:
    """A run ends bit for bit as without it: weights, optimizer state, metrics, attributes, hooks and random streams."""
    refusals = 0
    cells = pairwise(CELLS)
    for cell in cells:
        setting = Setting(**cell, shuffled=True)
        fitted = subject.fit(subject.make(), setting=setting, epochs=1)
        try:
            rows = subject.rows(fitted, may_refuse=True)
        except NotApplicableError:
            refusals += 1
            continue
        if rows.empty:
            raise BrokenError(f"{setting}: nothing was measured, so that there is nothing to compare")
        _compare(fitted, subject.control(setting, 1))
    if refusals == len(cells):
        raise NotApplicableError("it refuses all fits of the matrix")


@promise()
def interruption(subject: Subject) -> None:
    """A fit that fails or is interrupted is left bit for bit as without it; the next fit is measured as a first one."""
    measurement, _, rows = subject.base
    for place, interrupted in zip(PLACES, (False, True, False), strict=True):
        setting = Setting(fails_in=place, interrupted=interrupted)
        measurement = subject.make()
        fitted = subject.fit(measurement, setting=setting)
        expected = SystemExit if interrupted else PlantedError
        if not isinstance(fitted.error, expected):
            found = "no error came" if fitted.error is None else where(fitted.error)
            raise BrokenError(f"a fit that fails in its {place} pass or step: {found}, for a {expected.__name__}")
        _compare(fitted, subject.control(setting))
    again = subject.rows(subject.fit(measurement))
    same_rows("after a fit that failed", again, rows)


def _compare(fitted: Fit, control: dict[str, Any]) -> None:
    if text := difference_text(control, fitted.left):
        raise BrokenError(f"{fitted.module.setting}: {text}")
