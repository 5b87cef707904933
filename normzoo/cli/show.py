"""``normzoo show``: a recipe as it will be run."""

from __future__ import annotations

import argparse

from normzoo._yaml_text import dump
from normzoo.cli.recipe import read


def execute(arguments: argparse.Namespace) -> int:
    """Print the recipe with what it extends filled in."""
    recipe = read(arguments.recipe)
    print(dump({**recipe.config, **({"sweep": recipe.grid} if recipe.grid else {})}), end="")
    return 0
