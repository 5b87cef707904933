"""Power normalization."""

from __future__ import annotations

import torch
from torch import Tensor

from normzoo.functional.power import power_norm
from normzoo.layers._base import Activation, RunningStatsLayer
from normzoo.layers.group import check_groups


class PowerNorm(RunningStatsLayer):
    """Power normalization: each channel by a running quadratic mean, for the noisy statistics of language models.

    ``y = x / sqrt(phi + eps) * weight + bias``, phi the running mean of x^2 over batch and positions as it was before
    the batch; no mean is subtracted. For the first ``warmup`` batches the batch's own quadratic mean takes its place.

    Its backward is the authors' approximation, not the gradient of the output: with ``z = x / sqrt(phi + eps)`` and q
    the batch's quadratic mean::

        h  = dy * weight - momentum_backward * ema_gz * z;   dx = h / sqrt(q + eps);   ema_gz += mean(h * z)

    so a state moves in the backward pass. The paper divides dx by the running root; this is the authors' code.
    During warm-up the code moves phi twice a batch, first towards the cumulative average; so does this layer.

    Use it in transformers for language in the place of layer normalization. ``groups`` applies the authors' group
    scaling before it (their models use the number of heads), which they found to be needed for stability. One value
    per channel is enough when training: a quadratic mean is not 0, as a variance would be.

    Shapes: (N, C), (N, C, L), (N, C, H, W), (N, C, D, H, W) or, with ``channel_dim=-1``, (N, ..., C). The output has
    the shape, dtype and memory format of the input; statistics are float32 at least.

    Args:
        num_features: C.
        eps: added to quadratic means; 1e-5 as in the authors' code.
        momentum: update rate of phi, one minus the authors' alpha of the forward pass; None for the cumulative average.
        momentum_backward: update rate of the backward's state, one minus their alpha of the backward pass.
        warmup: batches divided by their own quadratic mean; 10,000 is the authors' default.
        groups: of the group scaling, must divide C; None for no scaling.
        sync: when training, take statistics over all ranks: R ranks of batch b are then one of batch R * b.
        affine: learn ``weight`` and ``bias``, each (C,).
        act_layer: makes the activation that follows, such as ``torch.nn.ReLU``; None for none.
        channel_dim: 1 for (N, C, ...), -1 for (N, ..., C).
        device: where parameters and buffers are made.
        dtype: of parameters and buffers, which are float32 at least.

    Buffers: ``running_phi`` (C,), initially 1; ``ema_gz`` (C,), initially 0; ``num_batches_tracked``.

    Raises:
        ValueError: for rates outside [0, 1], a negative warmup, groups that do not divide C, or input of another
            channel count.

    Source: Shen, Yao, Gholami, Mahoney & Keutzer 2020, arXiv 2003.07845, algorithm 2, and the authors' code.

    Example:
        >>> y = PowerNorm(3)(torch.randn(8, 3, 16, 16))
        >>> (y.square().mean((0, 2, 3)) - 1).abs().max().item() < 1e-4
        True
    """

    running_phi: Tensor
    ema_gz: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        momentum_backward: float = 0.1,
        warmup: int = 10_000,
        groups: int | None = None,
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
        if not 0 <= momentum_backward <= 1:
            raise ValueError(f"momentum_backward is an update rate, from 0 to 1, not {momentum_backward}")
        if warmup < 0:
            raise ValueError(f"warmup is a number of batches, not {warmup}")
        if groups is not None:
            check_groups(groups, num_features)
        self.momentum_backward, self.warmup, self.groups = momentum_backward, warmup, groups
        self.register_buffer("running_phi", torch.ones(num_features, **self._placement))
        self.register_buffer("ema_gz", torch.zeros(num_features, **self._placement))
        for name in ("running_mean", "running_var"):
            delattr(self, name)  # to come last: torch.export miscounts buffers after one of None
            self.register_buffer(name, None)

    def reset_running_stats(self) -> None:
        """Set the quadratic mean to 1, the backward's state and the count of batches to 0."""
        super().reset_running_stats()
        self.running_phi.fill_(1)
        self.ema_gz.zero_()

    def normalize(self, x: Tensor) -> Tensor:
        """Apply the layer to checked input."""
        y = power_norm(
            x,
            self.running_phi,
            self.ema_gz,
            self.weight,
            self.bias,
            batches=self.num_batches_tracked,
            warmup=self.warmup,
            groups=self.groups,
            training=self.training,
            momentum=self.update_rate(),
            momentum_backward=self.momentum_backward,
            eps=self.eps,
            sync=self.sync,
        )
        self.count_batch()
        return y
