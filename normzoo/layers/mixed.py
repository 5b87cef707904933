"""Layers that mix the statistics of samples and batch."""

from __future__ import annotations

import torch
from torch import Tensor

from normzoo.functional.mixed import batch_group_norm, batch_instance_norm, switchable_norm
from normzoo.layers._base import Activation, RunningStatsLayer
from normzoo.layers.group import check_groups


class SwitchableNorm(RunningStatsLayer):
    """Switchable normalization: learnt mixtures of instance, layer and batch statistics.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias`` where mean and var are each a mixture of the three, by the
    softmax of three logits for means and three for variances, the same for all channels. Evaluating, the batch's
    statistics are running averages.

    All variances are biased, as in the paper. The authors' code for maps has an unbiased instance variance, from which
    the others inherit: ``unbiased_instance=True`` is for their weights. Their running variance starts at 0; here it
    starts at 1, as in batch norm. Their ``momentum`` is the share that is kept.

    Use it to find which statistics a network wants. The logits are learnt slowly; give them no weight decay to keep
    mixtures from being drawn to equal shares.

    Shapes: (N, C), (N, C, L), (N, C, H, W), (N, C, D, H, W) or, with ``channel_dim=-1``, (N, ..., C). The output has
    the shape, dtype and memory format of the input; statistics are float32 at least.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: update rate of the running averages; None for the cumulative average of all batches.
        unbiased_instance: divide the instance variance by HW - 1.
        sync: when training, take statistics over all ranks: R ranks of batch b are then one of batch R * b.
        affine: learn ``weight`` and ``bias``, each (C,); the logits ``mean_weight`` and ``var_weight``, each (3,) in
            the order instance, layer, batch and initially 1, are learnt in any case.
        act_layer: makes the activation that follows, such as ``torch.nn.ReLU``; None for none.
        channel_dim: 1 for (N, C, ...), -1 for (N, ..., C).
        device: where parameters and buffers are made.
        dtype: of parameters and buffers, which are float32 at least.

    Raises:
        ValueError: on input of another channel count, or of one value per channel when training; with
            ``unbiased_instance``, on input of one position; for ``unbiased_instance`` with ``sync``.

    Source: Luo, Ren, Peng, Zhang & Li 2019, arXiv 1806.10779, equations 3-5.

    Example:
        >>> SwitchableNorm(3)(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 3, 8, 8])
    """

    mean_weight: Tensor
    var_weight: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        unbiased_instance: bool = False,
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
        if unbiased_instance and sync:
            raise ValueError("unbiased_instance is for the weights of one rank; it cannot go with sync=True")
        self.unbiased_instance = unbiased_instance
        self.add_parameter("mean_weight", 1.0, size=3)
        self.add_parameter("var_weight", 1.0, size=3)

    def normalize(self, x: Tensor) -> Tensor:
        """Apply the layer to checked input."""
        y = switchable_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.mean_weight,
            self.var_weight,
            training=self.training,
            momentum=self.update_rate(),
            eps=self.eps,
            unbiased_instance=self.unbiased_instance,
            sync=self.sync,
        )
        self.count_batch()
        return y


class BatchInstanceNorm(RunningStatsLayer):
    """Batch-instance normalization: each channel learns how much of batch and how much of instance norm it wants.

    ``y = (gate * x_B + (1 - gate) * x_I) * weight + bias``, x_B normalized by the batch's statistics (running ones when
    evaluating), x_I by each sample's own, both with biased variances. ``gate`` starts at 1, which is batch norm.

    A gate counts as clipped to [0, 1], and where it is at a bound no gradient leads it further out: the projected
    gradient descent of the paper. The authors clip the parameter after each step, at ten times the learning rate and
    without weight decay; give the gates such a parameter group to do as they did.

    Use it where style varies within the data (artistic images, several domains) and must be discounted in part.

    Shapes: (N, C), (N, C, L), (N, C, H, W), (N, C, D, H, W) or, with ``channel_dim=-1``, (N, ..., C). The output has
    the shape, dtype and memory format of the input; statistics are float32 at least.

    Args:
        num_features: C.
        eps: added to both variances.
        momentum: update rate of the running averages; None for the cumulative average of all batches.
        sync: when training, take statistics over all ranks: R ranks of batch b are then one of batch R * b.
        affine: learn ``weight`` and ``bias``, each (C,); ``gate`` is learnt in any case.
        act_layer: makes the activation that follows, such as ``torch.nn.ReLU``; None for none.
        channel_dim: 1 for (N, C, ...), -1 for (N, ..., C).
        device: where parameters and buffers are made.
        dtype: of parameters and buffers, which are float32 at least.

    Raises:
        ValueError: on input of another channel count, or of one value per channel when training.

    Source: Nam & Kim 2018, arXiv 1805.07925, equations 1-4.

    Example:
        >>> BatchInstanceNorm(3)(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 3, 8, 8])
    """

    gate: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
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
        self.add_parameter("gate", 1.0)

    def normalize(self, x: Tensor) -> Tensor:
        """Apply the layer to checked input."""
        y = batch_instance_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.gate,
            training=self.training,
            momentum=self.update_rate(),
            eps=self.eps,
            sync=self.sync,
        )
        self.count_batch()
        return y


class BatchGroupNorm(RunningStatsLayer):
    """Batch group normalization: groups of channels by their mean and variance over batch and space.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``, one mean and (biased) variance for each group of C / groups
    consecutive channels. With groups = C it is batch norm; fewer groups gather more values for each statistic.
    Evaluation uses running averages (of the unbiased variance).

    The running statistics are kept for each channel, equal within a group, so that they mean what they mean in
    BatchNorm2d and state dicts go across. The paper also has more groups than channels, which cut through maps and tie
    the layer to one size of image; those are refused.

    Use it for batches of a few images with few groups, for very large batches with many. The paper gives no number for
    all: it tunes groups to the batch size.

    Shapes: (N, C), (N, C, L), (N, C, H, W), (N, C, D, H, W) or, with ``channel_dim=-1``, (N, ..., C). The output has
    the shape, dtype and memory format of the input; statistics are float32 at least.

    Args:
        num_features: C.
        groups: number of groups, which must divide C.
        eps: added to the variance.
        momentum: update rate of the running averages; None for the cumulative average of all batches.
        sync: when training, take statistics over all ranks: R ranks of batch b are then one of batch R * b.
        affine: learn ``weight`` and ``bias``, each (C,).
        act_layer: makes the activation that follows, such as ``torch.nn.ReLU``; None for none.
        channel_dim: 1 for (N, C, ...), -1 for (N, ..., C).
        device: where parameters and buffers are made.
        dtype: of parameters and buffers, which are float32 at least.

    Raises:
        ValueError: if groups does not divide C; on input of another channel count, or, with groups = C, of one value
            per channel when training.

    Source: Zhou et al. 2020, arXiv 2012.02782.

    Example:
        >>> BatchGroupNorm(8, groups=2)(torch.randn(2, 8, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(
        self,
        num_features: int,
        *,
        groups: int = 32,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
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
        check_groups(groups, num_features)
        self.groups = groups

    def normalize(self, x: Tensor) -> Tensor:
        """Apply the layer to checked input."""
        y = batch_group_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            training=self.training,
            momentum=self.update_rate(),
            eps=self.eps,
            groups=self.groups,
            sync=self.sync,
        )
        self.count_batch()
        return y
