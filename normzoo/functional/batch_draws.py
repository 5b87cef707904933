"""How far the means of random batches are from the mean of all samples, known by inner products alone."""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def draw_batches(
    count: int, population: int, batch_size: int, *, replacement: bool = False, generator: Generator | None = None
) -> Tensor:
    """Random batches of samples 0 to N - 1, independent of each other.

    Args:
        count: how many batches are drawn.
        population: N, samples to draw from.
        batch_size: b, samples in each batch.
        replacement: whether a sample may come several times in a batch; without, all batches of b different samples
            are equally likely.
        generator: of the random numbers; torch's global one by default.

    Returns:
        (count, b) int64.

    Raises:
        ValueError: for fewer than one batch, or unless 1 <= batch_size, and batch_size <= population without
            replacement.

    Example:
        >>> draw_batches(2, population=3, batch_size=3).sort(1).values.tolist()
        [[0, 1, 2], [0, 1, 2]]
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}")
    if population < 1 or batch_size < 1 or not (replacement or batch_size <= population):
        raise ValueError(f"batch_size must be from 1 to the population ({population}), not {batch_size}")
    if replacement:
        return torch.randint(population, (count, batch_size), generator=generator)
    # float64: of random numbers that are equal the first would come too often
    order = torch.rand(count, population, dtype=torch.float64, generator=generator)
    return order.topk(batch_size, sorted=False).indices


def squared_deviations(products: Tensor, batches: Tensor) -> Tensor:
    """``|mean over a batch of g - mean over all of g|^2`` for each batch, from inner products of the N vectors g.

    With w the weights of a batch less 1 / N each, it is the quadratic form ``w' K w`` of the inner products
    ``K_ij = <g_i, g_j>``: the vectors themselves, such as gradients of all parameters, are not needed.

    Args:
        products: (N, N), K; vectors less their mean have the same result, and less rounding.
        batches: (count, b) int64, samples from 0 to N - 1, which may come several times.

    Returns:
        (count,) float64, in squared units of the vectors.

    Raises:
        ValueError: unless ``products`` is a square matrix and ``batches`` has two dimensions.

    Source: Bjorck et al. 2018, arXiv 1806.02375: the squared noise of an SGD step is alpha^2 times this.

    Example:
        >>> g = torch.tensor([[0.0], [2.0], [4.0], [6.0]])
        >>> squared_deviations(g @ g.T, torch.tensor([[0, 1], [1, 2]])).tolist()
        [4.0, 0.0]
    """
    if products.ndim != 2 or products.shape[0] != products.shape[1] or batches.ndim != 2:
        raise ValueError(
            "products must be (N, N) and batches (count, b), not of shapes "
            f"{tuple(products.shape)} and {tuple(batches.shape)}"
        )
    population, (count, batch_size) = len(products), batches.shape
    weights = torch.full((count, population), -1 / population, dtype=torch.float64, device=products.device)
    shares = torch.full_like(batches, 1, dtype=torch.float64) / batch_size
    weights.scatter_add_(1, batches.to(products.device), shares.to(products.device))
    return ((weights @ products.double()) * weights).sum(1)
