"""``normzoo sweep``: run every point of a recipe's grid, one after the other, and report on all of them."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from normzoo._errors import RecipeError
from normzoo._files import write_whole
from normzoo._yaml_text import dump
from normzoo.cli._resume import SWEEP, asked_for, locked, state_of
from normzoo.cli._terminal import terminal
from normzoo.cli.run import check_out, new_folder, shortened, train

_KEPT = ("finished", "diverged")  # states of points that are not run again


def execute(arguments: argparse.Namespace) -> int:
    """Run all points; 1 if one failed, 128 and the signal's number if a signal ended them, else 0.

    A point that has diverged is a result of the sweep.
    """
    recipe, resumed = asked_for(arguments, SWEEP)
    for notice in recipe.notices:
        print(f"{recipe.source}: {notice}", file=sys.stderr)
    if not recipe.grid:
        raise RecipeError(f"{recipe.source}: there is no sweep: section; use normzoo run, or add one")
    from normzoo.cli._interrupts import listening
    from normzoo.cli.report import try_report

    check_out(arguments.out)
    console = terminal(stderr=arguments.dry_run)
    points = {f"{i:02d}-{shortened(label)}": (label, config) for i, (label, config) in enumerate(recipe.points(), 1)}
    if resumed is not None:
        kept = {name for name in points if state_of(resumed / name) in _KEPT}
        console.print(f"{resumed}: {len(kept)} of {len(points)} runs are kept", soft_wrap=True)
    else:
        kept = set()
    with console.status("checking the recipe"):
        for name, (label, config) in points.items():
            if name not in kept:
                _check(config, f"{recipe.source} ({label})")
    if arguments.dry_run:
        for name, (_, config) in points.items():
            if name not in kept:
                print(f"---\n# {name}\n{dump(config)}", end="")
        return 0
    folder = resumed or new_folder(arguments.out, f"{recipe.name}-sweep")
    codes = [0]
    with listening() as interrupts, locked(folder):
        if resumed is None:
            try:
                write_whole(folder / SWEEP, dump({**recipe.config, "sweep": recipe.grid}))
            except OSError as error:
                console.print(f"{SWEEP} could not be written: {error}")
        for i, (name, (label, config)) in enumerate(points.items(), start=1):
            if name in kept:
                continue
            console.rule(f"run {i} of {len(points)}: {label}", align="left", style="dim")
            goes_on = resumed is not None and (folder / name).exists()
            outcome = train(config, folder / name, recipe.source, goes_on)
            if outcome.state != "diverged":
                codes.append(outcome.code)
            if interrupts.received is not None:
                break
        return try_report(folder, max(codes))


def _check(config: dict[str, Any], source: str) -> None:
    from normzoo.cli.rehearse import rehearse

    trainer = rehearse(config, source).trainer
    if trainer is not None and type(trainer.strategy.launcher).__name__ == "_SubprocessScriptLauncher":
        raise RecipeError(
            f"{source}: trainer: {trainer.num_devices} devices would be driven by processes that run this command "
            "again, which a sweep cannot take part in; set trainer.devices=1 or trainer.strategy=ddp_spawn, or use "
            "normzoo run for each point"
        )
