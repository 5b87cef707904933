"""Layers that normalize each value by its neighbourhood."""

from __future__ import annotations

import torch
from torch import Tensor

from normzoo.functional.local import divisive_norm, local_response_norm
from normzoo.layers._base import Activation, NormLayer


class LocalResponseNorm(NormLayer):
    """Local response normalization, as in AlexNet: each value by the squares of the channels beside it.

    ``y = x / (k + alpha * sum(x^2))^beta``, the sum at the same position over ``size`` neighbouring channels (cut off
    at the first and last). ``torch.nn.LocalResponseNorm`` divides the sum by ``size`` and has k = 1; for its numbers
    and torchvision's weights use ``mean=True``. There are no parameters unless asked for, and no statistics of
    samples or batch; training and evaluation are the same.

    It hardly normalizes: at the paper's constants the divisor moves from 1.7 only where activations are in the tens.
    Use it to reproduce old networks, not to stabilize new ones.

    Shapes: (N, C), (N, C, L), (N, C, H, W), (N, C, D, H, W) or, with ``channel_dim=-1``, (N, ..., C). The output has
    the shape, dtype and memory format of the input; statistics are float32 at least.

    Args:
        num_features: C.
        size: channels in the window; 5 as in the paper. An even window reaches one further back.
        alpha: factor of the sum; 1e-4 as in the paper.
        beta: exponent; 0.75 as in the paper.
        k: what is added; 2 as in the paper.
        mean: divide the sum by ``size``.
        affine: learn ``weight`` and ``bias``, each (C,); the paper has none.
        act_layer: makes the activation that follows, such as ``torch.nn.ReLU``; None for none.
        channel_dim: 1 for (N, C, ...), -1 for (N, ..., C).
        device: where parameters are made.
        dtype: of parameters, which are float32 at least.

    Raises:
        ValueError: for a size below 1, k that is not positive, or input of another channel count.

    Source: Krizhevsky, Sutskever & Hinton 2012, "ImageNet classification with deep convolutional neural networks",
        section 3.3.

    Example:
        >>> LocalResponseNorm(4)(torch.zeros(1, 4)).tolist()
        [[0.0, 0.0, 0.0, 0.0]]
    """

    def __init__(
        self,
        num_features: int,
        *,
        size: int = 5,
        alpha: float = 1e-4,
        beta: float = 0.75,
        k: float = 2.0,
        mean: bool = False,
        affine: bool = False,
        act_layer: Activation | None = None,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features,
            affine=affine,
            act_layer=act_layer,
            channel_dim=channel_dim,
            device=device,
            dtype=dtype,
        )
        if size < 1:
            raise ValueError(f"size must be at least 1, not {size}")
        if not k > 0:
            raise ValueError(f"k must be positive, since it keeps the divisor from 0, not {k}")
        self.size, self.alpha, self.beta, self.k, self.mean = size, alpha, beta, k, mean

    def normalize(self, x: Tensor) -> Tensor:
        """Apply the layer to checked input."""
        return local_response_norm(
            x, self.weight, self.bias, size=self.size, alpha=self.alpha, beta=self.beta, k=self.k, mean=self.mean
        )


class DivisiveNorm(NormLayer):
    """Divisive normalization: each value by mean and spread of a window around it, over all channels.

    ``v = x - mean(x);  y = v / sqrt(sigma^2 + mean(v^2)) * weight + bias``, the means over a window of positions and
    all channels. Layer normalization is the case of a window as large as the map, and sigma^2 is more than a guard
    against zero: it keeps weak responses weak. Training and evaluation are the same.

    The windows do not shrink at the border; what lies beyond counts as zero. The authors' code divides the mean square
    by the area of the mean's window; here each window has its own, which is the same for equal windows, as theirs are.

    Use it where contrast is local: images of uneven lighting, early layers. On (N, C) input the windows run over
    neighbouring channels, as in the authors' recurrent networks.

    Shapes: (N, C), (N, C, L), (N, C, H, W), (N, C, D, H, W) or, with ``channel_dim=-1``, (N, ..., C). The output has
    the shape, dtype and memory format of the input; statistics are float32 at least.

    Args:
        num_features: C.
        mean_window: side of the window of the mean, 5 as by default in the authors' code.
        square_window: side of the window of the mean square.
        sigma: the smoothing; 0.5 as in the authors' networks for CIFAR-10.
        learn_sigma: make ``sigma`` a parameter of shape (1,), as in the authors' ResNets.
        affine: learn ``weight`` and ``bias``, each (C,).
        act_layer: makes the activation that follows, such as ``torch.nn.ReLU``; None for none.
        channel_dim: 1 for (N, C, ...), -1 for (N, ..., C).
        device: where parameters are made.
        dtype: of parameters, which are float32 at least.

    Raises:
        ValueError: for a window below 1, sigma that is not positive, or input of another channel count.

    Source: Ren, Liao, Urtasun, Sinz & Zemel 2017, arXiv 1611.04520.

    Example:
        >>> DivisiveNorm(4)(torch.randn(2, 4, 8, 8)).shape
        torch.Size([2, 4, 8, 8])
    """

    sigma: Tensor | float

    def __init__(
        self,
        num_features: int,
        *,
        mean_window: int = 5,
        square_window: int = 5,
        sigma: float = 0.5,
        learn_sigma: bool = False,
        affine: bool = True,
        act_layer: Activation | None = None,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features,
            affine=affine,
            act_layer=act_layer,
            channel_dim=channel_dim,
            device=device,
            dtype=dtype,
        )
        if mean_window < 1 or square_window < 1:
            raise ValueError(f"windows must be at least 1 wide, not {mean_window} and {square_window}")
        if not sigma > 0:
            raise ValueError(f"sigma must be positive, since it keeps the divisor from 0, not {sigma}")
        self.mean_window, self.square_window, self.learn_sigma = mean_window, square_window, learn_sigma
        if learn_sigma:
            self.add_parameter("sigma", sigma, size=1)
        else:
            self.sigma = sigma

    def normalize(self, x: Tensor) -> Tensor:
        """Apply the layer to checked input."""
        windows = {"mean_window": self.mean_window, "square_window": self.square_window}
        return divisive_norm(x, self.sigma, self.weight, self.bias, **windows)
