"""What a sampled step of each callback costs, and what that is for each step at its default interval.

usage: python benchmarks/callbacks.py [--rounds 15] [--threads 2]      prints the table of docs/benchmarks/callbacks.md

One process trains ResNet-18 on random images; every step is either plain or sampled by one callback, in turn, so that
drift of the machine falls on all alike. The median over rounds of (sampled - plain) is a sample's cost.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import platform
import statistics
import tempfile
import time
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from normzoo.callbacks import Divergence, GradientTails, RelativeLoss
from normzoo.task import ImageClassification

DEFAULT_INTERVAL = {"Divergence": 1, "GradientTails": 50, "RelativeLoss": 500}


class OnlyAt:
    """A schedule that is true in one of every ``period`` steps."""

    def __init__(self, phase: int, period: int) -> None:
        self.phase, self.period = phase, period

    def __call__(self, step: int) -> bool:
        """Whether to sample at this step."""
        return step % self.period == self.phase


class DivergenceAt(Divergence):
    """Divergence in one of every few steps, where the real one is in all."""

    def __init__(self, due: OnlyAt) -> None:
        super().__init__()
        self.due = due

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        """Judge only when due."""
        if self.due(trainer.global_step - 1):
            super().on_train_batch_end(trainer, *args)


class Clock(pl.Callback):
    """Seconds from each batch's start to the next one's, so that what is read late counts too."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        """Note the time."""
        self.starts.append(time.perf_counter())


def measure(rounds: int) -> tuple[float, dict[str, float]]:
    """Seconds of a plain step, and the extra seconds of a sample of each callback."""
    names = [*DEFAULT_INTERVAL]
    period = 2 * len(names)  # a plain step after each sampled one; what a sample leaves for later falls on it
    tails, relative = GradientTails(), RelativeLoss()
    divergence = DivergenceAt(OnlyAt(0, period))
    tails._is_due, relative._is_due = OnlyAt(2, period), OnlyAt(4, period)
    clock = Clock()
    data = TensorDataset(torch.randn(32, 3, 64, 64), torch.randint(0, 10, (32,)))
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=(rounds + 2) * period + 1,
            max_epochs=-1,
            callbacks=[clock, divergence, tails, relative],
            logger=pl.loggers.CSVLogger(folder),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )
        trainer.fit(ImageClassification("resnet18", "batch"), DataLoader(data, batch_size=32))
    seconds = [b - a for a, b in itertools.pairwise(clock.starts)][2 * period :]
    pairs = [[seconds[i] + seconds[i + 1] for i in range(2 * j, len(seconds) - 1, period)] for j in range(len(names))]
    # Divergence, the cheapest, is the measure of a plain pair but for itself, so its own cost is timed apart
    plain = statistics.median(pairs[0]) / 2
    cost = {name: statistics.median(p) - 2 * plain for name, p in zip(names, pairs, strict=True)}
    cost["Divergence"] = judge_seconds(divergence)
    return plain, cost


def judge_seconds(divergence: Divergence, n: int = 2000) -> float:
    """Seconds for one loss through Divergence's hooks, on a Trainer that stands still."""
    from types import SimpleNamespace

    module = SimpleNamespace(automatic_optimization=True, device=torch.device("cpu"))
    trainer: Any = SimpleNamespace(global_step=1, accumulate_grad_batches=1, lightning_module=module)
    loss = torch.tensor(1.0)
    start = time.perf_counter()
    for _ in range(n):
        Divergence.on_train_batch_end(divergence, trainer, module, {"loss": loss}, None, 0)  # type: ignore[arg-type]
    return (time.perf_counter() - start) / n


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    plain, cost = measure(arguments.rounds)
    print(
        f"ResNet-18, 32x3x64x64, {arguments.threads} threads, torch {torch.__version__}, {platform.machine()}, ", end=""
    )
    print(f"n = {arguments.rounds}; a plain step takes {plain * 1e3:.0f} ms\n")
    print("| callback | a sample costs, in steps | default interval | overhead for each step |")
    print("|---|---|---|---|")
    total = 0.0
    for name, interval in DEFAULT_INTERVAL.items():
        share = cost[name] / plain / interval
        total += share
        print(f"| {name} | {cost[name] / plain:.4f} | {interval} | {share:.2%} |")
    print(f"| all three | | | {total:.2%} |")


if __name__ == "__main__":
    main()
