"""What the callbacks cost: beside each other, beside what is usually done, and with the size of the model.

usage: python benchmarks/callbacks.py [--rounds 15] [--threads 2] [--only MODEL ...] [--each-step] [--device cuda]
                                       [--write]

One process trains a network on random images; in turn a step is measured by one callback, or watched as experiment
trackers do, and the next one is plain, so that drift of the machine falls on all alike. The median over rounds of the
extra seconds of such a pair is what a sample costs; divided by the interval, what each step does. What is meant for
each step is then measured at sixteen steps in a row, in turn: GradientNorm, GradientTails with Numba and without, both
together, and nothing. Its cost is also told by the time inside of its hooks, and by how much longer it takes from the
first hook before the optimizer's update to the end of the batch. ``--each-step`` measures nothing else. ``--write``
makes the tables of docs/benchmarks/callbacks.md.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime as dt
import itertools
import logging
import math
import platform
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import timm
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter

from normzoo.callbacks import (
    ChannelMoments,
    Divergence,
    GradientNoise,
    GradientNorm,
    GradientPredictiveness,
    GradientTails,
    LossAbove,
    Measurement,
    RelativeLoss,
    Sharpness,
)
from normzoo.callbacks._run.ranks import owners
from normzoo.functional.histogram_and_moments import histogram_and_moments
from normzoo.task import ImageClassification

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks" / "callbacks.md"
MARK = "<!-- measured -->"
# An optimizer step is of two micro-batches, which GradientNoise compares
MODELS = {
    "resnet18": ((32, 3, 64, 64), "ResNet-18"),
    "resnet50": ((8, 3, 128, 128), "ResNet-50"),
    "resnet110_cifar": ((128, 3, 32, 32), "ResNet-110 for CIFAR"),
}
DEFAULT_INTERVAL = {
    "Divergence": 1,
    "ChannelMoments": 50,
    "GradientNoise": 50,
    "GradientTails": 50,
    "GradientNorm": 1,
    "GradientNorm, each parameter": 50,
    "RelativeLoss": 500,
    "GradientPredictiveness": 500,
    "Sharpness": 1000,
}
SPLIT = "GradientNoise(split=2)"
BY_TORCH = "GradientTails without Numba"
BOTH = "GradientNorm and GradientTails"
EACH_STEP = ("GradientNorm", "GradientTails", BY_TORCH, BOTH)
PEERS = ("add_histogram", "histc")


# Steps in a row at which those for which there is an aim at each step measure, in each round
IN_A_ROW = 16


@dataclass(frozen=True)
class Cost:
    """Of a sample, in plain steps: the median, and the standard error of a median of values from a normal."""

    share: float
    error: float = 0.0

    @staticmethod
    def of(values: list[float]) -> Cost:
        """From what each round found."""
        return Cost(statistics.median(values), (math.pi / 2) ** 0.5 * statistics.stdev(values) / len(values) ** 0.5)

    def row(self, title: str, interval: int = 1) -> str:
        """A line of the table."""
        each = f"{self.share / interval:.2%} ± {self.error / interval:.2%}"
        return f"| {title} | {self.share:.4f} ± {self.error:.4f} | {interval} | {each} |"


class OnlyAt:
    """A schedule that is true at some steps in a row of every ``period``."""

    def __init__(self, phase: int, period: int, in_a_row: int = 1) -> None:
        self.phase, self.period, self.in_a_row = phase, period, in_a_row

    def __call__(self, step: int) -> bool:
        """Whether to sample at this step."""
        return 0 <= step % self.period - self.phase < self.in_a_row


class StepSeconds:
    """Seconds inside of methods of an object, for each step of a clock: those of a callback's hooks by default.

    They do not depend on how steps differ, and leave out what measuring costs outside of them, such as caches that it
    has emptied.
    """

    HOOKS = (
        *("on_train_batch_start", "on_before_backward", "on_after_backward", "on_before_optimizer_step", "applies"),
        "on_train_batch_end",
    )

    def __init__(self, clock: Clock, owner: Any, *names: str) -> None:
        self._of: defaultdict[int, float] = defaultdict(float)
        self._clock = clock
        for name in names or self.HOOKS:
            setattr(owner, name, self._timed(getattr(owner, name)))

    def steps(self) -> list[float]:
        """Seconds of each step but the last."""
        return [self._of[step] for step in range(1, len(self._clock.starts))]

    def periods(self, steps: int, first: int) -> list[float]:
        """Seconds a step, as the mean of each whole period of so many steps from ``first`` on."""
        starts = range(first, len(self._clock.starts) - steps + 1, steps)
        return [sum(self._of[step] for step in range(start, start + steps)) / steps for start in starts]

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self._of[len(self._clock.starts)] += time.perf_counter() - start

        return timed


class SplitNoise(GradientNoise):
    """Of another class, as a Trainer takes one callback with a state of each."""


class TailsByTorch(GradientTails):
    """GradientTails as it is where Numba is not installed."""

    def histograms(self, tensors: Sequence[Tensor], step: int) -> tuple[Tensor, Tensor]:
        """By PyTorch's functions."""
        return histogram_and_moments(tensors, self.mantissa_bits, compiled=False)


