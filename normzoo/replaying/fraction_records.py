"""Records of what a fatal update does on its way."""

from __future__ import annotations

from typing import Any

from normzoo.records.schema import Column, Figure, Schema

_FRACTION = Column("fraction", "float", "fraction of the update that is applied, from 0 to 1")


def _along(title: str, kind: str, y: str, **options: Any) -> Figure:
    return Figure(title, kind, x="fraction", y=y, x_label="fraction of the update", **options)


def _channels(title: str, z: str, scale: str) -> Figure:
    return _along(title, "heat map", "channel", z=z, z_scale=scale, facet="site")


LOSS = Schema(
    "replay_fractions",
    "one fraction of the update",
    (
        _FRACTION,
        Column("loss", "float", "loss of the step's own batch"),
        Column("largest", "float", "largest magnitude among the outputs of all modules; infinite or NaN if one is"),
    ),
    (_along("Loss along the update", "line", "loss", y_scale="log"),),
)
CHANNELS = Schema(
    "replay_channels",
    "one fraction of the update, module, and channel",
    (
        Column("site", "text", "name of the module: of normalization layers the input is meant, of others the output"),
        _FRACTION,
        Column("channel", "int", "number of the channel, from 0"),
        Column("mean", "float", "mean over batch and space, of all micro-batches and ranks"),
        Column("variance", "float", "(biased) variance"),
    ),
    (
        _along(
            "Variance of channels along the update", "heat map", "channel", z="variance", facet="site", z_scale="log"
        ),
        _along(
            "Mean of channels along the update", "heat map", "channel", z="mean", facet="site", z_scale="signed log"
        ),
    ),
)
DEPTH = Schema(
    "replay_depth",
    "one module without modules inside, at 0, 50 or 100 per cent of the update",
    (
        _FRACTION,
        Column("module", "text", "name of the module"),
        Column("depth", "int", "place among these modules in the order of their first calls, from 0"),
        Column("mean", "float", "mean of the output, NaN if it is not finite"),
        Column("std", "float", "standard deviation of the output, NaN if it is not finite"),
        Column("max", "float", "largest magnitude of the output; infinite or NaN if a value is"),
    ),
    (
        Figure(
            "Activations over depth along the update",
            "line",
            x="depth",
            y="max",
            lines=("fraction",),
            y_scale="log",
            x_label="depth (modules in the order of their calls)",
            y_label="largest magnitude of the output",
        ),
    ),
)
TAILS = Schema(
    "replay_gradient_tails",
    "one fraction of the update, and weight",
    (
        Column("weight", "text", "name of the weight, of those before the sites of `replay_channels`"),
        _FRACTION,
        Column("q50", "float", "median magnitude of the gradient of the step's batch"),
        Column("q999", "float", "0.999 quantile of the magnitude"),
        Column("max", "float", "largest magnitude"),
        Column("kurtosis", "float", "excess kurtosis"),
    ),
    (
        _along(
            "Gradients along the update", "line", "max", lines=("weight",), y_scale="log", y_label="largest gradient"
        ),
        _along("Kurtosis of gradients along the update", "line", "kurtosis", lines=("weight",)),
    ),
)
UPDATES = Schema(
    "replay_updates",
    "one parameter",
    (
        Column("parameter", "text", "name of the parameter"),
        Column("place", "int", "place among the parameters, from 0"),
        Column("matrix", "bool", "whether it has more than one dimension, unlike a bias"),
        Column("weight", "float", "norm before the update"),
        Column("update", "float", "norm of the update"),
        Column("relative_update", "float", "norm of the update as a multiple of the norm before it"),
    ),
    (
        Figure(
            "Update of each parameter",
            "line",
            x="place",
            y="relative_update",
            y_scale="log",
            x_label="parameters in their order",
            y_label="norm of the update / norm of the parameter",
        ),
    ),
)
