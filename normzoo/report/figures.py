"""The figures of a report, drawn from run folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from normzoo.report.runs import Run

_STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "none",
}
# Okabe & Ito's colours, told apart by colour-blind readers too
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
_DASHES = ("-", "--", ":", "-.")
_MARKERS = "osD^v"  # of a run's optimizers
_LOSS_CEILING = 1e6


def draw(runs: Sequence[Run]) -> dict[str, Figure]:
    """Every figure that the runs hold data for: title -> figure."""
    drawings: dict[str, Callable[[Sequence[Run]], Figure | None]] = {
        "Accuracy": _accuracy,
        "Training loss": _loss,
        "Gradient histogram": _gradients,
        "Relative loss along the step": _relative_loss,
        "Channels over depth": _profile,
        "Gradient noise scale": _noise,
    }
    with rc_context(_STYLE):
        figures = {title: drawing(runs) for title, drawing in drawings.items()}
    return {title: figure for title, figure in figures.items() if figure is not None}


def middle_layer(runs: Sequence[Run]) -> str | None:
    """The middle one of the convolutions, else of the layers, whose gradients every run with a record has."""
    tails = [run.record("gradient_tails") for run in runs]
    recorded = [dict.fromkeys(record["layer"]) for record in tails if not record.empty]
    if not recorded:
        return None
    common = [name for name in recorded[0] if all(name in other for other in recorded)]
    weights = [n for n in common if n.endswith("weight")] or common
    candidates = [n for n in weights if "conv" in n] or weights
    return candidates[len(candidates) // 2] if candidates else None


def first_tail(run: Run, layer: str | None) -> Mapping[str, Any] | None:
    """The first sample of a layer's gradient."""
    record = run.record("gradient_tails")
    if "of" in record:  # not in records written when there was nothing but gradients
        record = record[record["of"].fillna("gradient") == "gradient"]
    of_layer = record.index[record["layer"] == layer] if not record.empty else []
    return record.loc[of_layer[0]].to_dict() if len(of_layer) else None


def _line(index: int) -> dict[str, Any]:
    return {
        "color": _COLORS[index % len(_COLORS)],
        "linestyle": _DASHES[(index + index // len(_COLORS)) % len(_DASHES)],  # runs may lie on top of each other
    }


def _label(name: str) -> str:
    """A name as matplotlib draws it: ``$`` would start a formula, and a leading underscore hide the line."""
    text = name.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=2)


def _accuracy(runs: Sequence[Run]) -> Figure | None:
    if not any(run.curve(m)[0] for run in runs for m in ("train/accuracy", "test/accuracy")):
        return None
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for i, run in enumerate(runs):
        steps, values = run.curve("train/accuracy")
        left.plot(steps, _smooth(values), label=_label(run.name), **_line(i))
        steps, values = run.curve("test/accuracy")
        right.plot(steps, values, marker="o", markersize=4, **_line(i))
    left.set(title="train (mini-batches, smoothed)", xlabel="step", ylabel="accuracy", ylim=(0, 1))
    right.set(title="test", xlabel="step")
    _legend(figure, left)
    return figure


def _loss(runs: Sequence[Run]) -> Figure | None:
    if not any(run.curve("train/loss")[0] for run in runs):
        return None
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots()
    for i, run in enumerate(runs):
        steps, values = run.curve("train/loss")
        axes.plot(steps, np.clip(values, None, _LOSS_CEILING), label=_label(run.name), **_line(i))
        divergence = run.record("divergence")
        if not divergence.empty:
            at, loss = divergence.loc[0, ["step", "loss"]]
            at_most = loss if loss < _LOSS_CEILING else _LOSS_CEILING  # also for NaN
            axes.plot(at, at_most, marker="x", markersize=9, mew=2, color=_line(i)["color"])
    axes.axhline(1e3, color="0.5", linewidth=1, linestyle=":")
    axes.annotate("10³", (1.0, 1e3), xycoords=("axes fraction", "data"), color="0.4", ha="right", va="bottom")
    axes.set(yscale="log", xlabel="step", ylabel=f"mini-batch loss (drawn up to {_LOSS_CEILING:.0e})")
    axes.set_title("loss of each mini-batch; × marks divergence")
    _legend(figure, axes)
    return figure


def _gradients(runs: Sequence[Run]) -> Figure | None:
    layer = middle_layer(runs)
    if layer is None:
        return None
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots()
    for i, run in enumerate(runs):
        row = first_tail(run, layer)
        if row is None:
            continue
        magnitude, density = magnitude_density(row["histogram"], row["mantissa_bits"])
        if not magnitude.size:  # every value was zero or not finite
            continue
        kurtosis = "" if np.isnan(row["kurtosis"]) else f" (excess kurtosis {row['kurtosis']:.1f})"
        axes.plot(magnitude, density, label=_label(run.name) + kurtosis, **_line(i))
    if not axes.lines:
        return None
    axes.set(xscale="log", yscale="log", xlabel="|gradient|", ylabel="density of log₁₀|gradient|")
    axes.set_title(f"gradient of {layer} at its first sampled step")
    _legend(figure, axes)
    return figure


def _relative_loss(runs: Sequence[Run]) -> Figure | None:
    if all(run.record("relative_loss").empty for run in runs):
        return None
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots()
    drawn = []
    for i, run in enumerate(runs):
        record = run.record("relative_loss")
        if record.empty:
            continue
        by_optimizer = samples_by_optimizer(record)
        for optimizer, samples in by_optimizer.items():
            samples = _alike(samples)
            sizes = samples["multiples"].iloc[0] * samples["lr"].iloc[0]
            curves = np.stack([*samples["relative"]])
            curves = np.where(np.isnan(curves), np.inf, curves).clip(1e-2, 1e3)
            low, middle, high = np.quantile(curves, (0.0, 0.5, 1.0), axis=0)
            what = f", optimizer {optimizer}" if len(by_optimizer) > 1 else ""
            what += " (along the update)" if samples["along"].iloc[0] == "update" else ""
            marker = _MARKERS[optimizer % len(_MARKERS)]
            axes.plot(sizes, middle, marker=marker, markersize=4, label=_label(run.name) + what, **_line(i))
            axes.fill_between(sizes, low, high, color=_line(i)["color"], alpha=0.12, linewidth=0)
            drawn.append(sizes)
    axes.axhline(1.0, color="0.5", linewidth=1, linestyle=":")
    axes.set(yscale="log", xlabel="step size (multiple × learning rate)", ylabel="loss after / before")
    _signed_log(axes, np.concatenate(drawn))
    axes.set_title("median over sampled steps, with their range; drawn up to 10³")
    _legend(figure, axes)
    return figure


def _profile(runs: Sequence[Run]) -> Figure | None:
    if all(run.record("channel_moments").empty for run in runs):
        return None
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for i, run in enumerate(runs):
        record = run.record("channel_moments")
        if record.empty:
            continue
        where = record["where"].iloc[0]
        record = record[record["where"] == where]
        for axes, step in ((left, record["step"].min()), (right, record["step"].max())):
            at = record[record["step"] == step]
            label = f"{_label(run.name)}, {where}s, steps {record['step'].min()} and {record['step'].max()}"
            axes.plot(at["depth"], at["variance"], marker="o", markersize=3, label=label, **_line(i))
    left.set(title="first sample", xlabel="depth (modules followed)", ylabel="variance of channels, mean", yscale="log")
    right.set(title="last sample", xlabel="depth (modules followed)")
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure, left)
    return figure


