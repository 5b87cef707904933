"""The law of the singular values of a product of large square Gaussian matrices."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_HALVINGS = 64  # of the interval in which an angle lies: more than float64 can tell apart


def fuss_catalan_edge(factors: int) -> float:
    """The largest singular value of a product of K large square Gaussian matrices: ``sqrt((K+1)^(K+1) / K^K)``.

    Args:
        factors: K, how many matrices are multiplied; their entries are independent, of mean 0 and variance 1 / n.

    Raises:
        ValueError: for fewer than one factor.

    Source: Penson & Zyczkowski 2011, arXiv 1103.3453.

    Example:
        >>> fuss_catalan_edge(1), round(fuss_catalan_edge(3), 3), round(fuss_catalan_edge(5), 3)
        (2.0, 3.079, 3.864)
    """
    _check(factors)
    return math.sqrt((factors + 1) * (1 + 1 / factors) ** factors)


def fuss_catalan_density(values: Tensor, factors: int) -> Tensor:
    """Density of the singular values of a product of K square Gaussian matrices, as their size n grows.

    The squares x of the singular values follow the Fuss-Catalan law of order K, which is known by an angle phi from 0
    to pi / (K+1)::

        x       = sin^(K+1)((K+1) phi) / (sin phi sin^K(K phi))
        p(x)    = sin^2 phi sin^(K-1)(K phi) / (pi sin^K((K+1) phi))

    The density of the singular value s = sqrt(x) is 2 s p(s^2): for K = 1 the quarter circle sqrt(4 - s^2) / pi, for
    more factors infinite at 0, where it grows as s^(-(K-1)/(K+1)).

    Args:
        values: singular values, any shape; the density is 0 below 0 and beyond :func:`fuss_catalan_edge`.
        factors: K, how many matrices are multiplied; their entries are independent, of mean 0 and variance 1 / n.

    Returns:
        float64, of the shape of the values.

    Raises:
        ValueError: for fewer than one factor.

    Source: Forrester & Liu 2015, arXiv 1404.5759, proposition 2.1 with p = K + 1 and r = 1; Penson & Zyczkowski 2011,
    arXiv 1103.3453, for products of matrices.

    Example:
        >>> fuss_catalan_density(torch.tensor([0.0, 1.0, 2.0]), 1) * torch.pi
        tensor([2.0000, 1.7321, 0.0000], dtype=torch.float64)
    """
    k, rest, phi = factors, *_angles(values, factors)
    inside = (values >= 0) & (values < fuss_catalan_edge(factors))
    # 2 s p(s^2) with s written by the angle, so that nothing is 0 times infinity at s = 0
    density = 2 / math.pi * phi.sin() ** 1.5 * (k * phi).sin() ** (k / 2 - 1) * ((k + 1) * rest).sin() ** ((1 - k) / 2)
    return torch.where(inside, density, 0.0)


def fuss_catalan_cdf(values: Tensor, factors: int) -> Tensor:
    """Share of the singular values of a product of K large square Gaussian matrices that are at most each value.

    The integral of :func:`fuss_catalan_density`, in closed form by the same angle::

        F = 1 - (K+1) phi / pi + K sin phi sin((K+1) phi) / (pi sin(K phi))

    Args:
        values: singular values, any shape.
        factors: K, how many matrices are multiplied; their entries are independent, of mean 0 and variance 1 / n.

    Returns:
        float64 from 0 to 1, of the shape of the values.

    Raises:
        ValueError: for fewer than one factor.

    Source: the angle of Forrester & Liu 2015, arXiv 1404.5759, proposition 2.1. With
    w = sin((K+1) phi) / sin(K phi) exp(i phi) the Stieltjes transform of the law of x is w / x, and the integral of
    that over x is K w - log(w - 1), whose imaginary part is this.

    Example:
        >>> fuss_catalan_cdf(torch.tensor([0.0, 1.0, 2.0]), 1)
        tensor([0.0000, 0.6090, 1.0000], dtype=torch.float64)
    """
    k, rest, phi = factors, *_angles(values, factors)
    share = ((k + 1) * rest + k * phi.sin() * ((k + 1) * rest).sin() / (k * phi).sin()) / math.pi
    return torch.where(values >= fuss_catalan_edge(factors), 1.0, torch.where(values > 0, share, 0.0))


def _angles(values: Tensor, factors: int) -> tuple[Tensor, Tensor]:
    """The angles pi / (K+1) - phi and phi of singular values; the former is exact near 0, as values near 0 need."""
    k, end = factors, math.pi / (factors + 1)
    _check(k)
    log_x = 2 * values.double().clamp(0, fuss_catalan_edge(k)).log()
    low, high = torch.zeros_like(log_x), torch.full_like(log_x, end)
    for _ in range(_HALVINGS):
        rest = (low + high) / 2
        phi = end - rest
        log_of_angle = (k + 1) * ((k + 1) * rest).sin().log() - phi.sin().log() - k * (k * phi).sin().log()
        too_large = log_of_angle > log_x
        low, high = torch.where(too_large, low, rest), torch.where(too_large, rest, high)
    rest = torch.where(values > 0, (low + high) / 2, 0.0)
    return rest, (end - rest).clamp_min(torch.finfo(torch.float64).tiny)


def _check(factors: int) -> None:
    if factors < 1:
        raise ValueError(f"factors must be at least 1, not {factors}")
