"""What only training shows is found before a run: one step on random images, without effect on anything else."""

from __future__ import annotations

import os
import random
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from PIL import Image

from normzoo.cli.main import main
from normzoo.cli.recipe import read
from normzoo.cli.rehearse import MAX_PARAMETERS, rehearse

SMALL = """
model: {arch: resnet20_cifar, norm: batch}
data: {name: fashion_mnist, batch_size: 16}
optimizer: {name: sgd, lr: 0.05}
trainer: {max_steps: 3, accelerator: cpu}
"""
OWN = """
import lightning.pytorch as pl
import torch
from torch import nn
from normzoo.data import FashionMNIST

class Model(pl.LightningModule):
    def __init__(self, needs: int = 0, size: int = 784, where: str = ""):
        super().__init__()
        self.net = nn.Linear(size, 10)
        self.needs, self.where = needs, where
    def training_step(self, batch, batch_idx):
        if len(batch[0]) < self.needs:
            raise ValueError(f"needs {self.needs} images, not {len(batch[0])}")
        if self.where == "train":
            raise RuntimeError("two\\nlines \\x1b[31m")
        return nn.functional.cross_entropy(self.net(batch[0].flatten(1)), batch[1])
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

class Schedule(Model):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        steps = self.trainer.estimated_stepping_batches
        assert steps == 40, steps
        rule = lambda step: (steps - step) / (steps - 2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

class Skips(Model):
    def training_step(self, batch, batch_idx):
        assert batch_idx < 4
        return None

class Halves(FashionMNIST):
    def load(self, split):
        images, labels = super().load(split)
        return images[..., :14, :14], labels

class Big(Model):
    def __init__(self):
        super().__init__()
        with torch.device("meta"):
            self.big = nn.Linear(20_000, 20_000)

class Data(pl.LightningDataModule):
    def setup(self, stage):
        raise AssertionError("loaded")

class Raises(pl.Callback):
    def __init__(self, early: bool = True):
        self.early = early
    def on_fit_start(self, *args):
        if self.early:
            raise RuntimeError("of a callback")
    def on_train_epoch_end(self, *args):
        raise SystemExit("of a callback")

class OwnFinder(pl.callbacks.LearningRateFinder):
    def on_fit_start(self, *args):
        raise AssertionError("run")

class Nosy(pl.Callback):
    seen: list = []
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append((tuple(batch[0].shape), batch[0].dtype, batch[1].dtype, trainer.global_step))
    def on_validation_batch_end(self, trainer, *args):
        self.seen.append("validation")
    def on_train_epoch_end(self, trainer, pl_module):
        self.seen.append("epoch")
"""
OWN_MODEL = ["model={class_path: rehearsed_parts.Model}", "optimizer=null"]

