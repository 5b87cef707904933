"""Batch normalization."""

from __future__ import annotations

from torch import Tensor

from normzoo.functional.batch import batch_norm
from normzoo.layers._base import RunningStatsLayer


class BatchNorm(RunningStatsLayer):
    """Batch normalization: each channel by its mean and variance over batch and space.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``, training with the batch's statistics (biased variance),
    evaluating with running averages (of the unbiased variance), as ``torch.nn.BatchNorm2d``; state dicts go across.

    Use it for convolutional networks at batch sizes of 16 and more for each device. Not for batches of one or
    two, nor where the batches of training and use differ: see ``batch_renorm`` and ``group``.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: update rate of the running averages; None for the cumulative average of all batches.
        affine: learn ``weight`` and ``bias``, each (C,).
        channel_dim: 1 for (N, C, ...), -1 for (N, ..., C).
        device: where parameters and buffers are made.
        dtype: of parameters and buffers, which are float32 at least.

    Raises:
        ValueError: on input of another channel count, or of one value per channel when training.

    Source: Ioffe & Szegedy 2015, arXiv 1502.03167; defaults as in PyTorch.

    Example:
        >>> import torch
        >>> BatchNorm(3)(torch.randn(8, 3, 4, 4)).mean((0, 2, 3)).abs().max().item() < 1e-6
        True
    """

    def normalize(self, x: Tensor) -> Tensor:
        """Apply the layer to checked input."""
        y = batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            training=self.training,
            momentum=self.update_rate(),
            eps=self.eps,
            channel_dim=self.channel_dim,
        )
        self.count_batch(x)  # after it was accepted
        return y
