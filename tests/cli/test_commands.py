"""Each command, as a user types it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas.testing
import pytest
import yaml
from ranks import Forks, run_ranks, start_command
from sweeps import few

from normzoo.cli.main import main
from normzoo.report import load_runs

DEADLINE = 150  # seconds
SMALL = """
seed: 3
model: {arch: resnet20_cifar, norm: batch}
data: {name: fashion_mnist, batch_size: 4}
optimizer: {name: sgd, lr: 0.05}
trainer: {max_steps: 3, accelerator: cpu, log_every_n_steps: 1, limit_val_batches: 1, num_sanity_val_steps: 0,
          val_check_interval: 3, enable_checkpointing: false, enable_model_summary: false}
callbacks: [{name: gradient_tails, every_n_steps: 1}, {name: relative_loss, every_n_steps: 3}, divergence]
"""
STOP = (
    "callbacks=[{name: divergence, rules: [{class_path: normzoo.callbacks.LossAbove, init_args: {threshold: 500}},"
    " {class_path: normzoo.callbacks.LossSpike}],"
    " action: {class_path: normzoo.callbacks.Stop, init_args: {exit_code: 7}}}]"
)
OWN = """
import lightning.pytorch as pl
import torch
from torch import nn

class Norm(nn.Module):
    def __init__(self, num_features, *, factor=1.0, device=None, dtype=None):
        super().__init__()
        self.factor = factor
    def forward(self, x):
        return x * self.factor

class Raises(pl.Callback):
    def __init__(self, at: int = 1):
        self.at = at
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.at and pl_module.wide:
            raise RuntimeError("from the user's callback")

class Model(pl.LightningModule):
    def __init__(self, width: int = 4):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(784, width), nn.ReLU(), nn.Linear(width, 10))
        self.wide = width == 5
    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "small.yaml").write_text(SMALL)
    (tmp_path / "own_parts.py").write_text(OWN)
    return tmp_path


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing a report takes longer than the run, for tests that look only at what the run left."""
    monkeypatch.setattr("normzoo.cli.report.try_report", lambda folder, code: code)


def test_run_leaves_a_folder_that_can_be_read_and_run_again(folder: Path, request: pytest.FixtureRequest) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main(["run", "small.yaml", "--out", "first", "optimizer.lr=0.01"]) == 0
    names = {str(p.relative_to(folder / "first")) for p in (folder / "first").rglob("*") if p.is_file()}
    assert {
        "recipe.yaml",
        "environment.json",
        "status.json",
        "report.html",
        "metrics/metrics.csv",
        "metrics/gradient_tails-000.arrows",
        "metrics/relative_loss-000.arrows",
    } <= names
    recipe = yaml.safe_load((folder / "first" / "recipe.yaml").read_text())
    assert recipe["optimizer"]["lr"] == 0.01
    environment = json.loads((folder / "first" / "environment.json").read_text())
    assert {"torch", "lightning", "timm"} <= set(environment["packages"])
    assert set(environment["git"]) == {"commit", "dirty"}
    [run] = load_runs(folder / "first")
    assert (run.state, run.diverged_at, run.watched) == ("finished", None, True)
    assert run.curve("train/loss")[0] == [0, 1, 2]
    assert {*run.record("gradient_tails")["step"]} == {0, 1, 2}
    events = EventAccumulator(str(folder / "first" / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {"train/loss", "relative_loss/headroom"} < set(tags)

    request.getfixturevalue("no_report")
    assert main(["run", "first/recipe.yaml", "--out", "second"]) == 0
    [again] = load_runs(folder / "second")
    assert again.curve("train/loss") == run.curve("train/loss")
    assert again.curve("test/accuracy") == run.curve("test/accuracy")
    for quantity, frame in run.records.items():
        pandas.testing.assert_frame_equal(again.record(quantity), frame)
    assert "NORMZOO_RUN_FOLDER" not in os.environ


@pytest.mark.usefixtures("no_report")
@pytest.mark.slow
def test_a_recipe_samples_on_a_schedule(folder: Path) -> None:
    schedule = "{class_path: normzoo.callbacks.Warmup, init_args: {start: 2}}"
    assert main(["run", "small.yaml", f"callbacks.relative_loss.every_n_steps={schedule}", "--out", "run"]) == 0
    [run] = load_runs(folder / "run")
    assert run.record("relative_loss")["step"].tolist() == [2]
    assert main(["run", "run/recipe.yaml", "--out", "again"]) == 0


def diverging(strategy: str = "") -> list[str]:
    """Arguments of a run that diverges at step 1."""
    ranks = ["trainer.devices=2", f"trainer.strategy={strategy}"] if strategy else []
    return [
        "run",
        "small.yaml",
        "model.norm=none",
        "optimizer.lr=1e6",
        "trainer.max_steps=9",
        STOP,
        *ranks,
        "--out",
        "run",
    ]


def test_a_run_that_diverges_ends_with_the_code_of_stop(folder: Path) -> None:
    assert main(diverging()) == 7
    [run] = load_runs(folder / "run")
    assert (run.state, run.diverged_at) == ("diverged", 1)
    assert run.status["error"].startswith("the run has diverged at step 1: the loss ")
    assert (folder / "run" / "metrics" / "diverged.ckpt").exists()
    assert '<tr class="diverged" ' in (folder / "run" / "report.html").read_text()
    assert len(run.curve("train/loss")[0]) < 9


@pytest.mark.slow
def test_ranks_that_a_launcher_has_started_end_a_run_that_diverges(folder: Path) -> None:
    forks = start_command(folder, *diverging("ddp_fork"))
    assert forks.ended_with(DEADLINE) == [7], forks.output
    [run] = load_runs(folder / "run")
    assert (run.state, run.diverged_at) == ("diverged", 1)
    assert run.status["error"].startswith("the run has diverged at step 1: ")


@pytest.mark.slow
def test_only_the_first_rank_ends_with_the_code_of_stop(folder: Path) -> None:
    """A launcher takes the failure of another one for a crash, and kills the first while it writes the report."""
    script = f"""
