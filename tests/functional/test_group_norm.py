"""Group normalization of channels-last maps, whose gradient arrives in any layout."""

from __future__ import annotations

import pytest
import torch
from norm_cases import sample
from torch import Tensor
from torch.testing import assert_close

from normzoo.functional._group_function import NATIVE
from normzoo.functional.group import group_norm

CHANNELS = 2 * NATIVE
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def laid_out(x: Tensor, layout: str) -> Tensor:
    """``x`` as it is, channels-last, or as a part of a larger channels-last tensor."""
    if layout == "part":
        return torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, : x.shape[1]]
    return x.contiguous(memory_format=FORMATS[layout])


@pytest.mark.parametrize("of_dy", [*FORMATS, "part"])
@pytest.mark.parametrize("of_x", [*FORMATS, "part"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_gradients_are_those_of_the_formula_in_float64(groups: int, of_x: str, of_dy: str) -> None:
    shape = (3, CHANNELS, 4, 3)
    x, weight, bias, dy = (sample(s, seed=i) for i, s in enumerate((shape, (CHANNELS,), (CHANNELS,), shape)))
    found = []
    for dtype, layouts in ((torch.float64, ("contiguous", "contiguous")), (torch.float32, (of_x, of_dy))):
        narrow = [t.to(dtype) for t in (x, weight, bias)]
        leaves = [laid_out(narrow[0], layouts[0]).requires_grad_(), *(t.clone().requires_grad_() for t in narrow[1:])]
        norm = torch.nn.functional.group_norm if dtype == torch.float64 else group_norm
        y = norm(leaves[0], groups, *leaves[1:])
        found.append([y, *torch.autograd.grad(y, leaves, laid_out(dy.to(dtype), layouts[1]))])
    for want, got in zip(*found, strict=True):
        assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
