"""Proxy normalization."""

from __future__ import annotations

import torch
from torch import Tensor

from normzoo.functional.proxy import proxy_norm
from normzoo.layers._base import Activation, NormLayer
from normzoo.layers.group import check_groups


class ProxyNorm(NormLayer):
    """Group normalization and an activation whose output is normalized by a Gaussian stand-in.

    ``z = act(weight * group_norm(x) + bias);  y = (z - mean(p)) / sqrt(var(p) + proxy_eps)``, p the same activation of
    a proxy variable: ``p = act(weight * ((1 + proxy_weight) * r + proxy_bias) + bias)`` with r normally distributed.
    Mean and (biased) variance of p follow from the parameters alone, channel by channel, at ``samples`` quantiles. So
    activations keep the mean and spread over the data that batch norm would give them, without a batch; training and
    evaluation are the same.

    The activation belongs to the layer. The authors place it wherever a normalization is followed by one, and use
    plain normalization elsewhere. Their groups are strided (channel c is in group c modulo groups); here they are of
    consecutive channels, which is the same for one group.

    Use it to train without batch statistics what was made for batch norm. In a network that has activations of its own
    it needs those removed.

    Shapes: (N, C), (N, C, L), (N, C, H, W), (N, C, D, H, W) or, with ``channel_dim=-1``, (N, ..., C). The output has
    the shape, dtype and memory format of the input; statistics are float32 at least.

    Args:
        num_features: C.
        groups: number of groups of the normalization, which must divide C; 1, layer normalization, as in the paper's
            main experiments (the authors' code also has 4).
        eps: added to the variance of the groups.
        samples: quantiles of the proxy; 200 as in the authors' code.
        proxy_eps: added to the variance of the proxy; 0.03 as in the authors' code, large on purpose.
        affine: learn ``weight`` and ``bias``, each (C,); ``proxy_weight`` and ``proxy_bias``, each (C,) and initially
            0, are learnt in any case. The authors give weight decay to the latter two alone.
        act_layer: makes the activation inside, ``torch.nn.ReLU`` by default; None for the identity.
        channel_dim: 1 for (N, C, ...), -1 for (N, ..., C).
        device: where parameters are made.
        dtype: of parameters, which are float32 at least.

    Raises:
        ValueError: if groups does not divide C; on input of another channel count or with one value in a group.

    Source: Labatie, Masters, Eaton-Rosen & Luschi 2021, arXiv 2106.03743.

    Example:
        >>> ProxyNorm(8)(torch.randn(2, 8, 16, 16)).mean().abs().item() < 0.1
        True
    """

    proxy_weight: Tensor
    proxy_bias: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        groups: int = 1,
        eps: float = 1e-5,
        samples: int = 200,
        proxy_eps: float = 0.03,
        affine: bool = True,
        act_layer: Activation | None = torch.nn.ReLU,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features,
            eps=eps,
            affine=affine,
            act_layer=None,
            channel_dim=channel_dim,
            device=device,
            dtype=dtype,
        )
        check_groups(groups, num_features)
        if samples < 2:
            raise ValueError(f"samples must be at least 2, not {samples}")
        if not proxy_eps >= 0:
            raise ValueError(f"proxy_eps must not be negative, got {proxy_eps}")
        self.groups, self.samples, self.proxy_eps = groups, samples, proxy_eps
        self.act_layer = act_layer
        self.inner = torch.nn.Identity() if act_layer is None else act_layer()
        self.add_parameter("proxy_weight", 0.0)
        self.add_parameter("proxy_bias", 0.0)

    def normalize(self, x: Tensor) -> Tensor:
        """Apply the layer to checked input."""
        return proxy_norm(
            x,
            self.inner,
            self.weight,
            self.bias,
            self.proxy_weight,
            self.proxy_bias,
            groups=self.groups,
            samples=self.samples,
            eps=self.eps,
            proxy_eps=self.proxy_eps,
        )
