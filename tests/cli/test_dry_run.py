"""``--dry-run``: the recipe that a run would keep is printed, after the checks, and nothing is written."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from normzoo.cli.main import main
from normzoo.cli.recipe import read

BASE = """
seed: 7
model: {arch: resnet20_cifar, norm: batch}
data: {name: fashion_mnist, batch_size: 4}
optimizer: {name: sgd, lr: 0.05}
trainer: {max_steps: 1, accelerator: cpu, limit_val_batches: 0, enable_model_summary: false,
          enable_checkpointing: false}
"""
SMALL = "extends: base.yaml\noptimizer: {momentum: 0.9}\nsweep:\n  model.norm: [batch, {name: group, groups: 8}]\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("normzoo.cli.report.try_report", lambda folder, code: code)
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "my.yaml").write_text(f"model: {{norm: none}}\n{SMALL}")
    return tmp_path


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_run_prints_what_it_would_keep(folder: Path, capsys: pytest.CaptureFixture[str], place: int) -> None:
    arguments = ["my.yaml", "--optimizer.lr", "1e-3"]
    arguments.insert(place if place != 2 else 3, "--dry-run")
    before = files(folder)
    assert main(["run", *arguments]) == 0
    printed = capsys.readouterr().out
    assert files(folder) == before
    assert yaml.safe_load(printed)["optimizer"] == {"name": "sgd", "lr": 0.001, "momentum": 0.9}
    assert yaml.safe_load(printed)["model"] == {"arch": "resnet20_cifar", "norm": "none"}
    if place == 0:  # the recipe that a run keeps, and one that it takes
        assert main(["run", "my.yaml", "optimizer.lr=1e-3", "--out", "run"]) == 0
        assert (folder / "run" / "recipe.yaml").read_text() == printed
        (folder / "printed.yaml").write_text(printed)
        assert read("printed.yaml").config == read("my.yaml", ["optimizer.lr=1e-3"]).config
        capsys.readouterr()
        assert main(["run", "printed.yaml", "--dry-run"]) == 0
        assert capsys.readouterr().out == printed


def test_a_sweep_prints_the_recipe_of_each_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(folder)
    assert main(["sweep", "my.yaml", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert files(folder) == before
    assert [line for line in printed.splitlines() if line.startswith("#")] == [
        "# 01-norm=batch",
        "# 02-norm=group(groups=8)",
    ]
    norms = [document["model"]["norm"] for document in yaml.safe_load_all(printed)]
    assert norms == ["batch", {"name": "group", "groups": 8}]
    expected = [config for _, config in read("my.yaml").points()]
    assert [*yaml.safe_load_all(printed)] == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "my.yaml", "optimizer.lr=fast"], "optimizer.lr"),
        (["run", "my.yaml", "model.norm={name: group, groups: 0}"], "groups"),
        (["sweep", "my.yaml", "data.batch_size=100000"], "too few for one step"),
        (["run", "my.yaml", "--out", "there"], "--out: there exists"),
        (["sweep", "my.yaml", "--out", "there"], "--out: there exists"),
    ],
)
def test_what_a_run_refuses_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (folder / "there").mkdir()
    before = files(folder)
    assert main([*arguments, "--dry-run"]) == 2
    captured = capsys.readouterr()
    assert (captured.out, message in captured.err) == ("", True)
    assert files(folder) == before


def test_only_the_first_process_prints(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    before = files(folder)
    assert main(["run", "my.yaml", "--dry-run"]) == 0
    assert (capsys.readouterr().out, files(folder)) == ("", before)
