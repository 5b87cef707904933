"""Filter response normalization and its thresholded linear unit (Singh & Krishnan 2020, arXiv 1911.09737)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normzoo._shapes import per_channel
from normzoo.functional._channel_affine import channel_affine


def filter_response_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    tau: Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> Tensor:
    """``y = max(x / sqrt(nu2 + eps) * weight + bias, tau)`` with nu2 the mean of x^2 over space, nothing subtracted.

    Args:
        x: (N, C, ...), not empty.
        weight: (C,), the scale; 1 if None.
        bias: (C,), the shift; 0 if None.
        tau: (C,), the threshold of the thresholded linear unit; none if None.
        eps: added to the mean square.

    Returns:
        a tensor of the shape, dtype and memory format of ``x``.

    Source: Singh & Krishnan 2020, arXiv 1911.09737, equations 1-3.
    """
    unit, threshold = (None, ()) if tau is None else (_Threshold(), (tau,))
    rule = _MeanSquare(eps)
    return channel_affine(x, rule, weight, bias, sample=True, after=unit, after_tensors=threshold)[0]


@dataclass(frozen=True)
class _MeanSquare:
    """Division by the root mean square of each sample's channel, which is var + mean^2."""

    eps: float
    about_zero = True

    def __call__(self, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        scale = (torch.addcmul(var, mean, mean) + self.eps).rsqrt()
        scale = scale if weight is None else scale * weight
        return scale, torch.zeros_like(scale) if bias is None else bias.to(scale.dtype).expand_as(scale)

    def vjp(self, inputs: list[Any], d_scale: Tensor, d_shift: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """As autograd's, by hand."""
        mean, var, weight, bias = inputs
        rstd = (torch.addcmul(var, mean, mean) + self.eps).rsqrt()
        scale, d_weight, d_rstd = rstd, None, d_scale
        if weight is not None:
            scale, d_rstd = rstd * weight, d_scale * weight
            d_weight = (d_scale * rstd).sum(0)
        d_square = d_rstd * rstd.pow(3) * -0.5
        return scale, [2 * mean * d_square, d_square, d_weight, None if bias is None else d_shift.sum(0)]


class _Threshold:
    """The thresholded linear unit; a tie belongs to y, as in the authors' listing."""

    def __call__(self, y: Tensor, tau: Tensor) -> Tensor:
        return y.clamp(min=per_channel(tau, y))

    def vjp(self, y: Tensor, dz: Tensor, tau: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Gradient for y where it passes, for tau elsewhere."""
        dims = [0, *range(2, y.ndim)]
        below = -torch.finfo(y.dtype).tiny  # the kernel's test is strict
        dy = torch.ops.aten.threshold_backward(dz, y - per_channel(tau, y), below)
        return dy, [dz.sum(dims) - dy.sum(dims)]
