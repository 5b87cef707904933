"""Filter response normalization."""

from __future__ import annotations

import torch
from torch import Tensor

from normzoo.functional.filter_response import filter_response_norm
from normzoo.layers._base import Activation, NormLayer, own_activation


class FilterResponseNorm(NormLayer):
    """Filter response normalization with its thresholded linear unit: no batch, nothing subtracted.

    ``y = max(x / sqrt(nu2 + eps) * weight + bias, tau)``, nu2 the mean of x^2 over space of each sample and channel.
    Training and evaluation are the same.

    tau, the threshold of the unit, takes the place of a ReLU: since no mean is subtracted, channels may be far from
    zero, and a fixed threshold at zero would cut them all or none. In a network that keeps its activations, and where
    a sum follows (the last normalization of a residual block), use ``act_layer=None`` for the normalization alone.

    Use it for small batches, with the warm-up of the learning rate that the authors found necessary. The paper learns
    eps where maps are a single pixel; here it is fixed, and (N, C) input becomes little more than its sign.

    Shapes: (N, C), (N, C, L), (N, C, H, W), (N, C, D, H, W) or, with ``channel_dim=-1``, (N, ..., C). The output has
    the shape, dtype and memory format of the input; statistics are float32 at least.

    Args:
        num_features: C.
        eps: added to the mean square; 1e-6 as in the paper.
        affine: learn ``weight`` and ``bias``, each (C,); ``tau`` is learnt in any case.
        act_layer: ``"tlu"`` for the thresholded linear unit with its parameter ``tau``, (C,), initially 0; or what
            makes another activation, such as ``torch.nn.ReLU``; None for none.
        channel_dim: 1 for (N, C, ...), -1 for (N, ..., C).
        device: where parameters are made.
        dtype: of parameters, which are float32 at least.

    Raises:
        ValueError: on input of another channel count.

    Source: Singh & Krishnan 2020, arXiv 1911.09737.

    Example:
        >>> FilterResponseNorm(3)(torch.randn(2, 3, 8, 8)).min().item() >= 0
        True
    """

    tau: Tensor | None

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-6,
        affine: bool = True,
        act_layer: Activation | str | None = "tlu",
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features,
            eps=eps,
            affine=affine,
            act_layer=own_activation(act_layer, "tlu"),
            channel_dim=channel_dim,
            device=device,
            dtype=dtype,
        )
        self.act_layer = act_layer
        self.add_parameter("tau", 0.0 if act_layer == "tlu" else None)

    def normalize(self, x: Tensor) -> Tensor:
        """Apply the layer to checked input."""
        return filter_response_norm(x, self.weight, self.bias, self.tau, eps=self.eps)
