"""The one table of registered layers, with options that exercise them.

A case names a layer, its options, the inputs it takes and refuses, what it cannot keep of the suite with them, and its
formula written as slow, obvious float64 loops (``norm_references.py``). ``tests/layers/test_conformance.py`` holds
every case to ``normzoo.testing`` and fails if a registered layer has none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import norm_references as references
import numpy as np
import pytest
import torch
from norm_references import State
from torch import Tensor, nn

import normzoo

CHANNELS = 6
FLAT, SEQUENCE, IMAGE, VOLUME = (5, CHANNELS), (3, CHANNELS, 4), (3, CHANNELS, 4, 3), (2, CHANNELS, 2, 3, 2)
# What is left when the batch, the map or both shrink to one: a layer normalizes or refuses it, with a reason.
ONE_VALUE = tuple((1, CHANNELS, *[1] * space) for space in range(4))
PIXELS, ONE_IMAGE = (4, CHANNELS, 1, 1), (1, CHANNELS, 4, 3)
DEGENERATE = (*ONE_VALUE, PIXELS, ONE_IMAGE)

Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def _uniform(low: float, high: float) -> Draw:
    return lambda rng, shape: rng.uniform(low, high, shape)


def _normal(scale: float) -> Draw:
    return lambda rng, shape: scale * rng.normal(size=shape)


# What parameters and buffers may hold after some training.
DRAWS: dict[str, Draw] = {
    "weight": _uniform(0.5, 1.5),
    "bias": _normal(1.0),
    "running_mean": _normal(0.5),
    "running_var": _uniform(0.5, 2.0),
    "running_phi": _uniform(0.5, 2.0),
    "running_whitening": lambda rng, shape: np.eye(shape[-1]) + 0.2 * rng.normal(size=shape),
    "num_batches_tracked": lambda rng, shape: np.array(3),
    "drift_mean": _normal(0.25),
    "drift_scale": _normal(0.25),
    "ema_gz": _normal(0.25),
    "v": _normal(1.0),
    "tau": _normal(0.5),
    "alpha": _uniform(0.3, 0.9),
    "shift": _normal(0.5),
    "sigma": _uniform(0.3, 1.0),
    "gate": _uniform(0.1, 0.9),
    "mean_weight": _normal(1.0),
    "var_weight": _normal(1.0),
    "proxy_weight": _normal(0.25),
    "proxy_bias": _normal(0.25),
}


@dataclass(frozen=True)
class Case:
    """One layer with options.

    Attributes:
        name: as registered.
        options: what the layer is made with.
        id: the case in test names.
        ranks: dimensions of the inputs that it takes.
        refuses: shapes from ``DEGENERATE`` that it refuses when training, and when evaluating.
        refusal: the text of that refusal.
        like_torch: whether ``torch.nn.BatchNorm2d`` evaluates the same from the same state dict.
        differentiates: whether backward is the gradient of the output, when training and when evaluating.
        exceptions: what it cannot keep of ``normzoo.testing.CHECKS`` with these options; None for what is declared in
            the registry.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""
    ranks: tuple[int, ...] = (2, 3, 4, 5)
    refuses: tuple[frozenset, frozenset] = (frozenset(), frozenset())
    refusal: str = ""
    like_torch: bool = False
    differentiates: tuple[bool, bool] = (True, True)
    exceptions: Mapping[str, str] | None = None

    def __str__(self) -> str:
        return self.id or self.name

    @property
    def defaults(self) -> dict[str, Any]:
        """The layer's options and their defaults."""
        return normzoo.norm_info(self.name).options

    def refuses_shape(self, shape: tuple[int, ...], training: bool) -> bool:
        """Whether the layer refuses this shape from ``DEGENERATE``."""
        return shape in self.refuses[0 if training else 1]

    def make(self, **more: Any) -> nn.Module:
        """The layer, with ``more`` options."""
        return normzoo.create_norm(self.name, CHANNELS, **{**self.options, **more})

    def made(self, **more: Any) -> nn.Module:
        """The layer with parameters and running statistics as after some training."""
        layer, rng = self.make(**more), np.random.default_rng(1)
        drawn = {k: torch.from_numpy(DRAWS[k](rng, tuple(v.shape))).to(v) for k, v in layer.state_dict().items()}
        layer.load_state_dict(drawn)
        return layer

    def options_of(self, layer: nn.Module) -> dict[str, Any]:
        """All options of a layer of this case, as it holds them."""
        return {k: getattr(layer, k, v) for k, v in {**self.defaults, **self.options}.items()}

    def expect(self, layer: nn.Module, x: Tensor) -> tuple[Tensor, State]:
        """Float64 output and state after ``layer(x)``, by the reference; call it before the layer moves."""
        channel_dim, state = layer.channel_dim if x.ndim > 2 else 1, state_of(layer)
        reference = getattr(references, self.name)
        y = reference(array(x.movedim(channel_dim, 1)), state, self.options_of(layer), layer.training)
        return torch.from_numpy(y).movedim(1, channel_dim), state

    @property
    def factory(self) -> Callable[..., nn.Module]:
        """What the suite makes the layer with."""
        return normzoo.get_norm(self.name, **self.options)

    def reference(self, layer: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """:meth:`expect` as the suite takes it."""
        y, state = self.expect(layer, x)
        return y, {k: torch.from_numpy(state[k]) for k in layer.state_dict()}


def state_of(layer: nn.Module) -> State:
    """A float64 copy of what the layer holds, by name; weight 1 and bias 0 where it has none."""
    held = {k: array(v) for k, v in layer.state_dict().items()}
    return {"weight": np.ones(CHANNELS), "bias": np.zeros(CHANNELS), **held}


def array(t: Tensor) -> np.ndarray:
    return t.detach().to(torch.float64).numpy().copy()


def _variant(case: Case, name: str, options: Mapping[str, Any], **changes: Any) -> Case:
    return dataclasses.replace(case, id=f"{case.name}-{name}", options=options, **changes)


_MAPS = (3, 4, 5)
_SINGLE, _ALONE = frozenset(ONE_VALUE), frozenset({*ONE_VALUE, PIXELS})
_IN_TRAINING = {"refuses": (_SINGLE, frozenset())}
_OF_GROUPS = {
    "ranks": _MAPS,
    "refuses": (_ALONE, _ALONE),
    "refusal": r"each of the 6 groups holds a single value of the input of shape \(",
}

_MORE = r"more than one value per channel when training; the input has shape \(1, 6"

_BATCH = Case(
    "batch",
    like_torch=True,
    **_IN_TRAINING,
    refusal=_MORE,
)
_CONSTANT = "the corrections are constants in backward"
_RENORM = Case(
    "batch_renorm",
    {"r_max": 1.25, "d_max": 0.25, "momentum": 0.25},
    like_torch=True,
    exceptions={
        "gradcheck": _CONSTANT,
        "gradgradcheck": _CONSTANT,
        "running_statistics": "corrections within these bounds do not make training what evaluation is",
    },
    **_IN_TRAINING,
    refusal=_MORE,
)
_GHOST = Case(
    "ghost_batch",
    {"ghost_size": 2},
    ranks=_MAPS,  # of the five samples of a flat input the last would be alone
    like_torch=True,
    **_IN_TRAINING,
    refusal=r"with ghost_size=\d a virtual batch has one value per channel of the input of shape \(",
)
_L1 = Case(
    "l1_batch",
    **_IN_TRAINING,
    refusal=_MORE,
)
_BATCH_GROUP = Case("batch_group", {"groups": 2}, like_torch=True)
_ITER = Case(
    "iter_norm",
    {"groups": 2},
    **_IN_TRAINING,
    refusal=f"whitening needs {_MORE}",
)
_EVO_B0 = Case("evonorm_b0", **_IN_TRAINING, refusal=_MORE)
_EVO_S0 = Case("evonorm_s0", {"groups": 2})
# In training their backward is a control process; see test_control_process.py.
_ONLINE = Case("online", {"momentum": 0.2, "momentum_backward": 0.3, "clamp_value": 1.0}, differentiates=(False, True))
_POWER = Case("power", {"warmup": 5, "momentum_backward": 0.25}, differentiates=(False, True))
_SWITCHABLE = Case("switchable", **_IN_TRAINING, refusal=_MORE)
_BATCH_INSTANCE = Case("batch_instance", **_IN_TRAINING, refusal=_MORE)
_PROXY = Case("proxy", {"samples": 50})

CASES = (
    _BATCH,
    _variant(_BATCH, "cumulative", {"momentum": None, "eps": 1e-3}),
    _RENORM,
    _variant(
        _RENORM,
        "scheduled",
        {"average": "variance", "r_max": [(0, 1.0), (6, 3.0)], "d_max": [(1, 0), (9, 4)], "eps": 1e-3},
    ),
    _variant(_RENORM, "cumulative", {**_RENORM.options, "momentum": None}),
    # Without corrections, which are constants in backward, it is batch norm.
    _variant(_RENORM, "uncorrected", {"r_max": 1.0, "d_max": 0.0, "average": "variance"}, exceptions=None),
    _GHOST,
    _variant(
        _GHOST,
        "remainder",
        {"ghost_size": 3, "momentum": None},
        ranks=(2, 3, 4, 5),
        refuses=(_ALONE, frozenset()),
    ),
    Case("frozen_batch", {"eps": 1e-3}, like_torch=True),
    _L1,
    _variant(
        _L1,
        "cumulative",
        {"momentum": None, "eps": 1e-2},
        exceptions={"state_dict": "its eps is added to a deviation and torch's to a variance"},
    ),
    _BATCH_GROUP,
    _variant(
        _BATCH_GROUP,
        "6",
        {"groups": 6, "momentum": None},
        **_IN_TRAINING,
        refusal=_MORE,
    ),
    _ITER,
    _variant(_ITER, "whole", {"iterations": 3, "eps": 1e-2, "momentum": None}),
    _EVO_B0,
    _variant(_EVO_B0, "linear", {"act_layer": None, "momentum": None, "eps": 1e-2}),
    _ONLINE,
    _variant(_ONLINE, "layer", {"momentum": 0.2, "momentum_backward": 0.3, "compensation": "layer"}),
    _variant(_ONLINE, "plain", {"momentum": 0.2, "compensation": None, "eps": 1e-2}),
    _POWER,
    _variant(
        _POWER,
        "groups",
        {"warmup": 0, "groups": 2, "momentum": 0.3},
        exceptions={
            **normzoo.norm_info("power").exceptions,
            "batch_dependence": "without warm-up it scales by the batches before",
        },
    ),
    _variant(_POWER, "cumulative", {"momentum": None, "eps": 1e-2}),
    Case("group", {"groups": 2}),
    Case("group", {"groups": 3, "eps": 1e-3}, id="group-3"),
    Case("layer"),
    Case("layer_channel"),
    Case("instance", **_OF_GROUPS),
    Case("rms"),
    Case("rms", {"bias": True, "eps": 1e-2}, id="rms-bias"),
    Case("filter_response"),
    Case("filter_response", {"act_layer": None, "eps": 1e-2}, id="filter_response-linear"),
    _EVO_S0,
    _variant(_EVO_S0, "linear", {"groups": 3, "act_layer": None, "eps": 1e-2}),
    Case("positional"),
    Case("positional", {"unbiased": True, "eps": 1e-2}, id="positional-unbiased"),
    Case("local_response", {"alpha": 0.3, "affine": True}),
    Case("local_response", {"size": 4, "alpha": 0.5, "beta": 0.5, "k": 1.0, "mean": True}, id="local_response-even"),
    Case("divisive", {"mean_window": 3}),
    Case("divisive", {"mean_window": 2, "square_window": 4, "learn_sigma": True}, id="divisive-even"),
    _SWITCHABLE,
    _variant(
        _SWITCHABLE,
        "unbiased",
        {"unbiased_instance": True, "momentum": None, "eps": 1e-2},
        ranks=_MAPS,
        refuses=(_ALONE, _ALONE),
        refusal=r"an unbiased instance variance needs more than one position; the input has shape \(",
    ),
    _BATCH_INSTANCE,
    _variant(_BATCH_INSTANCE, "cumulative", {"momentum": None, "eps": 1e-2}),
    _PROXY,
    _variant(_PROXY, "3", {"groups": 3, "act_layer": nn.SiLU, "proxy_eps": 0.1}),
    _variant(_PROXY, "identity", {"groups": 6, "act_layer": None, "eps": 1e-2}, **_OF_GROUPS),
    Case("none"),
    Case("affine"),
    Case("dynamic_tanh", {"alpha_init": 0.8}),
    Case("derf", {"shift_init": 0.3}),
)

ONE_EACH = list({case.name: case for case in reversed(CASES)}.values())[::-1]


every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_layer = pytest.mark.parametrize("case", ONE_EACH, ids=str)
train_and_eval = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def sample(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype) * 2 + 0.5


def assert_state(layer: nn.Module, expected: State, **tolerance: float) -> None:
    """What the layer holds is what the reference left."""
    held = state_of(layer)
    assert held.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(held[name], value, err_msg=name, **tolerance)


def gradients(layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """The output and all gradients."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x)
    y.backward(dy)
    named = {k.removeprefix("_orig_mod."): p.grad for k, p in layer.named_parameters()}
    return {"y": y.detach(), "x": x.grad, **named}
