"""Plans of each cause, with the proofs that it takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from planted.faults import Rows
from planted.fit import Settings
from planted.plan import Change, Plan, changed


def poison(
    half: str, base: Settings, kind: str, at: int, rows: Rows, value: Any, lenient: tuple[str, ...] = ()
) -> Plan:
    """Samples that are not like the others, in one batch."""
    return Plan(half, ("data",), base, {"poison": ((kind, at, rows, value),)}, lenient, at=at)


def too_large(half: str, base: Settings, plant: Change, at: int | None = None) -> Plan:
    """A learning rate that no warm-up makes hold: a constant one, or one after a jump of the schedule, or rising."""
    proofs = (({"warm_up": 40, "steps": 120}, True),) if "lr" in plant else ()
    return Plan(half, ("learning_rate",), base, plant, proofs=proofs, at=at)


def no_warm_up(half: str, base: Settings, steps: int) -> Plan:
    """A learning rate that holds after a warm-up, for 100 steps more and with other seeds, and not from the start."""
    again = {"warm_up": steps, "steps": steps + 100, "seed": base.seed + 1000}
    proofs = ((again, False), ({**again, "seed": base.seed + 2000}, False))
    base = replace(base, warm_up=steps, steps=steps + 100)
    return Plan(half, ("warm_up",), base, {"warm_up": 0, "steps": 70}, ("learning_rate",), proofs)


def dying(half: str, base: Settings, at: int | None = None) -> Plan:
    """What becomes constant before a normalization whose eps is as good as none; with 0.001 all goes well."""
    base = changed(base, {"options": {"eps": 1e-3}})
    proofs = (({"prune": None, "shrink": 0.0}, False),)
    return Plan(half, ("normalization",), base, {"options": {"eps": 1e-12}}, (), proofs, at)


def rare(half: str, base: Settings, eps: float, at: int) -> Plan:
    """A rare token whose embedding is constant before a normalization whose eps is as good as none."""
    base = changed(base, {"options": {"eps": 1e-3}, "poison": tuple(("rare", at + i, 4, 0) for i in range(8))})
    proofs = (({"poison": ()}, False),)
    return Plan(half, ("normalization",), base, {"options": {"eps": eps}}, ("data",), proofs, at)


def coarse(half: str, base: Settings, plant: Change) -> Plan:
    """Float16 inside of the module, or the whole run, in which float32 holds."""
    return Plan(half, ("precision",), base, plant if "precision" in plant else {"options": plant})


def flip(half: str, base: Settings, kind: str, at: int, name: str, index: int, bit: int) -> Plan:
    """A bit that flips between two steps, which replay is not told."""
    return Plan(half, ("hardware",), base, {"flip": ((kind, at, name, index, bit),)}, at=at)


def own_rate(half: str, base: Settings, part: str, factor: float) -> Plan:
    """A parameter that runs away by its own learning rate."""
    return Plan(half, ("parameter",), base, {"rates": {part: factor}}, ("learning_rate",))


def rewarded(half: str, base: Settings, **plant: Any) -> Plan:
    """A parameter that runs away by its gradient, with nothing against it."""
    return Plan(half, ("parameter",), base, {"options": plant})


def hard(half: str, base: Settings, rules: str, kind: str, at: int, rows: Rows) -> Plan:
    """A hard batch that the run survives."""
    lenient = ("data",) if kind == "noise" else ()
    base = replace(base, rules=rules)
    return Plan(half, ("innocent",), base, {"poison": ((kind, at, rows, None),)}, lenient, at=at, goes_on=True)


def tight(half: str, base: Settings, rules: str) -> Plan:
    """An alarm by a tight rule in a healthy run."""
    return Plan(half, ("innocent",), base, {"rules": rules}, goes_on=True)


def two(half: str, truth: tuple[str, str], base: Settings, one: Change, other: Change) -> Plan:
    """Two causes at once, of which each alone raises an alarm."""
    nothing = {name: getattr(base, name) for name in (*one, *other)}
    proofs = tuple(({name: nothing[name] for name in part}, True) for part in (one, other))
    return Plan(half, truth, base, {**one, **other}, proofs=proofs)
