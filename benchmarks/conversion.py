"""Accuracy of a trained ResNet-20 before and after its norms are converted, with and without calibration.

usage: python benchmarks/conversion.py [--seeds 3] [--epochs 5] [--to group none ...] [--threads 2] [--write]

For each seed a ResNet-20 is trained on the embedded Fashion-MNIST images, then converted to each norm, calibrated on
512 training images or not, and fine-tuned for one epoch. ``--write`` puts the table into docs/conversion.md.
"""

from __future__ import annotations

import argparse
import copy
import datetime as dt
import platform
import statistics
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from norms import processor
from torch import nn

import normzoo
from normzoo.data import FashionMNIST

PAGE = Path(__file__).parents[1] / "docs" / "conversion.md"
TARGETS: dict[str, str | dict[str, object]] = {
    "batch_renorm": "batch_renorm",
    "group": "group",
    "group, 2 channels each": {"name": "group", "channels_per_group": 2},
    "layer": "layer",
    "rms": "rms",
    "none": "none",
}
MARK = "<!-- measured -->"
STEPS = ["converted", "calibrated", "converted, 1 epoch", "calibrated, 1 epoch"]


def train(model: nn.Module, data: FashionMNIST, epochs: int, lr: float) -> None:
    """SGD with momentum and a cosine schedule."""
    loader = data.train_dataloader()
    optimizer = torch.optim.SGD(normzoo.param_groups(model, 5e-4), lr=lr, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * len(loader))
    model.train()
    for epoch in range(epochs):
        loader.batch_sampler.set_epoch(epoch)
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(images.contiguous(memory_format=torch.channels_last)), labels).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, data: FashionMNIST) -> float:
    """Share of the test images, in per cent."""
    model.eval()
    found = [(model(x).argmax(1) == y).float() for x, y in data.test_dataloader()]
    return 100 * torch.cat(found).mean().item()


def run(seed: int, epochs: int, targets: list[str]) -> dict[str, dict[str, float]]:
    """Accuracies of one seed: {norm: {step: per cent}}, and the original's under ``batch``."""
    torch.manual_seed(seed)
    data = FashionMNIST(seed=seed, batch_size=128)
    data.setup()
    model = normzoo.create_model("resnet20_cifar", num_classes=10, in_chans=1).to(memory_format=torch.channels_last)
    train(model, data, epochs, 0.1)
    found = {"batch": {"before": accuracy(model, data)}}
    plain = FashionMNIST(seed=seed, batch_size=512, augment=False)
    images = next(iter(plain.train_dataloader()))[0]
    for name in targets:
        row = found[name] = {}
        for label, batches in (("converted", None), ("calibrated", [images])):
            changed = copy.deepcopy(model)
            normzoo.convert_norms(changed, TARGETS[name], calibrate=batches)
            row[label] = accuracy(changed, data)
            train(changed, data, 1, 0.02)
            row[f"{label}, 1 epoch"] = accuracy(changed, data)
        print(seed, name, {k: round(v, 1) for k, v in row.items()}, flush=True)
    print(seed, found["batch"], flush=True)
    return found


def table(results: list[dict[str, dict[str, float]]], targets: list[str]) -> str:
    """Mean and standard deviation over seeds."""

    def cell(of: Callable[[dict[str, dict[str, float]]], float]) -> str:
        values = [of(r) for r in results]
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.1f}{spread}"

    before = cell(lambda r: r["batch"]["before"])
    lines = [f"| to | {' | '.join(STEPS)} |", "|---" * (len(STEPS) + 1) + "|"]
    lines += [
        f"| {n} | " + " | ".join(cell(lambda r, n=n, step=step: r[n][step]) for step in STEPS) + " |" for n in targets
    ]
    return f"The original, with batch norm: {before} %.\n\n" + "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--to", nargs="*", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = [run(seed, arguments.epochs, arguments.to) for seed in range(arguments.seeds)]
    text = table(results, arguments.to)
    print(text)
    if arguments.write:
        head, _, rest = PAGE.read_text(encoding="utf-8").partition(MARK)
        tail = rest.partition(f"{MARK}\n")[2]
        conditions = (
            f"`python benchmarks/conversion.py --write`, {dt.datetime.now(dt.UTC).date()}: ResNet-20 trained for "
            f"{arguments.epochs} epochs on the 6,000 embedded Fashion-MNIST images, test accuracy in per cent, mean "
            f"and standard deviation of n = {arguments.seeds} seeds; calibration on 512 training images; fine-tuning "
            f"for one epoch at a rate of 0.02 (training: 0.1). {processor()}, {arguments.threads} threads, "
            f"torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}."
        )
        PAGE.write_text(f"{head}{MARK}\n\n{conditions}\n\n{text}\n\n{MARK}\n{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
