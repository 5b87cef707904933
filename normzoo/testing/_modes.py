"""Promises about training and evaluation: dependence on the batch, running statistics."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normzoo.testing._compare import BrokenError, NotApplicableError, agree, describe
from normzoo.testing._inputs import MANY, MODES, sample, state, step, where
from normzoo.testing._promises import promise
from normzoo.testing._subject import Subject


@promise()
def train_eval(subject: Subject) -> None:
    """Evaluation changes nothing and is deterministic; a layer without batch statistics gives the same in training."""
    for shape in subject.shapes:
        x = sample(shape)
        layer = subject.made().eval()
        before, text = state(layer), where(False, x)
        first, second = step(layer, x), step(layer, x)
        for name, value in second.items():
            agree(f"{text}: {name}, the second time", value, first[name])
        for name, value in state(layer).items():
            agree(f"{text}: {name} afterwards", value, before[name])
        if subject.batch_statistics is False or (subject.batch_statistics is None and not _depends(subject, shape)):
            got = step(subject.made().train(), x)
            for name, value in got.items():
                agree(f"{where(True, x)}: {name}, against evaluation", value, first[name], tolerance=1e-6)


def _depends(subject: Subject, shape: tuple[int, ...]) -> bool:
    """Whether in training the output of a sample changes with the others."""
    return max(_change(subject, shape, kept, training=True) for kept in (0, shape[0] - 1)) > 1e-4


def _change(subject: Subject, shape: tuple[int, ...], kept: int, training: bool) -> float:
    """The largest change of one sample's output when all others change."""
    x, other = sample(shape, torch.float64), sample(shape, torch.float64, seed=1) * 2 + 1
    other[kept] = x[kept]
    with torch.no_grad():
        one, two = (subject.made(dtype=torch.float64).train(training)(v)[kept] for v in (x, other))
    return (one - two).abs().max().item()


@promise()
def batch_dependence(subject: Subject) -> None:
    """Samples depend on each other in training if and only if batch_statistics says so, and never in evaluation."""
    for shape in subject.shapes:
        for training in MODES:
            change = max(_change(subject, shape, kept, training) for kept in (0, shape[0] - 1))
            declared = subject.batch_statistics if training else False
            if declared is None:  # nothing was said: train_eval holds the layer to one of the two
                continue
            text = f"{where(training, torch.empty(shape, dtype=torch.float64))}: when the other samples change, "
            if declared and change < 1e-4:
                raise BrokenError(f"{text}a sample's output changes by {change:.3g}, against batch_statistics=True")
            if not declared and change > 1e-9:
                against = ", against batch_statistics=False" if training else ""
                raise BrokenError(f"{text}a sample's output changes by {change:.3g}{against}")


def _statistics(layer: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in state(layer).items() if k.startswith("running_")}


def _need_running(subject: Subject) -> None:
    if not _statistics(subject.make()):
        raise NotApplicableError("it has no running statistics")
    subject.need_option("momentum")


@promise()
def running_statistics(subject: Subject) -> None:
    """Momentum 1 leaves the batch's own statistics, for evaluation as in training; 0 leaves the old."""
    _need_running(subject)
    for shape in subject.shapes:
        wide = (MANY, *shape[1:])
        still = subject.made(momentum=0.0).train()
        before = state(still)
        x = sample(wide, seed=3)
        step(still, x)
        for name, value in _statistics(still).items():
            agree(f"{where(True, x)}, momentum=0: {name} afterwards", value, before[name], tolerance=1e-6)

        alike = _same_means(wide)
        layer = subject.made(momentum=1.0).train()
        step(layer, alike)
        if "running_mean" in _statistics(layer):
            text = f"{where(True, alike)}, momentum=1: running_mean, against the batch's mean"
            want = torch.full((subject.num_features,), 0.75)
            agree(text, _statistics(layer)["running_mean"], want, tolerance=1e-4)

        layer = subject.made(momentum=1.0).train()
        step(layer, sample(wide, seed=4) * 3)
        trained = step(layer, x)["output"]
        text = f"{where(False, x)}, after training on it at momentum=1: output, against training's"
        agree(text, step(layer.eval(), x)["output"], trained, tolerance=3e-2)


def _same_means(shape: tuple[int, ...]) -> Tensor:
    """Different values in each sample and channel, of which all have the same mean, also over groups of either."""
    x = sample(shape, torch.float64, seed=5)
    dims = list(range(2, len(shape))) or [0]
    return (x - x.mean(dims, keepdim=True) + 0.75).float()


@promise()
def num_batches_tracked(subject: Subject) -> None:
    """num_batches_tracked counts the batches of training and not those of evaluation."""
    layer = subject.made()
    before = state(layer).get("num_batches_tracked")
    if before is None or not _moves(subject):
        raise NotApplicableError("it counts no batches")
    x = sample(subject.shape)
    for training in (True, True, False):
        step(layer.train(training), x)
    text = f"input {describe(x)}, twice in training and once in evaluation: num_batches_tracked"
    agree(text, state(layer)["num_batches_tracked"], before + 2)


def _moves(subject: Subject) -> bool:
    """Whether a step of training changes anything that the layer holds."""
    layer = subject.made().train()
    before = state(layer)
    step(layer, sample(subject.shape))
    return any(not torch.equal(value, before[name]) for name, value in state(layer).items())


@promise()
def momentum_none(subject: Subject) -> None:
    """Momentum None makes running statistics the plain average over all batches, in whatever order they came."""
    _need_running(subject)
    try:
        subject.make(momentum=None)
    except (TypeError, ValueError) as error:
        raise NotApplicableError(f"it has no cumulative average: momentum=None gives {type(error).__name__}") from error
    batches = [sample((8, *subject.shape[1:]), torch.float64, seed=i) + i for i in range(4)]
    forward, backward = (subject.make(momentum=None, dtype=torch.float64).train() for _ in range(2))
    means = []
    for x, y in zip(batches, reversed(batches), strict=True):
        forward(x)
        backward(y)
        alone = subject.make(momentum=None, dtype=torch.float64).train()
        alone(x)
        means.append(_statistics(alone).get("running_mean"))
    text = f"{where(True, batches[0])}, momentum=None"
    of_forward, of_backward = _statistics(forward), _statistics(backward)
    known = [m for m in means if m is not None]
    if known and "running_mean" in of_forward:
        what = f"{text}: running_mean, against the average of {len(known)} batches' means"
        agree(what, of_forward["running_mean"], torch.stack(known).mean(0), tolerance=1e-5)
    for name, value in of_forward.items():
        agree(f"{text}: {name}, against the same batches in reverse", value, of_backward[name], tolerance=1e-5)
