"""``normzoo sweep``: train every point of a recipe's grid, one after the other, and report on all of them."""

from __future__ import annotations

import argparse

from normzoo._errors import RecipeError
from normzoo._files import write_whole
from normzoo._yaml_text import dump
from normzoo.cli._terminal import terminal
from normzoo.cli.recipe import read
from normzoo.cli.report import try_report
from normzoo.cli.run import new_folder, shortened, train


def execute(arguments: argparse.Namespace) -> int:
    """Train all points; 1 if one failed, 128 and the signal's number if a signal ended them, else 0.

    A point that has diverged is a result of the sweep.
    """
    recipe = read(arguments.recipe, arguments.overrides)
    if not recipe.grid:
        raise RecipeError(f"{recipe.source}: there is no sweep: section; use normzoo run, or add one")
    from normzoo.cli._interrupts import listening
    from normzoo.cli.rehearse import rehearse

    console = terminal()
    points = [*recipe.points()]
    with console.status("checking the recipe"):
        for label, config in points:
            trainer = rehearse(config, f"{recipe.source} ({label})").trainer
            if type(trainer.strategy.launcher).__name__ == "_SubprocessScriptLauncher":
                raise RecipeError(
                    f"{recipe.source}: trainer: {trainer.num_devices} devices would be driven by processes that "
                    "run this command again, which a sweep cannot take part in; set trainer.devices=1 or "
                    "trainer.strategy=ddp_spawn, or use normzoo run for each point"
                )
    folder = new_folder(arguments.out, f"{recipe.name}-sweep")
    codes = [0]
    with listening() as interrupts:
        try:
            write_whole(folder / "sweep.yaml", dump({**recipe.config, "sweep": recipe.grid}))
        except OSError as error:
            console.print(f"sweep.yaml could not be written: {error}")
        for i, (label, config) in enumerate(points, start=1):
            console.rule(f"run {i} of {len(points)}: {label}", align="left", style="dim")
            outcome = train(config, folder / f"{i:02d}-{shortened(label)}", recipe.source)
            if outcome.state != "diverged":
                codes.append(outcome.code)
            if interrupts.received is not None:
                break
        return try_report(folder, max(codes))
