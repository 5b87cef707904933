"""Online normalization."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from normzoo.functional.online import online_norm
from normzoo.layers._base import Activation, NormLayer


class OnlineNorm(NormLayer):
    """Online normalization: each sample by running statistics of the samples before it; no batch is needed.

    Training, samples are taken in order, one by one, whatever the batch: each channel is normalized by a running mean
    and variance, which then move towards the sample's. The backward is the authors' control process, not the gradient
    of the output: it removes from the gradient its running components along the output and along the mean
    (``normzoo.functional.online`` has the recursions). Evaluating, the running statistics are fixed and the gradient
    is the ordinary one.

    After scale and shift comes a compensation of what the lag of the statistics can do: by default values are clamped
    to [-5, 5], as in the authors' code since 2020; ``compensation="layer"`` divides each sample by its root mean
    square, as in the paper. Without affine parameters the layer compensates all the same.

    Use it for batches of one, streams and recurrent networks. Its result depends on the order of samples, and under
    several ranks each keeps its own statistics. On (N, C) input a sample has no variance of its own, and
    the running variance is that of the samples' means, so that one value per channel is enough when training.

    Shapes: (N, C), (N, C, L), (N, C, H, W), (N, C, D, H, W) or, with ``channel_dim=-1``, (N, ..., C). The output has
    the shape, dtype and memory format of the input; statistics are float32 at least.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: update rate for each sample of the running statistics; 1e-3, one minus the authors' alpha.
        momentum_backward: update rate for each sample of the backward's states; 1e-2.
        compensation: ``"clamp"``, ``"layer"`` or None.
        clamp_value: bound of the clamp.
        affine: learn ``weight`` and ``bias``, each (C,).
        act_layer: makes the activation that follows, such as ``torch.nn.ReLU``; None for none.
        channel_dim: 1 for (N, C, ...), -1 for (N, ..., C).
        device: where parameters and buffers are made.
        dtype: of parameters and buffers, which are float32 at least.

    Buffers, each (C,): ``running_mean``, ``running_var`` (initially 0 and 1) and, moved by the backward pass,
    ``drift_mean`` and ``drift_scale`` (initially 0).

    Raises:
        ValueError: for rates outside [0, 1], an unknown compensation, or input of another channel count.

    Source: Chiley et al. 2019, arXiv 1905.05894, and the authors' code.

    Example:
        >>> OnlineNorm(3)(torch.randn(1, 3, 8, 8)).shape
        torch.Size([1, 3, 8, 8])
    """

    _initial_statistics: ClassVar[dict[str, float]] = {
        "running_mean": 0.0,
        "running_var": 1.0,
        "drift_mean": 0.0,
        "drift_scale": 0.0,
    }
    running_mean: Tensor
    running_var: Tensor
    drift_mean: Tensor
    drift_scale: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        momentum: float = 1e-3,
        momentum_backward: float = 1e-2,
        compensation: str | None = "clamp",
        clamp_value: float = 5.0,
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
        for name, rate in (("momentum", momentum), ("momentum_backward", momentum_backward)):
            if not 0 <= rate <= 1:
                raise ValueError(f"{name} is the update rate for each sample, from 0 to 1, not {rate}")
        if compensation not in ("clamp", "layer", None):
            raise ValueError(f"compensation must be 'clamp', 'layer' or None, not {compensation!r}")
        if not clamp_value > 0:
            raise ValueError(f"clamp_value must be positive, not {clamp_value}")
        self.momentum, self.momentum_backward = float(momentum), float(momentum_backward)
        self.compensation, self.clamp_value = compensation, clamp_value
        for name, value in self._initial_statistics.items():
            self.register_buffer(name, torch.full((num_features,), value, **self._placement))

    def reset_parameters(self) -> None:
        """Reset scale, shift and all running statistics."""
        super().reset_parameters()
        for name, value in self._initial_statistics.items():
            getattr(self, name).fill_(value)

    def normalize(self, x: Tensor) -> Tensor:
        """Apply the layer to checked input."""
        return online_norm(
            x,
            self.running_mean,
            self.running_var,
            self.drift_mean,
            self.drift_scale,
            self.weight,
            self.bias,
            training=self.training,
            momentum=self.momentum,
            momentum_backward=self.momentum_backward,
            eps=self.eps,
            compensation=self.compensation,
            clamp_value=self.clamp_value,
        )
