"""A run in which a cause may be planted: its settings, its module, its batches and its fit."""

from __future__ import annotations

import logging
import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from normzoo.callbacks import Divergence, GradientNorm, GradientSpike, LossSpike
from planted.cloud import Cloud
from planted.convnext import ConvNext
from planted.decoder import Decoder
from planted.dense import Dense
from planted.excited import Excited
from planted.experts import Experts
from planted.faults import Flip, poisoned
from planted.flow import Flow
from planted.graph import Graph
from planted.images import Autoencoder, Batch, Mixer, Residual
from planted.perceiver import Perceiver
from planted.recommender import Recommender
from planted.scan import Scan
from planted.sequences import Language, Pairs, Series, Table
from planted.siamese import Siamese
from planted.tagger import Tagger
from planted.temporal import Temporal
from planted.translator import Translator
from planted.unet import UNet
from planted.vision_transformer import ViT

# Each is a module whose forward takes a batch and returns the loss, and whose ``samples`` makes samples of its task
NETS: dict[str, Any] = {
    net.__name__.lower(): net
    for net in (
        *(Residual, Mixer, Autoencoder, Language, Series, Pairs, Table),  # of halves a and b
        *(ViT, ConvNext, UNet, Translator, Tagger, Scan, Experts, Siamese, Flow, Graph),  # of half c
        *(Dense, Excited, Decoder, Temporal, Cloud, Recommender, Perceiver),  # of half d
    )
}
AFTER = 4  # steps that a run goes on for after its alarm
RULES: dict[str, Any] = {
    "usual": None,
    "loss spike": lambda: [LossSpike(10.0, window=20)],
    "gradient spike": lambda: [GradientSpike(deviations=8.0, factor=2.0)],
    "small gradient spike": lambda: [GradientSpike(deviations=2.5, factor=1.3)],
    "small loss spike": lambda: [LossSpike(2.5, window=20)],
}


@dataclass(frozen=True)
class Settings:
    """What a run is made of; the module, and all that replay gives to it, follows from these alone.

    Attributes:
        net: key of ``NETS``.
        options: of the net.
        optimizer: ``"sgd"`` (with momentum 0.9), ``"adam"``, ``"adamw"``, ``"rmsprop"``, ``"nadam"``, ``"adagrad"``,
            ``"adamax"`` or ``"radam"``.
        own: further options of the optimizer, such as weight_decay.
        lr: learning rate after warm-up.
        warm_up: steps over which the learning rate rises from 0.
        jump: (step, factor): the learning rate is so many times as large from this step on.
        rise: the learning rate is multiplied by this at each step.
        cosine: steps over which the learning rate falls to a tenth as half a cosine; 0 for a constant one.
        rates: factors of the learning rate of parameters, by a part of their names.
        prune: (step, channel): this channel's ``gate`` is set to 0 before the step.
        shrink: by which each gate shrinks towards 0 after each step.
        batch: samples of a micro-batch.
        accumulation: micro-batches of a step.
        steps: of the run, if nothing ends it.
        seed: of weights and data.
        clip: norm to which gradients are clipped, or value.
        precision: as the Trainer takes it.
        drift: the first floating-point tensor is so many times as large at each step as at the one before.
        poison: ``(kind, step, rows, value)`` of :func:`poisoned`, one for each.
        flip: ``(kind, step, name, index, bit)`` of :class:`Flip`, one for each.
        rules: key of ``RULES``.
        clip_by: ``"value"`` if each number of a gradient is clipped by itself; as usual their norm is.
        stairs: steps after each of which the learning rate is halved; 0 for a constant one.
    """

    net: str
    options: dict[str, Any] = field(default_factory=dict)
    optimizer: str = "adamw"
    lr: float = 1e-3
    warm_up: int = 0
    jump: tuple[int, float] | None = None
    rise: float = 1.0
    rates: dict[str, float] = field(default_factory=dict)
    prune: tuple[int, int] | None = None
    shrink: float = 0.0
    batch: int = 32
    accumulation: int = 1
    steps: int = 70
    seed: int = 0
    clip: float | None = None
    precision: Any = "32-true"
    drift: float = 1.0
    poison: tuple[tuple[Any, ...], ...] = ()
    flip: tuple[tuple[Any, ...], ...] = ()
    rules: str = "usual"
    own: dict[str, Any] = field(default_factory=dict)
    cosine: int = 0
    clip_by: str | None = None
    stairs: int = 0


