"""Accuracy of a trained ResNet-20 before and after its norms are converted, with and without calibration.

usage: python benchmarks/conversion.py [--seeds 3] [--epochs 5] [--to group ...] [--write]

For each seed a ResNet-20 is trained on the embedded Fashion-MNIST images, then converted to each norm, calibrated on
512 training images or not, and fine-tuned for one epoch; and converted and fine-tuned on batches of 2 images.
``--write`` puts both tables into docs/conversion.md.
"""

from __future__ import annotations

import argparse
import copy
import datetime as dt
import itertools
import platform
import statistics
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from norms import processor
from torch import Tensor, nn

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
# What a network trained with batch norm can be fine-tuned with on small batches
SMALL: dict[str, dict[str, Any]] = {
    "batch": {"to": "batch"},
    "batch_renorm": {"to": "batch_renorm", "options": {"r_max": 3.0, "d_max": 5.0}},
    "none, folded": {"to": "none", "fold": True},
    "frozen_batch": {"to": "frozen_batch"},
    "affine": {"to": "affine"},
    "group, calibrated": {"to": "group"},
    "layer, calibrated": {"to": "layer"},
}
MARK, MARK_SMALL = "<!-- measured -->", "<!-- measured: small batches -->"
SMALL_STEPS, SMALL_RATES = 150, (0.002, 0.0005, 0.0001)
Result = dict[str, dict[str, float]]  # {norm: {what was done: per cent}}


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


def trained(seed: int, epochs: int) -> tuple[nn.Module, FashionMNIST, Tensor]:
    """A network trained with batch norm, its data, and images to calibrate on."""
    torch.manual_seed(seed)
    data = FashionMNIST(seed=seed, batch_size=128)
    data.setup()
    model = normzoo.create_model("resnet20_cifar", num_classes=10, in_chans=1).to(memory_format=torch.channels_last)
    train(model, data, epochs, 0.1)
    plain = FashionMNIST(seed=seed, batch_size=512, augment=False)
    return model, data, next(iter(plain.train_dataloader()))[0]


def run(model: nn.Module, data: FashionMNIST, images: Tensor, targets: list[str]) -> Result:
    """Accuracies of one seed: {norm: {step: per cent}}."""
    result = {}
    for name in targets:
        row = result[name] = {}
        for label, batches in (("converted", None), ("calibrated", [images])):
            changed = copy.deepcopy(model)
            normzoo.convert_norms(changed, TARGETS[name], calibrate=batches)
            row[label] = accuracy(changed, data)
            train(changed, data, 1, 0.02)
            row[f"{label}, 1 epoch"] = accuracy(changed, data)
        print(name, {k: round(v, 1) for k, v in row.items()}, flush=True)
    return result


def run_small(model: nn.Module, data: FashionMNIST, images: Tensor, seed: int) -> Result:
    """Accuracies of one seed before and after fine-tuning on batches of 2 images, at several rates."""
    small = FashionMNIST(seed=seed, batch_size=2)
    result = {}
    for name, target in SMALL.items():
        converted = copy.deepcopy(model).eval()
        normzoo.convert_norms(converted, **target, calibrate=[images] if "calibrated" in name else None)
        row = result[name] = {"converted": accuracy(converted, data)}
        for rate in SMALL_RATES:
            tuned = copy.deepcopy(converted).train()
            optimizer = torch.optim.SGD(normzoo.param_groups(tuned, 5e-4), lr=rate, momentum=0.9)
            for images_of_batch, labels in itertools.islice(small.train_dataloader(), SMALL_STEPS):
                optimizer.zero_grad()
                F.cross_entropy(tuned(images_of_batch), labels).backward()
                optimizer.step()
            row[f"rate {rate:g}"] = accuracy(tuned, data)
        print(name, {k: round(v, 1) for k, v in row.items()}, flush=True)
    return result


def table(results: list[Result]) -> str:
    """Mean and standard deviation over seeds."""

    def cell(name: str, step: str) -> str:
        values = [result[name][step] for result in results]
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.1f}{spread}"

    steps = [*next(iter(results[0].values()))]
    lines = [f"| to | {' | '.join(steps)} |", "|---" * (len(steps) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(cell(name, step) for step in steps) + " |" for name in results[0]]
    return "\n".join(lines)


def write(mark: str, conditions: str, text: str) -> None:
    """Put what was measured between the page's two marks."""
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(mark)
    tail = rest.partition(f"{mark}\n")[2]
    PAGE.write_text(f"{head}{mark}\n\n{conditions}\n\n{text}\n\n{mark}\n{tail}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--to", nargs="*", choices=TARGETS, default=list(TARGETS), help="of the first table")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    before, converted, small = [], [], []
    for seed in range(arguments.seeds):
        model, data, images = trained(seed, arguments.epochs)
        before.append({"batch": {"accuracy": accuracy(model, data)}})
        print(seed, before[-1], flush=True)
        small.append(run_small(model, data, images, seed))
        if arguments.to:
            converted.append(run(model, data, images, arguments.to))
    original = table(before).rpartition("| batch | ")[2].rstrip(" |")
    conditions = (
        f"`python benchmarks/conversion.py --write`, {dt.datetime.now(dt.UTC).date()}: ResNet-20 trained for "
        f"{arguments.epochs} epochs on the 6,000 embedded Fashion-MNIST images, test accuracy in per cent, mean "
        f"and standard deviation of n = {arguments.seeds} seeds; calibration on 512 training images; "
    )
    machine = (
        f"{processor()}, {arguments.threads} threads, torch {torch.__version__}, timm {timm.__version__}, "
        f"Python {platform.python_version()}.\n\nThe original, with batch norm: {original} %."
    )
    of_small = (
        f"fine-tuning for {SMALL_STEPS} steps on batches of 2 images by SGD with momentum 0.9 at the rate given. "
    )
    print(original, table(small), *([table(converted)] if converted else []), sep="\n\n")
    if arguments.write:
        write(MARK_SMALL, conditions + of_small + machine, table(small))
        if converted:
            tuning = "fine-tuning for one epoch at a rate of 0.02 (training: 0.1). "
            write(MARK, conditions + tuning + machine, table(converted))


if __name__ == "__main__":
    main()
