"""How large a gradient is beside the weights that it moves, unit by unit."""

from __future__ import annotations

import torch
from torch import Tensor

UNIT_EPS = 1e-3  # the least norm of weights, as in adaptive gradient clipping


def largest_unit_ratio(gradient: Tensor, weight: Tensor, eps: float = UNIT_EPS) -> Tensor:
    """The largest ratio ``|g_i| / max(|w_i|, eps)`` of Euclidean norms over the units i of a parameter.

    A unit is an index of the first dimension (a row of a matrix, a filter of a convolution); of a vector or a number
    it is the whole. Adaptive gradient clipping limits this ratio.

    Args:
        gradient: floating point, any shape, not empty; norms are taken in float32 or wider.
        weight: of the same shape.
        eps: the least norm of a unit's weights that is divided by.

    Returns:
        0-d, of the dtype of the norms, on the device of ``gradient``; NaN if any value is NaN.

    Source: Brock, De, Smith & Simonyan 2021, arXiv 2102.06171, equation 3.

    Example:
        >>> largest_unit_ratio(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.ones(2, 2)).round(decimals=4)
        tensor(3.5355)
    """
    units, of_weights = (_unit_norms(t) for t in (gradient, weight))
    return (units / of_weights.clamp(min=eps)).amax()


def _unit_norms(x: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x.flatten(1) if x.ndim > 1 else x.reshape(1, -1), dim=1, dtype=dtype)
