"""The squared noise of an SGD update over many draws of a batch, beside its bound."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor

from normzoo.experiments._batches import training_batches
from normzoo.experiments.experiment import Column, Experiment, Figure
from normzoo.functional import draw_batches, squared_deviations, update_noise_bound

_WITHOUT, _WITH = "without replacement", "with replacement"
_MEASURED, _BOUND = "measured", "alpha^2 C / b"
_FACTORS = {_WITHOUT: ("(N-b)/N", "(N-b)/(N-1)"), _WITH: ("1",)}  # that a way to draw batches is compared with
_AT_ONCE = 16384  # batches in memory
_ROUNDING = 1e-12  # of C: a squared deviation below it is rounding, as that of a batch of all samples is
_TOLERANCE = 1e-3  # of the mean of the samples' gradients, by rounding


class NoiseBound(Experiment):
    """E|alpha grad_B - alpha grad|^2 over draws of a batch B of b of N samples, beside alpha^2 C / b.

    C is the mean over the N samples of |grad_i - grad|^2, the population variance of their gradients summed over all
    parameters. Gradients are those of the untrained network, of the cross entropy of single samples. Batches are drawn
    without replacement, as the batches of a run are, and with replacement. Their mean gradients are known from the
    inner products of the N gradients, so that hundreds of thousands of batches are drawn. All rates alpha scale the
    same draws.

    Args:
        data: gives batches of (images, labels), the first ``samples`` of which are the population.
        task: the network; without statistics of the batch, since a sample's gradient depends on the batch with them.
        samples: N.
        batch_sizes: b, at most N.
        learning_rates: alpha.
        draws: batches drawn of each size, by each of the two ways, independently.
        seed: of the draws.

    Raises:
        ValueError: for numbers that are not positive, and batches larger than N; before the first part, for a network
            whose samples' gradients depend on the batch.

    Source: Bjorck et al. 2018, arXiv 1806.02375, the bound on the noise of an SGD step.
    """

    name = "noise_bound"
    row = "a batch size, a way to draw and a learning rate: what was measured, the bound, or a prediction"
    columns = (
        Column("sampling", "text", f"how batches are drawn: `{_WITHOUT}` or `{_WITH}`"),
        Column("learning_rate", "float", "alpha"),
        Column("batch_size", "int", "b, samples in a batch"),
        Column("population", "int", "N, samples that batches are drawn from"),
        Column("draws", "int", "batches drawn"),
        Column("noise", "float", "C, the mean of |grad_i - grad|^2 over all N samples"),
        Column("curve", "text", f"`{_MEASURED}`, `{_BOUND}`, or the factor of a prediction"),
        Column("value", "float", "squared noise of the update, measured, or its bound, in squared units of parameters"),
        Column("error", "float", "standard error of the measured value over the draws"),
        Column("prediction", "float", "the bound times the finite-population factor"),
        Column("deviation", "float", "measured less predicted value, in standard errors; none where 0 is predicted"),
        Column("relative", "float", "measured over predicted value, less 1; none where 0 is predicted"),
    )
    figures = (
        Figure(
            "Squared noise of an update",
            "line",
            x="batch_size",
            y="value",
            lines=("learning_rate", "curve"),
            facet="sampling",
            x_scale="log",
            y_scale="log",
            x_label="batch size b",
            y_label="E|alpha grad_B - alpha grad|^2",
        ),
        Figure(
            "Measured less predicted noise",
            "line",
            x="batch_size",
            y="deviation",
            lines=("sampling", "curve"),
            x_scale="log",
            level=0.0,
            x_label="batch size b",
            y_label="difference in standard errors",
        ),
    )

    def __init__(
        self,
        data: LightningDataModule,
        task: LightningModule,
        samples: int = 512,
        batch_sizes: Sequence[int] = (8, 16, 32, 64, 128, 256, 512),
        learning_rates: Sequence[float] = (0.1, 0.01, 0.001),
        draws: int = 300_000,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        if samples < 2 or draws < 2:
            raise ValueError(f"samples and draws must be at least 2, not {samples} and {draws}")
        if not batch_sizes or not 1 <= min(batch_sizes) <= max(batch_sizes) <= samples:
            raise ValueError(f"batch_sizes must be from 1 to samples ({samples}), not {[*batch_sizes]}")
        if not learning_rates or not all(0 < rate < math.inf for rate in learning_rates):
            raise ValueError(f"learning_rates must be above 0, not {[*learning_rates]}")
        self.data, self.task, self.samples, self.draws = data, task, samples, draws
        self.batch_sizes, self.learning_rates = batch_sizes, learning_rates

    def parts(self) -> list[dict[str, Any]]:
        """Each way to draw, and batch size."""
        return [{"sampling": way, "batch_size": b} for way in _FACTORS for b in self.batch_sizes]

    def prepare(self) -> None:
        """The inner products of the samples' gradients less their mean."""
        images, labels = self._population()
        gradients = sample_gradients(self.task, images, labels)
        gradients -= gradients.mean(0)
        self.products = sum(part.double() @ part.double().T for part in gradients.split(16384, 1))

    def rows(self, part: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """For each rate a row of the measured noise, one of the bound, and one of each factor."""
        sampling, b = part["sampling"], part["batch_size"]
        noise = self.products.trace().item() / self.samples
        squares = torch.cat([*self._deviations(b, sampling == _WITH)])
        squares[squares < _ROUNDING * noise] = 0.0
        mean, error = squares.mean().item(), squares.std().item() / math.sqrt(self.draws)
        for rate in self.learning_rates:
            common = {
                "sampling": sampling,
                "learning_rate": rate,
                "batch_size": b,
                "population": self.samples,
                "draws": self.draws,
                "noise": noise,
                **dict.fromkeys(("value", "error", "prediction", "deviation", "relative")),
            }
            measured, bound = rate**2 * mean, update_noise_bound(noise, rate, b).item()
            yield {**common, "curve": _MEASURED, "value": measured, "error": rate**2 * error}
            yield {**common, "curve": _BOUND, "value": bound}
            for factor in _FACTORS[sampling]:
                predicted = update_noise_bound(noise, rate, b, self.samples, factor).item()
                row = {**common, "curve": factor, "prediction": predicted}
                if predicted > 0:
                    row |= {
                        "deviation": (measured - predicted) / (rate**2 * error),
                        "relative": measured / predicted - 1,
                    }
                yield row

    def _deviations(self, batch_size: int, replacement: bool) -> Iterator[Tensor]:
        for start in range(0, self.draws, _AT_ONCE):
            count = min(_AT_ONCE, self.draws - start)
            batches = draw_batches(count, self.samples, batch_size, replacement=replacement)
            yield squared_deviations(self.products, batches)

    def _population(self) -> tuple[Tensor, Tensor]:
        batches, found = [], 0
        for images, labels in training_batches(self.data):
            batches.append((images, labels))
            found += len(labels)
            if found >= self.samples:
                break
        if found < self.samples:
            raise ValueError(f"samples is {self.samples}, and the data has {found} in its training batches")
        images, labels = (torch.cat(tensors)[: self.samples] for tensors in zip(*batches, strict=True))
        return images, labels


def sample_gradients(task: LightningModule, images: Tensor, labels: Tensor) -> Tensor:
    """(N, P) gradients of the cross entropy of each of N samples, of all P parameters.

    Args:
        task: images -> logits, in training mode.
        images: (N, ...).
        labels: (N,) classes.

    Raises:
        ValueError: if their mean is not the gradient of the mean loss, as where layers take statistics of the batch.
    """
    task.train()
    parameters = [p for p in task.parameters() if p.requires_grad]

    def gradient(chosen: slice) -> Tensor:
        loss = F.cross_entropy(task(images[chosen]), labels[chosen])
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

    count = len(labels)
    gradients = torch.empty(count, sum(p.numel() for p in parameters))
    try:
        for i in range(count):
            gradients[i] = gradient(slice(i, i + 1))
        few = min(count, 64)
        mean, together = gradients[:few].mean(0), gradient(slice(few))
    except ValueError as error:  # of a batch normalization layer that gets one value
        raise ValueError(f"the gradient of a single sample cannot be had: {error}") from error
    if not (mean - together).norm() <= _TOLERANCE * together.norm():
        raise ValueError(
            "the mean of the samples' gradients is not the gradient of their mean loss: the network mixes the samples "
            "of a batch, or draws random numbers; take one without batch normalization and dropout (model.norm=none)"
        )
    return gradients
