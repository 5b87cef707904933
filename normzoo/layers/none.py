"""No normalization."""

from __future__ import annotations

import torch
from torch import Tensor

from normzoo.functional.elementwise import channel_scale_shift
from normzoo.layers._base import Activation, NormLayer


class NoNorm(NormLayer):
    """No normalization: ``y = x + bias``, with a learnable bias for each channel.

    The bias is there because convolutions that a normalization layer follows have none of their own. It is the
    control of every experiment about normalization: at large learning rates gradients grow heavy-tailed and the loss
    diverges. Training and evaluation are the same.

    Shapes: (N, C), (N, C, L), (N, C, H, W), (N, C, D, H, W) or, with ``channel_dim=-1``, (N, ..., C). The output has
    the shape, dtype and memory format of the input; statistics are float32 at least.

    Args:
        num_features: C.
        affine: learn ``bias``, (C,), initially 0; without it the layer returns a copy of its input.
        act_layer: makes the activation that follows, such as ``torch.nn.ReLU``; None for none.
        channel_dim: 1 for (N, C, ...), -1 for (N, ..., C).
        device: where parameters are made.
        dtype: of parameters, which are float32 at least.

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
        act_layer: Activation | None = None,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features,
            affine=affine,
            act_layer=act_layer,
            channel_dim=channel_dim,
            device=device,
            dtype=dtype,
        )
        self.add_parameter("weight", None)

    def normalize(self, x: Tensor) -> Tensor:
        """Apply the layer to checked input."""
        return channel_scale_shift(x, None, self.bias)
