"""The floor of each layer: the large kernels of PyTorch that its forward and backward cannot do without.

Eager mode cannot fuse, so that each step of a formula is a kernel that passes over the whole tensor. ``FLOORS`` counts
them by kind, ``kernels`` has a call of each kind to be timed in the layer's own rounds, taking turns with it; their
times added up are the floor. Small tensors (a value for each channel or sample), allocation where a kernel takes
``out=``, and Python cost nothing in it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten


def kernels(x: Tensor, dy: Tensor, kinds: Iterable[str]) -> dict[str, Callable[[], Any]]:
    """One call of each of the kinds of kernel on detached (N, C, H, W) tensors."""
    n, c, h, w = x.shape
    weight, zero, one = torch.rand(c), torch.zeros(c), torch.ones(c)
    group = torch.zeros(n, 8), torch.ones(n, 8)
    last, d_last = x.movedim(1, -1), dy.movedim(1, -1)
    position = torch.zeros(n, h, w, 1), torch.ones(n, h, w, 1)
    size = min(c, 64)
    rows = x.movedim(1, -1).reshape(-1, c // size, size).transpose(0, 1).contiguous()
    matrix, product = torch.rand(c // size, size, size), torch.empty_like(rows)
    square, squared = torch.rand(2, c // size, size, size)
    positive, y = x.abs(), torch.empty_like(x)
    grouped, grouped_y, factor = x.unflatten(1, (8, -1)), y.unflatten(1, (8, -1)), torch.rand(n, 8, 1, h, w)
    ghosts, statistics = list(zip(*(t.split(16) for t in (x, dy, y)), strict=True)), torch.empty(2, c)

    def ghost_norm() -> None:
        for part, _, out in ghosts:
            torch.native_batch_norm(part, weight, zero, None, None, True, 0.0, 1e-5, out=(out, *statistics))

    def ghost_norm_backward() -> None:
        for part, d_part, _ in ghosts:
            _aten.native_batch_norm_backward(d_part, part, weight, None, None, zero, one, True, 1e-5, everything)

    def group_sum() -> Tensor:  # the faster of two ways
        return grouped.sum(2) if c >= 64 else functools.reduce(torch.add, grouped.unbind(2))

    everything = [True, True, True]
    calls = {
        "pass": lambda: torch.mul(x, dy, out=y),
        "group_pass": lambda: torch.mul(grouped, factor, out=grouped_y),
        "group_sum": group_sum,
        "sum": lambda: x.sum((0, 2, 3)),
        "sigmoid": lambda: torch.sigmoid(x, out=y),
        "erf": lambda: torch.erf(x, out=y),
        "exp": lambda: torch.exp(x, out=y),
        "sqrt": lambda: torch.sqrt(positive, out=y),
        "newton": lambda: torch.bmm(square, square, out=squared),
        "matmul": lambda: torch.bmm(rows, matrix, out=product),
        "batch_norm": lambda: torch.native_batch_norm(x, weight, zero, None, None, True, 0.0, 1e-5),
        "batch_norm_backward": lambda: _aten.native_batch_norm_backward(
            dy, x, weight, None, None, zero, one, True, 1e-5, everything
        ),
        "ghost_norm": ghost_norm,
        "ghost_norm_backward": ghost_norm_backward,
        "affine_backward": lambda: _aten.native_batch_norm_backward(
            dy, x, weight, zero, one, None, None, False, 0.0, everything
        ),
        "group_norm": lambda: torch.native_group_norm(x, weight, zero, n, c, h * w, 8, 1e-5),
        "group_norm_backward": lambda: _aten.native_group_norm_backward(
            dy, x, *group, weight, n, c, h * w, 8, everything
        ),
        "layer_norm": lambda: torch.native_layer_norm(last, [c], weight, zero, 1e-5),
        "layer_norm_backward": lambda: _aten.native_layer_norm_backward(
            d_last, last, [c], *position, weight, zero, everything
        ),
    }
    return {kind: calls[kind] for kind in kinds}


_MOMENTS = {"sum": 2, "pass": 1}  # the mean, the squared differences and their sum


def _count(*parts: dict[str, int], **more: int) -> dict[str, int]:
    total: dict[str, int] = {}
    for part in (*parts, more):
        for kind, number in part.items():
            kind = "pass" if kind == "passes" else kind
            total[kind] = total.get(kind, 0) + number
    return total


_BATCH = _count(batch_norm=1, batch_norm_backward=1)
# moments, scale and shift; the product with dy, its sum and dy's, and dx = a * dy + b * x + c, which are two
_BY_SAMPLE = _count(_MOMENTS, passes=4, sum=2)
_GROUP = {
    "contiguous": _count(group_norm=1, group_norm_backward=1),
    "channels_last": _count(_MOMENTS, passes=1, group_norm_backward=1),
}
# moments, less the mean, over the deviation, scale and shift; the same without moments, scale and shift backward,
# product, two sums, and dx
_POSITION = {
    "contiguous": _count(_MOMENTS, passes=8, sum=2, affine_backward=1),
    "channels_last": _count(layer_norm=1, layer_norm_backward=1),
}
FLOORS: dict[str, Any] = {
    "affine": _count(passes=1, affine_backward=1),
    "batch": _BATCH,
    "batch_group": _BY_SAMPLE,
    "batch_instance": _BY_SAMPLE,
    "batch_renorm": _BATCH,
    # forward: product, shift, erf, scale and shift; backward: product, shift, erf, scale and shift backward, square,
    # exp, product, the sums for alpha and shift, product
    "derf": _count(passes=7, erf=2, exp=1, affine_backward=1, sum=2),
    # forward: moments over channels, less the mean, over the deviation, scale and shift (windows are of one channel);
    # backward: moments, less the mean, over the deviation, scale and shift backward, product, two sums, dx in three
    "divisive": _count(_MOMENTS, _MOMENTS, passes=9, sum=2, affine_backward=1),
    # forward: product, sigmoid, scale and shift; backward: product, sigmoid, scale and shift backward, sigmoid
    # backward, the sum for alpha, product
    "dynamic_tanh": _count(passes=5, sigmoid=2, affine_backward=1, sum=1),
    # forward: moments, the excess, clamp, sum, quotient, scale and shift; backward: the excess, clamp, sum, inverse,
    # quotient, scale and shift backward, two products, threshold, two sums, the product and sum for v, dx in four
    "evonorm_b0": _count(_MOMENTS, passes=17, sum=5),
    # forward: moments, product, sigmoid, product, scale and shift; backward: product, sigmoid, product with dy, sigmoid
    # backward, the products and sums for scale and v, two for the gate's share of dx, the sum for bias, dx in two
    "evonorm_s0": _count(_MOMENTS, passes=11, sigmoid=2, sum=3),
    # forward: squares, their sum, scale and shift, threshold; backward: scale and shift, threshold, product, its sum
    # and two for bias and tau, dx in two
    "filter_response": _count(passes=8, sum=4),
    "frozen_batch": _count(passes=2),
    # batch norm's kernels once for each virtual batch of 16 samples
    "ghost_batch": _count(ghost_norm=1, ghost_norm_backward=1),
    "group": _GROUP,
    "instance": {"contiguous": _GROUP["contiguous"], "channels_last": _BY_SAMPLE},
    # moments, less the mean, mixing; less the mean, the product with dy, its sum, mixing of dy and of x; and, small but
    # no less work than those, the products of Newton's four iterations after the first, three forward, five backward
    "iter_norm": _count(passes=2, sum=2, matmul=5, newton=32),
    # the mean, deviations and their sum, scale and shift; scale and shift backward, signs and their sum, dx
    "l1_batch": _count(passes=5, sum=3, affine_backward=1),
    "layer": _GROUP,
    "layer_channel": _POSITION,
    # forward: squares, five of the window, its share, sum, two roots, two products; backward: those but the last, the
    # product with dy, that over the divisor, five of the window, dx in two
    "local_response": _count(passes=27, sqrt=4),
    "none": _count(passes=1, sum=1),
    # moments, scale and shift, clamp; those without moments, clamp backward, product with dy, its sum and dy's, dx
    "online": _count(_MOMENTS, passes=7, sum=2),
    "positional": _POSITION,
    # squares, their sum, scale and shift; scale and shift backward, dx
    "power": _count(passes=3, sum=1, affine_backward=1),
    # squares, their sum over groups, product, squares, their sum, scale and shift; product, scale and shift backward,
    # the share of the state, product, its sum over groups, dx in two
    "power-groups": _count(passes=5, sum=1, group_pass=4, group_sum=2, affine_backward=1),
    # moments, scale and shift, activation, scale and shift; scale and shift, activation, scale and shift backward,
    # activation backward, product, its sum and dy's, dx in two
    "proxy": _count(_MOMENTS, passes=9, sum=2, affine_backward=1),
    # squares, their sum, two products; in backward as above
    "rms": {
        "contiguous": _count(passes=7, sum=2, affine_backward=1),
        "channels_last": _count(passes=4, sum=2, layer_norm_backward=1),
    },
    "switchable": _BY_SAMPLE,
}


def counts(name: str, memory_format: str) -> dict[str, int]:
    """How many kernels of each kind a layer needs."""
    found = FLOORS[name]
    return found.get(memory_format, found)


def floor(name: str, memory_format: str, seconds: dict[str, float]) -> float:
    """Seconds of a layer's floor from those of the kernels."""
    return sum(number * seconds[kind] for kind, number in counts(name, memory_format).items())
