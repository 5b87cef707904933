"""``normzoo validate``: everything short of training."""

from __future__ import annotations

import argparse

from normzoo.cli.recipe import read


def execute(arguments: argparse.Namespace) -> int:
    """Check the recipe, and every point of its grid, by making everything that a run would use."""
    recipe = read(arguments.recipe, arguments.overrides)
    from normzoo.cli.build import build

    build(recipe.config, recipe.source).trainer(logger=False)
    points = [*recipe.points()] if recipe.grid else []
    for label, config in points:
        build(config, f"{recipe.source} ({label})").trainer(logger=False)
    count = f", {len(points)} runs in its sweep" if points else ""
    print(f"{recipe.source}: valid{count}")
    return 0
