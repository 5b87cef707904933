"""What the metrics' ``plot`` draws; matplotlib is imported when something is drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from normzoo.functional.log_histogram import TAIL_LEVELS, bucket_edges, magnitude_counts, quantiles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def drawn(ax: Axes | None, draw: Callable[[Any], None]) -> tuple[Figure | None, Axes]:
    """The figure, None for axes that were given, and the axes, after ``draw`` and with a legend."""
    figure = None
    if ax is None:
        from matplotlib import pyplot as plt

        figure, ax = plt.subplots()
    draw(ax)
    if ax.get_legend_handles_labels()[1]:
        ax.legend()
    return figure, ax


def channels(result: tuple[Tensor, Tensor], ax: Any) -> None:
    """Mean of each channel, (sites, C), within a standard deviation on either side."""
    means, deviations = result[0].detach().cpu(), result[1].detach().sqrt().cpu()
    numbers = range(means.shape[-1])
    for site, (mean, deviation) in enumerate(zip(means, deviations, strict=True)):
        [line] = ax.plot(numbers, mean, marker=".", label=_numbered("site", site, len(means)))
        ax.fill_between(numbers, mean - deviation, mean + deviation, color=line.get_color(), alpha=0.2)
    ax.set(xscale="linear", xlabel="channel", ylabel="mean, with a standard deviation on either side")
    ax.xaxis.get_major_locator().set_params(integer=True)


def channels_over_steps(results: Sequence[tuple[Tensor, Tensor]], ax: Any) -> None:
    """Mean over the channels of their variance, for each site, from one result to the next."""
    variances = torch.stack([variance.detach().cpu().mean(-1) for _, variance in results], 1)
    for site, row in enumerate(variances):
        ax.plot(range(len(results)), row, marker=".", label=_numbered("site", site, len(variances)))
    ax.set(xscale="linear", xlabel="step", ylabel="variance, mean over the channels", yscale="log")
    ax.xaxis.get_major_locator().set_params(integer=True)


def magnitudes(counts: Tensor, mantissa_bits: int, ax: Any) -> None:
    """Share of the finite non-zero magnitudes in each bucket, (layers, buckets), over the magnitude."""
    edges = bucket_edges(mantissa_bits)
    for layer, row in enumerate(counts.cpu()):
        shares = magnitude_counts(row, mantissa_bits)[0].double()
        shares[0] = 0.0  # zeros and tiny values
        filled = shares.nonzero().flatten()
        if len(filled):
            first, last = int(filled[0]), int(filled[-1]) + 1
            label = _numbered("layer", layer, len(counts))
            ax.stairs(shares[first:last] / shares.sum(), edges[first : last + 1], label=label)
    ax.set(xlabel="magnitude", ylabel="share of the values, by bucket", xscale="log")


def magnitudes_over_steps(results: Sequence[Tensor], mantissa_bits: int, ax: Any) -> None:
    """Quantiles of the magnitudes of each layer, from one result to the next."""
    found = torch.stack([quantiles(counts.cpu(), TAIL_LEVELS, mantissa_bits, absolute=True) for counts in results])
    for layer in range(found.shape[1]):
        color = f"C{layer}"
        for level, line, values in zip(TAIL_LEVELS, ("-", "--", ":"), found[:, layer].T, strict=True):
            label = " ".join(filter(None, [_numbered("layer", layer, found.shape[1]), f"{level:.1%}"]))
            ax.plot(range(len(results)), values, line, color=color, label=label)
    ax.set(xscale="linear", xlabel="step", ylabel="quantile of the magnitude", yscale="log")
    ax.xaxis.get_major_locator().set_params(integer=True)


def _numbered(what: str, number: int, count: int) -> str | None:
    """A label for one of several."""
    return f"{what} {number}" if count > 1 else None
