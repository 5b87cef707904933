"""Layers that normalize each position over its channels."""

from __future__ import annotations

import torch
from torch import Tensor

from normzoo.functional.position import channel_layer_norm, positional_norm, rms_norm
from normzoo.layers._base import Activation, NormLayer


class ChannelLayerNorm(NormLayer):
    """Layer normalization of each position over its channels, as in ConvNeXt and in transformers.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``, with one mean and (biased) variance for each sample and
    position. Training and evaluation are the same. With ``channel_dim=-1`` it is ``torch.nn.LayerNorm(C)``; on maps
    it is ConvNeXt's and timm's ``LayerNorm2d``. State dicts go across.

    Use it for transformers and for networks whose blocks are like theirs: wide, with large depthwise kernels. Not
    with few channels, of which each position's mean takes a part of the signal; there see ``group``.

    Shapes: (N, C), (N, C, L), (N, C, H, W), (N, C, D, H, W) or, with ``channel_dim=-1``, (N, ..., C); the output has
    the shape, dtype and memory format of the input, statistics are float32 at least.

    Args:
        num_features: C, at least 2.
        eps: added to the variance; 1e-6 as in ConvNeXt.
        affine: learn ``weight`` and ``bias``, each (C,).
        act_layer: makes the activation that follows, such as ``torch.nn.ReLU``; None for none.
        channel_dim: 1 for (N, C, ...), -1 for (N, ..., C).
        device: where parameters are made.
        dtype: of parameters, which are float32 at least.

    Raises:
        ValueError: for a single channel; on input of another channel count.

    Source: Ba, Kiros & Hinton 2016, arXiv 1607.06450; over the channels of a map, Liu et al. 2022, arXiv 2201.03545.

    Example:
        >>> y = ChannelLayerNorm(16)(torch.randn(2, 16, 8, 8))
        >>> y.mean(1).abs().max().item() < 1e-5
        True
    """

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-6,
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
        return channel_layer_norm(x, self.weight, self.bias, eps=self.eps)


class PositionalNorm(NormLayer):
    """Positional normalization (PONO): each position by the mean and variance of its channels.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``. The formula is that of ``layer_channel``; what sets the
    method apart is where its moments go: the authors hand them on to later layers of generative networks (moment
    shortcut), for which ``normzoo.functional.position`` is the place to start from.

    The paper divides the variance by C, the authors' code by C - 1: ``unbiased=True`` is for their weights.

    Use it in image-to-image networks, where the moments carry structure. In classifiers prefer ``layer_channel``.

    Shapes: as for ``layer_channel``. Statistics are float32 at least, the output has the dtype of the input.

    Args:
        num_features: C, at least 2.
        eps: added to the variance; 1e-5 as in the authors' code.
        unbiased: divide the variance by C - 1.
        affine: learn ``weight`` and ``bias``, each (C,).
        act_layer: makes the activation that follows, such as ``torch.nn.ReLU``; None for none.
        channel_dim: 1 for (N, C, ...), -1 for (N, ..., C).
        device: where parameters are made.
        dtype: of parameters, which are float32 at least.

    Raises:
        ValueError: for a single channel; on input of another channel count.

    Source: Li, Wu, Weinberger & Belongie 2019, arXiv 1907.04312.

    Example:
        >>> PositionalNorm(16)(torch.randn(2, 16, 8, 8)).shape
        torch.Size([2, 16, 8, 8])
    """

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        unbiased: bool = False,
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
        self.unbiased = unbiased

    def normalize(self, x: Tensor) -> Tensor:
        """Apply the layer to checked input."""
        return positional_norm(x, self.weight, self.bias, eps=self.eps, unbiased=self.unbiased)


class RMSNorm(NormLayer):
    """Root mean square normalization of each position over its channels.

    ``y = x / sqrt(mean(x^2) + eps) * weight``: layer normalization without subtracting the mean and without a shift.
    With ``channel_dim=-1`` it is ``torch.nn.RMSNorm(C)``, on maps timm's ``RmsNorm2d``; state dicts go across.

    eps is a fixed number. ``torch.nn.RMSNorm`` takes the dtype's by default, so that its output depends on the
    precision it runs in.

    Use it in transformers, where it does what layer normalization does for less. In convolutional networks without
    biases set ``bias=True``, so that channels can be shifted as after batch norm.

    Shapes: as for ``layer_channel``, also with one channel. Statistics are float32 at least, the output has the dtype
    of the input.

    Args:
        num_features: C.
        eps: added to the mean square; 1e-6 as in LLaMA and timm.
        bias: learn ``bias`` too.
        affine: learn ``weight``, (C,).
        act_layer: makes the activation that follows, such as ``torch.nn.ReLU``; None for none.
        channel_dim: 1 for (N, C, ...), -1 for (N, ..., C).
        device: where parameters are made.
        dtype: of parameters, which are float32 at least.

    Raises:
        ValueError: on input of another channel count.

    Source: Zhang & Sennrich 2019, arXiv 1910.07467.

    Example:
        >>> y = RMSNorm(16)(torch.randn(2, 16, 8, 8))
        >>> (y.square().mean(1) - 1).abs().max().item() < 1e-4
        True
    """

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-6,
        bias: bool = False,
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
        if not bias:
            self.add_parameter("bias", None)

    def normalize(self, x: Tensor) -> Tensor:
        """Apply the layer to checked input."""
        return rms_norm(x, self.weight, self.bias, eps=self.eps)
