"""What loggers that take figures are sent: a sample, drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from normzoo.records.headroom import headroom_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def depth_profile(rows: Sequence[Mapping[str, Any]], figure: Figure) -> None:
    """Of one sample of channel moments the variance, and the magnitude of the mean, over depth."""
    upper, lower = figure.subplots(2, 1, sharex=True)
    for where, marker in (("input", "o"), ("output", "x")):
        ours = [row for row in rows if row["where"] == where]
        if ours:
            depth = [row["depth"] for row in ours]
            upper.plot(depth, [row["variance"] for row in ours], marker=marker, markersize=4, label=where)
            lower.plot(depth, [row["mean"] for row in ours], marker=marker, markersize=4, label=where)
    upper.set(yscale="log", ylabel="variance", title=f"channels at step {rows[0]['step']}, means over them")
    lower.set(yscale="log", ylabel="|mean|", xlabel="depth (modules followed)")
    lower.xaxis.get_major_locator().set_params(integer=True)
    upper.legend()


def relative_loss_curve(row: Mapping[str, Any], figure: Figure) -> None:
    """Of one sample of relative loss the curve and the headroom."""
    axes = figure.subplots()
    axes.plot(row["multiples"], row["relative"], marker="o", markersize=4)
    axes.axhline(1.0, color="0.5", linewidth=1, linestyle=":")
    if row["headroom"] is not None:
        text = headroom_text(row["headroom"], row["headroom_bound"])
        axes.axvline(row["headroom"], color="0.5", linewidth=1, linestyle="--", label=f"headroom {text}")
    smallest = min((abs(s) for s in row["multiples"] if s), default=1.0)
    axes.set_xscale("symlog", linthresh=10.0 ** math.ceil(math.log10(smallest)))  # no tick between it and 0
    axes.set(xlabel="multiple of the step", ylabel="relative loss")
    of = f" of optimizer {row['optimizer']}" if row["optimizer"] else ""
    axes.set_title(f"along the {row['along']}{of} at step {row['step']}")
    if max((v for v in row["relative"] if v < float("inf")), default=1.0) > 10:
        axes.set_yscale("log")
    if row["headroom"] is not None:
        axes.legend()
