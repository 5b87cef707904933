"""Filter response normalization and its thresholded linear unit (Singh & Krishnan 2020, arXiv 1911.09737)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from normzoo._shapes import per_channel, statistics_dtype
from normzoo.functional._pieces import by_sample


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
    return by_sample(partial(_filter_response, eps=eps), x, weight, bias, tau)


def _filter_response(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, tau: Tensor | None, *, eps: float
) -> Tensor:
    wide = x.to(statistics_dtype(x))
    nu2 = wide.square().mean(tuple(range(2, x.ndim)), keepdim=True) if x.ndim > 2 else wide.square()
    scale = (nu2 + eps).rsqrt()
    y = wide * (scale if weight is None else scale * per_channel(weight, x))
    y = y if bias is None else y + per_channel(bias, x)
    if tau is not None:
        threshold = per_channel(tau, x)
        y = torch.where(y >= threshold, y, threshold)  # a tie belongs to y, as in the authors' listing
    return y.to(x.dtype)
