"""Runs that differ only in their seed, which figures show as one line with a band."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from normzoo.report.settings import identity, seed_key

if TYPE_CHECKING:
    from normzoo.report.runs import Run


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed, or a single run.

    Attributes:
        label: what the runs have in common, or the name of a single run.
        runs: one or several.
    """

    label: str
    runs: list[Run]

    @property
    def name(self) -> str:
        """What stands in legends: the label, with the number of seeds."""
        return f"{self.label} ({len(self.runs)} seeds)" if len(self.runs) > 1 else self.label

    @property
    def diverged(self) -> list[Run]:
        """Those that have diverged, or whose loss ended as NaN or infinite while nobody watched it."""
        return [run for run in self.runs if run.has_diverged]


def seed_groups(runs: Sequence[Run]) -> list[Group]:
    """The runs in groups, in the order of their first runs.

    Runs are in one group if their recipes, or the hyperparameters of other logs, have different seeds and are else the
    same. A run without a seed, and one whose seed another one of the group has already, is alone.
    """
    groups: list[list[Run]] = []
    known: dict[Any, list[Run]] = {}  # by what their runs have in common
    for run in runs:
        key = seed_key(run.config)
        if key is None:
            groups.append([run])
            continue
        together = known.setdefault((run.of_recipe, key, identity(_without(key, run.config))), [])
        if not together:
            groups.append(together)
        if any(other.config[key] == run.config[key] for other in together):
            groups.append([run])
        else:
            together.append(run)
    return [Group(_label(group), group) for group in groups]


def _without(key: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return {section: value for section, value in config.items() if section != key}


def _label(group: Sequence[Run]) -> str:
    """What the names of the runs have in common, such as ``norm=batch,lr=0.1`` of ``01-norm=batch,lr=0.1,seed=0``."""
    if len(group) == 1:
        return group[0].name
    parts = [re.sub(r"^\d+-", "", run.name.rpartition("/")[2]).split(",") for run in group]
    common = ",".join(part for part in parts[0] if all(part in others for others in parts))
    return common or f"{group[0].name} to {group[-1].name}"
