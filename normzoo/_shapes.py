"""The only file that knows which axis is the channel."""

from __future__ import annotations

import math

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def check_input(x: Tensor, num_features: int, channel_dim: int, layer: str) -> None:
    """Raise a ValueError unless ``x`` is floating, at least 2-d and has ``num_features`` channels."""
    if x.ndim < 2:
        raise ValueError(
            f"{layer} takes (N, C), (N, C, L), (N, C, H, W), (N, C, D, H, W) or, with channel_dim=-1, "
            f"(N, ..., C); the input has shape {tuple(x.shape)}"
        )
    if not x.is_floating_point():
        raise ValueError(f"{layer} takes floating-point input; the input has dtype {x.dtype}")
    if x.shape[channel_dim] != num_features:
        last = "; give it channel_dim=-1 if its channel is last" if x.shape[-1] == num_features else ""
        raise ValueError(
            f"{layer} was made for {num_features} channels; the input of shape {tuple(x.shape)} has "
            f"{x.shape[channel_dim]} at dimension {channel_dim}{last}"
        )


def check_channel_dim(channel_dim: int) -> None:
    """Raise a ValueError unless ``channel_dim`` is 1 (channels first) or -1 (channels last)."""
    if channel_dim not in (1, -1):
        raise ValueError(f"channel_dim must be 1 (channels first) or -1 (channels last), not {channel_dim!r}")


def channels_first(x: Tensor, channel_dim: int) -> Tensor:
    """A view of ``x`` with the channel at dimension 1."""
    return x if channel_dim == 1 or x.ndim == 2 else x.movedim(-1, 1)


def channels_back(y: Tensor, channel_dim: int) -> Tensor:
    """Undo :func:`channels_first`; the result is contiguous where the channel is last."""
    return y if channel_dim == 1 or y.ndim == 2 else y.movedim(1, -1).contiguous()


def per_channel(v: Tensor, x: Tensor) -> Tensor:
    """View ``v`` of shape (C,) so that it broadcasts against ``x`` of shape (N, C, ...)."""
    return v.view(-1, *[1] * (x.ndim - 2))


def positions(x: Tensor) -> int:
    """Number of positions in space of (N, C, ...), 1 of (N, C)."""
    return math.prod(x.shape[2:])


def spread(v: Tensor, x: Tensor) -> Tensor:
    """View ``v`` of shape (N, C) or (1, C) so that it broadcasts against ``x`` of shape (N, C, ...)."""
    return v.view(*v.shape, *[1] * (x.ndim - 2))


def channels_last(x: Tensor) -> bool:
    """Whether the neighbours in memory of a value in (N, C, ...) belong to other channels."""
    return x.stride(1) == 1 and x.shape[1] > 1


def memory_format(x: Tensor) -> torch.memory_format:
    """Channels-last for images and volumes that are laid out so, else contiguous."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    return last if last and x.is_contiguous(memory_format=last) else torch.contiguous_format


def affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """``x * weight + bias`` in a new tensor of the dtype of ``x``; for empty input it gives gradients of zero."""
    y = x.clone() if weight is None else x * per_channel(weight, x)
    return (y if bias is None else y + per_channel(bias, x)).to(x.dtype)


def values_per_channel(x: Tensor) -> int:
    """Number of values of (N, C, ...) that share one channel: the batch times the spatial extent."""
    return x.numel() // x.shape[1] if x.shape[1] else 0


def statistics_dtype(x: Tensor) -> torch.dtype:
    """Float32 for half-precision input, else the dtype of ``x``: statistics are never narrower than float32."""
    return torch.float32 if x.dtype in HALF else x.dtype


def scalar_dtype(device: torch.device) -> torch.dtype:
    """The dtype of rates and bounds that are 0-d tensors on a device: float64, or float32 where there is no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def parameter_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """The dtype in which a layer asked to be made as ``dtype`` keeps parameters and statistics."""
    return torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
