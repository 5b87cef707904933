"""Normalization of each position over its channels: layer normalization as in ConvNeXt, RMS and positional."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normzoo._shapes import HALF, channels_last, statistics_dtype
from normzoo.functional._moments import affine_backward, joined, squared_difference
from normzoo.functional._pieces import by_formula, gradients_of_formula, pieces, summed, traced, without_autocast
from normzoo.functional.elementwise import affine_into, affine_to, product_into


def channel_layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-6
) -> Tensor:
    """``y = (x - mean) / sqrt(var + eps) * weight + bias``, statistics of each position over channels.

    Args:
        x: (N, C, ...), not empty.
        weight: (C,), the scale; 1 if None.
        bias: (C,), the shift; 0 if None.
        eps: added to the biased variance.

    Returns:
        a tensor of the shape, dtype and memory format of ``x``.

    Raises:
        ValueError: with a single channel, whose normalized value would be 0.

    Source: Ba, Kiros & Hinton 2016, arXiv 1607.06450; over the channels of a map, Liu et al. 2022, arXiv 2201.03545.
    """
    _check_channels(x)
    if channels_last(x) and (x.dtype not in HALF or x.device.type == "cpu"):
        dtype = statistics_dtype(x)
        weight, bias = (None if v is None else v.to(dtype) for v in (weight, bias))
        return torch.layer_norm(x.movedim(1, -1), [x.shape[1]], weight, bias, eps).movedim(-1, 1)
    return _standardize(x, _Standardize(eps), weight, bias)


def positional_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    unbiased: bool = False,
) -> Tensor:
    """``y = (x - mean) / sqrt(var + eps) * weight + bias``, as :func:`channel_layer_norm`.

    Args:
        x: (N, C, ...), not empty.
        weight: (C,), the scale; 1 if None.
        bias: (C,), the shift; 0 if None.
        eps: added to the variance.
        unbiased: divide the variance by C - 1, as the authors' code does, and not by C, as the paper does.

    Returns:
        a tensor of the shape, dtype and memory format of ``x``.

    Raises:
        ValueError: with a single channel.

    Source: Li, Wu, Weinberger & Belongie 2019, arXiv 1907.04312, equations 1-3.
    """
    if not unbiased:
        return channel_layer_norm(x, weight, bias, eps=eps)
    _check_channels(x)
    return _standardize(x, _Standardize(eps, correction=1), weight, bias)


def rms_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-6) -> Tensor:
    """``y = x / sqrt(mean(x^2) + eps) * weight + bias``, the mean of each position over channels.

    Args:
        x: (N, C, ...), not empty.
        weight: (C,), the scale; 1 if None.
        bias: (C,), the shift; 0 if None.
        eps: added to the mean square.

    Returns:
        a tensor of the shape, dtype and memory format of ``x``.

    Source: Zhang & Sennrich 2019, arXiv 1910.07467, equation 4; eps as in later implementations.
    """
    return _standardize(x, _Standardize(eps, about_mean=False), weight, bias)


def _check_channels(x: Tensor) -> None:
    if x.shape[1] == 1:
        raise ValueError(
            f"each position of the input of shape {tuple(x.shape)} has a single channel: "
            "its value normalized over channels would be 0 whatever it is"
        )


@dataclass(frozen=True)
class _Standardize:
    """``z = (x - mean) * rstd`` of each position, or ``z = x * rstd`` with ``rstd = 1 / sqrt(mean(x^2) + eps)``."""

    eps: float
    about_mean: bool = True
    correction: int = 0

    def whole(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The formula in differentiable operations."""
        wide = x.to(statistics_dtype(x))
        mean = wide.mean(1, keepdim=True) if self.about_mean else None
        centred = wide if mean is None else wide - mean
        var = centred.square().sum(1, keepdim=True) / (x.shape[1] - self.correction)
        return affine_to(centred * (var + self.eps).rsqrt(), weight, bias).to(x.dtype)

    def measure(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """The mean, if it is subtracted, and rstd, both (N, 1, ...)."""
        mean = x.mean(1, keepdim=True) if self.about_mean else None
        if mean is not None:
            square = squared_difference(x, mean).sum(1, keepdim=True)
        elif channels_last(x):
            square = torch.linalg.vector_norm(x, dim=1, keepdim=True).square()
        else:
            square = x.square().sum(1, keepdim=True)
        return mean, square.div_(x.shape[1] - self.correction).add_(self.eps).rsqrt_()

    def gradients(
        self, x: Tensor, dy: Tensor, mean: Tensor | None, rstd: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Those for x, weight and bias."""
        if channels_last(x) and not self.correction:
            return self._by_layer_norm(x, dy, mean, rstd, weight)
        dx, of_affine = torch.empty_like(x), []
        for rows in pieces(x):
            wide, scale = x[rows].to(rstd.dtype), rstd[rows]
            z = wide * scale if mean is None else (wide - mean[rows]).mul_(scale)
            dz, *found = affine_backward(dy[rows], z, weight)
            of_affine.append(found)
            along = torch.mul(dz, z).sum(1, keepdim=True).div_(x.shape[1] - self.correction)
            if mean is not None:
                dz.sub_(dz.mean(1, keepdim=True))
            dx[rows] = dz.addcmul_(z, along, value=-1).mul_(scale)
        d_weight, d_bias = (summed(found) for found in zip(*of_affine, strict=True))
        return dx, d_weight, d_bias

    def _by_layer_norm(
        self, x: Tensor, dy: Tensor, mean: Tensor | None, rstd: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """By layer normalization's kernel, which also subtracts the gradient's mean over channels."""
        dtype = torch.promote_types(rstd.dtype, weight.dtype)
        dy, weight = dy.to(dtype), weight.to(dtype)
        moments = (torch.zeros_like(rstd) if mean is None else mean, rstd)
        last = [t.to(dtype).movedim(1, -1) for t in (dy, x, *moments)]
        dx, d_weight, d_bias = torch.ops.aten.native_layer_norm_backward(
            last[0], last[1], [x.shape[1]], last[2], last[3], weight, weight, [True, True, True]
        )
        dx = dx.movedim(-1, 1)
        if not self.about_mean:
            with without_autocast(x):
                # a row vector times a matrix runs on all cores, the matrix times a vector on one
                mean_of_dz = weight[None] @ last[0].reshape(-1, x.shape[1]).T
            dx.add_(mean_of_dz.view_as(rstd).mul_(rstd).div_(x.shape[1]))
        return dx.to(x.dtype), d_weight, d_bias


def _standardize(x: Tensor, formula: _Standardize, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return formula.whole(x, weight, bias) if traced(x) else _apply(x, formula, weight, bias)


@torch.compiler.disable
def _apply(*arguments: Any) -> Tensor:
    return _Position.apply(*arguments)


class _Position(torch.autograd.Function):
    """Keeps the input and the moments of each position."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, formula: _Standardize, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        y, held = torch.empty_like(x), []
        for rows in pieces(x):
            wide = x[rows].to(statistics_dtype(x))
            mean, rstd = formula.measure(wide)
            held.append((mean, rstd))
            z = product_into(y[rows], wide, rstd) if mean is None else (wide - mean).mul_(rstd)
            affine_into(y[rows], z, weight, bias)
        means, rstds = zip(*held, strict=True)
        ctx.save_for_backward(x, joined(means) if formula.about_mean else None, joined(rstds), weight, bias)
        ctx.formula = formula
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight, bias = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if by_formula(dy):
            dx, *rest = gradients_of_formula(ctx.formula.whole, [x, weight, bias], (needs[0], *needs[2:]), dy)
            return dx, None, *rest
        scale = rstd.new_ones(x.shape[1]) if weight is None else weight
        dx, d_weight, d_bias = ctx.formula.gradients(x, dy, mean, rstd, scale)
        return dx, None, None if weight is None else d_weight, None if bias is None else d_bias
