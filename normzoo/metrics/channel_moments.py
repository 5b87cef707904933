"""Mean and variance of channels over a whole run."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from normzoo.functional.channel_moments import channel_moments, merge_moments, moments_variance
from normzoo.metrics import _plots
from normzoo.metrics._merging import MergingMetric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class ChannelMoments(MergingMetric):
    """Count, mean and variance of each channel, at one or several sites, merged over updates and ranks.

    One float64 tensor of shape (sites, 3, num_channels) is the whole state: count, mean and M2 = sum (x - mean)^2. It
    merges by the parallel formula of Chan, Golub & LeVeque 1983, over ranks too.

    Args:
        num_channels: C.
        sites: how many sets of channels.
        **options: of :class:`torchmetrics.Metric`: ``sync_on_compute``, ``process_group``, ``dist_sync_on_step``,
            ``dist_sync_fn``, ``distributed_available_fn``, ``compute_on_cpu``, ``compute_with_cache``.

    Raises:
        ValueError: unless both are at least 1, or for an option that torchmetrics does not know.

    Example:
        >>> moments = ChannelMoments(num_channels=2)
        >>> moments.update(torch.tensor([[1.0, 10.0], [3.0, 10.0]]))
        >>> moments.mean[0].tolist(), moments.var()[0].tolist(), moments.count[0].tolist()
        ([2.0, 10.0], [1.0, 0.0], [2.0, 2.0])
    """

    is_differentiable = False
    full_state_update = False
    __jit_unused_properties__: ClassVar[list[str]] = [*Metric.__jit_unused_properties__, "count", "mean"]
    if TYPE_CHECKING:  # torch.jit.script takes annotations of a class for those of attributes to compile
        moments: Tensor

    def __init__(self, num_channels: int, sites: int = 1, **options: Any) -> None:
        super().__init__(**options)
        for name, value in (("num_channels", num_channels), ("sites", sites)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        zeros = torch.zeros(sites, 3, num_channels, dtype=torch.float64)
        self.add_state("moments", zeros, dist_reduce_fx=merge_moments)

    def update(self, x: Tensor, channel_dim: int = 1, site: int = 0) -> None:
        """Take in ``x``, with its channels along ``channel_dim``, at one site.

        Raises:
            ValueError: if ``x`` has another number of channels.
        """
        if x.shape[channel_dim] != self.moments.shape[-1]:
            raise ValueError(
                f"x of shape {tuple(x.shape)} has {x.shape[channel_dim]} channels along dimension {channel_dim}, "
                f"not {self.moments.shape[-1]}"
            )
        self.moments[site] = merge_moments(torch.stack([self.moments[site], channel_moments(x, channel_dim)]))

    def compute(self) -> tuple[Tensor, Tensor]:
        """Mean and biased variance, each (sites, C) float64; NaN variance for a site without values."""
        return self.mean.clone(), self.var()  # a copy, as updates go on in place

    @property
    def count(self) -> Tensor:
        """(sites, C): how many values each channel has had."""
        return self.moments[:, 0]

    @property
    def mean(self) -> Tensor:
        """(sites, C); 0 without values."""
        return self.moments[:, 1]

    def var(self, unbiased: bool = False) -> Tensor:
        """(sites, C): M2 / n, or M2 / (n - 1); NaN where that divides by zero."""
        return moments_variance(self.moments, unbiased)

    def plot(
        self, val: tuple[Tensor, Tensor] | Sequence[tuple[Tensor, Tensor]] | None = None, ax: "Axes | None" = None
    ) -> "tuple[Figure | None, Axes]":
        """Draw the means of the channels, with a standard deviation on either side, or over steps the variances.

        Args:
            val: a result of ``compute`` or ``forward``, by default that of ``compute`` now; or several, of which
                the mean over the channels of their variance is drawn, for each site.
            ax: where; by default a new figure.

        Returns:
            the figure, None for ``ax`` given, and its axes.
        """
        result: Any = self.compute() if val is None else val
        several = not isinstance(result[0], Tensor)
        return _plots.drawn(ax, partial(_plots.channels_over_steps if several else _plots.channels, result))
