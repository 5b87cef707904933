"""A run that holds, what is planted in it, and proofs that this is what makes it diverge.

The verdicts that count as right were decided before any verdict was seen. ``strict`` ones name what was planted;
``lenient`` ones are also what a careful person might say first:

- a learning rate that would hold after a warm-up: strictly a warm-up left out, leniently the learning rate;
- a parameter whose own learning rate is too large: strictly the parameter, leniently the learning rate;
- a class that there is not, at which the run fails: strictly the data, leniently the error;
- targets drawn anew in one batch, which the run survives: strictly innocent, leniently the data;
- a rare token whose embedding is constant, so that eps decides: strictly the normalization, leniently the data;
- two causes at once: either of them.

A proof is a change of the planted run and whether it alarms with that change.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from planted.fit import Settings

Change = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """A run with something planted.

    Attributes:
        half: ``"a"``, ``"b"``, ``"c"`` or ``"d"``: the set of runs that it belongs to.
        truth: what is planted, of the names of causes; several if either is right.
        base: settings of a run that holds.
        plant: the change of these that makes it diverge.
        lenient: further causes that a careful person might name first.
        proofs: further changes of the planted run, and whether the run alarms with them.
        at: the step at which something is planted; the alarm has to come within 12 steps of it.
        goes_on: whether the run goes on after the alarm as the base does.
    """

    half: str
    truth: tuple[str, ...]
    base: Settings
    plant: Change
    lenient: tuple[str, ...] = ()
    proofs: tuple[tuple[Change, bool], ...] = ()
    at: int | None = None
    goes_on: bool = False

    @property
    def planted(self) -> Settings:
        """The run with what is planted."""
        return changed(self.base, self.plant)


def changed(settings: Settings, change: Change) -> Settings:
    """Settings with a change; options of the net are added to those that there are."""
    options = {**settings.options, **change.get("options", {})}
    return replace(settings, **{**change, "options": options})


def net(name: str, seed: int, optimizer: str, lr: float, options: Change | None = None, **more: Any) -> Settings:
    """Settings, shorter."""
    return Settings(name, options or {}, optimizer, lr, seed=seed, **more)
