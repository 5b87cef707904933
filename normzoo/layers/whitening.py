"""Whitening layers."""

from __future__ import annotations

import torch
from torch import Tensor

from normzoo.functional.whitening import iter_norm
from normzoo.layers._base import Activation, RunningStatsLayer
from normzoo.layers.group import check_groups


class IterNorm(RunningStatsLayer):
    """Iterative normalization: channels are not only standardized but decorrelated, by Newton's iterations.

    ``y = W (x - mean) * weight + bias``. In each group of consecutive channels W approaches the inverse square root of
    the covariance ``S = cov + eps * I`` over batch and space (biased), by ``P <- 1.5 P - 0.5 P^3 S / trace(S)`` from
    ``P = I``; ``W = P / sqrt(trace(S))``. Few iterations whiten the directions of large variance and leave the others.

    Evaluation uses running averages of the mean and, as in the authors' code, of W itself.

    Use it in the place of batch norm where conditioning matters, with groups of channels much smaller than the number
    of values per channel. More than seven iterations lose digits. It costs matrix products of each group's channels.

    Shapes: (N, C), (N, C, L), (N, C, H, W), (N, C, D, H, W) or, with ``channel_dim=-1``, (N, ..., C). The output has
    the shape, dtype and memory format of the input; statistics are float32 at least.

    Args:
        num_features: C.
        groups: number of groups of C / groups channels; None for groups of 64 channels, or of the largest divisor of C
            below that. The authors recommend groups of 64; their class has one group by default.
        iterations: of Newton's method; 5 as in the paper.
        eps: added to the diagonal of the covariance.
        momentum: update rate of the running averages; None for the cumulative average of all batches.
        sync: when training, take statistics over all ranks: R ranks of batch b are then one of batch R * b.
        affine: learn ``weight`` and ``bias``, each (C,).
        act_layer: makes the activation that follows, such as ``torch.nn.ReLU``; None for none.
        channel_dim: 1 for (N, C, ...), -1 for (N, ..., C).
        device: where parameters and buffers are made.
        dtype: of parameters and buffers, which are float32 at least.

    Buffers: ``running_mean`` (C,), ``running_whitening`` (groups, D, D) with D = C / groups, initially the identity,
    and ``num_batches_tracked``.

    Raises:
        ValueError: if groups does not divide C; for a negative number of iterations; on input of another channel
            count, or of one value per channel when training.

    Source: Huang, Zhou, Zhu, Liu & Shao 2019, arXiv 1904.03441, algorithm 1.

    Example:
        >>> y = IterNorm(2, iterations=9)(torch.randn(64, 2) @ torch.tensor([[1.0, 0.5], [0.0, 1.0]]))
        >>> abs((y[:, 0] * y[:, 1]).mean().item()) < 1e-3
        True
    """

    running_whitening: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        groups: int | None = None,
        iterations: int = 5,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        sync: bool = False,
        affine: bool = True,
        act_layer: Activation | None = None,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features,
            eps=eps,
            momentum=momentum,
            sync=sync,
            affine=affine,
            act_layer=act_layer,
            channel_dim=channel_dim,
            device=device,
            dtype=dtype,
        )
        if groups is None:
            size = max(d for d in range(1, min(num_features, 64) + 1) if num_features % d == 0)
            groups = num_features // size
        check_groups(groups, num_features)
        if iterations < 0:
            raise ValueError(f"iterations must not be negative, got {iterations}")
        self.groups, self.iterations = groups, iterations
        size = num_features // groups
        self.register_buffer("running_var", None)
        self.register_buffer("running_whitening", torch.eye(size, **self._placement).repeat(groups, 1, 1))

    def reset_running_stats(self) -> None:
        """Set the running mean to 0, the running whitening to the identity and the count of batches to 0."""
        super().reset_running_stats()
        self.running_whitening.copy_(torch.eye(self.running_whitening.shape[-1]))

    def normalize(self, x: Tensor) -> Tensor:
        """Apply the layer to checked input."""
        y = iter_norm(
            x,
            self.running_mean,
            self.running_whitening,
            self.weight,
            self.bias,
            training=self.training,
            momentum=self.update_rate(),
            eps=self.eps,
            iterations=self.iterations,
            sync=self.sync,
        )
        self.count_batch()
        return y
