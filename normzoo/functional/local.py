"""Normalization by neighbourhoods: local response and divisive normalization."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from normzoo._shapes import per_channel, statistics_dtype
from normzoo.functional._moments import affine_backward, per_channel_sum, squared_difference
from normzoo.functional._pieces import by_sample, gradients
from normzoo.functional.elementwise import Gradients, Kept, affine_into, affine_to


def local_response_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    size: int = 5,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 2.0,
    mean: bool = False,
) -> Tensor:
    """``y = x / (k + alpha * sum(x^2))^beta * weight + bias``, the sum of each position over ``size`` near channels.

    The window reaches size // 2 channels back and (size - 1) // 2 ahead and is cut off at the first and last channel.

    Args:
        x: (N, C, ...), not empty.
        weight: (C,), the scale; 1 if None.
        bias: (C,), the shift; 0 if None.
        size: channels of the window.
        alpha: factor of the sum of squares.
        beta: exponent.
        k: what is added.
        mean: divide the sum by ``size``, as ``torch.nn.LocalResponseNorm`` does.

    Returns:
        a tensor of the shape, dtype and memory format of ``x``.

    Source: Krizhevsky, Sutskever & Hinton 2012, section 3.3.
    """
    share = alpha / size if mean else alpha
    return by_sample(_LocalResponse(size, share, beta, k), x, weight, bias)


def divisive_norm(
    x: Tensor,
    sigma: Tensor | float,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    mean_window: int = 5,
    square_window: int = 5,
) -> Tensor:
    """``v = x - mean(x); y = v / sqrt(sigma^2 + mean(v^2)) * weight + bias``, means over windows and all channels.

    The windows are centred on each position (an even one reaches one further ahead). Beyond the border x and v count
    as 0, and means divide by the whole window. Input (N, C) has no space: there the windows run over the channels.

    Args:
        x: (N, C, ...), not empty.
        sigma: the smoothing, a (1,) tensor or a number.
        weight: (C,), the scale; 1 if None.
        bias: (C,), the shift; 0 if None.
        mean_window: side of the window of the mean.
        square_window: side of the window of the mean square.

    Returns:
        a tensor of the shape, dtype and memory format of ``x``.

    Source: Ren, Liao, Urtasun, Sinz & Zemel 2017, arXiv 1611.04520, equations 8-10.
    """
    if not isinstance(sigma, Tensor):
        sigma = torch.full((), sigma, dtype=statistics_dtype(x), device=x.device)  # filled there: no copy that waits
    sigma = sigma.to(x.device, statistics_dtype(x))
    return by_sample(_Divisive((mean_window, square_window)), x, sigma, weight, bias)


@dataclass(frozen=True, eq=False)
class _LocalResponse:
    size: int
    alpha: float
    beta: float
    k: float

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        wide = x.to(statistics_dtype(x))
        return affine_to(wide * self._power(self._divisor(wide)), weight, bias).to(x.dtype)

    def _divisor(self, x: Tensor) -> Tensor:
        return self.k + self.alpha * self._window_sum(x.square(), self.size // 2)

    def _window_sum(self, x: Tensor, before: int) -> Tensor:
        """Sums over windows of ``size`` channels; a few additions, since a running sum would cancel digits."""
        padded = F.pad(x, [0, 0] * (x.ndim - 2) + [before, self.size - 1 - before])
        total = padded.narrow(1, 0, x.shape[1])
        for first in range(1, self.size):
            total = total + padded.narrow(1, first, x.shape[1])
        return total

    def _power(self, divisor: Tensor) -> Tensor:
        if self.beta == 0.75:  # roots are many times as fast as pow
            return (divisor * divisor.sqrt()).rsqrt()
        return divisor.pow(-self.beta)

    def write(self, y: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
        """The output, by few passes."""
        wide = x.to(statistics_dtype(x))
        affine_into(y, self._power_and_root(wide)[0].mul_(wide), weight, bias)

    def _power_and_root(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``divisor ** -beta`` and ``divisor ** -0.5``, in place as far as may be."""
        divisor = _window_sum(x.square(), self.size, 1, self.size // 2).mul_(self.alpha).add_(self.k)
        if self.beta == 0.75:  # roots are many times as fast as pow
            root = divisor.rsqrt_()
            return root.sqrt().mul_(root), root
        return divisor.pow(-self.beta), divisor.rsqrt_()

    def vjp(
        self, x: Tensor, dy: Tensor, weight: Tensor | None, bias: Tensor | None, *, kept: Kept, out: Tensor | None
    ) -> Gradients:
        """With ``y = x * power * weight + bias``, ``power = divisor ** -beta``; the window's mirror image goes back."""
        wide, dy = x.to(statistics_dtype(x)), dy.to(statistics_dtype(x))
        d_bias = None if bias is None else per_channel_sum(dy)
        power, root = self._power_and_root(wide)
        product, d_weight = (wide * power).mul_(dy), None
        if weight is not None:
            d_weight, gain = per_channel_sum(product), per_channel(weight, x)
            product, power = product * gain, power * gain
        through = _window_sum(product.mul_(root.square_()), self.size, 1, (self.size - 1) // 2)
        share = -2 * self.alpha * self.beta
        dx = torch.addcmul(power.mul_(dy), through, wide, value=share, out=power if out is None else out)
        return dx.to(x.dtype), [d_weight, d_bias]


@dataclass(frozen=True, eq=False)
class _Divisive:
    windows: tuple[int, int]

    def __call__(self, x: Tensor, sigma: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        wide = x.to(statistics_dtype(x))
        if x.ndim == 2:  # windows of channels
            centred = wide - _window_mean(wide, self.windows[0])
            scale = (sigma.square() + _window_mean(centred.square(), self.windows[1])).rsqrt()
        else:
            mean = wide.mean(1, keepdim=True)
            var = (wide - mean).square().mean(1, keepdim=True)
            centre, scale = self._centre_and_scale(mean, var, sigma)
            centred = wide - centre
        return affine_to(centred * scale, weight, bias).to(x.dtype)

    def _centre_and_scale(self, mean: Tensor, var: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """From each position's mean and variance over channels, (N, 1, ...)."""
        centre = _window_mean(mean, self.windows[0])
        square = var + (mean - centre).square()
        return centre, (sigma.square() + _window_mean(square, self.windows[1])).rsqrt()

    def vjp(
        self,
        x: Tensor,
        dy: Tensor,
        sigma: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        *,
        kept: Kept,
        out: Tensor | None,
    ) -> Gradients:
        """With ``y = (x - centre) * scale * weight + bias``; autograd goes through the maps of one channel alone."""
        if x.ndim == 2:
            leaves = [t if t is None else t.detach().requires_grad_() for t in (x, sigma, weight, bias)]
            with torch.enable_grad():
                y = self(*leaves)  # type: ignore[arg-type]
            dx, *rest = gradients(y, leaves, dy)
            return torch.zeros_like(x) if dx is None else dx, rest
        wide, dy = x.to(statistics_dtype(x)), dy.to(statistics_dtype(x))
        mean, var = self._moments(wide)
        centre, scale = self._centre_and_scale_in_place(mean, var, sigma)
        z = (wide - centre).mul_(scale)
        dz, d_weight, d_bias = affine_backward(dy, z, dy.new_ones(x.shape[1]) if weight is None else weight)
        d_centre = dz.sum(1, keepdim=True).mul_(scale).neg_()
        d_square_mean = z.mul_(dz).sum(1, keepdim=True).mul_(scale.square()).mul_(-0.5)
        d_sigma = 2 * sigma * d_square_mean.sum()
        d_var = _window_means(d_square_mean, self.windows[1], mirrored=True)
        through_square = 2 * (mean - centre) * d_var
        d_mean = through_square + _window_means(d_centre - through_square, self.windows[0], mirrored=True)
        slope = d_var * (2 / x.shape[1])
        level = torch.addcmul(d_mean / x.shape[1], slope, mean, value=-1)
        dx = torch.add(dz.mul_(scale).addcmul_(wide, slope), level, out=dz if out is None else out).to(x.dtype)
        return dx, [d_sigma, None if weight is None else d_weight, None if bias is None else d_bias]

    def write(self, y: Tensor, x: Tensor, sigma: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
        """The output, by few passes."""
        if x.ndim == 2:
            y.copy_(self(x, sigma, weight, bias))
        else:
            wide = x.to(statistics_dtype(x))
            centre, scale = self._centre_and_scale_in_place(*self._moments(wide), sigma)
            affine_into(y, (wide - centre).mul_(scale), weight, bias)

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Each position's mean and variance over channels, (N, 1, ...)."""
        mean = x.mean(1, keepdim=True)
        return mean, squared_difference(x, mean).mean(1, keepdim=True)

    def _centre_and_scale_in_place(self, mean: Tensor, var: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """As ``_centre_and_scale``, without gradient."""
        centre = _window_means(mean, self.windows[0])
        square = _window_means(squared_difference(mean, centre).add_(var), self.windows[1])
        return centre, square.add_(sigma.square()).rsqrt_()


def _window_sum(x: Tensor, size: int, dim: int, before: int) -> Tensor:
    """Sums over windows of ``size`` along one dimension, of which ``before`` come before each; without gradient.

    A few additions: a running sum would cancel digits, and torch's pooling takes eight times as long.
    """
    total, length = x.clone(), x.shape[dim]
    for step in range(1, min(before, length - 1) + 1):
        total.narrow(dim, step, length - step).add_(x.narrow(dim, 0, length - step))
    for step in range(1, min(size - 1 - before, length - 1) + 1):
        total.narrow(dim, 0, length - step).add_(x.narrow(dim, step, length - step))
    return total


def _window_means(x: Tensor, size: int, *, mirrored: bool = False) -> Tensor:
    """As ``_window_mean`` of (N, 1, ...), without gradient, or with ``mirrored`` its transpose."""
    before = size // 2 if mirrored else (size - 1) // 2
    for dim in range(2, x.ndim):
        x = _window_sum(x, size, dim, before)
    return x / size ** (x.ndim - 2)


def _window_mean(x: Tensor, size: int) -> Tensor:
    """Mean over windows of (N, 1, ...), or over those of channels of (N, C), with zeros beyond the border."""
    flat = x[:, None] if x.ndim == 2 else x
    space = flat.ndim - 2
    pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[space - 1]
    y = pool(F.pad(flat, [(size - 1) // 2, size // 2] * space), size, stride=1)
    return y[:, 0] if x.ndim == 2 else y
