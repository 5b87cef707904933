"""How much gradients of mini-batches differ, and what that does to an update."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

FACTORS = {
    "(N-b)/(N-1)": lambda n, b: (n - b) / (n - 1) if n > 1 else 0.0,
    "(N-b)/N": lambda n, b: (n - b) / n,
    "1": lambda n, b: 1.0,
}
DEFAULT_FACTOR = "(N-b)/N"  # exact with C from batches drawn without replacement, as a run draws them


class GradientNoiseScale(NamedTuple):
    """What two batch sizes say about the gradient of all data.

    Attributes:
        gradient_sq: |G|^2, unbiased; may come out negative where noise is large.
        trace: tr(Sigma), the summed variance of single samples' gradients, unbiased.
        scale: B_simple = tr(Sigma) / |G|^2, in samples; consistent, not unbiased, as a ratio.
    """

    gradient_sq: Tensor
    trace: Tensor
    scale: Tensor


def noise_scale(
    small_sq: Tensor | float, big_sq: Tensor | float, small_batch: float, big_batch: float
) -> GradientNoiseScale:
    """The simple noise scale, from squared gradient norms at two batch sizes.

    The norm of a mean over B independent samples is biased: ``E|G_B|^2 = |G|^2 + tr(Sigma) / B`` (A.1). Solved for the
    two unknowns::

        |G|^2     = (B_big |G_big|^2 - B_small |G_small|^2) / (B_big - B_small)       (A.2)
        tr(Sigma) = (|G_small|^2 - |G_big|^2) / (1 / B_small - 1 / B_big)             (A.3)
        B_simple  = tr(Sigma) / |G|^2                                                 (2.9)

    The first two are unbiased, also if the big batch is the union of small ones. Average the squared norms over steps
    before, not the ratio after.

    Args:
        small_sq: |G_small|^2, any shape; the mean over several small batches, if there are.
        big_sq: |G_big|^2, likewise.
        small_batch: B_small, in samples.
        big_batch: B_big, in samples.

    Returns:
        ``gradient_sq``, ``trace`` and ``scale``, float64, of the shape of the norms.

    Raises:
        ValueError: unless 0 < small_batch < big_batch.

    Source: McCandlish et al. 2018, arXiv 1812.06162, equation 2.9 and appendix A.1.

    Example:
        >>> tuple(float(v) for v in noise_scale(small_sq=3.0, big_sq=2.0, small_batch=1, big_batch=2))
        (1.0, 2.0, 2.0)
    """
    if not 0 < small_batch < big_batch:
        raise ValueError(f"batch sizes must be 0 < small_batch < big_batch, not {small_batch} and {big_batch}")
    small, big = (torch.as_tensor(v, dtype=torch.float64) for v in (small_sq, big_sq))
    gradient_sq = (big_batch * big - small_batch * small) / (big_batch - small_batch)
    trace = (small - big) / (1 / small_batch - 1 / big_batch)
    return GradientNoiseScale(gradient_sq, trace, trace / gradient_sq)


def noise_scale_update(sums: Tensor, now: Tensor, decay: float | None) -> Tensor:
    """Weighted sums of two quantities over steps, and of the weights, with one step more.

    Both quantities are averaged before their ratio is taken: a mean of ratios would be biased.

    Args:
        sums: (3,) float64: the sums of both quantities and of the weights; zeros at the start.
        now: (2,) float64: the quantities of this step.
        decay: None to weigh all steps alike; or the factor by which the weight of older ones falls at each.

    Returns:
        (3,) float64.

    Source: McCandlish et al. 2018, arXiv 1812.06162, appendix A.1.

    Example:
        >>> sums = noise_scale_update(torch.zeros(3, dtype=torch.float64), torch.tensor([4.0, 2.0]).double(), decay=0.5)
        >>> noise_scale_means(noise_scale_update(sums, torch.tensor([1.0, 2.0]).double(), decay=0.5)).tolist()
        [2.0, 2.0]
    """
    now = torch.cat([now, torch.ones_like(now[:1])])
    return sums + now if decay is None else decay * sums + (1 - decay) * now


def noise_scale_means(sums: Tensor) -> Tensor:
    """The weighted means, (2,), of the quantities in :func:`noise_scale_update`'s sums; NaN before the first step."""
    return torch.where(sums[2] > 0, sums[:2] / sums[2], torch.nan)


