"""What a metric is, by its name: which is the loss, which one stands for a run, and which end of it is better."""

from __future__ import annotations

import re
from collections.abc import Iterable

from normzoo.names import SHORT_NAMES

_ACCURACIES = {"acc", "accuracy", "top1", "top5", "f1", "f1score", "auc", "auroc", "map", "miou", "iou", "dice", "r2"}
_ACCURACIES |= {"precision", "recall", "bleu", "rouge", "psnr", "ssim", "score", "correct"}
_LOSSES = {"loss", "losses", "nll", "elbo", "bpd", "bpc", "perplexity", "ppl", "mse", "rmse", "mae", "error", "err"}
_LOSSES |= {"ce", "bce", "kl", "fid", "wer", "cer"}
_PHASES = (("test",), ("val", "valid", "validation", "eval", "dev", "holdout"), (), ("train", "training", "fit"))
# What log keys of GradientTails and ChannelMoments were in the version before
_EARLIER = re.compile(r"(gradient|update|noise)/(alpha|kurtosis|l2|max|tail_ratio)/|channel_(input|output)/")
_ACCURACY = re.compile(r"(top\d*)?acc(uracy)?\d*")


def is_accuracy(metric: str) -> bool:
    """Whether a word in the name of a metric says that it is an accuracy.

    Example:
        >>> is_accuracy("val_acc1"), is_accuracy("test/MulticlassAccuracy"), is_accuracy("accumulated_loss")
        (True, True, False)
    """
    return any(_ACCURACY.fullmatch(word) for word in _words(metric))


def main_metric(metrics: Iterable[str]) -> str | None:
    """The metric that stands for a run in a table: on test data, else on validation data, an accuracy before a loss.

    Without one whose name says so it is a loss, else the first one that no measurement of ours has logged.

    Example:
        >>> main_metric(["train/loss", "train/accuracy", "val_loss"]), main_metric(["reward", "lr"]), main_metric([])
        ('val_loss', 'reward', None)
    """
    names = of_users(metrics)
    ranks = {name: rank for name in names if (rank := _rank(name)) is not None}
    return min(ranks, key=lambda name: ranks[name], default=next(iter(names), None))


def loss_metric(metrics: Iterable[str]) -> str | None:
    """The training loss, else another loss; None if no name says that it is one.

    Example:
        >>> loss_metric(["val_loss", "train_loss_epoch", "train_loss_step"]), loss_metric(["loss", "acc"])
        ('train_loss_step', 'loss')
    """
    names = [name for name in of_users(metrics) if "loss" in _words(name)]
    order = {3: 0, 2: 1, 1: 2, 0: 3}  # training, none, validation, test
    return min(names, key=lambda name: (order[_phase(name)], "epoch" in _words(name)), default=None)


def users_first(metrics: Iterable[str]) -> list[str]:
    """The metrics, those that measurements of ours have logged after all others.

    Example:
        >>> users_first(["gradient_norm/norm", "val_acc"])
        ['val_acc', 'gradient_norm/norm']
    """
    names = [*dict.fromkeys(metrics)]
    return [*dict.fromkeys([*of_users(names), *names])]


def of_training(metric: str) -> bool:
    """Whether the name says nothing of test or validation data."""
    return _phase(metric) >= 2


def better(metric: str) -> str | None:
    """``"higher"`` or ``"lower"``, by the words in the name of a metric; None if they do not tell.

    Example:
        >>> better("val/accuracy"), better("val_loss_epoch"), better("reward")
        ('higher', 'lower', None)
    """
    words = _words(metric)
    lower, higher = bool(words & _LOSSES), bool(words & _ACCURACIES)
    return None if lower == higher else "lower" if lower else "higher"


def quantity_of(metric: str) -> str:
    """What a metric is of, whatever the data: its name without words such as ``train``, ``val`` and ``epoch``.

    Example:
        >>> quantity_of("train/accuracy"), quantity_of("val_loss_epoch"), quantity_of("lr-SGD"), quantity_of("epoch")
        ('accuracy', 'loss', 'lr-SGD', 'epoch')
    """
    parts = re.split(r"([/_.\s]+)", metric)
    phases = {word for phase in _PHASES for word in phase} | {"epoch", "step"}
    kept = [part for part in parts[::2] if part and part.lower() not in phases]
    return metric if not kept or len(kept) == len(parts[::2]) else "_".join(kept)


def of_users(metrics: Iterable[str]) -> list[str]:
    """Metrics without the log keys of measurements, which begin with their names, as ``relative_loss/headroom``.

    Nor with the keys that measurements had in an earlier version, such as ``gradient/kurtosis/LAYER``.
    """
    own = SHORT_NAMES["callbacks"]
    names = [name for name in dict.fromkeys(metrics) if name.partition("/")[0] not in own]
    return [name for name in names if not _EARLIER.match(name)]


def _rank(name: str) -> tuple[int, int, int] | None:
    direction, phase = better(name), _phase(name)
    if direction is None:
        return None
    kind = 0 if direction == "higher" else 1
    if phase < 2:
        return phase, kind, 0
    return 2, 1 - kind, phase  # nothing was evaluated: the loss tells more than an accuracy of mini-batches


def _phase(name: str) -> int:
    words = _words(name)
    return next((i for i, phase in enumerate(_PHASES) if words & {*phase}), 2)


def _words(name: str) -> set[str]:
    """The words of a name, in lower case: those of ``valLoss`` and ``val/loss_epoch`` too."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name)
    return {word.lower() for word in re.split(r"[^A-Za-z0-9]+", spaced) if word}
