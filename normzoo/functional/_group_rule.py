"""The rule that batch, group, layer and instance normalization share (see ``_channel_affine``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class GroupRule:
    """Standardization of groups of consecutive channels, by their moments, which follow from those of the channels."""

    groups: int
    eps: float

    def __call__(self, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.groups == mean.shape[1]:
            rstd = (var + self.eps).rsqrt()
            scale = rstd if weight is None else rstd * weight
            return scale, torch.zeros_like(scale) if bias is None else bias.expand_as(scale)
        offset, rstd = self._standardize(mean, var)
        scale = rstd.expand_as(offset).reshape(mean.shape)
        scale = scale if weight is None else scale * weight
        shift = offset.reshape(mean.shape) * scale
        return scale, shift if bias is None else shift + bias

    def _standardize(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """The channels' means less their group's, (N, groups, C / groups), and 1 / std of the groups."""
        grouped, var = (v.view(v.shape[0], self.groups, -1) for v in (mean, var))
        offset = grouped - grouped.mean(-1, keepdim=True)
        var = torch.addcmul(var, offset, offset).mean(-1, keepdim=True)
        return offset, (var + self.eps).rsqrt()

    def vjp(self, inputs: list[Any], d_scale: Tensor, d_shift: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        mean, var, weight, bias = inputs
        d_bias = None if bias is None else d_shift.sum(0)
        if self.groups == mean.shape[1]:
            rstd = (var + self.eps).rsqrt_()
            d_weight = None if weight is None else (d_scale * rstd).sum(0)
            scale = rstd if weight is None else rstd * weight
            return scale, [None, (d_scale * scale).mul_(rstd).mul_(rstd).mul_(-0.5), d_weight, d_bias]
        offset, rstd = self._standardize(mean, var)
        # of (x - the group's mean), where d_scale is of (x - the channel's mean)
        grouped = torch.addcmul(d_scale.view_as(offset), offset, d_shift.view_as(offset))
        scale, d_weight, weighted = rstd.expand_as(offset), None, grouped
        if weight is not None:
            by_group = weight.view(self.groups, -1)
            scale, weighted = rstd * by_group, grouped * by_group
            d_weight = (grouped * rstd).sum(0).flatten()
        d_var = weighted.sum(-1, keepdim=True) * rstd.pow(3) * (-0.5 / offset.shape[-1])
        scale = scale.reshape(mean.shape)
        d_mean = (d_shift * scale).view_as(offset)
        d_mean = torch.addcmul(d_mean - d_mean.mean(-1, keepdim=True), offset, d_var, value=2).view_as(mean)
        return scale, [d_mean, d_var.expand_as(offset).reshape(mean.shape), d_weight, d_bias]
