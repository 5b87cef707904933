"""The fits whose figures are kept as golden files, so that a change of structure is seen to change no figure.

The fits use the public API only (callbacks by name, ``normzoo.watch``, ``normzoo.load_run``, loggers), so that they run
on an older or a newer tree as well:

    python tests/golden_fits.py --write                 # into tests/golden
    PYTHONPATH=TREE python tests/golden_fits.py --write FOLDER
    python tests/golden_fits.py --diff FOLDER FOLDER    # bit for bit, as both are of one machine
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import random
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from golden_files import Golden, Recording, checksum, differences, floats, ints, of_column, of_state, read, write
from golden_nets import (
    Bypassed,
    Checkpointed,
    Complex,
    Gan,
    InPlace,
    Keeps,
    Late,
    Looks,
    Named,
    Negative,
    Net,
    Nothing,
    SharedNorm,
    Sometimes,
    Spoils,
    Squares,
    Thaws,
    Turns,
    batch_loss,
    convolutional,
    gan_discriminator_loss,
    gan_generator_loss,
    images,
    linear,
    loader,
    named,
    norms_of_many_packages,
    own_norm,
)
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

import normzoo
from normzoo.callbacks import (
    ChannelMoments,
    Divergence,
    Every,
    GradientNoise,
    GradientTails,
    LogSpaced,
    LossAbove,
    LossSpike,
    RelativeLoss,
    Stop,
    Warmup,
)

GOLDEN = Path(__file__).parent / "golden"
RANKS = 2
SOURCES = ["gradient", "update", "noise"]
FEW = [-0.5, 0.0, 0.5, 1.0, 4.0]  # multiples


class Histograms:
    """The part of a ``SummaryWriter`` that takes histograms."""

    def __init__(self) -> None:
        self.scalars: dict[str, list[tuple[int, float]]] = defaultdict(list)
        self.histograms: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
        self.figures: dict[str, list[int]] = defaultdict(list)

    def add_histogram_raw(self, tag: str, global_step: int, **histogram: Any) -> None:
        total, numbers = histogram["num"], [histogram[name] for name in sorted(histogram)]
        self.histograms[tag].append((global_step, total, checksum(*(np.asarray(n, np.float64) for n in numbers))))


class Writer(Histograms):
    """A ``SummaryWriter`` that keeps what it is given, of figures the tag alone."""

    def add_scalar(self, tag: str, value: Any, step: int) -> None:
        self.scalars[tag].append((step, float(value)))

    def add_image(self, tag: str, pixels: np.ndarray, global_step: int, dataformats: str) -> None:
        assert (pixels.ndim, pixels.dtype, dataformats) == (3, np.uint8, "HWC")
        self.figures[tag].append(global_step)

    def flush(self) -> None:
        """Nothing is held back."""


class Memory(Logger):
    """A logger that keeps scalars, and has a TensorBoard writer."""

    name, version = "memory", 0

    def __init__(self, writer: Histograms) -> None:
        super().__init__()
        self.writer = writer

    @property
    def experiment(self) -> Histograms:
        return self.writer

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to keep."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for key, value in metrics.items():
            self.writer.scalars[key].append((-1 if step is None else step, float(value)))


class Saves(pl.Callback):
    """Saves a checkpoint once a number of steps has been made."""

    def __init__(self, at: int, path: Path) -> None:
        self.at, self.path = at, path

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.at:
            trainer.save_checkpoint(self.path)


@dataclass
class Run:
    """Where a fit writes, and what it has left."""

    folder: Path
    writer: Histograms = field(default_factory=Histograms)
    states: dict[str, Any] = field(default_factory=dict)

    def path(self, name: str) -> str:
        """A folder of the fit's own, for ``dirpath``."""
        return str(self.folder / name)

    def trainer(self, *callbacks: Any, **options: Any) -> pl.Trainer:
        defaults: dict[str, Any] = {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 6,
            "max_epochs": -1,
            "logger": Memory(self.writer),
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "default_root_dir": str(self.folder),
        }
        return pl.Trainer(callbacks=list(callbacks), **{**defaults, **options})

    def fit(
        self,
        module: pl.LightningModule,
        *callbacks: Any,
        data: DataLoader[Any] | None = None,
        saved: str = "end",
        ckpt_path: str | None = None,
        **options: Any,
    ) -> pl.Trainer:
        """Train, and keep the callbacks' states as a checkpoint has them; under the name ``saved``."""
        trainer = self.trainer(*callbacks, **options)
        trainer.fit(module, loader() if data is None else data, ckpt_path=ckpt_path)
        self.keep_state(trainer, saved)
        return trainer

    def keep_state(self, trainer: pl.Trainer, name: str) -> None:
        path = self.folder / f"{name}.ckpt"
        trainer.save_checkpoint(path)
        self.states[name] = torch.load(path, weights_only=False)["callbacks"]

    def recording(self) -> Recording:
        """All that the fit has left."""
        found: Recording = {}
        for folder in sorted({p.parent for p in self.folder.rglob("*.arrows")}):
            where = folder.relative_to(self.folder).as_posix()
            for quantity, frame in normzoo.load_run(folder).items():
                for name in frame.columns:
                    for part, series in of_column(frame[name]).items():
                        found[f"record/{where}/{quantity}/{name}{part}"] = series
        for key, sent in self.writer.scalars.items():
            found[f"log/{key}/step"], found[f"log/{key}/value"] = ints(s for s, _ in sent), floats(v for _, v in sent)
        for key, histograms in self.writer.histograms.items():
            steps, totals, checksums = zip(*histograms, strict=True)
            found[f"histogram/{key}/step"], found[f"histogram/{key}/total"] = ints(steps), ints(totals)
            found[f"histogram/{key}/checksum"] = ints(checksums, "checksum")
        for key, steps in self.writer.figures.items():
            found[f"figure/{key}/step"] = ints(steps)
        return found | self.recorded_states()

    def recorded_states(self) -> Recording:
        """Those of the callbacks, whose names may hold a ``dirpath``, without the place of the fit's own folder."""
        found = of_state(self.states, "state")
        return {path.replace(str(self.folder), "FOLDER"): series for path, series in found.items()}


