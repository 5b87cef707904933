"""How far a sample is from a law."""

from __future__ import annotations

import torch
from torch import Tensor


def kolmogorov_smirnov(probabilities: Tensor) -> Tensor:
    """The largest distance between the distribution function F of a law and that of a sample x.

    Args:
        probabilities: (..., n), the law's F(x_i) for each value of the sample, in any order.

    Returns:
        (...) float64 from 1 / (2 n) to 1.

    Raises:
        ValueError: for an empty sample.

    Source: Massey 1951, J. Am. Stat. Assoc. 46, "The Kolmogorov-Smirnov test for goodness of fit".

    Example:
        >>> kolmogorov_smirnov(torch.tensor([0.5, 0.1])).item()  # half of the sample lies beyond 0.5, by the law too
        0.5
    """
    if not probabilities.ndim or not (n := probabilities.shape[-1]):
        raise ValueError("probabilities must hold at least one value of the sample in the last dimension")
    expected = probabilities.double().sort(-1).values
    steps = torch.arange(n + 1, dtype=torch.float64, device=expected.device) / n
    return torch.maximum(steps[1:] - expected, expected - steps[:-1]).amax(-1)
