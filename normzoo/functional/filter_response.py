"""Filter response normalization and its thresholded linear unit (Singh & Krishnan 2020, arXiv 1911.09737)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from normzoo._shapes import per_channel, positions, spread, statistics_dtype
from normzoo.functional._moments import per_channel_sum, per_sample_sum, scale_shift, scale_shift_into, small_beside
from normzoo.functional._pieces import by_sample
from normzoo.functional.elementwise import Gradients, Kept, affine_to


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
    return by_sample(_FilterResponse(eps), x, weight, bias, tau)


@dataclass(frozen=True, eq=False)
class _FilterResponse:
    eps: float

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, tau: Tensor | None) -> Tensor:
        wide = x.to(statistics_dtype(x))
        dims = list(range(2, x.ndim))
        square = wide.square().mean(dims, keepdim=True) if dims else wide.square()
        y = affine_to(wide * (square + self.eps).rsqrt(), weight, bias)
        # a tie belongs to y, as in the authors' listing
        return (y if tau is None else y.clamp(min=per_channel(tau.to(y.dtype), y))).to(x.dtype)

    def write(self, y: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, tau: Tensor | None) -> Kept:
        """The output, by few passes."""
        wide = x.to(statistics_dtype(x))
        rstd = self._rstd(wide)
        scale_shift_into(y, wide, rstd if weight is None else rstd * weight, bias)
        if tau is not None:
            y.clamp_(min=per_channel(tau.to(y.dtype), y))
        return (rstd,) if small_beside(x) else ()

    def vjp(
        self,
        x: Tensor,
        dy: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        tau: Tensor | None,
        *,
        kept: Kept,
        out: Tensor | None,
    ) -> Gradients:
        """With ``z = x * scale + bias`` and ``y = max(z, tau)``: the gradient goes to z or to tau."""
        wide, dz = x.to(statistics_dtype(x)), dy.to(statistics_dtype(x))
        rstd = kept[0] if kept else self._rstd(wide)
        scale = rstd if weight is None else rstd * weight
        if tau is not None:
            level = -tau if bias is None else bias - tau
            above = scale_shift(wide, scale, level.expand_as(scale))
            dz = torch.ops.aten.threshold_backward(dz, above, -torch.finfo(above.dtype).tiny)  # its test is strict
        product = dz * wide
        d_scale = per_sample_sum(product)
        total = per_channel_sum(dz)
        d_tau = None if tau is None else per_channel_sum(dy.to(dz.dtype)) - total
        d_weight = None if weight is None else (d_scale * rstd).sum(0)
        slope = (d_scale if weight is None else d_scale * weight) * rstd.pow(3) / -positions(x)
        dx = torch.mul(dz, spread(scale, x), out=product if out is None else out)
        dx = dx.addcmul_(wide, spread(slope, x)).to(x.dtype)
        return dx, [d_weight, None if bias is None else total, d_tau]

    def _rstd(self, x: Tensor) -> Tensor:
        """(N, C), 1 / sqrt(mean square + eps)."""
        return (per_sample_sum(x.square()).div_(positions(x)).add_(self.eps)).rsqrt_()
