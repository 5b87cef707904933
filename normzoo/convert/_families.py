"""The normalizations that a module is compared with, and what such a comparison ends in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Family:
    """What a normalization takes its statistics over.

    Attributes:
        name: the zoo's name, or the name in the table of kinds; None for one that is only described.
        over: dimensions of a (N, groups, C / groups, positions) view.
        groups: number of groups.
        centred: whether v is about the mean.
        subtracted: whether d is the deviation from the mean.
        correction: what is taken from the number of values that v is divided by.
        text: what to call it.
    """

    name: str | None
    over: tuple[int, ...]
    text: str
    groups: int = 1
    centred: bool = True
    subtracted: bool = True
    correction: int = 0

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The pair (d, v) of an (N, C, positions) input, both of its shape."""
        view = x.unflatten(1, (self.groups, -1))
        mean = view.mean(self.over, keepdim=True)
        centred = view - mean
        square = (centred if self.centred else view).square()
        count = square.numel() // mean.numel() - self.correction
        v = (square.sum(self.over, keepdim=True) / max(count, 1)).expand_as(view)
        return (centred if self.subtracted else view).flatten(1, 2), v.flatten(1, 2)


def families(channels: int) -> Iterator[Family]:
    """All families, those first that others agree with on inputs without positions."""
    yield Family("layer_channel", (2,), "layer norm of each position over channels")
    yield Family("rms", (2,), "division of each position by the root mean square of its channels", 1, False, False)
    yield Family("positional", (2,), "layer norm of each position, with the unbiased variance", correction=1)
    simple = "division of each position by the standard deviation of its channels"
    yield Family("simple norm", (2,), simple, subtracted=False, correction=1)
    yield Family(None, (2,), f"{simple}, with the biased variance", subtracted=False)
    yield Family("layer", (2, 3), "layer norm of each sample over channels and positions")
    yield Family("instance", (3,), "instance norm", channels)
    yield Family("filter_response", (3,), "division of each map by its root mean square", channels, False, False)
    for groups in range(2, channels):
        if channels % groups == 0:
            yield Family("group", (2, 3), f"group norm of {groups} groups", groups)
    yield Family("batch", (0, 3), "batch norm by the statistics of the batch", channels)
    for name, over, groups in (("layer", (2, 3), 1), ("instance", (3,), channels), ("batch", (0, 3), channels)):
        yield Family(None, over, f"{name} norm with the unbiased variance", groups, correction=1)
    yield Family(None, (2, 3), "division of each sample by the root mean square of its values", 1, False, False)


@dataclass
class Recognised:
    """A module whose formula is known.

    Attributes:
        name: of the kind, as in the table of kinds.
        channel_dim: 1 or -1.
        channels: C.
        roles: {``"weight"``, ``"bias"``, ``"running_mean"``, ``"running_var"``: name of the module's tensor}.
        unit_offset: whether the scale is 1 + the module's weight.
        options: ``eps``, ``groups``, ``momentum``, ``unbiased`` as far as the kind has them.
        after: the module's activation, by name, which it applies to its normalized output.
        text: the formula in words.
        remarks: what the layer of this kind does otherwise.
    """

    name: str
    channel_dim: int
    channels: int
    roles: dict[str, str]
    unit_offset: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    after: dict[str, nn.Module] = field(default_factory=dict)
    text: str = ""
    remarks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Unknown:
    """A module that was looked at and is none of the known norms.

    Attributes:
        text: why, or what it looked like.
        norm_like: whether it may be a norm: its values depend on each other, or its name says so.
    """

    text: str
    norm_like: bool


def standardized(family: Family, flat: Tensor) -> Tensor:
    d, v = family.parts(flat)
    return d * (v + 1e-12).rsqrt()


def least_squares(y: Tensor, z: Tensor) -> tuple[float, Tensor]:
    """The relative error of the best scale for each channel, and that scale."""
    scale = (y * z).sum((0, 2)) / z.square().sum((0, 2)).clamp(min=1e-300)
    error = (y - z * scale[:, None]).square().sum().sqrt() / y.square().sum().sqrt().clamp(min=1e-300)
    return float(error), scale


def close(a: Tensor, b: Tensor, tolerance: float, least: float = 0.0) -> bool:
    """Whether two tensors agree to a tolerance relative to their largest value, or to ``least`` if that is larger."""
    size = max(float(b.abs().max()), float(a.abs().max()), least)
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * size)
