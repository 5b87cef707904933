"""Which class the gradients at the logits push down."""

from __future__ import annotations

from torch import Tensor


def images_led(gradient: Tensor, images: int, near: float = 0.9) -> Tensor:
    """Of each class, the number of images whose gradient at its logit is near the largest possible one.

    The gradient of the mean cross entropy of B images is (softmax - target) / B. It reaches 1/B at the logit of a class
    that the network predicts with certainty and that is not the true one. A class leads an image where the gradient is
    at least ``near / B``.

    Args:
        gradient: (N, C), of the loss, which is a mean over ``images``.
        images: B, of which the N may be a part.
        near: share of 1/B.

    Returns:
        (C,) int64 tensor.

    Source: Bjorck et al. 2018, arXiv 1806.02375, figure 6.

    Example:
        >>> import torch
        >>> images_led(torch.tensor([[0.5, -0.5, 0.0], [0.48, 0.02, -0.5]]), images=2)
        tensor([2, 0, 0])
    """
    return (gradient.double() * images >= near).sum(0)
