"""The one table that drives every registered layer through one contract.

A case names a layer, options that exercise it, the inputs it takes and refuses, and its formula written as
slow, obvious float64 loops. ``tests/layers/test_contract.py`` fails if a registered layer has no case.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import normzoo

CHANNELS = 6
FLAT, SEQUENCE, IMAGE, VOLUME = (5, CHANNELS), (3, CHANNELS, 4), (3, CHANNELS, 4, 3), (2, CHANNELS, 2, 3, 2)
# What is left when the batch, the map or both shrink to one: a layer normalizes or refuses it, with a reason.
ONE_VALUE, ONE_PIXEL, PIXELS = (1, CHANNELS), (1, CHANNELS, 1, 1), (4, CHANNELS, 1, 1)
ONE_IMAGE = (1, CHANNELS, 4, 3)
DEGENERATE = (ONE_VALUE, ONE_PIXEL, PIXELS, ONE_IMAGE)


@dataclass
class State:
    """A layer's parameters and running statistics as float64 arrays."""

    weight: np.ndarray
    bias: np.ndarray
    mean: np.ndarray | None = None
    var: np.ndarray | None = None
    batches: int = 0


@dataclass(frozen=True)
class Case:
    """One layer with options.

    Attributes:
        name: as registered.
        reference: (x channels first, state, all options, training) -> y; moves the state's running statistics.
        options: what the layer is made with.
        id: the case in test names.
        running_stats: whether the layer keeps BatchNorm2d's running statistics.
        shapes: inputs of every rank it takes.
        refuses: shapes from ``DEGENERATE`` that it refuses when training, and when evaluating.
        refusal: the text of that refusal.
        smooth: options under which no part of the training output is held constant in backward.
        rounding: error allowed in float64; float32's where a rate or bound is a float32 tensor.
    """

    name: str
    reference: Callable[[np.ndarray, State, Mapping[str, Any], bool], np.ndarray]
    options: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""
    running_stats: bool = False
    shapes: tuple[tuple[int, ...], ...] = (FLAT, SEQUENCE, IMAGE, VOLUME)
    refuses: tuple[frozenset, frozenset] = (frozenset(), frozenset())
    refusal: str = ""
    smooth: Mapping[str, Any] = field(default_factory=dict)
    rounding: float = 1e-11

    def __str__(self) -> str:
        return self.id or self.name

    def refuses_shape(self, shape: tuple[int, ...], training: bool) -> bool:
        """Whether the layer refuses this shape from ``DEGENERATE``."""
        return shape in self.refuses[0 if training else 1]

    def make(self, **more: Any) -> nn.Module:
        """The layer, with ``more`` options."""
        return normzoo.create_norm(self.name, CHANNELS, **{**self.options, **more})

    def made(self, **more: Any) -> nn.Module:
        """The layer with parameters and running statistics as after some training."""
        layer, rng = self.make(**more), np.random.default_rng(1)
        draws = {
            "weight": rng.uniform(0.5, 1.5, CHANNELS),
            "bias": rng.normal(size=CHANNELS),
            "running_mean": rng.normal(size=CHANNELS) / 2,
            "running_var": rng.uniform(0.5, 2.0, CHANNELS),
            "num_batches_tracked": np.array(3),
        }
        state = layer.state_dict()
        layer.load_state_dict({k: torch.from_numpy(draws[k]).to(v) for k, v in state.items()})
        return layer

    def expect(self, layer: nn.Module, x: Tensor) -> tuple[Tensor, State]:
        """Float64 output and state after ``layer(x)``, by the reference; call it before the layer moves."""
        channel_dim = layer.channel_dim if x.ndim > 2 else 1
        options = {**normzoo.norm_info(self.name).options, **self.options}
        options = {k: getattr(layer, k, v) for k, v in options.items()}
        state = state_of(layer)
        y = self.reference(_array(x.movedim(channel_dim, 1)), state, options, layer.training)
        return torch.from_numpy(y).movedim(1, channel_dim), state


def state_of(layer: nn.Module) -> State:
    """A float64 copy of what the layer holds."""
    held = {k: _array(v) for k, v in layer.state_dict().items()}
    return State(
        held.get("weight", np.ones(CHANNELS)),
        held.get("bias", np.zeros(CHANNELS)),
        held.get("running_mean"),
        held.get("running_var"),
        int(held.get("num_batches_tracked", 0)),
    )


def _array(t: Tensor) -> np.ndarray:
    return t.detach().to(torch.float64).numpy().copy()


def _moments(v: np.ndarray) -> tuple[float, float]:
    mean = v.sum() / v.size
    return mean, ((v - mean) ** 2).sum() / v.size


def batch(x: np.ndarray, s: State, o: Mapping[str, Any], training: bool) -> np.ndarray:
    y = np.empty_like(x)
    s.batches += training
    rate = (1 / s.batches if o["momentum"] is None else o["momentum"]) if training else 0.0
    for c in range(x.shape[1]):
        v = x[:, c]
        mean, var = _moments(v) if training else (s.mean[c], s.var[c])
        y[:, c] = (v - mean) / math.sqrt(var + o["eps"]) * s.weight[c] + s.bias[c]
        if training:
            s.mean[c] = (1 - rate) * s.mean[c] + rate * mean
            s.var[c] = (1 - rate) * s.var[c] + rate * var * v.size / (v.size - 1)
    return y