@dataclass(frozen=True)
class Fit:
    """A fit of a name, ``GROUP/WHAT``; each group is a file.

    Args:
        run: trains.
        slow: whether ``make test`` leaves it out.
        rtol: relative tolerance of its floats on other machines; None for that of all.
    """

    name: str
    run: Callable[[Run], Any]
    slow: bool = False
    rtol: float | None = None

    @property
    def group(self) -> str:
        return self.name.split("/")[0]


def scaled(init_scale: float = 1024.0) -> dict[str, Any]:
    """float16 autocast with a GradScaler, on a CPU; an ``init_scale`` of 2^30 makes gradients overflow at first."""
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=3)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


def halves(batch: Any) -> list[Any]:
    return list(zip(*(t.chunk(2) for t in batch), strict=True))


def epoch(batches: int, batch_size: int = 4) -> dict[str, Any]:
    """An epoch of some batches, which may end within the micro-batches of a step."""
    return {"max_steps": -1, "max_epochs": 1, "data": loader(batches * batch_size, batch_size)}


TWO: dict[str, Any] = {"accumulate_grad_batches": 2}
THREE: dict[str, Any] = {"accumulate_grad_batches": 3}


def every_callback(loss: Any = None) -> list[Any]:
    return [
        GradientTails(2, of=SOURCES),
        RelativeLoss(2, multiples=FEW, loss=loss),
        Divergence(rules=[LossAbove(), LossSpike(5.0, window=3)]),
        ChannelMoments(2, where="both"),
        GradientNoise(2),
    ]


def resumed(run: Run) -> None:
    """A run that stops in an epoch, and one that goes on from a checkpoint taken before that, in the same record."""

    def callbacks() -> list[Any]:
        folder, label = run.path("log"), "every"
        return [
            GradientTails(2, of="update", dirpath=folder),
            RelativeLoss(2, multiples=FEW, window=3, quantile=0.5, dirpath=folder),
            Divergence(rules=[LossAbove(), LossSpike(5.0, window=4)], dirpath=folder),
            ChannelMoments(2, dirpath=folder),
            GradientNoise(2, dirpath=folder),
            GradientNoise(1, decay=None, dirpath=folder, label=label),
        ]

    planted, at = {15: 50.0}, run.folder / "middle.ckpt"
    run.fit(Net(planted=planted), *callbacks(), Saves(5, at), max_steps=7, saved="first", **TWO)
    run.states["middle"] = torch.load(at, weights_only=False)["callbacks"]
    module = Net(planted={n - 10: v for n, v in planted.items()})
    torch.manual_seed(5)
    run.fit(module, *callbacks(), max_steps=12, ckpt_path=str(at), saved="second", **TWO)


def resumed_turns(run: Run) -> None:
    """Several optimizers, each of which goes on with its own count."""

    def callbacks() -> list[Any]:
        folder = run.path("log")
        return [
            RelativeLoss(2, multiples=FEW, loss=batch_loss, dirpath=folder),
            GradientTails(LogSpaced(4), of=["gradient", "update"], dirpath=folder),
        ]

    at = run.folder / "middle.ckpt"
    turns = [(0, 1), (0,), (2, 0), (0,)]
    run.fit(Turns(lambda n: turns[n % 4]), *callbacks(), Saves(6, at), max_steps=9, saved="first")
    run.states["middle"] = torch.load(at, weights_only=False)["callbacks"]
    run.fit(Turns(lambda n: turns[n % 4]), *callbacks(), max_steps=16, ckpt_path=str(at), saved="second")


