"""What the entry points of the package give Lightning: the measurements that the environment variable NORMZOO asks for.

Lightning calls these functions whenever a script makes a Trainer or a Fabric. Without the variable they import nothing.
"""

from __future__ import annotations

import sys
from typing import Any

from normzoo._variable import VARIABLE, value


def trainer_callbacks() -> list[Any]:
    """The callbacks that a Trainer gets beside those of the script: none unless the variable is set.

    Raises:
        SystemExit: with code 2, after one line on stderr, if the variable does not say what to measure.
    """
    asked = value()
    if not asked:
        return []
    from normzoo._errors import RecipeError
    from normzoo.plugin.adding import AddedMeasurements

    try:
        return [AddedMeasurements(asked)]
    except RecipeError as error:
        print(f"normzoo: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def fabric_callbacks() -> list[Any]:
    """No callbacks, as Fabric calls too few hooks; if the variable is set, a warning says what to do instead."""
    if value():
        from lightning_utilities.core.rank_zero import rank_zero_warn

        rank_zero_warn(
            f"{VARIABLE} is set, and Fabric calls too few hooks for measurements: put the training loop into "
            "'with normzoo.watch(model, optimizer):', which measures it"
        )
    return []
