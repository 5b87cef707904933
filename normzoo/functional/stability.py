"""Up to which curvature an optimizer's steps are stable on a quadratic loss."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

Number = TypeVar("Number", float, Tensor)


def sgd_bound(lr: Number, momentum: float = 0.0, dampening: float = 0.0, nesterov: bool = False) -> Number:
    """The largest eigenvalue of the Hessian of a quadratic up to which full-batch ``torch.optim.SGD`` converges.

    With learning rate lr, momentum mu and dampening d: 2/lr without momentum; (2 + 2 mu) / (lr (1 - d)) with heavy-ball
    momentum, where the gradient enters with the weight 1 - d; and (2 + 2 mu) / (lr (1 + 2 mu)) with Nesterov's. Each is
    where the iteration b <- mu b + (1 - d) h x, x <- x - lr (b, or h x + mu b) has the eigenvalue -1. Weight decay w
    makes the eigenvalue h + w of h.

    Source: Cohen et al. 2021, arXiv 2103.00065, section 2 and appendix B.

    Example:
        >>> round(sgd_bound(0.1), 9), round(sgd_bound(0.1, 0.9), 9), round(sgd_bound(0.1, 0.9, nesterov=True), 9)
        (20.0, 38.0, 13.571428571)
    """
    weight = 1 + 2 * momentum if nesterov else 1 - dampening if momentum else 1.0
    return (2 + 2 * momentum) / (lr * weight)


def adam_bound(lr: Number, beta1: float = 0.9) -> Number:
    """The largest eigenvalue of P^-1 H up to which Adam converges on a quadratic while its preconditioner P stays.

    (2 + 2 beta1) / (lr (1 - beta1)), which is 38/lr for 0.9: momentum as a running mean of gradients. Decoupled weight
    decay w (AdamW) makes it smaller by the factor 1 - lr w / 2, which is left out.

    Source: Cohen et al. 2022, arXiv 2207.14484, section 2.

    Example:
        >>> round(adam_bound(1e-3), 6)
        38000.0
    """
    return (2 + 2 * beta1) / (lr * (1 - beta1))


def adam_preconditioner(
    second_moment: Tensor, step: Tensor | float, beta1: float | Tensor, beta2: float | Tensor, eps: float
) -> Tensor:
    """P after so many steps of Adam, whose step is lr P^-1 times the running mean of gradients, which starts at 0.

    P = (1 - beta1^step) (sqrt(second_moment / (1 - beta2^step)) + eps): both bias corrections stand in P.

    Source: Cohen et al. 2022, arXiv 2207.14484, section 2.

    Example:
        >>> adam_preconditioner(torch.tensor([0.004]), 1, 0.9, 0.999, 0.0)
        tensor([0.2000])
    """
    step = torch.as_tensor(step, dtype=torch.float64)  # an optimizer's own is float32
    corrected = second_moment / (1 - beta2**step)
    return (corrected.sqrt() + eps) * (1 - beta1**step)
