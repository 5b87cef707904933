"""What all layers share: affine parameters, the check of the input, running statistics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from normzoo._shapes import check_channel_dim, check_input, parameter_dtype


class NormLayer(nn.Module):
    """Base of the zoo's layers: ``weight`` and ``bias`` of shape (C,), float32 or wider, or None.

    Subclasses implement :meth:`normalize`, which sees input whose channels have been checked.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        affine: bool = True,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_features < 1:
            raise ValueError(f"num_features must be at least 1, not {num_features}")
        if eps < 0:
            raise ValueError(f"eps must not be negative, got {eps}")
        check_channel_dim(channel_dim)
        self.num_features = num_features
        self.eps = eps
        self.affine = affine
        self.channel_dim = channel_dim
        for name, value in (("weight", 1.0), ("bias", 0.0)):
            param = (
                nn.Parameter(torch.full((num_features,), value, device=device, dtype=parameter_dtype(dtype)))
                if affine
                else None
            )
            self.register_parameter(name, param)

    def reset_parameters(self) -> None:
        """Set the scale to 1 and the shift to 0."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x``: (N, C, ...) or, with ``channel_dim=-1``, (N, ..., C); shape and dtype are kept."""
        check_input(x, self.num_features, self.channel_dim, type(self).__name__)
        return self.normalize(x)

    def normalize(self, x: Tensor) -> Tensor:
        """The layer's formula, on checked input."""
        raise TypeError(f"{type(self).__name__} does not define normalize(x)")

    def extra_repr(self) -> str:
        """What ``print(layer)`` shows."""
        dim = f", channel_dim={self.channel_dim}" if self.channel_dim != 1 else ""
        return f"{self.num_features}, eps={self.eps}, affine={self.affine}{dim}"


class RunningStatsLayer(NormLayer):
    """A layer with ``running_mean``, ``running_var`` and ``num_batches_tracked`` as in BatchNorm2d."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps=eps, affine=affine, channel_dim=channel_dim, device=device, dtype=dtype)
        if momentum is not None and not 0 <= momentum <= 1:
            raise ValueError(
                f"momentum is the update rate, from 0 to 1, or None for a cumulative average, not {momentum}"
            )
        self.momentum = momentum
        statistics: dict[str, Any] = {"device": device, "dtype": parameter_dtype(dtype)}
        self.register_buffer("running_mean", torch.zeros(num_features, **statistics))
        self.register_buffer("running_var", torch.ones(num_features, **statistics))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long, device=device))

    def reset_running_stats(self) -> None:
        """Set the running mean to 0, the running variance to 1 and the count of batches to 0."""
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Reset running statistics, scale and shift."""
        super().reset_parameters()
        self.reset_running_stats()

    def count_batch(self, x: Tensor) -> None:
        """Count the batch that was normalized; empty ones do not count."""
        if self.training and x.numel():
            self.num_batches_tracked.add_(1)

    def update_rate(self) -> float | Tensor:
        """The rate for the coming batch: ``momentum``, or 1/n (a 0-d tensor) for a cumulative average over n."""
        return 1 / (self.num_batches_tracked + 1) if self.momentum is None else float(self.momentum)

    def extra_repr(self) -> str:
        """What ``print(layer)`` shows."""
        return f"{super().extra_repr()}, momentum={self.momentum}"
