"""Batch renormalization."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from normzoo.functional._pieces import traced
from normzoo.functional.renorm import batch_renorm, piecewise_linear
from normzoo.layers._base import Activation, RunningStatsLayer

Schedule = Sequence[Sequence[float]]


class BatchRenorm(RunningStatsLayer):
    """Batch renormalization: batch norm whose training output agrees with evaluation, within bounds.

    Training, with mu_B and var_B (biased) of the batch, sigma_B = sqrt(var_B + eps), and mu, sigma the running
    averages *before* this batch::

        r = clip(sigma_B / sigma, 1 / r_max, r_max)       no gradient
        d = clip((mu_B - mu) / sigma, -d_max, d_max)      no gradient
        y = ((x - mu_B) / sigma_B * r + d) * weight + bias
        mu <- mu + momentum * (mu_B - mu);  sigma <- sigma + momentum * (sigma_B - sigma)

    Evaluating, ``y = (x - mu) / sigma * weight + bias``. The buffer is ``running_var = sigma^2 - eps``, so state
    dicts go to and from ``torch.nn.BatchNorm2d``. With r_max = 1 and d_max = 0 training equals batch norm.

    Use it in place of batch norm for small or dependent batches: a batch of one image works, as
    each channel has several values in it. One value per channel is refused when training, as by batch norm: it is 0
    after its own mean is subtracted, its output has no gradient, and the running deviation would run down to
    sqrt(eps). Implementations differ: the paper and Keras average sigma; torchrl averages the variance
    (``average="variance"``), which changes outputs by about 0.2 on ordinary data.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: update rate of the running averages (one minus the decay of the paper); None for the cumulative
            average of all batches.
        r_max: bound of the scale correction, at least 1: a number, or a schedule of (step, value) pairs, linear
            between and constant outside, over ``num_batches_tracked``. Default: the paper's, 1 until step 5,000,
            then rising to 3 at step 40,000.
        d_max: bound of the shift correction, at least 0: likewise; 0 until step 5,000, then rising to 5 at 25,000.
        average: ``"std"`` or ``"variance"``, what the running average is taken of.
        sync: when training, take statistics over all ranks: R ranks of batch b are then one of batch R * b.
        affine: learn ``weight`` and ``bias``, each (C,).
        act_layer: makes the activation that follows, such as ``torch.nn.ReLU``; None for none.
        channel_dim: 1 for (N, C, ...), -1 for (N, ..., C).
        device: where parameters and buffers are made.
        dtype: of parameters and buffers, which are float32 at least.

    Raises:
        ValueError: for bounds below 1 and 0, steps that do not increase; on input of another channel count, or
            of one value per channel when training.

    Source: Ioffe 2017, arXiv 1702.03275, algorithm 1; schedule from section 4.

    Example:
        >>> layer = BatchRenorm(3, r_max=3.0, d_max=[(0, 0), (1000, 5)])
        >>> layer(torch.randn(1, 3, 8, 8)).shape
        torch.Size([1, 3, 8, 8])
    """

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        r_max: float | Schedule = ((5000, 1.0), (40000, 3.0)),
        d_max: float | Schedule = ((5000, 0.0), (25000, 5.0)),
        average: str = "std",
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
        if average not in ("std", "variance"):
            raise ValueError(f"average must be 'std' or 'variance', not {average!r}")
        if eps == 0:
            raise ValueError("batch renormalization divides by sqrt(eps) when all values are equal; eps must be > 0")
        self.r_max = _points("r_max", r_max, minimum=1.0)
        self.d_max = _points("d_max", d_max, minimum=0.0)
        self.average = average

    def normalize(self, x: Tensor) -> Tensor:
        """Apply the layer to checked input."""
        step: Tensor | float = self.num_batches_tracked
        if len(self.r_max) == len(self.d_max) == 1:
            step = 0  # any: they are constants
        elif self.num_batches_tracked.device.type == "cpu" and not traced(x):
            step = self.num_batches_tracked.item()  # no device has to be waited for, and numbers are faster
        y = batch_renorm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            r_max=self.r_max[0][1] if len(self.r_max) == 1 else piecewise_linear(self.r_max, step),
            d_max=self.d_max[0][1] if len(self.d_max) == 1 else piecewise_linear(self.d_max, step),
            training=self.training,
            momentum=self.update_rate(),
            eps=self.eps,
            average=self.average,
            sync=self.sync,
        )
        self.count_batch()
        return y


def _points(name: str, value: float | Schedule, minimum: float) -> tuple[tuple[float, float], ...]:
    """A number or a schedule as checked (step, value) pairs."""
    try:
        if isinstance(value, int | float):
            points: tuple[tuple[float, float], ...] = ((0.0, float(value)),)
        else:
            points = tuple((float(s), float(v)) for s, v in value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number or a list of (step, value) pairs, not {value!r}") from None
    steps = [s for s, _ in points]
    if not points or any(a >= b for a, b in itertools.pairwise(steps)):
        raise ValueError(f"the steps of {name} must increase, got {value!r}")
    if not all(v >= minimum for _, v in points):
        raise ValueError(f"{name} must be at least {minimum:g}, got {value!r}")
    return points