def second_fit(run: Run) -> None:
    """The same Trainer goes on; another Trainer starts without the callbacks' state."""
    callbacks, module = every_callback(), Net()
    trainer = run.fit(module, *callbacks, max_steps=4, saved="first", **TWO)
    trainer.fit_loop.epoch_loop.max_steps = 8
    trainer.fit(module, loader())
    run.keep_state(trainer, "second")
    run.fit(module, *callbacks, max_steps=4, saved="third", default_root_dir=run.path("other"), **TWO)


def two_of_a_class(run: Run) -> None:
    run.fit(
        Net(),
        GradientTails(2),
        GradientTails(Warmup(2, 1), of="update", label="late"),
        GradientTails(3, by="module", dirpath=run.path("elsewhere")),
        Divergence(rules=[LossAbove(2.0)]),
        Divergence(rules=[LossAbove(), LossSpike(5.0, window=3)], label="spike"),
        RelativeLoss(2, multiples=FEW, along="update"),
        RelativeLoss(2, multiples=FEW, along="gradient", dirpath=run.path("elsewhere")),
        ChannelMoments(2),
        ChannelMoments(3, where="output", sites=["net.*"], label="outputs"),
        GradientNoise(2),
        GradientNoise(2, split=2, label="split"),
        **TWO,
    )


def compiled(part: bool, site: str, where: str, skipped: Sequence[int] = ()) -> Callable[[Run], Any]:
    def run_it(run: Run) -> None:
        torch._dynamo.reset()
        module: Any = Net("plain", skipped=skipped)
        module.net[3] = nn.Identity()
        if part:
            module.net = torch.compile(module.net, backend="eager")
        else:
            module = torch.compile(module, backend="eager")
        run.fit(module, ChannelMoments(2, sites=["norms", site], where=where), GradientTails(2), max_steps=4, **TWO)
        torch._dynamo.reset()

    return run_it


def resumed_between_steps(run: Run) -> None:
    """A divergence in the first micro-batch of a step that a checkpoint was saved within: both runs record it."""

    def callback() -> Divergence:
        return Divergence(rules=[LossAbove(40.0)], dirpath=run.path("log"))

    at = run.folder / "middle.ckpt"
    run.fit(Net(planted={10: 50.0}), callback(), Saves(5, at), max_steps=7, saved="first", **TWO)
    run.states["middle"] = torch.load(at, weights_only=False)["callbacks"]
    run.fit(Net(), callback(), max_steps=8, ckpt_path=str(at), saved="second", **TWO)


def csv_logger(run: Run) -> None:
    """A logger with a folder, which the records go to as well."""
    loggers = [CSVLogger(run.folder, name="", version="csv"), Memory(run.writer)]
    run.fit(Net(), GradientTails(3), ChannelMoments(3), logger=loggers)


def schedules(run: Run) -> None:
    chosen = {"every": Every(3), "warmup": Warmup(2, Every(2)), "log": LogSpaced(3), "function": lambda s: s in (1, 6)}
    run.fit(
        Net(),
        *(GradientTails(schedule, parameters="net.6.*", label=name) for name, schedule in chosen.items()),
        *(ChannelMoments(schedule, label=f"moments-{name}") for name, schedule in chosen.items()),
        *(RelativeLoss(schedule, multiples=[1.0], label=f"loss-{name}") for name, schedule in chosen.items()),
        *(GradientNoise(schedule, label=f"noise-{name}") for name, schedule in chosen.items()),
        max_steps=11,
        **TWO,
    )


def with_figures(run: Run) -> None:
    run.writer = Writer()
    run.fit(Gan(), RelativeLoss(3, multiples=FEW, loss=[gan_generator_loss, gan_discriminator_loss]), ChannelMoments(3))


Told = Callable[[Any, Any, Any], None]


def loop(
    run: Run,
    *callbacks: Any,
    model: nn.Module | None = None,
    several: bool = False,
    steps: int = 6,
    accumulate: int = 1,
    planted: dict[int, float] | None = None,
    logger: Any = None,
    called: Callable[[nn.Module], nn.Module] = lambda model: model,
    state: Any = None,
    saved: str = "end",
    start_step: int = 0,
    data: Sequence[Any] | None = None,
    name: str = "log",
) -> Any:
    """The loop that a user would write, watched; with ``several``, optimizers of the layers that take turns."""
    model = called(convolutional() if model is None else model)
    layers = [m for m in model.modules() if list(m.parameters(recurse=False))]
    parts = layers[-3:] if several else [model]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1 / (i + 1), momentum=0.9) for i, m in enumerate(parts)]
    batches, micro = data or list(loader(4 * steps * accumulate)), 0
    options = {"dirpath": run.path(name), "logger": Memory(run.writer) if logger is None else logger}
    watching = normzoo.watch(model, optimizers, *callbacks, start_step=start_step, **options)
    if state is not None:
        watching.load_state_dict(state)
    with watching:
        for step in range(steps):
            for optimizer in optimizers:
                optimizer.zero_grad()
            for _ in range(accumulate):
                batch = batches[micro]
                micro += 1
                loss = batch_loss(model, batch)
                watching.batch(batch)
                watching.loss(loss + (planted or {}).get(step, 0.0))
                (loss / accumulate).backward()
            if watching.should_stop:
                break
            for i, optimizer in enumerate(optimizers):
                if not several or i != 1 or step % 2:
                    optimizer.step()
        run.states[f"{saved}, inside"] = watching.state_dict()
    run.states[saved] = watching.state_dict()
    return watching


