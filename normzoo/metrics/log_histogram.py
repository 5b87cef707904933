"""A histogram of floats that needs no range."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from normzoo.functional.log_histogram import bucket_counts, magnitude_counts, quantiles, tail_index


class LogHistogram(Metric):
    """Signed histograms, one for each layer, with buckets exact in a float's exponent and leading mantissa bits.

    One int64 tensor of shape (layers, 2^(9+m)) is the whole state; it merges by addition, over ranks too.

    Args:
        layers: how many histograms.
        mantissa_bits: m, from 0 to 7; quantiles are off by at most 2^-(m+1), relatively.

    Raises:
        ValueError: for fewer than one layer, or mantissa bits out of range.

    Example:
        >>> histogram = LogHistogram()
        >>> histogram.update(torch.tensor([1.0, -2.0, 4.0, 0.0]))
        >>> histogram.quantile(1.0), histogram.zeros()
        (4.25, 1)
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, layers: int = 1, mantissa_bits: int = 3) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"layers must be at least 1, not {layers}")
        if not 0 <= mantissa_bits <= 7:
            raise ValueError(f"mantissa_bits must be from 0 to 7, not {mantissa_bits}")
        self.mantissa_bits = mantissa_bits
        zeros = torch.zeros(layers, 1 << (9 + mantissa_bits), dtype=torch.int64)
        self.add_state("counts", zeros, dist_reduce_fx="sum")

    def update(self, x: Tensor, layer: int = 0) -> None:
        """Count the values of ``x`` (any shape, floating point) for one layer."""
        self.counts[layer] += bucket_counts(x, self.mantissa_bits)

    def compute(self) -> Tensor:
        """The counts, (layers, 2^(9+m)) int64."""
        return self.counts

    def quantile(self, q: float, absolute: bool = False, layer: int = 0) -> float:
        """The q-quantile of the finite values, or of their magnitudes; NaN if there are none."""
        return float(quantiles(self.counts[layer : layer + 1].cpu(), [q], self.mantissa_bits, absolute))

    def tail_index(self, fraction: float, layer: int = 0) -> float:
        """Hill's alpha over the top ``fraction`` of the magnitudes; small means heavy-tailed."""
        return tail_index(self.counts[layer].cpu(), fraction, self.mantissa_bits)

    def zeros(self, layer: int = 0) -> int:
        """How many values lie in the first bucket: zero, and subnormal numbers below 2^-(126+m)."""
        return int(self.counts[layer].view(2, -1)[:, 0].sum())

    def nonfinite(self, layer: int = 0) -> int:
        """How many values are infinite or NaN."""
        return int(magnitude_counts(self.counts[layer], self.mantissa_bits)[1])
