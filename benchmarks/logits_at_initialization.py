"""Why one class leads at the initialization of ResNet-110 with batch normalization: the common mean of its features.

usage: python benchmarks/logits_at_initialization.py --data FOLDER [--seeds N]

FOLDER holds CIFAR-10, as ``data.root`` of a recipe takes it. For each seed one mini-batch of 128 images, without
augmentation, passes the network in training mode. Printed are root mean squares over the 64 features before the
classifier, of their mean and of their deviation over the images; and for three classifiers in how many images, in per
cent, one class has the largest gradient at the logits, and in how many it has at least 0.9/128: the model's own, the
same on features less their mean over the mini-batch, and one with Xavier's initialization and no bias.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normzoo.data import CIFAR10
from normzoo.functional import images_led
from normzoo.models import create_model

IMAGES = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of CIFAR-10, as data.root takes it")
    parser.add_argument("--seeds", type=int, default=4)
    arguments = parser.parse_args()
    images, labels = CIFAR10(arguments.data).load("train")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CIFAR10.mean, CIFAR10.std))
    print(f"{'seed':>4} {'mean':>6} {'deviation':>9}   {'own':>11} {'centred':>11} {'xavier':>11}")
    for seed in range(arguments.seeds):
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:IMAGES]
        torch.manual_seed(seed)
        network: Any = create_model("resnet110_cifar", "batch", init="xavier").train()
        with torch.no_grad():
            x = (images[chosen].float() / 255 - mean) / std
            features = F.adaptive_avg_pool2d(network.forward_features(x), 1).flatten(1)
            common = features.mean(0)
            xavier = nn.Linear(64, 10)
            nn.init.xavier_normal_(xavier.weight)
            nn.init.zeros_(xavier.bias)
            own = network.get_classifier()
            shares = [led(z, labels[chosen]) for z in (own(features), own(features - common), xavier(features))]
        sizes = [value.square().mean().sqrt().item() for value in (common, features.std(0))]
        print(f"{seed:>4} {sizes[0]:>6.2f} {sizes[1]:>9.2f}   {' '.join(shares)}", flush=True)


def led(logits: Tensor, labels: Tensor) -> str:
    """In how many images, in per cent, one class has the largest gradient, and at least 0.9 over their number."""
    gradient = (logits.softmax(1) - F.one_hot(labels, logits.shape[1])) / len(logits)
    largest = gradient.argmax(1).bincount().max().item() / len(logits)
    return f"{100 * largest:>5.1f} {100 * images_led(gradient, len(logits)).max().item() / len(logits):>5.1f}"


if __name__ == "__main__":
    main()