import os
from normzoo.cli.main import main
assert main({diverging("ddp")!r}) == (0 if int(os.environ["RANK"]) else 7)
"""
    run_ranks(folder, script, 2)
    [run] = load_runs(folder / "run")
    assert (run.state, run.diverged_at) == ("diverged", 1)


def test_a_sweep_reports_on_runs_that_diverge(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = "sweep={model.norm: [none], optimizer.lr: [0.0001, 1e6]}"
    assert main(["sweep", "small.yaml", grid, STOP, "trainer.max_steps=6", "--out", "sweep"]) == 0
    calm, wild = load_runs(folder / "sweep")
    assert calm.name == "01-norm=none,lr=0.0001"
    assert (calm.state, calm.diverged_at) == ("finished", None)
    assert (wild.state, wild.diverged_at) == ("diverged", 1)
    printed = capsys.readouterr().out
    assert "report: sweep/report.html" in printed
    assert "02-norm=none,lr=1000000.0" in (folder / "sweep" / "report.html").read_text()


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`")
def test_a_run_that_fails_does_not_stop_the_sweep(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [
        "model={class_path: own_parts.Model}",
        "optimizer=null",
        "callbacks=[{class_path: own_parts.Raises, init_args: {at: 2}}]",
        "sweep={model.width: [5, 6]}",
    ]
    assert main(["sweep", "small.yaml", *overrides, "--out", "sweep"]) == 1
    failed, finished = load_runs(folder / "sweep")
    assert (failed.state, finished.state) == ("failed", "finished")
    assert failed.status["error"] == "RuntimeError: from the user's callback"
    assert "from the user's callback" in (folder / "sweep" / "report.html").read_text().replace("&#x27;", "'")


@pytest.mark.usefixtures("no_report")
@pytest.mark.slow
def test_a_users_own_norm_trains_from_a_recipe(folder: Path) -> None:
    norm = "model.norm={class_path: own_parts.Norm, init_args: {factor: 0.5}}"
    callbacks = "callbacks=[{name: channel_moments, every_n_steps: 1, where: both}]"
    assert main(["run", "small.yaml", norm, callbacks, "--out", "own"]) == 0
    [run] = load_runs(folder / "own")
    record = run.record("channel_moments").set_index(["step", "where", "layer"])["variance"]
    assert len(record) == 3 * 2 * 19
    assert record[0, "output", "model.bn1"] == pytest.approx(0.25 * record[0, "input", "model.bn1"])
    assert main(["validate", "small.yaml", "model.norm={class_path: own_parts.Norm, init_args: {factr: 1}}"]) == 2


WEIGHT_NORMS = ("group+ws", "{name: group+ws, groups: 8}", "scaled_ws", "batch+scaled_ws")


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("norm", few(WEIGHT_NORMS, "group+ws"))
def test_weights_are_standardized_from_a_recipe(norm: str, folder: Path) -> None:
    overrides = [f"model.norm={norm}", "model.arch=resnet18", "trainer.max_steps=1", "callbacks=[]"]
    assert main(["validate", "small.yaml", *overrides]) == 0
    assert main(["run", "small.yaml", *overrides, "--out", "run"]) == 0
    [run] = load_runs(folder / "run")
    assert (run.state, len(run.curve("train/loss")[0])) == ("finished", 1)


@pytest.mark.usefixtures("no_report")
def test_run_folders_are_named_after_recipe_and_time(folder: Path) -> None:
    assert main(["run", "small.yaml", "--out=mine", "trainer.max_steps=1", "callbacks=[]"]) == 0
    assert (folder / "mine" / "recipe.yaml").exists()
    for _ in range(2):
        assert main(["run", "small.yaml", "trainer.max_steps=1", "callbacks=[]"]) == 0
    names = sorted(p.name for p in (folder / "runs").iterdir())
    assert len(names) == 2
    assert all(name.startswith("small-") for name in names)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["list"], ["list", "recipes"], ["list", "data"], ["show", "quickstart"]]
)
def test_light_commands_import_neither_torch_nor_lightning(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom normzoo.cli.main import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit:\n    pass\n"
        "sys.exit(' '.join({'torch', 'lightning', 'timm', 'matplotlib', 'pandas', 'pyarrow'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("what", ["norms", "models", "data", "callbacks", "optimizers", "lr_schedulers", "recipes"])
def test_list(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", what]) == 0
    expected = {"norms": "batch_renorm", "models": "resnet110_cifar", "data": "cifar10", "callbacks": "divergence",
                "optimizers": "adamw", "lr_schedulers": "cosine", "recipes": "quickstart"}[what]  # fmt: skip
    assert expected in capsys.readouterr().out


def test_experiments_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    from normzoo.names import SHORT_NAMES

    assert main(["list", "experiments"]) == 0
    listed = dict(line.split() for line in capsys.readouterr().out.splitlines()[1:])
    assert listed == SHORT_NAMES["experiment"]


def test_recipes_are_listed_by_prefix_with_their_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {
        "b_one": "# Is it b1?\n#\n# Time:   3 hours on a GPU\nseed: 1\n",
        "alone": "# Is it alone?\n# Command: normzoo run alone\n",
        "b_two_x": "# Is it b2?\n# Time: 1 minute\n# Time of day: x\n",
        "c_one": "seed: 1  # Time: 1 s\n",
    }
    monkeypatch.setattr("normzoo.cli.list.shipped", lambda: texts)
    assert main(["list", "recipes"]) == 0
    assert [re.split(r"  +", line.rstrip()) for line in capsys.readouterr().out.splitlines()] == [
        ["name", "question", "time"],
        ["alone", "Is it alone?", "-"],
        ["c_one", "-"],
        ["b"],
        ["", "b_one", "Is it b1?", "3 hours on a GPU"],
        ["", "b_two_x", "Is it b2?", "1 minute Time of day: x"],
    ]


def test_every_norm_is_listed_with_what_it_costs(capsys: pytest.CaptureFixture[str]) -> None:
    from normzoo.registry import list_norms

    assert main(["list", "norms"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line[:1].isalpha()}
    for name in list_norms():
        assert re.search(r" \d+\.\d-\d+\.\d *$", rows[name]), name
    assert {"weight_standardized", "scaled_ws"} < set(rows)


def test_every_short_name_names_a_class() -> None:
    from normzoo._components import import_class
    from normzoo.names import SHORT_NAMES

    paths = [path for group in SHORT_NAMES.values() for path in group.values()]
    assert len(paths) >= 15
    for path in paths:
        assert isinstance(import_class(path, "test", "test"), type)


def test_copy_show_and_validate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["copy", "quickstart", "mine.yaml"]) == 0
    assert main(["validate", "mine.yaml"]) == 0
    assert "mine.yaml: valid, 4 runs in its sweep" in capsys.readouterr().out
    before = (folder / "mine.yaml").read_text()
    assert main(["copy", "quickstart", "mine.yaml"]) == 2
    assert "not overwritten" in capsys.readouterr().err
    assert (folder / "mine.yaml").read_text() == before
    assert main(["show", "cifar10_resnet110_group"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["model"] == {"arch": "resnet110_cifar", "norm": {"name": "group", "groups": 8}, "channels_last": True}


@pytest.mark.slow
def test_every_shipped_recipe_is_valid(folder: Path) -> None:
    """Without data, which is not loaded to validate; a step of ResNet-110 takes seconds: small batches, no sweeps."""
    from normzoo.cli.recipe import read, shipped

    assert len(shipped()) >= 11
    for name in shipped():
        overrides = []
        if (read(name).config.get("data") or {}).get("name") == "cifar10":
            overrides = ["data.root=none", "data.download=true", "data.batch_size=2", "sweep=null"]
        if name.startswith("cifar10") and name != "cifar10_resnet110_batch":
            overrides.append("model.arch=resnet20_cifar")
        assert main(["validate", name, *overrides]) == 0, name
    assert {path.name for path in folder.iterdir()} == {"small.yaml", "own_parts.py"}  # nothing was downloaded


def wait_for(condition: Callable[[], bool], process: Forks) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert process.running, process.output
        assert time.monotonic() < end, "nothing was recorded before the deadline"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code", "state"), [("SIGINT", 130, "interrupted"), ("SIGKILL", -9, "unfinished")])
def test_an_interrupted_run_leaves_a_readable_folder(folder: Path, how: str, code: int, state: str) -> None:
    process = start_command(folder, "run", "small.yaml", "--out", "run", "trainer.max_steps=100000")
    record = folder / "run" / "metrics" / "gradient_tails-000.arrows"
    try:
        wait_for(lambda: record.exists() and record.stat().st_size > 20_000, process)
        os.kill(process.pids[0], getattr(signal, how))
        assert process.ended_with(DEADLINE) == [code], process.output
    finally:
        process.kill()
    [run] = load_runs(folder / "run")
    assert run.state == state
    assert not run.record("gradient_tails").empty
    if how == "SIGINT":
        assert run.curve("train/loss")[0]
        assert (folder / "run" / "report.html").exists()
    assert main(["report", "run"]) == 0