def watched() -> list[Any]:
    return [
        GradientTails(2, of=["gradient", "update"]),
        ChannelMoments(2, where="both", sites=["norms", "6"]),
        Divergence(rules=[LossAbove(), LossSpike(5.0, window=3)]),
        RelativeLoss(2, multiples=FEW, loss=batch_loss, window=2, quantile=0.5),
    ]


def watch_resumed(run: Run) -> None:
    first = loop(run, *watched(), steps=5, planted={4: 50.0}, saved="first")
    torch.manual_seed(3)
    loop(run, *watched(), steps=4, state=first.state_dict(), saved="second")


def watch_resumed_turns(run: Run) -> None:
    def ours() -> list[Any]:
        return [GradientTails(2), RelativeLoss(2, multiples=FEW, loss=batch_loss)]

    first = loop(run, *ours(), model=linear(), several=True, steps=5, saved="first")
    loop(run, *ours(), model=linear(), several=True, steps=4, state=first.state_dict(), saved="second")


def watch_entered_again(run: Run) -> None:
    """A loop that breaks off with an error, whose last sample is written, and goes on."""
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watching = normzoo.watch(model, optimizer, GradientTails(1), dirpath=run.path("log"), logger=Memory(run.writer))
    for fails in (3, 5):
        with contextlib.suppress(KeyError), watching:
            for number, batch in enumerate(loader(32)):
                optimizer.zero_grad()
                batch_loss(model, batch).backward()
                if number == fails:
                    raise KeyError("the loop's own")
                optimizer.step()


def watch_compiled(run: Run) -> None:
    torch._dynamo.reset()
    model = convolutional()
    model[3] = nn.Identity()
    callbacks = [GradientTails(2), ChannelMoments(2, sites=["norms", "6"], where="both")]
    loop(run, *callbacks, model=model, called=lambda m: torch.compile(m, backend="eager"), steps=4)
    torch._dynamo.reset()


def watch_writers(run: Run) -> None:
    """A SummaryWriter beside a logger, which both get the scalars."""
    run.writer = Writer()
    loop(run, *watched(), logger=[run.writer, Memory(run.writer)], steps=5)


