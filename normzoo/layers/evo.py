"""EvoNorms: normalization and activation in one layer."""

from __future__ import annotations

import torch
from torch import Tensor

from normzoo.functional.evo import evonorm_b0, evonorm_s0
from normzoo.layers._base import Activation, NormLayer, RunningStatsLayer, own_activation
from normzoo.layers.group import check_groups


class EvoNormS0(NormLayer):
    """EvoNorm-S0: group normalization of a gated input, found by search together with its activation.

    ``y = x * sigmoid(v * x) / sqrt(var + eps) * weight + bias``, var the (biased) variance of each sample's groups of
    consecutive channels. It takes the place of normalization and activation both; the mean is not subtracted.
    Training and evaluation are the same.

    With ``act_layer=None`` there is no gate: ``y = x / sqrt(var + eps) * weight + bias`` (timm's then only scales and
    shifts). Use it for small batches, in the place of group normalization and SiLU.

    Shapes: (N, C), (N, C, L), (N, C, H, W), (N, C, D, H, W) or, with ``channel_dim=-1``, (N, ..., C). The output has
    the shape, dtype and memory format of the input; statistics are float32 at least.

    Args:
        num_features: C.
        groups: number of groups, which must divide C; 32 as in the paper.
        eps: added to the variance; 1e-5 as in the paper.
        affine: learn ``weight`` and ``bias``, each (C,); ``v`` is learnt in any case.
        act_layer: ``"gate"`` for the gate with its parameter ``v``, (C,), initially 1; or what makes another
            activation, such as ``torch.nn.ReLU``; None for none.
        channel_dim: 1 for (N, C, ...), -1 for (N, ..., C).
        device: where parameters are made.
        dtype: of parameters, which are float32 at least.

    Raises:
        ValueError: if groups does not divide C; on input of another channel count.

    Source: Liu, Brock, Simonyan & Le 2020, arXiv 2004.02967, table 2 and appendix A.

    Example:
        >>> EvoNormS0(8, groups=2)(torch.randn(2, 8, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
    """

    v: Tensor | None

    def __init__(
        self,
        num_features: int,
        *,
        groups: int = 32,
        eps: float = 1e-5,
        affine: bool = True,
        act_layer: Activation | str | None = "gate",
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features,
            eps=eps,
            affine=affine,
            act_layer=own_activation(act_layer, "gate"),
            channel_dim=channel_dim,
            device=device,
            dtype=dtype,
        )
        check_groups(groups, num_features)
        self.groups, self.act_layer = groups, act_layer
        self.add_parameter("v", 1.0 if act_layer == "gate" else None)

    def normalize(self, x: Tensor) -> Tensor:
        """Apply the layer to checked input."""
        return evonorm_s0(x, self.weight, self.bias, self.v, groups=self.groups, eps=self.eps)


class EvoNormB0(RunningStatsLayer):
    """EvoNorm-B0: division by the larger of two spreads, the batch's and the sample's, found by search.

    ``y = x / max(sqrt(var_B + eps), v * x + sqrt(var_I + eps)) * weight + bias``, with var_B of each channel over batch
    and space (biased; evaluating, the running average of the unbiased one) and var_I of each sample and channel over
    space (biased). The maximum is the layer's nonlinearity; the mean is not subtracted.

    With ``act_layer=None``, ``y = x / sqrt(var_B + eps) * weight + bias`` (timm's then only scales and shifts). Use
    it in the place of batch norm and its activation where batches are large, in networks with an activation after
    each normalization. The authors' running variance is of the biased one.

    Shapes: (N, C), (N, C, L), (N, C, H, W), (N, C, D, H, W) or, with ``channel_dim=-1``, (N, ..., C). The output has
    the shape, dtype and memory format of the input; statistics are float32 at least.

    Args:
        num_features: C.
        eps: added to both variances, inside the roots; 1e-3 as in timm (the authors' ResNets have 1e-5).
        momentum: update rate of the running variance; None for the cumulative average of all batches.
        sync: take the batch's variance over all ranks.
        affine: learn ``weight`` and ``bias``, each (C,); ``v`` is learnt in any case.
        act_layer: ``"max"`` for the maximum with its parameter ``v``, (C,), initially 1; or what makes another
            activation, such as ``torch.nn.ReLU``; None for none.
        channel_dim: 1 for (N, C, ...), -1 for (N, ..., C).
        device: where parameters and buffers are made.
        dtype: of parameters and buffers, which are float32 at least.

    Raises:
        ValueError: on input of another channel count, or of one value per channel when training.

    Source: Liu, Brock, Simonyan & Le 2020, arXiv 2004.02967, table 2 and appendix A.

    Example:
        >>> EvoNormB0(8)(torch.randn(4, 8, 4, 4)).shape
        torch.Size([4, 8, 4, 4])
    """

    v: Tensor | None

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-3,
        momentum: float | None = 0.1,
        sync: bool = False,
        affine: bool = True,
        act_layer: Activation | str | None = "max",
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
            act_layer=own_activation(act_layer, "max"),
            channel_dim=channel_dim,
            device=device,
            dtype=dtype,
        )
        self.act_layer = act_layer
        self.add_parameter("v", 1.0 if act_layer == "max" else None)
        self.register_buffer("running_mean", None)  # nothing is subtracted

    def normalize(self, x: Tensor) -> Tensor:
        """Apply the layer to checked input."""
        y = evonorm_b0(
            x,
            self.running_var,
            self.weight,
            self.bias,
            self.v,
            training=self.training,
            momentum=self.update_rate(),
            eps=self.eps,
            sync=self.sync,
        )
        self.count_batch()
        return y
