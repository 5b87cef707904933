"""A histogram of floats that needs no range."""

import copy
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Self, overload

import torch
from torch import Tensor
from torchmetrics import Metric

from normzoo.functional.buckets import Layout, bucket_counts, bucket_counts_all
from normzoo.functional.log_histogram import (
    apart,
    from_pairs,
    magnitude_counts,
    quantiles,
    tail_index,
    tensorboard_histogram,
    to_pairs,
    zero_counts,
)
from normzoo.metrics import _plots
from normzoo.metrics._merging import MergingMetric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class LogHistogram(MergingMetric):
    """Signed histograms, one for each layer, with buckets exact in a float's exponent and leading mantissa bits.

    One int64 tensor of shape (layers, 2^(9+m)) is the whole state; it merges by addition, over ranks too, so the order
    of merging does not matter and 2^63 - 1 values may be counted. Zeros, tiny values, infinities, NaN and float64
    values beyond float32's range are counted apart (:func:`normzoo.functional.log_histogram.apart`).

    Args:
        layers: how many histograms.
        mantissa_bits: m, from 0 to 7; quantiles are off by at most 2^-(m+1), relatively.
        **options: of :class:`torchmetrics.Metric`: ``sync_on_compute``, ``process_group``, ``dist_sync_on_step``,
            ``dist_sync_fn``, ``distributed_available_fn``, ``compute_on_cpu``, ``compute_with_cache``.

    Raises:
        ValueError: for fewer than one layer, mantissa bits out of range, or an option that torchmetrics does not know.

    Example:
        >>> histogram = LogHistogram()
        >>> histogram.update(torch.tensor([1.0, -2.0, 4.0, 0.0]))
        >>> histogram.quantile(1.0), histogram.zeros()
        (4.25, 1)
        >>> other = LogHistogram()
        >>> other.update(torch.tensor([8.0]))
        >>> histogram.merge_state(other)
        >>> histogram.quantile([0.5, 1.0])
        [1.0625, 8.5]
    """

    is_differentiable = False
    full_state_update = False
    if TYPE_CHECKING:  # torch.jit.script takes annotations of a class for those of attributes to compile
        counts: Tensor

    def __init__(self, layers: int = 1, mantissa_bits: int = 3, **options: Any) -> None:
        super().__init__(**options)
        if layers < 1:
            raise ValueError(f"layers must be at least 1, not {layers}")
        self.mantissa_bits = mantissa_bits
        zeros = torch.zeros(layers, Layout(mantissa_bits).size, dtype=torch.int64)
        self.add_state("counts", zeros, dist_reduce_fx="sum")

    def update(self, x: Tensor, layer: int = 0) -> None:
        """Count the values of ``x`` (any shape, floating point) for one layer."""
        self.counts[layer] += bucket_counts(x, self.mantissa_bits)

    def update_all(self, tensors: Sequence[Tensor]) -> None:
        """Count the values of one tensor for each layer, in one pass.

        Raises:
            ValueError: unless there are as many tensors as layers.
        """
        if len(tensors) != len(self.counts):
            raise ValueError(f"one tensor for each of the {len(self.counts)} layers is needed, not {len(tensors)}")
        self._updated()
        self.counts += bucket_counts_all(tensors, self.mantissa_bits)

    def compute(self) -> Tensor:
        """The counts, (layers, 2^(9+m)) int64; a copy, as updates go on in place."""
        return self.counts.clone()

    def _check_mergeable(self, other: "LogHistogram") -> None:
        mine, its = ((len(h.counts), h.mantissa_bits) for h in (self, other))
        if mine != its:
            raise ValueError(f"a histogram of (layers, mantissa bits) {its} cannot be merged into one of {mine}")

    def merge(self, other: "LogHistogram") -> None:
        """What :meth:`merge_state` does, for one version more, with a warning."""
        warnings.warn(
            "LogHistogram.merge goes with the next version; use merge_state", DeprecationWarning, stacklevel=2
        )
        self.merge_state(other)

    @overload  # type: ignore[override]
    def __add__(self, other: "LogHistogram") -> "LogHistogram": ...
    @overload
    def __add__(self, other: Metric | float | Tensor) -> Metric: ...
    def __add__(self, other: Metric | float | Tensor) -> Metric:
        if not isinstance(other, LogHistogram):
            return super().__add__(other)
        warnings.warn(
            "the sum of two LogHistograms is a merged LogHistogram, and from the next version on torchmetrics' "
            "composition, as of all metrics; to merge, use merged = a.clone() and merged.merge_state(b)",
            FutureWarning,
            stacklevel=2,
        )
        both = copy.deepcopy(self)
        both.merge_state(other)
        return both

    def set_dtype(self, dst_type: str | torch.dtype) -> Self:
        """Counts are whole numbers, and stay int64: those of float32 would end at 2^24."""
        return self

    def _updated(self) -> None:
        """As torchmetrics does around update."""
        self._computed = None
        self._update_count += 1

    @overload
    def quantile(self, q: float, absolute: bool = ..., layer: int = ...) -> float: ...
    @overload
    def quantile(self, q: Sequence[float], absolute: bool = ..., layer: int = ...) -> list[float]: ...
    def quantile(self, q: float | Sequence[float], absolute: bool = False, layer: int = 0) -> float | list[float]:
        """The q-quantile, or one for each q, of the finite values or of their magnitudes; NaN if there are none."""
        several = isinstance(q, Sequence)
        levels = q if isinstance(q, Sequence) else [q]
        found = quantiles(self.counts[layer][None].cpu(), levels, self.mantissa_bits, absolute)[0].tolist()
        return found if several else found[0]

    def tail_index(self, fraction: float | None = None, layer: int = 0, *, k: int | None = None) -> float:
        """Hill's alpha over the top ``fraction``, or the ``k`` largest, of the magnitudes; small means heavy-tailed.

        Its inverse is off by less than log(1 + 2^-m) next to that of the values: for large alpha take more bits.
        """
        return tail_index(self.counts[layer].cpu(), fraction, self.mantissa_bits, k)

    def apart(self, layer: int = 0) -> dict[str, int]:
        """Counts of zeros, tiny and subnormal values, infinities, NaN and float64 overflow, by these names."""
        return {name: int(count) for name, count in apart(self.counts[layer].cpu(), self.mantissa_bits).items()}

    def zeros(self, layer: int = 0) -> int:
        """How many values are zero."""
        return int(zero_counts(self.counts[layer]))

    def nonfinite(self, layer: int = 0) -> int:
        """How many values are infinite or NaN."""
        return int(magnitude_counts(self.counts[layer], self.mantissa_bits)[1])

    def to_tensorboard(self, layer: int = 0, max_buckets: int = 200) -> dict[str, Any]:
        """The keyword arguments of ``SummaryWriter.add_histogram_raw``, but for the tag and the step."""
        return tensorboard_histogram(self.counts[layer].cpu(), self.mantissa_bits, max_buckets)

    def plot(
        self, val: Tensor | Sequence[Tensor] | None = None, ax: "Axes | None" = None
    ) -> "tuple[Figure | None, Axes]":
        """Draw the distribution of the finite non-zero magnitudes of each layer, or over steps their quantiles.

        Args:
            val: a result of ``compute`` or ``forward``, by default that of ``compute`` now; or several, of which the
                quantiles 50, 99 and 99.9 % are drawn.
            ax: where; by default a new figure.

        Returns:
            the figure, None for ``ax`` given, and its axes.
        """
        result: Any = self.compute() if val is None else val
        draw: Any = _plots.magnitudes if isinstance(result, Tensor) else _plots.magnitudes_over_steps
        return _plots.drawn(ax, partial(draw, result, self.mantissa_bits))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: the mantissa bits, and for each layer the filled buckets as pairs [bucket, count]."""
        return {"mantissa_bits": self.mantissa_bits, "layers": to_pairs(self.counts)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The histogram that :meth:`to_dict` described.

        Raises:
            ValueError: if a key is missing, or a bucket does not exist.
        """
        if missing := {"mantissa_bits", "layers"} - set(data):
            raise ValueError(f"a histogram needs {' and '.join(sorted(missing))}; there are {', '.join(sorted(data))}")
        histogram = cls(len(data["layers"]), data["mantissa_bits"])
        histogram._updated()
        histogram.counts += from_pairs(data["layers"], data["mantissa_bits"])
        return histogram