FAILS = {
    "accumulation": (["trainer.accumulate_grad_batches=0"], ["trainer.accumulate_grad_batches", "at least 1, not 0"]),
    "interval of validation": (["trainer.val_check_interval=0"], ["trainer.val_check_interval", "above 0, not 0"]),
    "more devices than there can be": (["trainer.devices=2147483648"], ["trainer.devices", "at most 9999"]),
    "barebones": (["trainer.barebones=true"], ["trainer.barebones"]),
    "image size": (["model={arch: vit_tiny_patch16_224}"], ["model: a training step on 16 random images of 1x28x28"]),
    "batch too large": (["data.batch_size=6001"], ["data", "6000 images", "6001"]),
    "batches of ranks": (["trainer.devices=2", "data.batch_size=3001"], ["data", "2 ranks with batches of 3001"]),
    "validation beyond the epoch": (["trainer.val_check_interval=376"], ["trainer", "(376)", "batches (375)"]),
    "no batches": (["trainer.limit_train_batches=0"], ["trainer: no training step", "limit_train_batches: 0"]),
    "part of a batch": (["trainer.limit_train_batches=0.001"], ["trainer", "0.001"]),
    "no epochs": (["trainer.max_epochs=0"], ["trainer: no training step", "max_epochs: 0"]),
    "no steps": (["trainer.max_steps=0"], ["trainer: no training step", "max_steps: 0"]),
    "no parameters": (
        ["callbacks=[lr_monitor, {name: gradient_tails, parameters: nothing}]"],
        ["callbacks[1]", "nothing"],
    ),
    "no sites": (["callbacks=[{name: channel_moments, sites: nothing}]"], ["callbacks[0]", "'nothing'"]),
    "one gradient": (["callbacks=[gradient_noise]"], ["callbacks[0]: GradientNoise", "split=2"]),
    "metric to stop on": (["callbacks=[{name: early_stopping, monitor: x}]"], ["callbacks[0]", "`x`", "train/loss"]),
    "metric of checkpoints": (["callbacks=[{name: model_checkpoint, monitor: x}]"], ["callbacks[0]", "'x'"]),
    "no checkpoints": (
        ["callbacks=[model_checkpoint]", "trainer.enable_checkpointing=false"],
        ["trainer", "`enable_checkpointing=False`"],
    ),
    "one value for each channel": (
        ["model.arch=resnet18", "data.batch_size=1"],
        ["model", "on 1 random images", "more than one value per channel"],
    ),
    "sparse": (["optimizer={class_path: torch.optim.SparseAdam}"], ["optimizer", "dense gradients"]),
    "device": (["trainer.accelerator=hpu"], ["trainer: "]),
    "precision": (["trainer.precision=transformer-engine"], ["trainer", "transformer_engine"]),
    "clipping": (
        ["trainer.gradient_clip_val=1", "trainer.gradient_clip_algorithm=x"],
        ["trainer", "`gradient_clip_algorithm` x"],
    ),
    "two alike": (["callbacks=[divergence, {name: divergence, strict: true}]"], ["callbacks[0]", "label"]),
    "one folder": (
        ["callbacks=[{name: divergence, dirpath: a}, {name: divergence, dirpath: a, strict: true}]"],
        ["label"],
    ),
    "no training step": (
        ["model={class_path: lightning.pytorch.LightningModule}", "optimizer=null"],
        ["trainer", "`training_step()`"],
    ),
    "own model": (
        ["model={class_path: rehearsed_parts.Model, init_args: {where: train}}", "optimizer=null"],
        ["model: a training step on 16 random images", r"RuntimeError: two lines \x1b[31m"],
    ),
    "own size": (["model={class_path: rehearsed_parts.Model, init_args: {size: 3}}", "optimizer=null"], ["model", "3"]),
    "own callback": (
        [*OWN_MODEL, "callbacks=[divergence, {class_path: rehearsed_parts.Raises}]"],
        ["callbacks[1]: RuntimeError: of a callback"],
    ),
    "callback that exits": (
        [
            *OWN_MODEL,
            "callbacks=[{class_path: rehearsed_parts.Raises, init_args: {early: false}}]",
        ],
        ["callbacks[0]", "SystemExit: of a callback"],
    ),
    "one class": (["data={name: image_folder, root: one, batch_size: 1}"], ["data", "one class only, 'cat'"]),
    "classes without images": (["data={name: image_folder, root: hollow, batch_size: 1}"], ["data", "one class only"]),
    "other images": (["data={name: cifar10, root: many, batch_size: 1}"], ["data", "11 class folders", "has ten"]),
}
DIVERGES = (
    "callbacks=[{{name: divergence, action: {{class_path: normzoo.callbacks.{}}}, "
    "rules: [{{class_path: normzoo.callbacks.LossAbove, init_args: {{threshold: 1e-9}}}}]}}]"
)
WORKS = {
    "all measurements": [
        "callbacks=[lr_monitor, channel_moments, gradient_tails, relative_loss, divergence, "
        "{name: gradient_noise, split: 8}]",
        "lr_scheduler={name: step, step_size: 1}",
    ],
    "metrics of training and test": [
        "callbacks=[{name: early_stopping, monitor: test/loss}, {name: model_checkpoint, monitor: train/loss}]"
    ],
    "no validation": ["trainer.limit_val_batches=0", *OWN_MODEL],
    "no bar": ["trainer.enable_progress_bar=false", *OWN_MODEL],
    "own bar and summary": [
        "callbacks=[{class_path: lightning.pytorch.callbacks.TQDMProgressBar}, "
        "{class_path: lightning.pytorch.callbacks.RichModelSummary}]",
        *OWN_MODEL,
    ],
    "two of one class": ["callbacks=[divergence, {name: divergence, label: low}]", *OWN_MODEL],
    "a divergence that stops": [DIVERGES.format("Stop"), *OWN_MODEL],
    "a divergence that raises": [DIVERGES.format("Raise"), *OWN_MODEL],
    "two folders": ["callbacks=[{name: divergence, dirpath: a}, {name: divergence, dirpath: b}]", *OWN_MODEL],
    "schedule over the whole run": [
        "model={class_path: rehearsed_parts.Schedule}",
        "optimizer=null",
        "trainer.max_steps=-1",
        "trainer.max_epochs=4",
        "trainer.limit_train_batches=10",
    ],
    "no loss": ["model={class_path: rehearsed_parts.Skips}", "optimizer=null", "trainer.max_epochs=-1"],
    "gradients of ranks": ["callbacks=[gradient_noise]", "trainer.devices=2", *OWN_MODEL],
    "validation now and then": ["trainer.check_val_every_n_epoch=5", *OWN_MODEL],
    "development run": ["trainer.fast_dev_run=true", *OWN_MODEL],
    "half precision": ["trainer.precision=bf16-mixed", *OWN_MODEL],
    "more epochs at least": ["trainer.min_epochs=5", *OWN_MODEL],
    "without end": ["trainer.max_epochs=-1", "trainer.max_steps=-1", *OWN_MODEL],
    "many micro-batches": ["trainer.accumulate_grad_batches=100", *OWN_MODEL, "callbacks=[gradient_noise]"],
    "all images at once": ["data.batch_size=6000", *OWN_MODEL],
    "a step of many images": [
        "model={class_path: rehearsed_parts.Model, init_args: {needs: 100}}",
        "optimizer=null",
        "data.batch_size=100",
    ],
    "classes of one's own": [
        "data={name: image_folder, root: two, image_size: 28, mode: L, batch_size: 1}",
        *OWN_MODEL,
    ],
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "rehearsed_parts", raising=False)
    (tmp_path / "small.yaml").write_text(SMALL)
    (tmp_path / "rehearsed_parts.py").write_text(OWN)
    names = {"one": ["cat"], "two": ["cat", "dog"], "many": list("abcdefghijk"), "hollow": ["cat"]}
    for path in [f"{root}/{split}/{n}" for root, ns in names.items() for split in ("train", "test") for n in ns]:
        (tmp_path / path).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / path / "0.png")
    (tmp_path / "hollow" / "train" / "dog").mkdir()
    return tmp_path