class Task(pl.LightningModule):
    """The module that is trained, as its user would have written it: nothing planted from outside is in it."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        torch.manual_seed(settings.seed)
        self.net = NETS[settings.net](**settings.options)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss."""
        return self.net(batch)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Take the channel away that is to be pruned before this step."""
        prune = self.settings.prune
        if prune is not None and self.trainer.global_step == prune[0]:
            with torch.no_grad():
                self.net.gate[prune[1]] = 0

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Make the step, and shrink the gates."""
        super().optimizer_step(*args, **kwargs)
        if self.settings.shrink:
            with torch.no_grad():
                gate = self.net.gate
                gate.copy_(gate.sign() * (gate.abs() - self.settings.shrink).clamp(min=0))

    def configure_optimizers(self) -> Any:
        """Of the settings, with a schedule for each step."""
        s = self.settings
        groups: dict[float, list[nn.Parameter]] = {1.0: []}
        for name, parameter in self.net.named_parameters():
            factor = next((factor for part, factor in s.rates.items() if part in name), 1.0)
            groups.setdefault(factor, []).append(parameter)
        params = [{"params": some, "lr": s.lr * factor} for factor, some in groups.items() if some]
        own = {"momentum": 0.9, **s.own} if s.optimizer == "sgd" else {**s.own}
        kinds: dict[str, Any] = {
            "sgd": torch.optim.SGD,
            "adam": torch.optim.Adam,
            "adamw": torch.optim.AdamW,
            "rmsprop": torch.optim.RMSprop,
            "nadam": torch.optim.NAdam,
            "adagrad": torch.optim.Adagrad,
            "adamax": torch.optim.Adamax,
            "radam": torch.optim.RAdam,
        }
        optimizer = kinds[s.optimizer](params, lr=s.lr, **own)

        def factor_at(step: int) -> float:
            warm = min(1.0, (step + 1) / (s.warm_up + 1))
            falls = 0.55 + 0.45 * math.cos(math.pi * min(1.0, step / s.cosine)) if s.cosine else 1.0
            falls *= 0.5 ** (step // s.stairs) if s.stairs else 1.0
            return warm * falls * s.rise**step * (s.jump[1] if s.jump is not None and step >= s.jump[0] else 1.0)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor_at)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def batches(s: Settings) -> list[Batch]:
    """The micro-batches of a run, in their order, poison included."""
    g = torch.Generator().manual_seed(1000 + s.seed)
    made: list[Batch] = []
    for index in range(s.steps * s.accumulation):
        step, micro = divmod(index, s.accumulation)
        batch = NETS[s.net].samples(s.batch, g)
        first = next((i for i, x in enumerate(batch) if x.is_floating_point()), 0)
        batch = tuple(x * s.drift**step if i == first and s.drift != 1 else x for i, x in enumerate(batch))
        for kind, at, rows, value in s.poison:
            if at == step and micro == s.accumulation - 1:
                batch = poisoned(batch, kind, rows, value, NETS[s.net], g)
        made.append(batch)
    return made


class Ends(Callback):
    """Ends a run some steps after its alarm, and notes the losses of steps."""

    def __init__(self, divergence: Divergence, goes_on: bool) -> None:
        self.divergence, self.goes_on = divergence, goes_on
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        """Note the loss; end the run some steps after its alarm."""
        self.losses.append(float(outputs["loss"]) * trainer.accumulate_grad_batches)
        step = self.divergence.step
        if step is not None and not self.goes_on and trainer.global_step > step + AFTER:
            trainer.should_stop = True


def quiet() -> None:
    """One thread, and no lines of the Trainer."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)


def trainer_of(s: Settings, folder: Path | str, callbacks: list[Any]) -> pl.Trainer:
    """The Trainer of a run, and of its replay."""
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=s.steps,
        max_epochs=-1,
        accumulate_grad_batches=s.accumulation,
        gradient_clip_val=s.clip,
        gradient_clip_algorithm=s.clip_by,
        precision=s.precision,
        callbacks=callbacks,
        logger=CSVLogger(folder, name="", version=""),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )


def fit(s: Settings, folder: Path, goes_on: bool = False) -> dict[str, Any]:
    """Train; what came of it: step and rule of the first alarm, the error, the losses, and the capsules' folders."""
    quiet()
    rules = RULES[s.rules]
    divergence = Divergence() if rules is None else Divergence(rules=rules())
    ends = Ends(divergence, goes_on)
    trainer = trainer_of(s, folder, [GradientNorm(), divergence, Flip(s.flip, s.accumulation), ends])
    error = None
    try:
        trainer.fit(Task(s), DataLoader(batches(s), batch_size=None))  # type: ignore[arg-type]
    except (IndexError, RuntimeError) as raised:
        error = f"{type(raised).__name__}: {raised}"
    capsules = sorted(str(path.relative_to(folder)) for path in folder.glob("capsules/*") if path.is_dir())
    made = trainer.global_step
    return {
        "alarm": divergence.step,
        "rule": divergence._judge.rule,
        "error": error,
        "steps": made,
        "losses": ends.losses,
        "capsules": capsules,
    }
