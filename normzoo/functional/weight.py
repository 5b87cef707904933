"""Standardization of the weights of convolutions, in the place of their outputs or beside it."""

from __future__ import annotations

from torch import Tensor

from normzoo._shapes import statistics_dtype


def standardize_weight(
    weight: Tensor, *, eps: float = 1e-6, unbiased: bool = False, eps_on_std: bool = False
) -> Tensor:
    """``(w - mean) / sqrt(var + eps)`` of each output filter.

    Published rules differ: timm's, the default here, and Google's BiT (eps 1e-10; timm takes 1e-8 for its weights) add
    eps to the biased variance; the authors' PyTorch code adds 1e-5 to the unbiased standard deviation
    (``unbiased=True, eps_on_std=True, eps=1e-5``), their TensorFlow code to the biased one.

    Args:
        weight: (O, I / groups, ...).
        eps: added to the variance, or to the standard deviation.
        unbiased: divide the variance by one less than the filter's number of weights.
        eps_on_std: add eps to the standard deviation.

    Returns:
        a tensor of the shape and dtype of ``weight``.

    Raises:
        ValueError: if filters have a single weight, which would become 0.

    Source: Qiao, Wang, Liu, Shen & Yuille 2019, arXiv 1903.10520, equation 4.
    """
    centred, square_sum, fan_in = _centre(weight)
    var = square_sum / (fan_in - unbiased)
    scale = 1 / (var.sqrt() + eps) if eps_on_std else (var + eps).rsqrt()
    return (centred * scale).view_as(weight).to(weight.dtype)


def scale_weight(
    weight: Tensor, gain: Tensor | None = None, *, gamma: float = 1.0, eps: float = 1e-6, clamp: bool = False
) -> Tensor:
    """``gain * gamma / sqrt(fan_in) * (w - mean) / sqrt(var + eps)`` of each output filter, var biased.

    Args:
        weight: (O, I / groups, ...).
        gain: (O,); 1 if None.
        gamma: the gain of the nonlinearity before, such as 1.7139588594436646 for ReLU; 1 where activations are scaled.
        eps: added to the variance, as in timm; with ``clamp`` the lower bound of fan_in * var.
        clamp: the rule of the NFNet authors' code: ``gain * gamma * (w - mean) / sqrt(max(fan_in * var, eps))``, with
            eps 1e-4.

    Returns:
        a tensor of the shape and dtype of ``weight``.

    Raises:
        ValueError: if filters have a single weight, which would become 0.

    Source: Brock, De & Smith 2021, arXiv 2101.08692, equation 4; clamped as in the code of arXiv 2102.06171.
    """
    centred, square_sum, fan_in = _centre(weight)
    scale = square_sum.clamp(min=eps).rsqrt() if clamp else (square_sum + fan_in * eps).rsqrt()
    if gain is not None:
        scale = scale * gain.view(-1, 1)
    return (centred * (gamma * scale)).view_as(weight).to(weight.dtype)


def _centre(weight: Tensor) -> tuple[Tensor, Tensor, int]:
    """Each filter less its mean, (O, fan_in), the sums of squares of that, (O, 1), and fan_in."""
    fan_in = weight[0].numel()
    if fan_in < 2:
        raise ValueError(
            f"the filters of a weight of shape {tuple(weight.shape)} have a single weight each, "
            "which standardization would make 0"
        )
    wide = weight.to(statistics_dtype(weight)).flatten(1)
    centred = wide - wide.mean(1, keepdim=True)
    return centred, centred.square().sum(1, keepdim=True), fan_in
