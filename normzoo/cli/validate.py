"""``normzoo validate``: everything short of training."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any

from normzoo.cli.recipe import read


def execute(arguments: argparse.Namespace) -> int:
    """Check the recipe, and every point of its grid, by making what a run would use and one training step."""
    recipe = read(arguments.recipe, arguments.overrides)
    notices = [*recipe.notices, *_check(recipe.config, recipe.source)]
    points = [*recipe.points()] if recipe.grid else []
    for label, config in points:
        notices += _check(config, f"{recipe.source} ({label})")
    for notice in dict.fromkeys(notices):
        print(f"{recipe.source}: {notice}", file=sys.stderr)
    count = f", {len(points)} runs in its sweep" if points else ""
    print(f"{recipe.source}: valid{count}")
    return 0


def _check(config: Mapping[str, Any], source: str) -> list[str]:
    """Try what a run would do; what was not tried, and what the Trainer's tools leave undone, in sentences."""
    from normzoo.callbacks._run.tools import passed_over
    from normzoo.cli.rehearse import rehearse

    rehearsal = rehearse(config, source)
    if rehearsal.trainer is None or rehearsal.task is None:
        return rehearsal.notices
    return [*rehearsal.notices, *passed_over(rehearsal.trainer, rehearsal.task)]
