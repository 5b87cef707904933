"""``normzoo sweep``: train every point of a recipe's grid, one after the other, and report on all of them."""

from __future__ import annotations

import argparse

from rich.console import Console

from normzoo._errors import RecipeError
from normzoo.cli.recipe import read
from normzoo.cli.report import write_report
from normzoo.cli.run import new_folder, train
from normzoo.cli.yaml_text import dump


def execute(arguments: argparse.Namespace) -> int:
    """Train all points; 0 if all finished, 1 if one failed, 130 after Ctrl-C."""
    recipe = read(arguments.recipe, arguments.overrides)
    if not recipe.grid:
        raise RecipeError(f"{recipe.source}: there is no sweep: section; use normzoo run, or add one")
    from normzoo.cli.build import build

    console = Console()
    points = [*recipe.points()]
    with console.status("checking the recipe"):
        for label, config in points:
            trainer = build(config, f"{recipe.source} ({label})").trainer(logger=False)
            if type(trainer.strategy.launcher).__name__ == "_SubprocessScriptLauncher":
                raise RecipeError(
                    f"{recipe.source}: trainer: {trainer.num_devices} devices would be driven by processes that "
                    "run this command again, which a sweep cannot take part in; set trainer.devices=1 or "
                    "trainer.strategy=ddp_spawn, or use normzoo run for each point"
                )
    folder = new_folder(arguments.out, f"{recipe.name}-sweep")
    (folder / "sweep.yaml").write_text(dump({**recipe.config, "sweep": recipe.grid}), encoding="utf-8")
    codes = []
    for i, (label, config) in enumerate(points, start=1):
        console.rule(f"run {i} of {len(points)}: {label}", align="left", style="dim")
        codes.append(train(config, folder / f"{i:02d}-{label}", recipe.source))
        if codes[-1] == 130:
            break
    write_report(folder)
    return 130 if 130 in codes else max(codes)