def _noise(runs: Sequence[Run]) -> Figure | None:
    if all(run.record("gradient_noise").empty for run in runs):
        return None
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots()
    for i, run in enumerate(runs):
        record = run.record("gradient_noise")
        if record.empty:
            continue
        scale = record["mean_scale"].where(record["mean_scale"] > 0)  # the estimate of |G|^2 may be negative
        axes.plot(record["step"], scale, label=_label(run.name), **_line(i))
        axes.axhline(record["big_batch"].median(), linewidth=1, alpha=0.5, color=_line(i)["color"])
    axes.set(yscale="log", xlabel="step", ylabel="noise scale, samples")
    axes.set_title("critical batch size, from running means; straight lines are the batches used")
    _legend(figure, axes)
    return figure


def samples_by_optimizer(record: pd.DataFrame) -> dict[int, pd.DataFrame]:
    """The samples of a record of relative loss, by the index of the optimizer, which older records lack."""
    if "optimizer" not in record:
        return {0: record}
    optimizer = record["optimizer"].fillna(0).astype(int)
    return {int(index): record[optimizer == index] for index in sorted(optimizer.unique())}


def _alike(record: pd.DataFrame) -> pd.DataFrame:
    """The samples taken as the last one was: a resumed run may change the multiples and the direction."""
    if "along" not in record:  # written when there was only one
        record = record.assign(along=None)
    multiples, along = record["multiples"].iloc[-1], record["along"].where(record["along"].notna(), "gradient")
    same = [np.array_equal(m, multiples) for m in record["multiples"]]
    return record.assign(along=along)[np.array(same) & (along == along.iloc[-1])]


def _signed_log(axes: Axes, values: np.ndarray) -> None:
    """A logarithmic x axis; with values at or below 0, one in both directions and linear below a power of ten."""
    sizes = np.abs(values[np.isfinite(values) & (values != 0)])
    if (values > 0).all():
        axes.set_xscale("log")
    elif sizes.size:
        axes.set_xscale("symlog", linthresh=10.0 ** np.ceil(np.log10(sizes.min())))  # no tick between it and 0
        axes.axvline(0.0, color="0.5", linewidth=1, linestyle=":")


def magnitude_density(pairs: np.ndarray, mantissa_bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Magnitudes and the density of their base-10 logarithm, from a record's rows (bucket, count).

    Buckets are a float32's sign, exponent and leading mantissa bits; zero and non-finite values are left out, and
    the buckets of one power of two are taken together.
    """
    counts = np.zeros(1 << (9 + mantissa_bits))
    pairs = pairs[pairs[:, 0] < counts.size]  # what is beyond has no magnitude
    counts[pairs[:, 0]] = pairs[:, 1]
    octaves = counts.reshape(2, 256, -1).sum((0, 2))[1:255]  # exponent 0 is zero and subnormal, 255 not finite
    filled = np.flatnonzero(octaves)
    lowest, highest = (filled[0], filled[-1] + 1) if filled.size else (0, 0)
    magnitude = 2.0 ** (np.arange(lowest, highest) + 1 - 127 + 0.5)
    density = octaves[lowest:highest] / max(octaves.sum(), 1) / np.log10(2.0)
    return magnitude, np.where(density > 0, density, np.nan)


def _smooth(values: Sequence[float], window: int = 5) -> np.ndarray:
    """Mean of up to ``window`` values so far."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - window, 0)
    return (sums[end] - sums[start]) / np.maximum(end - start, 1)
