"""No normalization."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normzoo._shapes import check_channel_dim, check_input, parameter_dtype, per_channel


class NoNorm(nn.Module):
    """No normalization: ``y = x + bias``, with a learnable bias for each channel.

    The bias is there because convolutions that a normalization layer follows have none of their own. It is the
    control of every experiment about normalization.

    Args:
        num_features: C.
        affine: learn ``bias``, (C,), initially 0; without it the layer is the identity.
        channel_dim: 1 for (N, C, ...), -1 for (N, ..., C).
        device: where the bias is made.
        dtype: of the bias, which is float32 at least.

    Raises:
        ValueError: on input of another channel count.

    Source: Bjorck, Gomes, Selman & Weinberger 2018, arXiv 1806.02375, the unnormalized networks.

    Example:
        >>> NoNorm(3)(torch.ones(1, 3, 2, 2)).mean().item()
        1.0
    """

    def __init__(
        self,
        num_features: int,
        *,
        affine: bool = True,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_features < 1:
            raise ValueError(f"num_features must be at least 1, not {num_features}")
        check_channel_dim(channel_dim)
        self.num_features = num_features
        self.affine = affine
        self.channel_dim = channel_dim
        bias = torch.zeros(num_features, device=device, dtype=parameter_dtype(dtype))
        self.bias = nn.Parameter(bias) if affine else None

    def reset_parameters(self) -> None:
        """Set the bias to 0."""
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Add the bias to ``x``: (N, C, ...) or, with ``channel_dim=-1``, (N, ..., C); shape and dtype are kept."""
        check_input(x, self.num_features, self.channel_dim, type(self).__name__)
        if self.bias is None:
            return x
        return x + per_channel(self.bias, x, self.channel_dim).to(x.dtype)

    def extra_repr(self) -> str:
        """What ``print(layer)`` shows."""
        return f"{self.num_features}, affine={self.affine}"
