"""The gradient noise of a run."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from normzoo.functional.noise import (
    GradientNoiseScale,
    chosen_factor,
    noise_scale,
    noise_scale_means,
    noise_scale_update,
    update_noise_bound,
)
from normzoo.metrics._merging import MergingMetric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class NoiseScale(MergingMetric):
    """The simple noise scale, from squared gradient norms at two batch sizes, averaged over updates.

    Both norms are averaged before their ratio is taken, as in McCandlish et al. 2018, arXiv 1812.06162, appendix A.1:
    a mean of ratios would be biased. The state is one float64 tensor: the weighted sums of |G_small|^2 and |G_big|^2,
    and of the weights; it merges by addition, over ranks too.

    Args:
        small_batch: B_small, in samples.
        big_batch: B_big, in samples.
        decay: None to weigh all updates alike; or the factor, between 0 and 1, by which the weight of older updates
            falls at each, for an exponential moving average that is right from the first update on.
        **options: of :class:`torchmetrics.Metric`: ``sync_on_compute``, ``process_group``, ``dist_sync_on_step``,
            ``dist_sync_fn``, ``distributed_available_fn``, ``compute_on_cpu``, ``compute_with_cache``.

    Raises:
        ValueError: unless 0 < small_batch < big_batch, and 0 < decay < 1 if given; for an option that torchmetrics does
            not know.

    Example:
        >>> noise = NoiseScale(small_batch=1, big_batch=2)
        >>> noise.update(small_sq=torch.tensor([2.0, 4.0]), big_sq=torch.tensor(2.0))
        >>> noise.compute().scale.item(), noise.bound(learning_rate=0.5, batch_size=2).item()
        (2.0, 0.25)
    """

    is_differentiable = False
    __jit_unused_properties__: ClassVar[list[str]] = [*Metric.__jit_unused_properties__, "full_state_update"]
    if TYPE_CHECKING:  # torch.jit.script takes annotations of a class for those of attributes to compile
        sums: Tensor

    @property
    def full_state_update(self) -> bool:  # type: ignore[override]
        """Whether states may not be added up, in forward and merge_state: moving averages may not."""
        return self.decay is not None

    def __init__(self, small_batch: float, big_batch: float, decay: float | None = None, **options: Any) -> None:
        super().__init__(**options)
        noise_scale(0.0, 0.0, small_batch, big_batch)  # checks the sizes
        if decay is not None and not 0 < decay < 1:
            raise ValueError(f"decay must be between 0 and 1, not {decay}")
        self.small_batch, self.big_batch, self.decay = small_batch, big_batch, decay
        self.add_state("sums", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, small_sq: Tensor, big_sq: Tensor) -> None:
        """Take in squared norms; of several, such as one for each micro-batch, the mean."""
        now = torch.stack([v.detach().to(self.sums).mean() for v in (small_sq, big_sq)])
        self.sums = noise_scale_update(self.sums, now, self.decay)

    def _check_mergeable(self, other: "NoiseScale") -> None:
        ours, theirs = ((m.small_batch, m.big_batch) for m in (self, other))
        if ours != theirs:
            raise ValueError(f"a noise scale of batches of {theirs} samples cannot be merged into one of {ours}")

    def compute(self) -> GradientNoiseScale:
        """|G|^2, tr(Sigma) = C and B_simple, each a 0-d float64 tensor; NaN before the first update."""
        small, big = noise_scale_means(self.sums)
        return noise_scale(small, big, self.small_batch, self.big_batch)

    def bound(
        self, learning_rate: float, batch_size: int, population: int | None = None, factor: str | None = None
    ) -> Tensor:
        """The update noise bound alpha^2 C / |B|; see :func:`normzoo.functional.noise.update_noise_bound`."""
        factor = chosen_factor(factor, population, batch_size, stacklevel=3)
        return update_noise_bound(self.compute().trace, learning_rate, batch_size, population, factor)

    def plot(
        self, val: GradientNoiseScale | Sequence[GradientNoiseScale] | None = None, ax: "Axes | None" = None
    ) -> "tuple[Figure | None, Axes]":
        """Draw the noise scale.

        Args:
            val: a result of ``compute`` or ``forward``, by default that of ``compute`` now; or several, which are drawn
                over steps.
            ax: where; by default a new figure.

        Returns:
            the figure, None for ``ax`` given, and its axes.
        """
        result = self.compute() if val is None else val
        scales = result.scale if isinstance(result, GradientNoiseScale) else [r.scale for r in result]
        figure, axes = self._plot(scales, ax)
        if TYPE_CHECKING:
            assert isinstance(axes, Axes)  # several are for results of several values
        axes.set_ylabel("noise scale, in samples")
        return figure, axes