class Watches(pl.Callback):
    """What is done to all gradients without normzoo, when due."""

    def __init__(self, watch: Callable[[str, Tensor, int], None], due: OnlyAt) -> None:
        self.watch, self.due = watch, due

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Watch."""
        if self.due(trainer.global_step):
            for name, p in pl_module.named_parameters():
                self.watch(name, p.grad, trainer.global_step)


class Clock(pl.Callback):
    """Seconds from each step's first batch to the next one's, so that what is read late counts too."""

    def __init__(self) -> None:
        self.starts: list[float] = []
        self.updates: list[float] = []  # of each step, from the hook before it to the end of its last batch
        self._update = 0.0

    def watch(self, first: Measurement) -> None:
        """Take the beginning of updates from the first measurement, as others would notice a hook of this callback."""
        hook = first.on_before_optimizer_step

        def begins(*args: Any) -> None:
            self._update = time.perf_counter()
            hook(*args)

        first.on_before_optimizer_step = begins  # type: ignore[method-assign]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note how long the update took, if the batch has brought one."""
        if self._update:
            self.updates.append(time.perf_counter() - self._update)
            self._update = 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Note the time."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize()
            self.starts.append(time.perf_counter())


def histc(name: str, g: Tensor, step: int) -> None:
    """A histogram of 64 bins between extremes that are read back, as experiment trackers make them."""
    low, high = g.min().item(), g.max().item()
    torch.histc(g.float(), 64, low, high).tolist()


