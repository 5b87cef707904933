"""Experiments that are no training runs: made from a recipe, and carried out part by part into a record."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import seed_everything
from rich.progress import Progress

from normzoo._components import accepted_options, component, given_options, reason
from normzoo._errors import RecipeError, shown
from normzoo.cli._interrupts import Interrupted, Interrupts
from normzoo.cli._status import Status
from normzoo.cli._terminal import terminal
from normzoo.cli.build import make_data, make_task, quiet_lightning, seed_of
from normzoo.experiments import Experiment
from normzoo.records.reading import read_records
from normzoo.records.segments import Segment

# Arguments that sections of the recipe give, and these sections
_SECTIONS = {"seed": ("seed",), "data": ("data",), "task": ("model", "optimizer", "lr_scheduler")}


@dataclass(frozen=True)
class Planned:
    """An experiment, what each of its parts is of, and the seed of the recipe."""

    experiment: Experiment
    parts: Sequence[Mapping[str, Any]]
    seed: int


def plan(config: Mapping[str, Any], source: str) -> Planned:
    """Check a config and make its experiment, of which no part is made.

    Raises:
        RecipeError: naming the file, the key, and what is accepted, for anything the recipe has wrong.
    """
    quiet_lightning()
    seed = seed_of(config, source)
    spec = config["experiment"]
    for argument, sections in _SECTIONS.items():
        if argument in given_options(spec):
            raise RecipeError(f"{source}: experiment.{argument}: give it in the section {sections[0]} of the recipe")
    made = component("experiment", spec, source, skip={*_SECTIONS})
    given = _given_by_sections(made.cls, config, source)
    arguments: dict[str, Any] = {"seed": seed} if "seed" in given else {}
    data = make_data(config, seed, source) if "data" in given else None
    if data is not None:
        arguments["data"] = data
    if "task" in given:
        arguments["task"] = make_task(config, data, seed, source)
    seed_everything(seed, workers=True, verbose=False)
    experiment: Experiment = made.make(**arguments)
    return Planned(experiment, _parts(experiment, source), seed)


def _given_by_sections(cls: type, config: Mapping[str, Any], source: str) -> set[str]:
    """The arguments of an experiment's class that the sections of a config give."""
    takes = {*accepted_options(cls)} & {*_SECTIONS}
    written = {section for section, value in config.items() if value is not None}
    taken = {"seed", "experiment", *(section for argument in takes for section in _SECTIONS[argument])}
    if unused := [section for section in config if section in written - taken]:
        raise RecipeError(
            f"{source}: {unused[0]}: {cls.__name__} takes nothing from this section; leave it out of the recipe"
        )
    given = {argument for argument in takes if argument == "seed" or _SECTIONS[argument][0] in written}
    for argument in sorted(takes - given):
        section, *others = _SECTIONS[argument]
        if written & {*others} or not _has_default(cls, argument):
            raise RecipeError(f"{source}: the section {section!r} is missing; {cls.__name__} takes it")
    return given


def _has_default(cls: type, argument: str) -> bool:
    parameter = inspect.signature(cls).parameters.get(argument)  # None if it goes to a base, with others
    return parameter is not None and parameter.default is not parameter.empty


def _parts(experiment: Experiment, source: str) -> list[Mapping[str, Any]]:
    name = type(experiment).__name__
    if not experiment.name:
        raise RecipeError(
            f"{source}: experiment: {name} has no name for its record; give the class one, as in name = 'x'"
        )
    try:
        parts = [*experiment.parts()]
    except Exception as error:  # the class may be a user's
        raise RecipeError(f"{source}: experiment: {name}.parts() fails: {reason(error)}") from error
    if not parts:
        raise RecipeError(f"{source}: experiment: {name} has no parts with these arguments")
    for part in parts:
        if not isinstance(part, Mapping):
            raise RecipeError(
                f"{source}: experiment: {name}.parts() must give a mapping for each part, not {shown(part)}"
            )
    return parts


def carry_out(planned: Planned, folder: Path, status: Status, interrupts: Interrupts) -> None:
    """Make the parts that are not on record in ``folder``, each in one write, until a signal asks to end.

    Raises:
        Interrupted: between two parts, after a signal.
        RecordError: if what is on record is damaged.
    """
    experiment, parts = planned.experiment, planned.parts
    first = parts_on_record(experiment, folder)
    if first >= len(parts):
        return
    seed_everything(planned.seed, workers=True, verbose=False)
    experiment.folder = folder
    experiment.prepare()
    segment = Segment(folder / "metrics", experiment.schema, first)
    with Progress(*Progress.get_default_columns(), console=terminal()) as progress:
        shown_parts = progress.add_task(experiment.name, total=len(parts), completed=first)
        for number in range(first, len(parts)):
            if interrupts.received is not None:
                raise Interrupted(interrupts.exit_code)
            if rows := rows_of(planned, number):
                segment.append(rows)
            status.write("running")
            progress.advance(shown_parts)


def rows_of(planned: Planned, number: int) -> list[dict[str, Any]]:
    """The rows of one part, under random streams that do not depend on the parts that were made before it."""
    [seed] = np.random.SeedSequence([planned.seed, number]).generate_state(1).tolist()
    seed_everything(seed, workers=True, verbose=False)
    return [{**row, "step": number} for row in planned.experiment.rows(planned.parts[number])]


def parts_on_record(experiment: Experiment, folder: Path) -> int:
    """How many parts are on record in a run's folder; one whose write was cut off is not."""
    record = read_records(folder).get(experiment.name)
    return 0 if record is None or record.empty else int(record["step"].max()) + 1