FITS = [
    Fit("gradient_tails/defaults", lambda r: r.fit(Net(), GradientTails(2))),
    Fit("gradient_tails/sources", lambda r: r.fit(Net(), GradientTails(2, of=SOURCES), **TWO)),
    Fit("gradient_tails/adamw", lambda r: r.fit(Net("adamw"), GradientTails(2, of=["update"])), slow=True),
    Fit(
        "gradient_tails/by",
        lambda r: r.fit(
            Net(net=nn.Sequential(nn.Sequential(convolutional()))),
            GradientTails(3, by="module", of=SOURCES),
            GradientTails(3, by=1, label="one"),
            GradientTails(3, by=3, of=SOURCES, label="three"),
            **TWO,
        ),
    ),
    Fit(
        "gradient_tails/budget",
        lambda r: r.fit(Net(), GradientTails(1, budget=16, of=SOURCES, tail_fraction=0.1), max_steps=4, **TWO),
    ),
    Fit(
        "gradient_tails/mantissa_bits",
        lambda r: r.fit(Net(), *(GradientTails(4, mantissa_bits=b, label=f"bits-{b}") for b in (1, 5, 7))),
        slow=True,
    ),
    Fit(
        "gradient_tails/mantissa_bits_0",
        lambda r: r.fit(Net(), GradientTails(4, mantissa_bits=0, tail_fraction=0.3)),
        slow=True,
    ),
    Fit(
        "gradient_tails/parameters",
        lambda r: r.fit(
            Net(),
            GradientTails(2, parameters=["net.?.weight", "*bias"]),
            GradientTails(2, parameters="net.6*", label="one"),
        ),
        slow=True,
    ),
    Fit("gradient_tails/complex", lambda r: r.fit(Squares(net=Complex()), GradientTails(2, of=SOURCES), **TWO)),
    Fit("gradient_tails/sparse", lambda r: r.fit(Squares("sparse", net=Looks()), GradientTails(2, of=SOURCES), **TWO)),
    Fit(
        "gradient_tails/accumulation",
        lambda r: r.fit(Net(), GradientTails(1, of=SOURCES), **THREE, **epoch(8)),
    ),
    Fit(
        "gradient_tails/one_micro_batch",
        lambda r: r.fit(Net(), GradientTails(1, of=["gradient", "noise"]), **THREE, **epoch(7)),
        slow=True,
    ),
    Fit(
        "gradient_tails/accumulation_scheduled",
        lambda r: r.fit(
            Net(),
            GradientTails(2, of=SOURCES),
            GradientAccumulationScheduler({0: 1, 1: 3}),
            data=loader(24),
            max_steps=8,
        ),
        slow=True,
    ),
    Fit(
        "gradient_tails/unused_in_last_pass",
        lambda r: r.fit(Sometimes(), GradientTails(1, of=SOURCES), max_steps=3, **TWO),
        slow=True,
    ),
    Fit(
        "gradient_tails/clipping",
        lambda r: r.fit(Net(), GradientTails(2, of=["gradient", "update"]), gradient_clip_val=0.05),
    ),
    Fit(
        "gradient_tails/not_finite", lambda r: r.fit(Spoils(), GradientTails(1, of=["gradient", "update"]), max_steps=1)
    ),
    Fit("gradient_tails/scaler", lambda r: r.fit(Net(), GradientTails(2, of=SOURCES), **scaled(), **TWO), rtol=0.05),
    Fit(
        "gradient_tails/scaler_skips",
        lambda r: r.fit(Net(), GradientTails(1, of=["gradient", "update"]), max_steps=8, **scaled(2.0**24)),
        slow=True,
        rtol=0.05,
    ),
    Fit(
        "gradient_tails/fused_scaler",
        lambda r: r.fit(Net("fused"), GradientTails(2, of=SOURCES), **scaled(), **TWO),
        rtol=0.05,
        slow=True,
    ),
    Fit(
        "gradient_tails/bf16",
        lambda r: r.fit(Net(), GradientTails(2, of=SOURCES), precision="bf16-mixed", **TWO),
        rtol=0.1,
        slow=True,
    ),
    Fit(
        "gradient_tails/float64",
        lambda r: r.fit(Net(), GradientTails(2, of=SOURCES), precision="64-true", **TWO),
        slow=True,
    ),
    Fit(
        "gradient_tails/turns",
        lambda r: r.fit(
            Turns(lambda n: [(0, 1), (0,), (2, 0), (0, 0)][n % 4]),
            GradientTails(2, of=["gradient", "update"]),
            max_steps=12,
        ),
    ),
    Fit(
        "gradient_tails/lbfgs",
        lambda r: r.fit(Net("lbfgs"), GradientTails(2, of=["gradient", "update"]), max_steps=4),
        slow=True,
    ),
    Fit("gradient_tails/thawed", lambda r: r.fit(Thaws(), GradientTails(2, of=SOURCES), **TWO), slow=True),
    Fit("gradient_tails/configure_model", lambda r: r.fit(Late(), GradientTails(3)), slow=True),
    Fit("relative_loss/gradient", lambda r: r.fit(Net("plain"), RelativeLoss(2, multiples=FEW))),
    Fit("relative_loss/update", lambda r: r.fit(Net("momentum"), RelativeLoss(2))),
    Fit(
        "relative_loss/along",
        lambda r: r.fit(
            Net(),
            RelativeLoss(2, multiples=FEW, along="gradient"),
            RelativeLoss(2, multiples=FEW, along="update", label="update"),
        ),
    ),
    Fit("relative_loss/adamw", lambda r: r.fit(Net("adamw"), RelativeLoss(2, multiples=FEW))),
    Fit(
        "relative_loss/groups",
        lambda r: r.fit(Net("groups"), RelativeLoss(2, multiples=FEW, along="gradient")),
        slow=True,
    ),
    Fit("relative_loss/cycle", lambda r: r.fit(Net("cycle"), RelativeLoss(2, multiples=FEW)), slow=True),
    Fit(
        "relative_loss/bounds",
        lambda r: r.fit(
            Net("plain"),
            RelativeLoss(1, multiples=[1e-3, 2e-3], window=3, quantile=0.5),
            RelativeLoss(1, multiples=[100.0, 0.1234567], window=2, label="far"),
            max_steps=5,
        ),
    ),
    Fit(
        "relative_loss/loss",
        lambda r: r.fit(Net("plain"), RelativeLoss(2, multiples=FEW, loss=lambda m, b: m.net(b[0]).square().mean())),
        slow=True,
    ),
    Fit("relative_loss/negative", lambda r: r.fit(Negative("plain"), RelativeLoss(2, multiples=FEW))),
    Fit("relative_loss/zero", lambda r: r.fit(Nothing("adamw"), RelativeLoss(2, multiples=FEW)), slow=True),
    Fit("relative_loss/no_dropout", lambda r: r.fit(Net("plain", linear()), RelativeLoss(2)), slow=True),
    Fit("relative_loss/accumulation", lambda r: r.fit(Net(), RelativeLoss(2, multiples=FEW), **THREE), slow=True),
    Fit(
        "relative_loss/clipping",
        lambda r: r.fit(Net("plain"), RelativeLoss(2, multiples=FEW), gradient_clip_val=0.05),
        slow=True,
    ),
    Fit("relative_loss/still", lambda r: r.fit(Net("still"), RelativeLoss(2, multiples=FEW)), slow=True),
    Fit(
        "relative_loss/scaler_skips",
        lambda r: r.fit(
            Net(),
            RelativeLoss(1, multiples=FEW),
            RelativeLoss(1, multiples=FEW, along="gradient", label="gradient"),
            max_steps=8,
            **scaled(2.0**24),
        ),
        rtol=0.05,
        slow=True,
    ),
    Fit(
        "relative_loss/fused_scaler",
        lambda r: r.fit(Net("fused"), RelativeLoss(2, multiples=FEW, along="gradient"), **scaled(), **TWO),
        slow=True,
        rtol=0.05,
    ),
    Fit(
        "relative_loss/bf16",
        lambda r: r.fit(Net(), RelativeLoss(2, multiples=FEW), precision="bf16-mixed"),
        slow=True,
        rtol=0.05,
    ),
    Fit("relative_loss/in_place", lambda r: r.fit(InPlace(), RelativeLoss(2, multiples=FEW)), slow=True),
    Fit("relative_loss/kept_state", lambda r: r.fit(Keeps(), RelativeLoss(2, multiples=FEW))),
    Fit(
        "relative_loss/without_hooks", lambda r: r.fit(Net("without_hooks"), RelativeLoss(2, multiples=FEW)), slow=True
    ),
    Fit("relative_loss/no_loss", lambda r: r.fit(Net(no_loss=[2, 3]), RelativeLoss(1, multiples=FEW)), slow=True),
    Fit("relative_loss/lbfgs", lambda r: r.fit(Net("lbfgs"), RelativeLoss(2, multiples=FEW), max_steps=4), slow=True),
    Fit(
        "relative_loss/gan",
        lambda r: r.fit(
            Gan(),
            RelativeLoss(2, multiples=FEW, loss=[gan_generator_loss, gan_discriminator_loss]),
            RelativeLoss(1, multiples=FEW, loss=gan_discriminator_loss, optimizer=1, along="gradient", label="one"),
            max_steps=10,
        ),
    ),
    Fit(
        "relative_loss/turns",
        lambda r: r.fit(
            Turns(lambda n: [(0, 1), (0,), (2, 0), (0, 0)][n % 4]),
            RelativeLoss(2, multiples=FEW, loss=batch_loss, optimizer=[0, 2]),
            max_steps=14,
        ),
        slow=True,
    ),
    Fit("divergence/none", lambda r: r.fit(Net(), Divergence(rules=[LossAbove()]))),
    Fit("divergence/threshold", lambda r: r.fit(Net(planted={2: 5.0, 4: 9.0}), Divergence(rules=[LossAbove(4.5)]))),
    Fit("divergence/stop", lambda r: r.fit(Net(planted={3: 2e3}), Divergence(action=Stop(None)), max_steps=12)),
    Fit("divergence/nan", lambda r: r.fit(Net(planted={3: float("nan")}), Divergence()), slow=True),
    Fit("divergence/infinite", lambda r: r.fit(Net(planted={3: float("-inf")}), Divergence()), slow=True),
    Fit(
        "divergence/spike",
        lambda r: r.fit(
            Net(planted={2: 2e3, 8: 20.0}), Divergence(rules=[LossAbove(1e4), LossSpike(8.0, window=5)]), max_steps=10
        ),
    ),
    Fit(
        "divergence/drop",
        lambda r: r.fit(
            Net(planted={8: -20.0}),
            Divergence(rules=[LossAbove(), LossSpike(15.0, window=5, two_sided=True)]),
            Divergence(rules=[LossAbove(), LossSpike(15.0, window=5)], label="one-sided"),
            max_steps=10,
        ),
    ),
    Fit("divergence/accumulation", lambda r: r.fit(Net(planted={7: 50.0}), Divergence(rules=[LossAbove(40.0)]), **TWO)),
    Fit(
        "divergence/no_loss",
        lambda r: r.fit(Net(no_loss=[1, 4], planted={5: 50.0}), Divergence(rules=[LossAbove(40.0)])),
        slow=True,
    ),
    Fit(
        "divergence/manual",
        lambda r: r.fit(Turns(lambda n: (0, 1), planted={3: 50.0}), Divergence(rules=[LossAbove(40.0)]), max_steps=10),
    ),
    Fit(
        "divergence/last_step",
        lambda r: r.fit(Net(planted={5: 50.0}), Divergence(rules=[LossAbove(40.0)], action=Stop(None))),
        slow=True,
    ),
    Fit("divergence/resumed_between_steps", resumed_between_steps),
    Fit("channel_moments/norms", lambda r: r.fit(Net(), ChannelMoments(2))),
    Fit("channel_moments/both", lambda r: r.fit(Net(), ChannelMoments(2, sites=["net.*"], where="both"), max_steps=3)),
    Fit(
        "channel_moments/sites",
        lambda r: r.fit(
            Net(net=linear()),
            ChannelMoments(2, sites="net.1", where="output"),
            ChannelMoments(2, sites=["norms", "net.[34]"], where="both", channel_dim=-1, label="last"),
        ),
    ),
    Fit(
        "channel_moments/accumulation", lambda r: r.fit(Net(), ChannelMoments(2, where="both"), **THREE, **epoch(8, 3))
    ),
    Fit(
        "channel_moments/recognise",
        lambda r: r.fit(Net(net=own_norm()), ChannelMoments(2, recognise=True, where="both")),
    ),
    Fit(
        "channel_moments/packages",
        lambda r: r.fit(Net(net=norms_of_many_packages()), ChannelMoments(2, where="both"), max_steps=2),
        slow=True,
    ),
    Fit(
        "channel_moments/shared",
        lambda r: r.fit(Net(net=SharedNorm()), ChannelMoments(2, sites=["norms", "net.second"], dead_below=1e-3)),
    ),
    Fit("channel_moments/never_called", lambda r: r.fit(Bypassed(), ChannelMoments(1), max_steps=4), slow=True),
    Fit(
        "channel_moments/checkpointed",
        lambda r: r.fit(Net(net=Checkpointed(False)), ChannelMoments(2, where="both"), **TWO),
    ),
    Fit(
        "channel_moments/checkpointed_reentrant",
        lambda r: r.fit(Net(net=Checkpointed(True)), ChannelMoments(2, where="both"), **TWO),
        slow=True,
    ),
    Fit("channel_moments/compiled", compiled(True, "net.6", "both"), slow=True),
    Fit("channel_moments/compiled_whole", compiled(False, "net.6", "input"), slow=True),
    Fit("channel_moments/compiled_skipped", compiled(True, "net.6", "input", skipped=[4]), slow=True),
    Fit(
        "channel_moments/skipped_batches",
        lambda r: r.fit(Net(skipped=[3], no_loss=[1]), ChannelMoments(2), data=loader(20), max_steps=5, **TWO),
        slow=True,
    ),
    Fit(
        "channel_moments/turns",
        lambda r: r.fit(
            Turns(lambda n: [(0, 1), (0,), (2, 0), (0, 0)][n % 4]),
            ChannelMoments(4, sites=["net.1", "net.3"], where="output"),
            max_steps=14,
        ),
    ),
    Fit(
        "channel_moments/bf16",
        lambda r: r.fit(Net(), ChannelMoments(2, where="both"), precision="bf16-mixed"),
        slow=True,
        rtol=0.05,
    ),
    Fit("channel_moments/configure_model", lambda r: r.fit(Late(), ChannelMoments(3)), slow=True),
    Fit("gradient_noise/accumulation", lambda r: r.fit(Net(), GradientNoise(2), **TWO)),
    Fit(
        "gradient_noise/last_step", lambda r: r.fit(Net(), GradientNoise(1, decay=0.5), **THREE, **epoch(7)), slow=True
    ),
    Fit("gradient_noise/uneven", lambda r: r.fit(Net(), GradientNoise(1), data=loader(22), max_steps=6, **TWO)),
    Fit("gradient_noise/split", lambda r: r.fit(Net(), GradientNoise(2, split=2))),
    Fit("gradient_noise/split_accumulation", lambda r: r.fit(Net(), GradientNoise(2, split=2), **TWO), slow=True),
    Fit("gradient_noise/split_by_function", lambda r: r.fit(Net("adamw"), GradientNoise(2, split=halves), max_steps=4)),
    Fit(
        "gradient_noise/population",
        lambda r: r.fit(
            Net(),
            GradientNoise(2, population=64, factor="(N-b)/N", decay=None),
            GradientNoise(2, population=64, factor="(N-b)/(N-1)", samples=lambda batch: 2 * len(batch[1]), label="two"),
            **TWO,
        ),
    ),
    Fit(
        "gradient_noise/short_batch",
        lambda r: r.fit(Net(), GradientNoise(1, split=3), data=loader(14), max_steps=8),
        slow=True,
    ),
    Fit(
        "gradient_noise/part_of_one_sample",
        lambda r: r.fit(Net(), GradientNoise(1, split=2), data=loader(14)),
        slow=True,
    ),
    Fit(
        "gradient_noise/mapping",
        lambda r: r.fit(
            Named(), GradientNoise(2, split=2), data=DataLoader(images(48), batch_size=8, collate_fn=named), max_steps=5
        ),
    ),
    Fit(
        "gradient_noise/clipping",
        lambda r: r.fit(Net("plain"), GradientNoise(2), gradient_clip_val=0.05, **TWO),
        slow=True,
    ),
    Fit("gradient_noise/scaler", lambda r: r.fit(Net(), GradientNoise(2), **scaled(), **TWO), rtol=0.3, slow=True),
    Fit("gradient_noise/fused_scaler", lambda r: r.fit(Net("fused"), GradientNoise(2), **scaled(), **TWO), rtol=0.3),
    Fit(
        "gradient_noise/scaler_split",
        lambda r: r.fit(Net(), GradientNoise(2, split=2), max_steps=8, **scaled(2.0**24)),
        slow=True,
        rtol=0.3,
    ),
    Fit(
        "gradient_noise/accumulation_scheduled",
        lambda r: r.fit(
            Net(), GradientNoise(1), GradientAccumulationScheduler({0: 1, 1: 3}), data=loader(24), max_steps=9
        ),
        slow=True,
    ),
    Fit("gradient_noise/lbfgs", lambda r: r.fit(Net("lbfgs"), GradientNoise(2, split=2), max_steps=4), slow=True),
    Fit("together/all", lambda r: r.fit(Net(), *every_callback(), max_steps=8, **TWO)),
    Fit(
        "together/adamw",
        lambda r: r.fit(Net("adamw"), *every_callback(loss=batch_loss), max_steps=6, gradient_clip_val=0.1, **TWO),
        slow=True,
    ),
    Fit("together/schedules", schedules, slow=True),
    Fit("together/resumed", resumed),
    Fit("together/resumed_turns", resumed_turns, slow=True),
    Fit("together/second_fit", second_fit, slow=True),
    Fit("together/two_of_a_class", two_of_a_class),
    Fit("together/figures", with_figures),
    Fit("together/csv_logger", csv_logger, slow=True),
    Fit("watch/all", lambda r: loop(r, *watched())),
    Fit("watch/accumulation", lambda r: loop(r, *watched(), accumulate=2), slow=True),
    Fit("watch/several", lambda r: loop(r, *watched()[:1], *watched()[2:], model=linear(), several=True)),
    Fit(
        "watch/stop",
        lambda r: loop(r, Divergence(action=Stop(None)), GradientTails(1), planted={2: 2e3}, steps=8, start_step=7),
    ),
    Fit("watch/resumed", watch_resumed),
    Fit("watch/resumed_turns", watch_resumed_turns, slow=True),
    Fit("watch/entered_again", watch_entered_again, slow=True),
    Fit("watch/defaults", lambda r: loop(r, GradientTails(), ChannelMoments(), steps=51), slow=True),
    Fit("watch/compiled", watch_compiled, slow=True),
    Fit("watch/writers", watch_writers, slow=True),
]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """One thread, and no messages, while fits run."""
    threads, log = torch.get_num_threads(), logging.getLogger("lightning.pytorch")
    level = log.level
    torch.set_num_threads(1)
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(threads)
        log.setLevel(level)


