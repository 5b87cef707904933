"""The norms of each parameter, of its gradient and of its update: what a capsule shows of the last steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from normzoo.callbacks._run.ranks import NamedReading, own_parts
from normzoo.callbacks.measurement import Column, Figure, Measurement, Sample, Step


class ParameterNorms(Measurement):
    """Records the norms of each parameter, of its gradient and of what the step adds to it.

    A row of the record ``parameter_norms`` for each sampled step and parameter. :class:`normzoo.callbacks.Recorder`
    measures by it the steps that it makes again at an alarm. Gradients are reduced over ranks, unscaled and not
    clipped. Norms are accumulated in float32.

    Args:
        every_n_steps: sample when the number of steps that the optimizer has made is a multiple of this; or a schedule.
        dirpath: folder of the record; by default that of the Trainer's first logger, else a new one.
        label: sets the callback apart from others of its class: the record goes to a folder of this name in that one,
            and log keys begin with it.

    Raises:
        ValueError: at setup for unsupported strategies.
    """

    name = "parameter_norms"
    row = "one sampled step and parameter"
    columns = (
        Column("optimizer", "int", "index of the optimizer"),
        Column("layer", "text", "name of the parameter"),
        Column("depth", "int", "place of the parameter among those of the optimizer"),
        Column("dimensions", "int", "number of dimensions of the parameter, 1 for a bias"),
        Column("gradient", "float", "Euclidean norm of the gradient, reduced, unscaled, before clipping", logged=True),
        Column("nonfinite", "int", "number of values of the gradient that are infinite or NaN", logged=True),
        Column("weight", "float", "Euclidean norm of the parameter before the step", logged=True),
        Column("update", "float", "Euclidean norm of what the step adds; null for a step that is skipped", logged=True),
        Column(
            "relative_update", "float", "`update` over `weight`; null without `update` or if `weight` is 0", logged=True
        ),
    )
    figures = (
        Figure(
            "Gradient norm by layer",
            "line",
            x="step",
            y="gradient",
            lines=("layer",),
            y_scale="log",
            y_label="norm of the gradient",
        ),
        Figure(
            "Relative update by layer",
            "line",
            x="step",
            y="relative_update",
            lines=("layer",),
            y_scale="log",
            level=1e-3,
            y_label="norm of update / weight",
        ),
    )
    needs = frozenset({"gradients", "update"})
    shards = True

    def measure(self, step: Step) -> None:
        """Send the norms of gradients and parameters."""
        gradients = step.gradients()
        names = list(step.parameters)
        late: dict[str, NamedReading] = {}
        step.memory |= {"late": late, "layers": list(gradients)}
        if gradients:
            parts = own_parts(list(gradients.values()))
            device = step.run.device
            weights = own_parts([step.parameters[name].detach() for name in gradients])
            values = {
                "gradient": _squares(parts, device),
                "weight": _squares(weights, device),
                "nonfinite": _nonfinite(parts, device),
            }
            layers = [(name, names.index(name), step.parameters[name].dim()) for name in gradients]
            self.send(step, values, late=late, layers=layers)

    def measure_update(self, step: Step) -> None:
        """Send the norms of what the step has added."""
        if layers := step.memory["layers"]:
            update = step.update()
            squares = _squares(own_parts([update[name] for name in layers]), step.run.device)
            step.memory["late"]["update"] = NamedReading({"update": squares}, self.reduce)

    def rows(self, sample: Sample, values: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """A row for each parameter that has a gradient."""
        layers, late = sample.about["layers"], sample.about["late"]
        updates: Sequence[float | None] = [None] * len(layers)
        if "update" in late:
            updates = late["update"].read()["update"].sqrt().tolist()
        columns = (
            values["gradient"].sqrt().tolist(),
            values["nonfinite"].tolist(),
            values["weight"].sqrt().tolist(),
            updates,
        )
        return [
            {
                "optimizer": sample.optimizer,
                "layer": layer,
                "depth": depth,
                "dimensions": dimensions,
                "gradient": gradient,
                "nonfinite": int(nonfinite),
                "weight": weight,
                "update": update,
                "relative_update": update / weight if update is not None and weight else None,
            }
            for (layer, depth, dimensions), gradient, nonfinite, weight, update in zip(layers, *columns, strict=True)
        ]


def _squares(parts: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """The squared norm of what this rank measures of each tensor, (tensors,) float64."""
    dtypes = [None if x is None else torch.promote_types(x.dtype, torch.float32) for x in parts]
    norms = [None if x is None else torch.linalg.vector_norm(x, dtype=d) for x, d in zip(parts, dtypes, strict=True)]
    return _stacked(norms, device).square()


def _nonfinite(parts: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """How many values of what this rank measures of each tensor are not finite, (tensors,) float64."""
    return _stacked([None if x is None else (~x.isfinite()).sum() for x in parts], device)


def _stacked(values: Sequence[Tensor | None], device: torch.device) -> Tensor:
    none = torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack([none if value is None else value.double() for value in values])
