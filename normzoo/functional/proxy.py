"""Proxy normalization of activations (Labatie, Masters, Eaton-Rosen & Luschi 2021, arXiv 2106.03743)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from normzoo._shapes import statistics_dtype
from normzoo.functional._channel_affine import channel_affine
from normzoo.functional._group_rule import GroupRule
from normzoo.functional._moments import affine_backward
from normzoo.functional.elementwise import affine_to


def proxy_norm(
    x: Tensor,
    activation: Callable[[Tensor], Tensor],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    proxy_weight: Tensor | None = None,
    proxy_bias: Tensor | None = None,
    *,
    groups: int = 1,
    samples: int = 200,
    eps: float = 1e-5,
    proxy_eps: float = 0.03,
) -> Tensor:
    """Group normalization, then an activation that is normalized by what it does to a Gaussian stand-in.

    With ``z = activation(weight * group_norm(x) + bias)`` and the same activation of a proxy variable,
    ``p = activation(weight * ((1 + proxy_weight) * r + proxy_bias) + bias)`` for r at the mid-point quantiles of the
    standard normal distribution, ``y = (z - mean(p)) / sqrt(var(p) + proxy_eps)``, for each channel.

    Args:
        x: (N, C, ...), not empty.
        activation: applied elementwise.
        weight: (C,), the scale before the activation; 1 if None.
        bias: (C,), the shift before the activation; 0 if None.
        proxy_weight: (C,), 0 if None.
        proxy_bias: (C,), 0 if None.
        groups: of the normalization, each of C / groups consecutive channels.
        samples: quantiles that stand in for the normal distribution.
        eps: added to the variance of the groups.
        proxy_eps: added to the (biased) variance of the proxy.

    Returns:
        a tensor of the shape, dtype and memory format of ``x``.

    Raises:
        ValueError: if ``groups`` does not divide C, or if a group holds one value.

    Source: Labatie et al. 2021, arXiv 2106.03743, section 5, in the form of the authors' code.
    """
    dtype = statistics_dtype(x)
    channels = x.shape[1]
    if groups < 1 or channels % groups:
        raise ValueError(f"groups must divide the channels: {groups} groups were asked of {channels} channels")
    if x.shape[0] and x[0].numel() == groups:
        raise ValueError(f"each of the {groups} groups holds a single value of the input of shape {tuple(x.shape)}")
    ones = torch.ones(channels, dtype=dtype, device=x.device)
    scale = ones if weight is None else weight.to(dtype)
    shift = 0 * ones if bias is None else bias.to(dtype)
    normal = _normal_quantiles(samples, dtype, x.device)[:, None]
    if proxy_weight is not None:
        normal = normal * (1 + proxy_weight)
    if proxy_bias is not None:
        normal = normal + proxy_bias
    proxy = activation(scale * normal + shift)
    mean = proxy.mean(0)
    rstd = ((proxy - mean).square().mean(0) + proxy_eps).rsqrt()
    after = _Normalized(activation)
    rule = GroupRule(groups, eps)
    return channel_affine(x, rule, scale, shift, sample=True, after=after, after_tensors=(mean, rstd))[0]


def _normal_quantiles(samples: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The mid-point quantiles of the standard normal distribution."""
    if torch.compiler.is_exporting():  # constants, for ONNX has no erfinv
        return torch.tensor(
            [NormalDist().inv_cdf((i + 0.5) / samples) for i in range(samples)], dtype=dtype, device=device
        )
    quantile = (torch.arange(samples, dtype=dtype, device=device) + 0.5) / samples
    return 2**0.5 * torch.erfinv(2 * quantile - 1)


@dataclass(frozen=True, eq=False)
class _Normalized:
    """The activation, less the proxy's mean, over the proxy's spread."""

    activation: Callable[[Tensor], Tensor]

    def __call__(self, y: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
        return affine_to(self.activation(y), rstd, -mean * rstd)

    def vjp(self, y: Tensor, dz: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Autograd goes through the activation alone."""
        leaf = y.detach().requires_grad_()
        inplace = getattr(self.activation, "inplace", False)
        with torch.enable_grad():
            # No leaf: FlopCounterMode hangs hooks on what modules are given, which autograd.grad cannot run for leaves
            active = self.activation(leaf.clone() if inplace else leaf.view_as(leaf))
        d_active, product, total = affine_backward(dz, active.detach(), rstd)
        (dy,) = torch.autograd.grad(active, leaf, d_active)
        return dy, [-rstd * total, torch.addcmul(product, mean, total, value=-1)]
