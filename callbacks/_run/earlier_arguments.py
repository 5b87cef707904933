"""Arguments of Divergence in the version before, which stand for rules and actions; for one more version."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]

from normzoo.callbacks.actions import Action, Record, Stop
from normzoo.callbacks.rules import LossAbove, LossSpike, Rule


def earlier_rules(
    unnamed: bool, threshold: float | None, spike: float | None, window: int | None, two_sided: bool | None
) -> list[Rule]:
    """The rules about losses that these arguments stand for, with a warning for each that is given.

    Args:
        unnamed: whether the threshold was given without its name.
        threshold: of the loss.
        spike: robust standard deviations.
        window: how many losses a spike is measured by.
        two_sided: whether losses can be too low.

    Raises:
        ValueError: for what the rules refuse, and for ``two_sided`` without a spike.
    """
    if two_sided and spike is None:
        raise ValueError("two_sided=True is about the rule spike; pass rules=[LossSpike(deviations, two_sided=True)]")
    for sentence in _sentences(unnamed, threshold, spike, window, two_sided):
        rank_zero_warn(sentence)
    options: dict[str, Any] = {"window": window} if window is not None else {}
    spikes = LossSpike(1.0 if spike is None else spike, two_sided=bool(two_sided), **options)
    return [LossAbove(1e3 if threshold is None else threshold), *([spikes] if spike is not None else [])]


def _sentences(unnamed: bool, threshold: Any, spike: Any, window: Any, two_sided: Any) -> Iterator[str]:
    if threshold is not None and unnamed:
        yield (
            f"Divergence({threshold}) is read as its threshold in this version alone, as the first argument says when "
            f"to look: pass rules=[LossAbove({threshold})], or every_n_steps=n"
        )
    for name, value, new in (
        ("threshold", None if unnamed else threshold, f"LossAbove({threshold})"),
        ("spike", spike, f"LossSpike({spike})"),
        ("window", window, f"LossSpike(deviations, window={window})"),
        ("two_sided", two_sided, f"LossSpike(deviations, two_sided={two_sided})"),
    ):
        if value is not None:
            yield f"Divergence({name}={value}) is read in this version alone: pass rules=[{new}]"


def earlier_action(stop: bool) -> Action:
    """The action that ``stop`` stands for, with a warning."""
    new = "action=Stop(exit_code=None)" if stop else "action=Record(), or leave it out"
    rank_zero_warn(f"Divergence(stop={stop}) is read in this version alone: pass {new}")
    return Stop(exit_code=None) if stop else Record()
