"""Sums of a convolution's gradient against loops over every term, in float64."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from normzoo.functional import channel_means, convolution_gradient_sums

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "1x1": {"kernel": (1, 1)},
    "1x1, strided": {"kernel": (1, 1), "stride": (2, 2)},
    "oblong": {"kernel": (3, 2)},
    "padding": {"padding": (1, 2)},
    "stride": {"stride": (2, 1)},
    "stride beyond the last position": {"stride": (3, 3)},  # some inputs belong to no output
    "dilation": {"space": (5, 6), "dilation": (1, 2)},
    "groups": {"groups": 2},
    "depthwise": {"groups": 4, "outputs": 8},
    "all": {"kernel": (2, 3), "stride": (2, 3), "padding": (2, 1), "dilation": (2, 1), "groups": 2},
    "one dimension": {"space": (9,), "kernel": (3,), "stride": (2,), "padding": (1,), "dilation": (2,)},
    "three dimensions": {"space": (3, 4, 3), "kernel": (2, 2, 1), "stride": (1, 2, 1), "padding": (0, 1, 0)},
}


def by_loops(x: Tensor, g: Tensor, shape: Sequence[int], stride: Any, dilation: Any, groups: int) -> tuple[Any, Any]:
    """The definition: every term of every entry, one after the other."""
    total, magnitudes = torch.zeros(*shape, dtype=torch.float64), torch.zeros(*shape, dtype=torch.float64)
    outputs, inputs, *kernel = shape
    for o, i, *k in itertools.product(range(outputs), range(inputs), *map(range, kernel)):
        channel = o // (outputs // groups) * inputs + i
        for b, *p in itertools.product(range(len(x)), *map(range, g.shape[2:])):
            place = tuple(s * at + d * j for s, at, d, j in zip(stride, p, dilation, k, strict=True))
            term = g[(b, o, *p)] * x[(b, channel, *place)]
            total[(o, i, *k)] += term
            magnitudes[(o, i, *k)] += term.abs()
    return total, magnitudes


@pytest.mark.parametrize("name", CASES)
def test_both_sums_are_those_of_the_terms(name: str) -> None:
    given = {"space": (5, 4), "kernel": (3, 3), "groups": 1, "outputs": 4} | CASES[name]
    space, kernel, groups = given["space"], given["kernel"], given["groups"]
    stride, padding, dilation = (
        given.get(what, (default,) * len(space)) for what, default in (("stride", 1), ("padding", 0), ("dilation", 1))
    )
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, *space, dtype=torch.float64, generator=generator)
    weight = torch.randn(given["outputs"], 4 // groups, *kernel, dtype=torch.float64, generator=generator)
    weight.requires_grad_()
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(space) - 1]
    output = convolve(x, weight, None, stride, padding, dilation, groups)
    g = torch.randn(output.shape, dtype=torch.float64, generator=generator)
    padded = F.pad(x, [n for p in reversed(padding) for n in (p, p)])
    options = {"stride": stride, "dilation": dilation, "groups": groups}
    sums, magnitudes = convolution_gradient_sums(padded, g, weight.shape, **options)
    loops = by_loops(padded, g, weight.shape, stride, dilation, groups)
    torch.testing.assert_close((sums, magnitudes), loops, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sums, torch.autograd.grad(output, weight, g)[0])
    assert (sums.abs() <= magnitudes * (1 + 1e-12)).all()
    assert not torch.allclose(sums.abs(), magnitudes)
    assert not sums.requires_grad


def test_terms_of_one_sign_do_not_cancel() -> None:
    x, g = torch.rand(3, 2, 6, 6), -torch.rand(3, 4, 4, 4)
    sums, magnitudes = convolution_gradient_sums(x, g, (4, 2, 3, 3), stride=(1, 1), dilation=(1, 1))
    assert torch.equal(-sums, magnitudes)


def test_half_precision_is_summed_in_float32() -> None:
    x = torch.full((1, 1, 64, 64), 8.0, dtype=torch.float16)
    g = torch.full((1, 1, 64, 64), 8.0, dtype=torch.float16)
    sums, magnitudes = convolution_gradient_sums(x, g, (1, 1, 1, 1), stride=(1, 1), dilation=(1, 1))
    assert sums.dtype is magnitudes.dtype is torch.float32
    assert sums.item() == magnitudes.item() == 64 * 64 * 64  # beyond the range of float16


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_means_of_channels_are_those_of_their_entries(groups: int) -> None:
    values = torch.rand(8, 4 // groups, 3, 2)
    output, of_input = channel_means(values, groups)
    entries: dict[tuple[str, int], list[float]] = {}
    for o, i, k, j in itertools.product(*map(range, values.shape)):
        channel = o // (8 // groups) * (4 // groups) + i
        entries.setdefault(("output", o), []).append(values[o, i, k, j].item())
        entries.setdefault(("input", channel), []).append(values[o, i, k, j].item())
    for what, means in (("output", output), ("input", of_input)):
        expected = [sum(entries[what, c]) / len(entries[what, c]) for c in range(len(means))]
        assert means.tolist() == pytest.approx(expected)
    assert output.dtype is of_input.dtype is torch.float64
    assert (len(output), len(of_input)) == (8, 4)