def record(fit: Fit, folder: Path) -> Recording:
    """Run a fit in an empty folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with quiet():
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        run = Run(folder)
        fit.run(run)
        return run.recording()


def record_all(folder: Path) -> dict[str, Golden]:
    """The recordings of all groups, those of several ranks included."""
    from golden_ranks import record_ranks

    groups: dict[str, Golden] = {}
    for fit in FITS:
        start = time.process_time()
        groups.setdefault(fit.group, {})[fit.name] = record(fit, folder / fit.name)
        print(f"{time.process_time() - start:6.2f} s  {'slow' if fit.slow else '    '}  {fit.name}", flush=True)
    groups["ranks"] = record_ranks(folder / "ranks")
    return groups


def write_all(to: Path) -> None:
    to.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for group, golden in record_all(Path(folder)).items():
            write(to / f"{group}.npz", golden)
    print(f"{normzoo.__file__}: {sum(f.stat().st_size for f in to.glob('*.npz'))} bytes in {to}")


def diff(before: Path, after: Path, exact: bool = True) -> int:
    """Print what differs between two folders; the number of differences."""
    count = 0
    tolerances = {fit.name: fit.rtol for fit in FITS}
    for path in sorted(before.glob("*.npz")):
        (_, old), (_, new) = read(path), read(after / path.name)
        for fit, recording in old.items():
            options = {} if tolerances.get(fit) is None else {"rtol": tolerances[fit]}
            found = [*differences(recording, new.get(fit, {}), exact, **options)]
            count += len(found)
            print(*(f"{fit}: {line}" for line in found), sep="\n", end="\n" if found else "")
    print(f"{count} series differ")
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", nargs="?", type=Path, const=GOLDEN, help="folder; by default tests/golden")
    parser.add_argument("--diff", nargs=2, type=Path, metavar=("BEFORE", "AFTER"))
    parser.add_argument("--tolerant", action="store_true", help="compare as on another machine")
    asked = parser.parse_args()
    if asked.write is not None:
        write_all(asked.write)
    if asked.diff is not None:
        return int(diff(*asked.diff, exact=not asked.tolerant) > 0)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