def step_seconds(
    arch: str,
    shape: tuple[int, ...],
    steps: int,
    callbacks: list[Any],
    folder: str,
    device: str,
    clock: Clock | None = None,
) -> list[float]:
    """Seconds of each step of a run with these callbacks."""
    data = TensorDataset(torch.randn(shape), torch.randint(0, 10, (shape[0],)))
    clock = Clock() if clock is None else clock
    first = Divergence(rules=[LossAbove(1e30)], recorder=False)
    if device == "cpu":  # on a GPU the update goes on after its hooks
        clock.watch(first)
    trainer = pl.Trainer(
        accelerator={"cuda": "gpu"}.get(device, device),
        devices=1,
        max_steps=steps + 1,
        max_epochs=-1,
        accumulate_grad_batches=2,
        callbacks=[clock, first, *callbacks],
        logger=pl.loggers.CSVLogger(folder),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(ImageClassification(arch, "batch"), DataLoader(data, batch_size=shape[0] // 2))
    return [b - a for a, b in itertools.pairwise(clock.starts)]


def of_blocks(seconds: list[float], contenders: list[str], plain: float, in_a_row: int = 1) -> dict[str, Cost]:
    """What a sample costs, from blocks of steps: a plain one, and one of each contender in turn.

    A contender measures at all steps of its block but the last, as what a sample leaves for later falls on the step
    after it.
    """
    length = in_a_row + 1
    blocks = [sum(seconds[i : i + length]) for i in range(0, len(seconds) - length + 1, length)]
    turns = [blocks[turn :: len(contenders) + 1] for turn in range(len(contenders) + 1)]
    extra = [[(b - a) / in_a_row / plain for a, b in zip(turns[0], turn, strict=False)] for turn in turns[1:]]
    return {name: Cost.of(values) for name, values in zip(contenders, extra, strict=True)}


def measure(arch: str, shape: tuple[int, ...], rounds: int, device: str) -> tuple[float, dict[str, Cost]]:
    """Seconds of a plain step, and what a sample of each contender costs."""
    contenders = [n for n in DEFAULT_INTERVAL if n not in ("Divergence", "GradientNorm")] + [SPLIT, *PEERS]
    period = 2 * (len(contenders) + 1)
    due = {name: OnlyAt(2 * (i + 1), period) for i, name in enumerate(contenders)}
    ours: dict[str, Any] = {
        "ChannelMoments": ChannelMoments(due["ChannelMoments"]),
        "GradientNoise": GradientNoise(due["GradientNoise"]),
        "GradientTails": GradientTails(due["GradientTails"]),
        "GradientNorm": GradientNorm(lambda step: False, layers=due["GradientNorm, each parameter"]),
        "RelativeLoss": RelativeLoss(due["RelativeLoss"]),
        "GradientPredictiveness": GradientPredictiveness(due["GradientPredictiveness"]),
        "Sharpness": Sharpness(due["Sharpness"]),
    }
    with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:

        def add_histogram(name: str, g: Tensor, step: int) -> None:
            writer.add_histogram(name, g, step)

        split = SplitNoise(due[SPLIT], split=2, dirpath=f"{folder}/split")
        peers = [Watches(add_histogram, due["add_histogram"]), Watches(histc, due["histc"])]
        callbacks = [*ours.values(), split, *peers]
        seconds = step_seconds(arch, shape, (rounds + 1) * period, callbacks, folder, device)[period:]
    plain = statistics.median(seconds[0::period] + seconds[1::period])
    cost = of_blocks(seconds, contenders, plain)
    return plain, cost | measure_each_step(arch, shape, max(rounds // 2, 2), device)[1]  # of sixteen samples each


def measure_each_step(arch: str, shape: tuple[int, ...], rounds: int, device: str) -> tuple[float, dict[str, Cost]]:
    """Seconds of a plain step, and what a sample of those that are meant for each step costs: in steps, in hooks."""
    length = IN_A_ROW + 1
    period = length * (len(EACH_STEP) + 1)
    due = {name: OnlyAt(length * (i + 1), period, IN_A_ROW) for i, name in enumerate(EACH_STEP)}
    with tempfile.TemporaryDirectory() as folder:
        measurements: dict[str, tuple[Measurement, ...]] = {
            "GradientNorm": (GradientNorm(due["GradientNorm"], layers=None),),
            "GradientTails": (GradientTails(due["GradientTails"]),),
            BY_TORCH: (TailsByTorch(due[BY_TORCH], label="by_torch"),),
            BOTH: (GradientNorm(due[BOTH], layers=None, label="both"), GradientTails(due[BOTH], label="both")),
        }
        clock = Clock()
        in_hooks = {name: [StepSeconds(clock, m) for m in some] for name, some in measurements.items()}
        callbacks = [m for some in measurements.values() for m in some]
        steps = (rounds + 1) * period
        seconds = step_seconds(arch, shape, steps, callbacks, folder, device, clock)[period:]
    plain = statistics.median(second for i, second in enumerate(seconds) if i % period < length)
    hooks = {}
    for turn, (name, parts) in enumerate(in_hooks.items(), start=1):
        of_steps = [sum(some) / plain for some in zip(*(part.steps()[period:] for part in parts), strict=True)]
        starts = range(turn * length, len(of_steps), period)
        hooks[f"{name}, in hooks"] = Cost.of([sum(of_steps[i : i + length]) / IN_A_ROW for i in starts])
    if clock.updates:
        updates = of_blocks(clock.updates[period:steps], list(EACH_STEP), plain, IN_A_ROW)
        hooks |= {f"{name}, with the update": cost for name, cost in updates.items()}
    return plain, of_blocks(seconds, list(EACH_STEP), plain, IN_A_ROW) | hooks


def divergence_table(arch: str, rounds: int, device: str) -> list[str]:
    """What ``Divergence`` costs each step, by its parts, from the time inside of hooks."""
    shape, title = MODELS[arch]
    with tempfile.TemporaryDirectory() as folder:
        clock = Clock()
        loss_rule = Divergence(rules=[LossAbove(1e30)], recorder=False, label="loss")
        norm = GradientNorm(layers=None)
        by_default = Divergence(recorder=False, label="usual")
        recording = Divergence(rules=[LossAbove(1e30)], label="recording")
        recorder = recording.recorder
        assert recorder is not None
        parts = {
            "the loss rule": (StepSeconds(clock, loss_rule),),
            "the usual rules, with `GradientNorm`": (StepSeconds(clock, norm), StepSeconds(clock, by_default)),
            "ring and snapshots": (StepSeconds(clock, recorder, "batch_begins", "judged", "norms"),),
        }
        steps, first = recorder.steps, 3 * recorder.steps  # by then the memory of both snapshots has been used
        callbacks = [norm, loss_rule, by_default, recording]
        count = first + rounds * steps + 1
        seconds = step_seconds(arch, shape, count, callbacks, folder, device, clock)[first:]
    plain = statistics.median(seconds)
    lines = [
        f"**{title}**, {'x'.join(map(str, shape))} in two micro-batches; a step takes {plain * 1e3:.0f} ms with all.",
        "",
        "| | each step, ms | overhead of each step |",
        "|---|---|---|",
    ]
    for name, some in parts.items():
        of_periods = [sum(values) for values in zip(*(part.periods(steps, first + 1) for part in some), strict=True)]
        cost = Cost.of(of_periods)
        share, error = cost.share / plain, cost.error / plain
        lines.append(f"| {name} | {cost.share * 1e3:.3f} ± {cost.error * 1e3:.3f} | {share:.2%} ± {error:.2%} |")
    return [*lines, ""]


def backpack_cost(arch: str, shape: tuple[int, ...], rounds: int) -> float | None:
    """What the variance of the samples' gradients by BackPACK adds to a step, as a share; None if it is not installed.

    In evaluation mode, since batch normalization in training has no gradients of samples.
    """
    try:
        from backpack import backpack, extend
        from backpack.extensions import Variance
    except ImportError:
        return None
    x, y = torch.randn(shape), torch.randint(0, 10, (shape[0],))
    plain = timm.create_model(arch, num_classes=10).eval()
    extended = extend(copy.deepcopy(plain), use_converter=True)
    loss = extend(torch.nn.CrossEntropyLoss())
    times: dict[str, list[float]] = {"plain": [], "backpack": []}
    for _ in range(rounds):
        for name, model in (("plain", plain), ("backpack", extended)):
            start = time.perf_counter()
            with backpack(Variance()) if name == "backpack" else contextlib.nullcontext():
                loss(model(x), y).backward()
            times[name].append(time.perf_counter() - start)
    return statistics.median(b / a for a, b in zip(*times.values(), strict=True)) - 1


def judge_seconds(n: int = 2000) -> float:
    """Seconds for one loss through Divergence's hooks, on a Trainer that stands still."""
    divergence = Divergence(recorder=False)
    module = SimpleNamespace(automatic_optimization=True, device=torch.device("cpu"))
    trainer: Any = SimpleNamespace(global_step=1, accumulate_grad_batches=1, lightning_module=module)
    loss = torch.tensor(1.0)
    start = time.perf_counter()
    for _ in range(n):
        divergence.on_train_batch_end(trainer, module, {"loss": loss}, None, 0)  # type: ignore[arg-type]
    return (time.perf_counter() - start) / n


def table(arch: str, rounds: int, device: str) -> list[str]:
    """The table of one network."""
    shape, title = MODELS[arch]
    plain, cost = measure(arch, shape, rounds, device)
    cost = {"Divergence": Cost(2 * judge_seconds() / plain), **cost}  # of two micro-batches
    lines = [
        f"**{title}**, {'x'.join(map(str, shape))} in two micro-batches; a plain step takes {plain * 1e3:.0f} ms.",
        "",
        "| | one sample, in steps | interval | overhead of each step |",
        "|---|---|---|---|",
    ]
    lines += [cost[name].row(f"`{name}`", interval) for name, interval in DEFAULT_INTERVAL.items()]
    total = sum(cost[name].share / interval for name, interval in DEFAULT_INTERVAL.items())
    error = sum((cost[name].error / interval) ** 2 for name, interval in DEFAULT_INTERVAL.items()) ** 0.5
    lines.append(f"| **all, by default** | | | **{total:.2%} ± {error:.2%}** |")
    lines += [
        cost[SPLIT].row(f"`{SPLIT}`", 50),
        *each_step_rows(cost),
        cost["add_histogram"].row("`SummaryWriter.add_histogram`"),
        cost["histc"].row("`torch.histc`, read back"),
    ]
    share_of_backpack = backpack_cost(arch, shape, max(3, rounds // 3)) if "cifar" not in arch else None
    if share_of_backpack is not None:
        lines.append(f"| BackPACK's `Variance`, each step | {share_of_backpack:.2f} | 1 | {share_of_backpack:.0%} |")
    return [*lines, ""]


def each_step_rows(cost: dict[str, Cost]) -> list[str]:
    """The rows of those that are meant for each step."""
    titles = {
        "GradientNorm": "`GradientNorm`",
        "GradientTails": "`GradientTails`",
        BY_TORCH: "`GradientTails`, without Numba",
        BOTH: "`GradientNorm` and `GradientTails`",
    }
    whole = [cost[name].row(title) for name, title in titles.items() if name != "GradientNorm"]
    hooks = [cost[f"{name}, in hooks"].row(f"{title}, in its hooks") for name, title in titles.items()]
    to_end = "to the end of the update"
    updates = {f"{title}, {to_end}": cost.get(f"{name}, with the update") for name, title in titles.items()}
    return [*whole, *hooks, *(found.row(title) for title, found in updates.items() if found is not None)]


def each_step_table(arch: str, rounds: int, device: str) -> list[str]:
    """The rows of the table that are about each step."""
    shape, title = MODELS[arch]
    plain, cost = measure_each_step(arch, shape, rounds, device)
    return [
        f"**{title}**, {'x'.join(map(str, shape))} in two micro-batches; a plain step takes {plain * 1e3:.0f} ms.",
        "",
        "| | one sample, in steps | interval | overhead of each step |",
        "|---|---|---|---|",
        cost["GradientNorm"].row("`GradientNorm`"),
        *each_step_rows(cost),
        "",
    ]


def growth(rounds: int) -> list[str]:
    """Seconds of GradientTails for synthetic gradients of 1 M to 1 B values, and for a rank's share of them."""
    tails = GradientTails()
    lines = [
        "| values | layers | all, ms | ns a value | `budget=2**16`, ms | a rank of 2, ms | a rank of 4, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for count in (10**6, 10**7, 10**8, 10**9):
        tensors = [torch.randn(count // 50) * 1e-3 for _ in range(50)]

        def seconds(parts: list[Tensor], callback: GradientTails = tails, repeats: int = max(3, rounds // 3)) -> float:
            times = []
            for _ in range(repeats):
                start = time.perf_counter()
                callback.histograms(parts, 0)
                times.append(time.perf_counter() - start)
            return statistics.median(times)

        whole = seconds(tensors)
        sampled = seconds(tensors, GradientTails(budget=2**16))
        shared = []
        for ranks in (2, 4):
            owner = owners([t.numel() for t in tensors], ranks)
            shared.append(seconds([t for t, r in zip(tensors, owner, strict=True) if r == 0]))
        times = " | ".join(f"{t * 1e3:.1f}" for t in shared)
        lines.append(
            f"| {count:.0e} | 50 | {whole * 1e3:.1f} | {whole / count * 1e9:.2f} | {sampled * 1e3:.1f} | {times} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--each-step", action="store_true", help="measure only what is meant for each step")
    parser.add_argument("--divergence", action="store_true", help="measure only Divergence, by its parts")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    if arguments.write and (arguments.each_step or arguments.device != "cpu"):
        parser.error("--write makes the whole page, of the CPU; leave out --each-step and --device")
    torch.set_num_threads(arguments.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    lines = [
        f"Measured on {dt.date.today().isoformat()}: {_processor()}, {arguments.threads} threads, "
        f"torch {torch.__version__}, lightning {pl.__version__}, Python {platform.python_version()}, "
        f"n = {arguments.rounds} rounds.",
        "",
    ]
    if arguments.divergence:
        for arch in arguments.only:
            print("\n".join(divergence_table(arch, arguments.rounds, arguments.device)), flush=True)
        return
    if arguments.each_step:
        for arch in arguments.only:
            print("\n".join(each_step_table(arch, arguments.rounds, arguments.device)), flush=True)
        return
    for arch in arguments.only:
        lines += table(arch, arguments.rounds, arguments.device)
        print("\n".join(lines[-24:]), flush=True)
    if arguments.device != "cpu":
        return
    lines += ["**With the size of the model**, `GradientTails.histograms` alone:", "", *growth(arguments.rounds)]
    print("\n".join(lines[-6:]))
    if arguments.write:
        text = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(text[: text.index(MARK)] + MARK + "\n\n" + "\n".join(lines) + "\n", encoding="utf-8")


def _processor() -> str:
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
