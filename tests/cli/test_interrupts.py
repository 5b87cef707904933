"""Signals to real processes: the first one ends a run cleanly, the second one at once."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ranks import start_command

from normzoo.cli.main import main
from normzoo.report import load_runs

DEADLINE = 120  # seconds
RECIPE = """
model: {class_path: slow.Model}
data: {name: fashion_mnist, batch_size: 8}
trainer: {max_steps: 1000000, max_epochs: 100000, accelerator: cpu, log_every_n_steps: 1, num_sanity_val_steps: 0,
          enable_model_summary: false, enable_progress_bar: false, limit_val_batches: 0}
"""
MODEL = """
import os, pathlib, time
import lightning.pytorch as pl, torch
from torch import nn

class Model(pl.LightningModule):
    def __init__(self, hang: bool = False, in_setup: bool = False, in_validation: bool = False):
        super().__init__()
        self.net, self.hang, self.in_setup = nn.Linear(784, 10), hang, in_setup
        self.in_validation = in_validation
    def setup(self, stage):
        if self.in_setup and self.ready("setup"):
            while not pathlib.Path("signalled").exists():
                time.sleep(0.01)
    def training_step(self, batch, batch_idx):
        if self.global_step == 3:
            self.ready("step")
        if self.hang and self.global_step == 3:
            time.sleep(1000)  # a signal does not end it, as long as its handler raises nothing
        loss = nn.functional.cross_entropy(self.net(batch[0].flatten(1)), batch[1])
        self.log("train/step", float(self.global_step))
        return loss
    def validation_step(self, batch, batch_idx):
        if self.in_validation and not self.trainer.sanity_checking:
            self.ready("validation")
            time.sleep(0.1)
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
    def ready(self, what):
        during_the_run = self.global_rank == 0 and pathlib.Path("run").is_dir()  # not the step that is tried before it
        if during_the_run:
            pathlib.Path("ready." + what).touch()
        return during_the_run
"""


class Child:
    """``normzoo run`` as a process of its own, which leads a process group."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.folder = folder
        self._forks = start_command(folder, "run", "slow.yaml", "--out", "run", *overrides)
        [self.pid] = self._forks.pids
        self.kill = self._forks.kill

    def wait_for(self, name: str) -> None:
        end = time.monotonic() + DEADLINE
        while not (self.folder / name).exists():
            assert self._forks.running, self.output
            assert time.monotonic() < end, self.output
            time.sleep(0.02)

    def send(self, number: signal.Signals, group: bool = False) -> None:
        (os.killpg if group else os.kill)(self.pid, number)

    def end(self) -> int | None:
        end = time.monotonic() + DEADLINE
        while self._forks.running:
            assert time.monotonic() < end, f"the process did not end: {self.output}"
            time.sleep(0.02)
        return self._forks.codes[0]

    @property
    def output(self) -> str:
        return self._forks.output


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "slow", raising=False)
    (tmp_path / "slow.yaml").write_text(RECIPE)
    (tmp_path / "slow.py").write_text(MODEL)
    return tmp_path


@pytest.fixture
def children() -> Iterator[list[Child]]:
    started: list[Child] = []
    yield started
    for child in started:
        child.kill()


@pytest.mark.parametrize(("name", "code", "checkpoints"), [("SIGINT", 130, True), ("SIGHUP", 129, False)])
def test_the_first_signal_ends_the_run_after_its_batch(
    folder: Path, children: list[Child], name: str, code: int, checkpoints: bool
) -> None:
    child = Child(folder, f"trainer.enable_checkpointing={checkpoints}")
    children.append(child)
    child.wait_for("ready.step")
    child.send(getattr(signal, name))
    assert child.end() == code, child.output
    [run] = load_runs(folder / "run")
    assert (run.state, run.status["error"]) == ("interrupted", name)
    steps = run.curve("train/step")[0]
    assert steps == list(range(steps[-1] + 1))  # nothing logged is lost
    saved = [torch.load(path, weights_only=True)["global_step"] for path in (folder / "run").rglob("interrupted.ckpt")]
    assert saved == ([steps[-1] + 1] if checkpoints else [])
    assert (folder / "run" / "report.html").exists()
    assert "Traceback" not in child.output
    if name != "SIGHUP":  # which says that the terminal is gone
        assert f"normzoo: {name}: the run ends after the current batch" in child.output


def test_the_second_signal_ends_a_run_that_hangs_at_once(folder: Path, children: list[Child]) -> None:
    child = Child(folder, "model.hang=true")
    children.append(child)
    child.wait_for("ready.step")
    for _ in range(2):
        child.send(signal.SIGINT)
        time.sleep(0.2)  # signals of one kind that come at once are one
    assert child.end() == 130, child.output
    [run] = load_runs(folder / "run")
    assert (run.state, run.status["error"]) == ("interrupted", "SIGINT")
    assert not (folder / "run" / "report.html").exists()


def test_a_signal_before_the_first_batch_trains_none(folder: Path, children: list[Child]) -> None:
    child = Child(folder, "model.in_setup=true")
    children.append(child)
    child.wait_for("ready.setup")
    child.send(signal.SIGINT)
    (folder / "signalled").touch()
    assert child.end() == 130, child.output
    [run] = load_runs(folder / "run")
    assert (run.state, run.curve("train/step")[0]) == ("interrupted", [])


def test_a_signal_in_validation_saves_what_was_trained(folder: Path, children: list[Child]) -> None:
    child = Child(folder, "model.in_validation=true", "trainer.limit_val_batches=1.0", "trainer.limit_train_batches=5")
    children.append(child)
    child.wait_for("ready.validation")
    child.send(signal.SIGTERM)
    assert child.end() == 143, child.output
    [run] = load_runs(folder / "run")
    assert run.state == "interrupted"
    [saved] = (folder / "run").rglob("interrupted.ckpt")
    checkpoint = torch.load(saved, weights_only=True)
    assert checkpoint["global_step"] == 5  # none of the next epoch
    assert checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]["current"]["ready"] > 0


@pytest.mark.parametrize("group", [True, False], ids=["from the terminal", "to the parent only"])
def test_all_ranks_end_after_the_same_batch(folder: Path, children: list[Child], group: bool) -> None:
    child = Child(folder, "trainer.devices=2", "trainer.strategy=ddp_fork")
    children.append(child)
    child.wait_for("ready.step")
    child.send(signal.SIGINT if group else signal.SIGTERM, group)
    assert child.end() == (130 if group else 143), child.output
    [run] = load_runs(folder / "run")
    assert run.state == "interrupted"
    assert (folder / "run" / "metrics" / "checkpoints" / "interrupted.ckpt").exists()
    with pytest.raises(ProcessLookupError):
        os.killpg(child.pid, 0)


def test_handlers_are_put_back(folder: Path) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert main(["run", "slow.yaml", "trainer.max_steps=1", "--out", "run"]) == 0
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    assert wakeup == -1