def gradient_noise(gradients: Tensor | Sequence[Tensor], batch_size: int = 1, unbiased: bool = False) -> Tensor:
    """``C = mean_i |g_i - mean g|^2``, the variance of single samples' gradients, summed over all parameters.

    From gradients of micro-batches of b samples, b times as much: their means vary 1/b as much.

    Args:
        gradients: (n, ...): n gradients, or one such tensor for each parameter, all with the same n.
        batch_size: b, the samples that each gradient is the mean over.
        unbiased: divide by n - 1 instead of n: for n gradients drawn from more, not the whole population. The mean
            over n takes (n - 1) / n of the variance out.

    Returns:
        0-d tensor, float32 or wider, in squared units of the gradient.

    Raises:
        ValueError: for no gradients, a different n, fewer than two if unbiased, or batch_size below 1.

    Source: Bjorck et al. 2018, arXiv 1806.02375, the bound on the noise of an SGD step.

    Example:
        >>> gradient_noise(torch.tensor([[1.0, 0.0], [3.0, 0.0]])).item()
        1.0
    """
    stacked = [gradients] if isinstance(gradients, Tensor) else list(gradients)
    sizes = {len(g) for g in stacked}
    if len(sizes) != 1 or min(sizes) < (2 if unbiased else 1):
        least = "two" if unbiased else "one"
        raise ValueError(f"gradients must hold the same number for each parameter, at least {least}, not {sizes or 0}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    n = sizes.pop()
    total = torch.zeros((), device=stacked[0].device)
    for g in stacked:
        g = g.detach().to(torch.promote_types(g.dtype, torch.float32))
        total = total + (g - g.mean(0)).square().sum()
    return total * (batch_size / (n - 1 if unbiased else n))


def update_noise_bound(
    noise: Tensor | float,
    learning_rate: float,
    batch_size: int,
    population: int | None = None,
    factor: str | None = None,
) -> Tensor:
    """The expected squared error of an SGD update: ``alpha^2 C / |B|`` times a finite-population factor.

    E|alpha grad_B - alpha grad|^2 over all batches B of b different samples out of N is this exactly with the factor
    ``"(N-b)/N"``, that of the source's text, and C divided by N - 1, as estimates from batches drawn without
    replacement are (:func:`noise_scale`; :func:`gradient_noise`, unbiased). With C divided by N (:func:`gradient_noise`
    of all N, not unbiased) ``"(N-b)/(N-1)"`` is exact; ``"1"`` is for samples drawn with replacement, and for an
    infinite population.

    Args:
        noise: C.
        learning_rate: alpha.
        batch_size: b.
        population: N, or None for infinitely many: no factor then.
        factor: one of the three names; by default ``"(N-b)/N"``. It was ``"(N-b)/(N-1)"``, so that for one version a
            population without a factor warns where the two differ.

    Returns:
        tensor of the shape of ``noise``, float32 or wider, in squared units of the update.

    Raises:
        ValueError: for another factor, or unless 1 <= batch_size <= population.

    Source: Bjorck et al. 2018, arXiv 1806.02375, the bound on the noise of an SGD step.

    Example:
        >>> update_noise_bound(2.0, learning_rate=0.5, batch_size=2, population=4, factor="(N-b)/N").item()
        0.125
    """
    factor = chosen_factor(factor, population, batch_size, stacklevel=3)
    if factor not in FACTORS:
        raise ValueError(f"factor must be one of {', '.join(map(repr, FACTORS))}, not {factor!r}")
    if batch_size < 1 or (population is not None and batch_size > population):
        raise ValueError(f"batch_size must be from 1 to the population ({population}), not {batch_size}")
    c = torch.as_tensor(noise, dtype=None if isinstance(noise, Tensor) else torch.float64)
    share = 1.0 if population is None else FACTORS[factor](population, batch_size)
    return c * (learning_rate**2 / batch_size * share)


def chosen_factor(factor: str | None, population: int | None, batch_size: int, stacklevel: int = 2) -> str:
    """The factor that was asked for, or the default, with a warning where that was another one before.

    Args:
        factor: name of the finite-population factor, or None for the default.
        population: N, samples in the training set; None if it is not known.
        batch_size: b, samples in a batch.
        stacklevel: of the warning.
    """
    if factor is not None:
        return factor
    if population is not None and batch_size < population:
        warnings.warn(
            f"the finite-population factor is {DEFAULT_FACTOR!r} by default now, and was '(N-b)/(N-1)'; pass factor= "
            "to say which",
            FutureWarning,
            stacklevel=stacklevel,
        )
    return DEFAULT_FACTOR
