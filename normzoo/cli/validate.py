"""``normzoo validate``: everything short of training."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any

from normzoo.cli.recipe import read


def execute(arguments: argparse.Namespace) -> int:
    """Check the recipe, and every point of its grid, by making everything that a run would use."""
    recipe = read(arguments.recipe, arguments.overrides)
    notices = _check(recipe.config, recipe.source)
    points = [*recipe.points()] if recipe.grid else []
    for label, config in points:
        notices += _check(config, f"{recipe.source} ({label})")
    for notice in dict.fromkeys(notices):
        print(f"{recipe.source}: {notice}", file=sys.stderr)
    count = f", {len(points)} runs in its sweep" if points else ""
    print(f"{recipe.source}: valid{count}")
    return 0


def _check(config: Mapping[str, Any], source: str) -> list[str]:
    """Make what a run would use; the work that the Trainer's tools leave undone on its layers, in sentences."""
    from normzoo.callbacks._tools import passed_over
    from normzoo.cli.build import build

    experiment = build(config, source)
    return passed_over(experiment.trainer(logger=False), experiment.task)