def files(folder: Path) -> list[str]:
    return sorted(str(p) for p in folder.rglob("*") if "__pycache__" not in p.parts)


@pytest.mark.parametrize("case", FAILS)
def test_what_a_run_would_stumble_over(case: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(folder)
    overrides, expected = FAILS[case]
    assert main(["validate", "small.yaml", *overrides]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1, error
    assert len(error) <= 300
    for part in expected:
        assert part in error
    assert files(folder) == before


@pytest.mark.parametrize("command", ["run", "sweep"])
def test_nothing_is_written_before_the_step(command: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(folder)
    model = "model={class_path: rehearsed_parts.Model, init_args: {where: train}}"
    assert main([command, "small.yaml", model, "optimizer=null", "sweep.seed=[1, 2]"]) == 2
    assert "RuntimeError: two lines" in capsys.readouterr().err
    assert files(folder) == before


@pytest.mark.parametrize("case", WORKS)
def test_what_trains_is_valid(case: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "small.yaml", *WORKS[case]]) == 0
    out, err = capsys.readouterr()
    assert (out, err) == ("small.yaml: valid\n", "")


def test_the_step_is_that_of_the_data_and_all_hooks_are_called(folder: Path) -> None:
    callback = "callbacks=[{class_path: rehearsed_parts.Nosy}]"
    assert main(["validate", "small.yaml", "trainer.accumulate_grad_batches=7", callback]) == 0
    seen = sys.modules["rehearsed_parts"].Nosy.seen
    assert seen == [
        ((4, 1, 28, 28), torch.float32, torch.int64, 0),
        ((4, 1, 28, 28), torch.float32, torch.int64, 1),
        "validation",
        "epoch",
    ]


def test_nothing_else_is_changed(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path_factory.mktemp("scratch")
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS", "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    before = files(folder)
    recipe = read(
        "small.yaml",
        [
            "trainer.deterministic=true",
            "trainer.benchmark=true",
            "callbacks=[{name: model_checkpoint, dirpath: mine}, {name: gradient_tails, dirpath: mine}]",
        ],
    )

    def state() -> list[object]:
        return [
            torch.get_rng_state().tolist(),
            random.getstate(),
            np.random.get_state()[1].tolist(),  # type: ignore[index]
            dict(os.environ),
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.cudnn.benchmark,
            warnings.filters[:],
            os.getcwd(),
        ]

    environment = dict(os.environ)
    rehearse(recipe.config, recipe.source)  # sets what Lightning sets once in each process
    assert dict(os.environ) == environment
    for config in (recipe.config, {**recipe.config, "optimizer": {"class_path": "torch.optim.SparseAdam"}}):
        torch.manual_seed(5), random.seed(5), np.random.seed(5)
        was = state()
        try:
            rehearse(config, recipe.source)
        except ValueError:
            assert config is not recipe.config
        else:
            assert config is recipe.config
        assert state() == was
    assert files(folder) == before
    assert files(scratch) == []


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["data={class_path: rehearsed_parts.Data}"], "Data does not tell the shape of its data"),
        (["data={class_path: rehearsed_parts.Halves}"], "Halves does not tell the shape of its data"),
        (["model={class_path: rehearsed_parts.Big}", "optimizer=null"], "parameters"),
        (["data={name: image_folder, root: two, image_size: 9999}", "model.in_chans=3"], "images of 3x9999x9999"),
        (["trainer.devices=2", "trainer.strategy=ddp_fork"], "forked"),
    ],
)
def test_what_cannot_be_tried_is_said(
    overrides: list[str], why: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert MAX_PARAMETERS < 20_000**2
    assert main(["validate", "small.yaml", *overrides]) == 0
    error = capsys.readouterr().err
    assert error.startswith("small.yaml: no training step was tried: ")
    assert why in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("asked", ["16-mixed", "16"])
def test_a_precision_that_the_machine_has_not_is_said(
    asked: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["validate", "small.yaml", f"trainer.precision={asked}", *OWN_MODEL]) == 0
    assert capsys.readouterr().err == (
        f"small.yaml: trainer.precision: this machine has no {asked}, and Lightning trains with bf16-mixed\n"
    )


def test_finders_of_batch_size_and_learning_rate_are_made_and_not_run(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    for finder, method in ((BatchSizeFinder, "scale_batch_size"), (LearningRateFinder, "lr_find")):
        monkeypatch.setattr(finder, method, lambda self, *_: ran.append(type(self).__name__))
        finder().on_fit_start(None, None)
    assert ran == ["BatchSizeFinder", "LearningRateFinder"]  # what a fit with them would do
    ran.clear()
    own = "{class_path: rehearsed_parts.OwnFinder}, {class_path: rehearsed_parts.Nosy}"
    lightnings = ", ".join(
        f"{{class_path: lightning.pytorch.callbacks.{c}}}" for c in ("BatchSizeFinder", "LearningRateFinder")
    )
    assert main(["validate", "small.yaml", *OWN_MODEL, f"callbacks=[{own}, {lightnings}]"]) == 0
    assert ran == []
    assert "epoch" in sys.modules["rehearsed_parts"].Nosy.seen  # the other callbacks are
    assert capsys.readouterr().err.splitlines() == [
        f"small.yaml: callbacks[{i}]: {name} was not tried, as it trains many steps of its own"
        for i, name in ((0, "OwnFinder"), (2, "BatchSizeFinder"), (3, "LearningRateFinder"))
    ]


def test_options_of_a_finder_are_checked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finder = "{class_path: lightning.pytorch.callbacks.BatchSizeFinder, init_args: {mod: power}}"
    assert main(["validate", "small.yaml", *OWN_MODEL, f"callbacks=[{finder}]"]) == 2
    assert "callbacks[0].mod" in capsys.readouterr().err


def test_data_to_be_downloaded_is_not(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    for name in ("CIFAR10", "FashionMNIST"):
        monkeypatch.setattr(getattr(datasets, name), "download", lambda self: pytest.fail("downloaded"))
    model = ["model={class_path: rehearsed_parts.Model}", "optimizer=null"]
    assert main(["validate", "small.yaml", "data={name: fashion_mnist, root: x, download: true}", *model]) == 0
    model = ["model={class_path: rehearsed_parts.Model, init_args: {size: 3072}}", "optimizer=null"]
    assert main(["validate", "small.yaml", "data={name: cifar10, root: x, download: true}", *model]) == 0
    assert not (folder / "x").exists()
