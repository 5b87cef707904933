"""The extreme eigenvalues of a symmetric matrix that is known by its products with vectors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_BREAKDOWN = 1e-13  # a next coefficient this small beside the others is rounding: the Krylov space is exhausted


@torch.no_grad()
def lanczos(product: Callable[[Tensor], Tensor], start: Tensor, products: int) -> tuple[Tensor, Tensor]:
    """The coefficients of the Lanczos recurrence, without a host read.

    beta_j v_(j+1) = A v_j - alpha_j v_j - beta_(j-1) v_(j-1), with v_1 along the start. Three vectors of the size of
    the start are kept; nothing is orthogonalized again, so that rounding may make copies of eigenvalues that were
    found already, but none outside of the spectrum.

    Args:
        product: A v for a vector v of norm 1, of the shape and dtype of the start; may be called with a vector of zeros
            once the Krylov space is exhausted.
        start: (n,) vector that is not 0, with a part along all eigenvectors looked for, as a random one has.
        products: k, how often ``product`` is called, at least 1.

    Returns:
        alpha and beta, (k,) float64 each: the diagonal of the tridiagonal matrix, and beside it beta_1 to beta_(k-1);
        beta_k is left for the residual. :func:`ritz_values` takes them.

    Source: Paige 1972, J. Inst. Maths Applics 10, the variant (2.a) that is stable.
    """
    v = start / start.norm()
    previous, beta = torch.zeros_like(v), v.new_zeros(())
    tiny = torch.finfo(v.dtype).tiny
    diagonal, beside = [], []
    for _ in range(products):
        w = product(v) - beta * previous
        alpha = torch.dot(w, v)
        w -= alpha * v
        beta = w.norm()
        previous, v = v, w.div_(beta.clamp_min(tiny))
        diagonal.append(alpha)
        beside.append(beta)
    return torch.stack(diagonal).double(), torch.stack(beside).double()


class Ritz(NamedTuple):
    """The extreme eigenvalues of a tridiagonal matrix of :func:`lanczos`; all NaN if a coefficient is not finite.

    Attributes:
        largest: at most the largest eigenvalue of A, up to rounding.
        smallest: at least the smallest eigenvalue of A, up to rounding.
        residual: abs(beta_k s_k), s the eigenvector of ``largest``: an eigenvalue of A is no further from ``largest``
            than this.
    """

    largest: float
    smallest: float
    residual: float


def ritz_values(alpha: Tensor, beta: Tensor) -> Ritz:
    """The extreme Ritz values of coefficients on the host.

    Coefficients after a beta that is 0, up to rounding of float64, are left out: the vectors up to there span a space
    that A maps into itself.

    Args:
        alpha: (k,) diagonal.
        beta: (k,) beside the diagonal; the last one is for the residual.

    Example:
        >>> import torch
        >>> A = torch.diag(torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64))
        >>> found = ritz_values(*lanczos(A.mv, torch.ones(3, dtype=torch.float64), 3))
        >>> round(found.largest, 9), round(found.smallest, 9)
        (5.0, 1.0)
    """
    scale, size = 0.0, 0
    for a, b in zip(alpha.tolist(), beta.tolist(), strict=True):
        size += 1
        scale = max(scale, abs(a), abs(b))
        if not (math.isfinite(a) and math.isfinite(b)):
            return Ritz(math.nan, math.nan, math.nan)
        if b <= _BREAKDOWN * scale:
            break
    beside = beta[: size - 1].double()
    matrix = torch.diag(alpha[:size].double()) + torch.diag(beside, 1) + torch.diag(beside, -1)
    values, vectors = torch.linalg.eigh(matrix)
    return Ritz(values[-1].item(), values[0].item(), abs(beta[size - 1].item() * vectors[-1, -1].item()))
