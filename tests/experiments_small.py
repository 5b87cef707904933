"""Small experiments that are no training runs, of which some are not right."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning.pytorch import LightningDataModule, LightningModule, seed_everything
from torch import Tensor, nn

from normzoo.data import FashionMNIST
from normzoo.data._module import Split
from normzoo.experiments import Column, Experiment, Figure


class Draws(Experiment):
    """Sums of random numbers from all global streams; and at one part what a test asks for."""

    name = "draws"
    row = "the sum of some draws"
    columns = (
        Column("size", "int", "how many numbers are drawn"),
        Column("total", "float", "their sum"),
        Column("shared", "float", "a number that all parts share"),
        Column("curve", "curve", "the numbers"),
    )
    figures = (Figure("Sums of draws", "line", x="size", y="total"),)

    def __init__(self, sizes: Sequence[int] = (1, 2, 3), at: int = -1, what: str = "", seed: int = 0) -> None:
        super().__init__(seed)
        self.sizes, self.at, self.what = sizes, at, what

    def parts(self) -> list[dict[str, Any]]:
        return [{"size": size} for size in self.sizes]

    def prepare(self) -> None:
        self.shared = float(torch.rand(()))

    def rows(self, part: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        if part["size"] == self.at:
            self._interfere()
        for _ in range(2):
            numbers = torch.randn(part["size"]).double().numpy() + np.random.randn() + random.random()
            yield {"size": part["size"], "total": float(numbers.sum()), "shared": self.shared, "curve": numbers}

    def _interfere(self) -> None:
        if self.what == "fails":
            raise RuntimeError("this part fails")
        if self.what in ("SIGINT", "SIGTERM", "waits"):
            Path("waiting").touch()
            if self.what != "waits":
                os.kill(os.getpid(), getattr(signal, self.what))
            while not _noticed():
                time.sleep(0.01)
        once = Path("killed")
        if self.what == "SIGKILL" and not once.exists():
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def _noticed() -> bool:
    """Whether the thread that reads signals has read one."""
    from normzoo.cli._interrupts import _received

    return _received()


class OfTask(Experiment):
    """Looks at data and a task, neither of which is trained."""

    name = "of_task"
    row = "a batch"
    columns = (Column("loss", "float", "the loss of a batch"),)

    def __init__(self, task: LightningModule, data: LightningDataModule, batches: int, **more: Any) -> None:
        super().__init__(**more)
        self.task, self.data, self.batches = task, data, batches

    def parts(self) -> list[dict[str, Any]]:
        return [{"batch": i} for i in range(self.batches)]

    def rows(self, part: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        self.data.setup("test")
        batches = iter(self.data.test_dataloader())
        x, y = [next(batches) for _ in range(part["batch"] + 1)][-1]
        self.task.eval()
        with torch.no_grad():
            yield {"loss": float(torch.nn.functional.cross_entropy(self.task(x), y))}


class OfTaskOrNone(OfTask):
    """Looks at data, and at a task if it is given one."""

    name = "of_task_or_none"

    def __init__(self, data: LightningDataModule, task: LightningModule | None = None, batches: int = 1) -> None:
        super().__init__(task or SmallTask(), data, batches)


class Forgetful(Draws):
    """Rows that depend on which parts were made before, against what an experiment promises."""

    name = "forgetful"

    def prepare(self) -> None:
        super().prepare()
        self.made = 0

    def rows(self, part: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        self.made += 1
        yield from ({**row, "total": row["total"] + self.made} for row in super().rows(part))


class WrongColumns(Draws):
    name = "wrong_columns"

    def rows(self, part: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        yield {"size": 1}


class Nameless(Experiment):
    def parts(self) -> list[dict[str, Any]]:
        return [{}]


class NoParts(Draws):
    name = "no_parts"

    def parts(self) -> list[Any]:
        return []


class BadParts(Draws):
    name = "bad_parts"

    def parts(self) -> list[Any]:
        return [1, 2]


class FailingParts(Draws):
    name = "failing_parts"

    def parts(self) -> list[Any]:
        raise KeyError("sizes")


def record_of(experiment: Experiment) -> pd.DataFrame:
    """All rows of an experiment, made as a run makes them."""
    from normzoo.cli._experiment import Planned, rows_of

    planned = Planned(experiment, [*experiment.parts()], experiment.seed)
    seed_everything(experiment.seed, workers=True, verbose=False)
    experiment.prepare()
    return pd.DataFrame([row for number in range(len(planned.parts)) for row in rows_of(planned, number)])


class FewImages(FashionMNIST):
    """The embedded images, of which the first are tested on."""

    def __init__(self, test_images: int = 64, batch_size: int = 32, seed: int = 0) -> None:
        super().__init__(batch_size=batch_size, augment=False, seed=seed)
        self.test_images = test_images

    def load(self, split: str) -> Split:
        images, labels = super().load(split)
        return (images[: self.test_images], labels[: self.test_images]) if split == "test" else (images, labels)


class SmallTask(LightningModule):
    """Two convolutions, with batch normalization or without, and its optimizer."""

    def __init__(self, norm: bool = True, lr: float = 0.1, width: int = 8) -> None:
        super().__init__()
        self.lr = lr
        widths = (1, width, 2 * width)
        blocks = []
        for narrow, wide in itertools.pairwise(widths):
            blocks += [nn.Conv2d(narrow, wide, 3, stride=2, padding=1, bias=not norm)]
            blocks += [nn.BatchNorm2d(wide)] if norm else []
            blocks += [nn.ReLU()]
        self.net = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8 * width, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
