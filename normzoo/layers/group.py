"""Group, layer and instance normalization: statistics of each sample, none of the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from normzoo.functional.group import group_norm, instance_norm, layer_norm
from normzoo.layers._base import Activation, NormLayer


def check_groups(groups: int, num_features: int) -> None:
    """Raise a ValueError unless ``groups`` divides the channels."""
    if groups < 1 or num_features % groups:
        divisors = [g for g in range(1, num_features + 1) if num_features % g == 0]
        raise ValueError(
            f"groups={groups} does not divide {num_features} channels; groups can be {', '.join(map(str, divisors))}"
        )


class GroupNorm(NormLayer):
    """Group normalization: each sample by the mean and variance of groups of channels over space.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``, one (biased) mean and variance for each sample and each
    group of C / groups consecutive channels. Training and evaluation are the same.

    Use it where batches are small or vary. It does not fold into a convolution for inference.

    Args:
        num_features: C.
        groups: number of groups; must divide C.
        eps: added to the variance.
        affine: learn ``weight`` and ``bias``, each (C,).
        act_layer: makes the activation that follows, such as ``torch.nn.ReLU``; None for none.
        channel_dim: 1 for (N, C, ...), -1 for (N, ..., C).
        device: where parameters are made.
        dtype: of parameters, which are float32 at least.

    Raises:
        ValueError: if groups does not divide C; on input of another channel count or with one value in a group.

    Source: Wu & He 2018, arXiv 1803.08494; 32 groups as there.

    Example:
        >>> GroupNorm(16, groups=4)(torch.randn(2, 16, 8, 8)).shape
        torch.Size([2, 16, 8, 8])
    """

    def __init__(
        self,
        num_features: int,
        *,
        groups: int = 32,
        eps: float = 1e-5,
        affine: bool = True,
        act_layer: Activation | None = None,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features,
            eps=eps,
            affine=affine,
            act_layer=act_layer,
            channel_dim=channel_dim,
            device=device,
            dtype=dtype,
        )
        check_groups(groups, num_features)
        self.groups = groups

    def normalize(self, x: Tensor) -> Tensor:
        """Apply the layer to checked input."""
        return group_norm(x, self.groups, self.weight, self.bias, eps=self.eps)


class LayerNorm(NormLayer):
    """Layer normalization of feature maps: each sample by its mean and variance over channels and space.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias`` with one (biased) mean and variance for each sample and a
    scale and shift for each channel, as ``torch.nn.GroupNorm(1, C)``. This is not ConvNeXt's layer, which
    normalizes each position over channels.

    Use it where the batch must not matter and channels are alike. In convolutional networks group normalization is
    usually the better choice.

    Args:
        num_features: C.
        eps: added to the variance.
        affine: learn ``weight`` and ``bias``, each (C,).
        act_layer: makes the activation that follows, such as ``torch.nn.ReLU``; None for none.
        channel_dim: 1 for (N, C, ...), -1 for (N, ..., C).
        device: where parameters are made.
        dtype: of parameters, which are float32 at least.

    Raises:
        ValueError: on input of another channel count or of one value per sample.

    Source: Ba, Kiros & Hinton 2016, arXiv 1607.06450; for maps, Wu & He 2018, arXiv 1803.08494, section 3.

    Example:
        >>> y = LayerNorm(16)(torch.randn(2, 16, 8, 8))
        >>> y.mean((1, 2, 3)).abs().max().item() < 1e-6
        True
    """

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        affine: bool = True,
        act_layer: Activation | None = None,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features,
            eps=eps,
            affine=affine,
            act_layer=act_layer,
            channel_dim=channel_dim,
            device=device,
            dtype=dtype,
        )

    def normalize(self, x: Tensor) -> Tensor:
        """Apply the layer to checked input."""
        return layer_norm(x, self.weight, self.bias, eps=self.eps)


class InstanceNorm(NormLayer):
    """Instance normalization: each sample and channel by its mean and variance over space.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias`` with (biased) statistics over space alone. It keeps no
    running statistics and, unlike ``torch.nn.InstanceNorm2d``, learns scale and shift by default, as all layers here.

    Use it for style transfer and where contrast carries no information. It needs more than one position, so it
    takes neither (N, C) input nor maps of one pixel.

    Args:
        num_features: C.
        eps: added to the variance.
        affine: learn ``weight`` and ``bias``, each (C,).
        act_layer: makes the activation that follows, such as ``torch.nn.ReLU``; None for none.
        channel_dim: 1 for (N, C, ...), -1 for (N, ..., C).
        device: where parameters are made.
        dtype: of parameters, which are float32 at least.

    Raises:
        ValueError: on input of another channel count or with one position.

    Source: Ulyanov, Vedaldi & Lempitsky 2016, arXiv 1607.08022.

    Example:
        >>> y = InstanceNorm(3)(torch.randn(2, 3, 8, 8))
        >>> y.mean((2, 3)).abs().max().item() < 1e-6
        True
    """

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        affine: bool = True,
        act_layer: Activation | None = None,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features,
            eps=eps,
            affine=affine,
            act_layer=act_layer,
            channel_dim=channel_dim,
            device=device,
            dtype=dtype,
        )

    def normalize(self, x: Tensor) -> Tensor:
        """Apply the layer to checked input."""
        return instance_norm(x, self.weight, self.bias, eps=self.eps)
