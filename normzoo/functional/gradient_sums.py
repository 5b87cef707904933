"""Sums over batch and space that a convolution's gradient is made of, with and without signs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def convolution_gradient_sums(
    x: Tensor,
    grad_output: Tensor,
    kernel_shape: Sequence[int],
    *,
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """The gradient of a convolution's kernel, and the sum of the magnitudes of the terms that it is the sum of.

    An entry of the kernel's gradient is a sum over batch and space of an input times an output gradient: for one group
    and one dimension, ``sum over b and p of grad_output[b, o, p] * x[b, i, stride * p + dilation * k]``. The magnitude
    of a product is the product of the magnitudes, so that the sum of magnitudes is the kernel's gradient for
    ``x.abs()`` and ``grad_output.abs()``, and costs as much as the gradient itself.

    Args:
        x: (N, I, *space) input, padded as the convolution pads it.
        grad_output: (N, O, *space) gradient of the loss by the convolution's output.
        kernel_shape: (O, I / groups, *kernel).
        stride: of each spatial dimension.
        dilation: of each spatial dimension.
        groups: of channels.

    Returns:
        the gradient and the sum of magnitudes, of the kernel's shape, in float32 or wider. No entry of the first is
        larger in magnitude than that of the second, up to rounding.

    Source: Bjorck et al. 2018, arXiv 1806.02375, equation 4 and table 1.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, grad_output.dtype), torch.float32)
    x, grad_output = x.detach().to(dtype), grad_output.detach().to(dtype)
    like = x.new_empty(1).expand(*kernel_shape)
    space = len(kernel_shape) - 2

    def kernel_gradient(x: Tensor, g: Tensor) -> Tensor:
        options = (list(stride), [0] * space, list(dilation), False, [0] * space, groups)
        return torch.ops.aten.convolution_backward(g, x, like, None, *options, (False, True, False))[1]

    return kernel_gradient(x, grad_output), kernel_gradient(x.abs(), grad_output.abs())


def channel_means(values: Tensor, groups: int = 1) -> tuple[Tensor, Tensor]:
    """Means of a kernel's values over the entries of each output channel, and over those of each input channel.

    Args:
        values: (O, I / groups, *kernel).
        groups: of channels.

    Returns:
        (O,) and (I,) float64 tensors.
    """
    entries = values.double().flatten(2).mean(2)
    return entries.mean(1), entries.unflatten(0, (groups, -1)).mean(1).flatten()
