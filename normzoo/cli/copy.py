"""``normzoo copy``: a shipped recipe to a file of one's own."""

from __future__ import annotations

import argparse
from pathlib import Path

from normzoo._errors import RecipeError
from normzoo.cli.recipe import find


def execute(arguments: argparse.Namespace) -> int:
    """Write the recipe's text to the target, which must not exist."""
    text = find(arguments.recipe)[1]
    try:
        with Path(arguments.target).open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise RecipeError(f"{arguments.target} exists and is not overwritten") from None
    except OSError as error:
        raise RecipeError(f"cannot write {arguments.target}: {error.strerror}") from None
    print(f"wrote {arguments.target}")
    return 0
