"""Whole scripts that know nothing of normzoo, where Lightning finds the package's metadata as in an installation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from plugin_small import PROJECT, write_metadata
from ranks import ENVIRONMENT, start_script

from normzoo import load_run

# The module of Lightning's own introduction, on random images
MODULE = """
import os, sys, torch, torch.nn.functional as F
sys.path.insert(0, os.environ["METADATA"])
import lightning as L
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class LitAutoEncoder(L.LightningModule):
    def __init__(self, lr: float = 1e-3):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(28 * 28, 16), nn.ReLU(), nn.Linear(16, 3))
        self.decoder = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 28 * 28))
        self.lr = lr

    def training_step(self, batch, batch_idx):
        x = batch[0].flatten(1)
        loss = F.mse_loss(self.decoder(self.encoder(x)), x)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)

    def train_dataloader(self):
        images = torch.randn(64, 28, 28, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(images), batch_size=8)
"""
TRAIN = (
    MODULE
    + """
L.seed_everything(1)

def trainer(epochs):
    return L.Trainer(max_epochs=epochs, accelerator="cpu", logger=L.pytorch.loggers.CSVLogger("."), log_every_n_steps=1)

first = trainer(1)
first.fit(LitAutoEncoder())
torch.save([p.detach() for p in first.lightning_module.parameters()], "weights.pt")
trainer(2).fit(LitAutoEncoder(), ckpt_path="last.ckpt" if os.path.exists("last.ckpt") else None)
first.save_checkpoint("last.ckpt")
"""
)
CLI = (
    MODULE
    + """
from lightning.pytorch.cli import LightningCLI
LightningCLI(LitAutoEncoder)
"""
)
# Processes that import everything anew: of the script's own, and those of a strategy
SPAWNS = (
    MODULE
    + """
def train(name, **options):
    options = {"accelerator": "cpu", "max_epochs": 1, "logger": L.pytorch.loggers.CSVLogger(name), **options}
    L.Trainer(enable_progress_bar=False, **options).fit(LitAutoEncoder())

if __name__ == "__main__":
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=train, args=(name,)) for name in ("a", "b")]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    train("spawned", strategy="ddp_spawn", devices=2)
"""
)
UNSET = (
    MODULE
    + """
trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
print(sorted(name for name in sys.modules if name.split(".")[0] == "normzoo"), len(trainer.callbacks))
"""
)


@pytest.fixture
def metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = write_metadata(tmp_path / "metadata")
    monkeypatch.setenv("METADATA", str(folder))
    monkeypatch.delenv("NORMZOO", raising=False)
    return folder


def run(folder: Path, script: str, *arguments: str) -> str:
    """The output of a script that ends well."""
    process = start_script(folder, script, *arguments)
    process.wait(60)
    return process.output


def test_a_script_is_measured_without_a_change(metadata: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two Trainers, of which the second resumes the first when the script is run again in another process."""
    run(tmp_path / "plain", TRAIN)
    monkeypatch.setenv("NORMZOO", "gradient_tails:every_n_steps=3,divergence")
    folder = tmp_path / "measured"
    for _ in range(2):
        output = run(folder, TRAIN)
        assert "NORMZOO measures gradient_tails, divergence; normzoo report " in output
    assert all(map(torch.equal, *(torch.load(tmp_path / f / "weights.pt") for f in ("plain", "measured"))))
    steps = [load_run(path)["gradient_tails"]["step"].unique().tolist() for path in sorted(folder.glob("*/version_*"))]
    assert steps == [[0, 3, 6], [0, 3, 6, 9, 12, 15], [0, 3, 6], [9, 12, 15]]
    states = torch.load(folder / "last.ckpt", weights_only=False)["callbacks"]
    assert "Divergence{'asked_by': 'NORMZOO'}" in states
    assert "callbacks used to create the checkpoint" not in output  # the resumed run has found them all


def test_a_malformed_value_stops_the_script_before_it_trains(
    metadata: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NORMZOO", "gradient_tials")
    process = start_script(tmp_path / "stopped", TRAIN)
    assert process.ended_with(60) == [2]
    assert "normzoo: NORMZOO: 'gradient_tials' is not a known measurement; did you mean" in process.output
    assert "Traceback" not in process.output
    assert not (tmp_path / "stopped" / "lightning_logs").exists()


def test_the_command_line_of_lightning(metadata: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORMZOO", "watch.yaml")
    folder = tmp_path / "cli"
    folder.mkdir()
    (folder / "watch.yaml").write_text("callbacks:\n- {name: gradient_norm, every_n_steps: 4}\n- divergence\n")
    logger = "--trainer.logger=lightning.pytorch.loggers.CSVLogger"
    run(
        folder, CLI, "fit", "--trainer.max_epochs=1", "--trainer.accelerator=cpu", logger, "--trainer.logger.save_dir=."
    )
    [version] = folder.glob("lightning_logs/version_*")
    assert (version / "config.yaml").exists()
    assert load_run(version)["gradient_norm"]["step"].unique().tolist() == [0, 4]


@pytest.mark.slow
def test_processes_that_are_spawned(metadata: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORMZOO", "gradient_tails:every_n_steps=3,divergence")
    (tmp_path / "spawns.py").write_text(SPAWNS)
    done = subprocess.run(
        [sys.executable, "spawns.py"],
        cwd=tmp_path,
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name, steps in (("a", [0, 3, 6]), ("b", [0, 3, 6]), ("spawned", [0, 3])):
        [version] = (tmp_path / name).glob("lightning_logs/version_*")
        assert load_run(version)["gradient_tails"]["step"].unique().tolist() == steps


@pytest.mark.slow
def test_a_script_without_the_variable_imports_two_small_modules(metadata: Path, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(UNSET)
    done = subprocess.run(
        [sys.executable, "train.py"],
        cwd=tmp_path,
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )
    assert done.stdout.splitlines()[-1].startswith("['normzoo', 'normzoo._variable', 'normzoo.plugin']")


def test_both_packages_of_lightning_are_served() -> None:
    factories = {group: [*points.values()] for group, points in PROJECT["entry-points"].items()}
    assert factories == {
        "lightning.pytorch.callbacks_factory": ["normzoo.plugin:trainer_callbacks"],
        "pytorch_lightning.callbacks_factory": ["normzoo.plugin:trainer_callbacks"],
        "lightning.fabric.callbacks_factory": ["normzoo.plugin:fabric_callbacks"],
        "lightning_fabric.callbacks_factory": ["normzoo.plugin:fabric_callbacks"],
    }