def batch_renorm(x: np.ndarray, s: State, o: Mapping[str, Any], training: bool) -> np.ndarray:
    if not training:
        return batch(x, s, o, training=False)
    y = np.empty_like(x)
    r_max, d_max = (float(np.interp(s.batches, *zip(*o[k], strict=True))) for k in ("r_max", "d_max"))
    s.batches += 1
    rate = 1 / s.batches if o["momentum"] is None else o["momentum"]
    for c in range(x.shape[1]):
        v, mu, sigma = x[:, c], s.mean[c], math.sqrt(s.var[c] + o["eps"])
        mean, var = _moments(v)
        std = math.sqrt(var + o["eps"])
        r = min(max(std / sigma, 1 / r_max), r_max)
        d = min(max((mean - mu) / sigma, -d_max), d_max)
        y[:, c] = ((v - mean) / std * r + d) * s.weight[c] + s.bias[c]
        s.mean[c] = (1 - rate) * mu + rate * mean
        if o["average"] == "std":
            s.var[c] = ((1 - rate) * sigma + rate * std) ** 2 - o["eps"]
        else:
            s.var[c] = (1 - rate) * s.var[c] + rate * var
    return y


def group(x: np.ndarray, s: State, o: Mapping[str, Any], training: bool) -> np.ndarray:
    y, size = np.empty_like(x), x.shape[1] // o["groups"]
    for n in range(x.shape[0]):
        for start in range(0, x.shape[1], size):
            mean, var = _moments(x[n, start : start + size])
            for c in range(start, start + size):
                y[n, c] = (x[n, c] - mean) / math.sqrt(var + o["eps"]) * s.weight[c] + s.bias[c]
    return y


def layer(x: np.ndarray, s: State, o: Mapping[str, Any], training: bool) -> np.ndarray:
    return group(x, s, {**o, "groups": 1}, training)


def instance(x: np.ndarray, s: State, o: Mapping[str, Any], training: bool) -> np.ndarray:
    return group(x, s, {**o, "groups": x.shape[1]}, training)


def none(x: np.ndarray, s: State, o: Mapping[str, Any], training: bool) -> np.ndarray:
    y = np.empty_like(x)
    for c in range(x.shape[1]):
        y[:, c] = x[:, c] + s.bias[c]
    return y


_BATCH = Case(
    "batch",
    batch,
    running_stats=True,
    refuses=(frozenset({ONE_VALUE, ONE_PIXEL}), frozenset()),
    refusal=r"more than one value per channel when training; the input has shape \(1, 6",
)
_RENORM = Case(
    "batch_renorm",
    batch_renorm,
    {"r_max": 1.25, "d_max": 0.25, "momentum": 0.25},
    running_stats=True,
    smooth={"r_max": 1.0, "d_max": 0.0},
)
_ALONE = frozenset({ONE_VALUE, ONE_PIXEL, PIXELS})

CASES = (
    _BATCH,
    dataclasses.replace(_BATCH, id="batch-cumulative", options={"momentum": None, "eps": 1e-3}, rounding=1e-6),
    _RENORM,
    dataclasses.replace(
        _RENORM,
        id="batch_renorm-scheduled",
        options={"average": "variance", "r_max": [(0, 1.0), (6, 3.0)], "d_max": [(1, 0), (9, 4)], "eps": 1e-3},
        rounding=1e-6,
    ),
    dataclasses.replace(
        _RENORM, id="batch_renorm-cumulative", options={**_RENORM.options, "momentum": None}, rounding=1e-6
    ),
    Case("group", group, {"groups": 2}),
    Case("group", group, {"groups": 3, "eps": 1e-3}, id="group-3"),
    Case("layer", layer),
    Case(
        "instance",
        instance,
        shapes=(SEQUENCE, IMAGE, VOLUME),
        refuses=(_ALONE, _ALONE),
        refusal=r"each of the 6 groups holds a single value of the input of shape \(",
    ),
    Case("none", none),
)

ONE_EACH = list({case.name: case for case in reversed(CASES)}.values())[::-1]
SHAPED = [pytest.param(c, s, id=f"{c}-{len(s)}d") for c in CASES for s in c.shapes]

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_layer = pytest.mark.parametrize("case", ONE_EACH, ids=str)
train_and_eval = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def sample(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype) * 2 + 0.5


def assert_state(layer: nn.Module, expected: State, **tolerance: float) -> None:
    """What the layer holds is what the reference left."""
    held = state_of(layer)
    assert held.batches == expected.batches
    for name in ("weight", "bias", "mean", "var"):
        if getattr(expected, name) is not None:
            np.testing.assert_allclose(getattr(held, name), getattr(expected, name), **tolerance)


def gradients(layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """The output and all gradients."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x)
    y.backward(dy)
    named = {k.removeprefix("_orig_mod."): p.grad for k, p in layer.named_parameters()}
    return {"y": y.detach(), "x": x.grad, **named}
