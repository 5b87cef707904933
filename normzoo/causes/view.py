"""The evidence of a replay as its judges read it: None wherever a question was not answered, and numbers as text."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

_RISE = 0.25  # of the level of quiet losses: a smaller rise is noise
_SPREADS = 6.0  # above the level of quiet losses: fewer are noise
_MEDIAN_BEFORE = re.compile(r"the median of the losses before it is (\S+?)[.,;]?(?:\s|$)")
_FRACTIONS = {2: "half", 3: "a third", 4: "a quarter", 5: "a fifth", 8: "an eighth", 10: "a tenth"}


class View:
    """Evidence, as :func:`normzoo.causes.read_evidence` returns it, or parts of it."""

    def __init__(self, evidence: Mapping[str, Any]) -> None:
        self.evidence = evidence

    def of(self, *path: str | int) -> Any:
        """What stands under keys and indices; None where there is nothing, or it is of another form."""
        value: Any = self.evidence
        for key in path:
            if isinstance(value, Mapping):
                value = value.get(key)
            elif isinstance(value, list | tuple) and isinstance(key, int):
                value = value[key] if -len(value) <= key < len(value) else None
            else:
                return None
        return value

    def number(self, *path: str | int) -> float | None:
        """A number; None where there is none."""
        return as_number(self.of(*path))

    def step(self, *path: str | int) -> int | None:
        """A step; None where there is none."""
        value = self.of(*path)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def texts(self, *path: str | int) -> list[str]:
        """The texts of a list; none where there is no list."""
        value = self.of(*path)
        return [text for text in value if isinstance(text, str)] if isinstance(value, list | tuple) else []

    def truth(self, *path: str | int) -> bool | None:
        """True or False; None where there is neither."""
        value = self.of(*path)
        return value if isinstance(value, bool) else None

    def text(self, *path: str | int) -> str:
        """A name or a number as text; ``?`` where there is none."""
        value = self.of(*path)
        return str(value) if isinstance(value, str | int | float) else "?"

    def numbers(self, *path: str | int) -> list[float]:
        """The numbers of a list, without what is not known; none where there is no list."""
        value = self.of(*path)
        known = map(as_number, value) if isinstance(value, list | tuple) else []
        return [number for number in known if number is not None]

    def rows(self, *path: str | int) -> list[View]:
        """The dictionaries of a list; none where there is no list."""
        value = self.of(*path)
        return [View(row) for row in value if isinstance(row, Mapping)] if isinstance(value, list | tuple) else []

    def series(self, name: str) -> dict[int, float]:
        """A series of the course, by step, without what is not known."""
        steps, values = self.of("course", "steps"), self.of("course", name)
        if not isinstance(steps, list | tuple) or not isinstance(values, list | tuple):
            return {}
        known = ((step, as_number(value)) for step, value in zip(steps, values, strict=False))
        return {step: value for step, value in known if value is not None and isinstance(step, int)}

    def loss_at(self, batch: int, weights: int) -> float | None:
        """The loss of the suspicious batch (0) or a quiet one (1) at the onset's weights (0) or the first (1)."""
        return self.number("data_or_state", "loss", batch, weights)

    def norm_at(self, batch: int, weights: int) -> float | None:
        """The norm of the gradient there."""
        return self.number("data_or_state", "norm", batch, weights)

    @property
    def onset(self) -> int | None:
        """The first step that is out of line."""
        return self.step("course", "onset")

    @property
    def quiet_loss(self) -> float | None:
        """The level of quiet losses."""
        level = self.number("course", "median_loss")
        return self.number("data_or_state", "loss", 1, 1) if level is None else level

    @property
    def median_before(self) -> float | None:
        """The median of the losses before the alarm, which its sentence tells; None if it does not."""
        found = _MEDIAN_BEFORE.search(str(self.of("about", "sentence") or ""))
        try:
            return float(found[1]) if found else None
        except ValueError:
            return None

    def is_high(self, loss: float | None, reference: float | None) -> bool | None:
        """Whether a loss is out of line with another one: not finite, or above it by more than quiet losses vary."""
        if loss is None or (reference is None and math.isfinite(loss)):
            return None
        if not math.isfinite(loss):
            return True
        assert reference is not None
        spread = self.number("course", "spread_loss") or 0.0
        return loss - reference > max(_SPREADS * spread, _RISE * abs(reference)) if math.isfinite(reference) else False


def as_number(value: Any) -> float | None:
    """A number of the evidence; None for what is none."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def is_broken(value: float | None) -> bool:
    """Whether a number is known and not finite."""
    return value is not None and not math.isfinite(value)


def short(value: float | None, digits: int = 3) -> str:
    """A number in a sentence.

    Example:
        >>> short(0.0012345), short(1e9), short(2), short(float("nan")), short(None)
        ('0.00123', '1e+09', '2', 'NaN', 'unknown')
    """
    if value is None:
        return "unknown"
    return "NaN" if math.isnan(value) else f"{float(f'{value:.{digits}g}'):g}".replace("inf", "infinite")


def part(fraction: float) -> str:
    """A fraction in words.

    Example:
        >>> part(0.25), part(1 / 64), part(0.3)
        ('a quarter', '1/64', '0.3 times')
    """
    of = 1 / fraction if fraction else math.inf
    if math.isfinite(of) and abs(of - round(of)) < 0.01 * of:
        return _FRACTIONS.get(round(of), f"1/{round(of)}")
    return f"{short(fraction, 2)} times"


def listed(parts: Sequence[Any]) -> str:
    """Words in a sentence.

    Example:
        >>> listed([3]), listed([3, 5]), listed(["a", "b", "c"])
        ('3', '3 and 5', 'a, b and c')
    """
    return " and ".join(filter(None, [", ".join(map(str, parts[:-1])), *map(str, parts[-1:])]))


def counted(noun: str, items: Sequence[Any]) -> str:
    """Things by their names: ``sample 3``, ``samples 3 and 5``."""
    return f"{noun}{'s' * (len(items) > 1)} {listed(items)}"
