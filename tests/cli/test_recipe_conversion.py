"""``model.checkpoint`` and ``model.convert`` of recipes, and ``normzoo convert --calibrate``, which takes a recipe."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import normzoo
from normzoo.cli.build import build
from normzoo.cli.main import main
from normzoo.cli.recipe import read
from normzoo.data import FashionMNIST
from normzoo.data._loader import BatchLoader
from normzoo.models import create_model

RECIPE = """
seed: 2
model: {arch: resnet20_cifar, norm: batch}
data: {name: fashion_mnist, batch_size: 4}
optimizer: {name: sgd, lr: 0.0}
trainer: {max_steps: 1, accelerator: cpu, limit_val_batches: 0, enable_model_summary: false, log_every_n_steps: 1,
          enable_progress_bar: false}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("normzoo.cli.report.try_report", lambda folder, code: code)
    monkeypatch.setattr("normzoo.cli.run.environment", lambda: {"packages": {}})
    (tmp_path / "r.yaml").write_text(RECIPE)
    torch.manual_seed(0)
    network = create_model("resnet20_cifar", "batch", num_classes=10, in_chans=1).train()
    for _ in range(3):
        network(torch.randn(8, 1, 28, 28))
    torch.save(network.state_dict(), "plain.pt")
    torch.save({"state_dict": {f"model.{k}": v for k, v in network.state_dict().items()}, "epoch": 1}, "lightning.ckpt")
    save_file(network.state_dict(), "safe.safetensors")
    return tmp_path


def trained(run: str) -> dict[str, Any]:
    [path] = Path(run).rglob("epoch=*.ckpt")
    return torch.load(path, weights_only=True)["state_dict"]


def batches(count: int, size: int = 4) -> list[torch.Tensor]:
    """The first training images by the seed, not augmented, from the parts that the data module is made of."""
    data = FashionMNIST(batch_size=size, seed=2)
    images, labels = data.load("train")
    loader = BatchLoader(images, labels, size, mean=data.mean, std=data.std, shuffle=True, seed=2)
    return [x for x, _ in itertools.islice(loader, count)]


@pytest.mark.parametrize("file", ["plain.pt", "lightning.ckpt", "safe.safetensors"])
def test_weights_are_those_of_the_file(folder: Path, file: str) -> None:
    task = build(read("r.yaml", [f"model.checkpoint={file}"]).config, "r.yaml").task
    expected = torch.load("plain.pt", weights_only=True)
    state = task.model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


def test_a_run_starts_from_what_convert_norms_makes(folder: Path) -> None:
    convert = "model.convert={to: {name: group, groups: 4}, calibrate: 3, exclude: bn1}"
    assert main(["run", "r.yaml", "model.checkpoint=plain.pt", convert, "--out", "run"]) == 0
    network = create_model("resnet20_cifar", "batch", num_classes=10, in_chans=1)
    network.load_state_dict(torch.load("plain.pt", weights_only=True))
    normzoo.convert_norms(network, "group", options={"groups": 4}, exclude="bn1", calibrate=batches(3))
    state = trained("run")  # after a step with a rate of 0
    moving = {name for name in state if "running" in name or "tracked" in name}
    for name, value in network.state_dict().items():
        if f"model.{name}" not in moving:
            assert torch.equal(state[f"model.{name}"], value), name


@pytest.mark.slow
def test_a_file_is_calibrated_as_a_run_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--to", "group", "--options", "{groups: 4}", "--recipe", "r.yaml", "--calibrate", "2"]
    for file in ("plain.pt", "lightning.ckpt"):
        assert main(["convert", file, *options, "--out", f"out-{file}", "--set", "data.batch_size=8"]) == 0
    assert "GroupNorm" in capsys.readouterr().out
    network = create_model("resnet20_cifar", "batch", num_classes=10, in_chans=1)
    network.load_state_dict(torch.load("plain.pt", weights_only=True))
    normzoo.convert_norms(network, "group", options={"groups": 4}, calibrate=batches(2, size=8))
    made = torch.load("out-plain.pt", weights_only=True)
    assert made.keys() == network.state_dict().keys()
    assert all(torch.equal(made[name], value) for name, value in network.state_dict().items())
    content = torch.load("out-lightning.ckpt", weights_only=True)
    assert content["epoch"] == 1
    assert {name.removeprefix("model."): 0 for name in content["state_dict"]}.keys() == made.keys()
    assert all(torch.equal(content["state_dict"][f"model.{name}"], value) for name, value in made.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--calibrate", "2"], "give both --calibrate and --recipe"),
        (["--recipe", "r.yaml"], "give both --calibrate and --recipe"),
        (["--recipe", "r.yaml", "--calibrate", "0"], "--calibrate: expected a number of batches above 0, not 0"),
        (["--recipe", "r.yaml", "--calibrate", "9999"], "plain.pt: 9999 batches of 4 images were asked for"),
        (["--recipe", "r.yaml", "--calibrate", "1", "--set", "model.arch=resnet32_cifar"], "plain.pt: weights: 72 of"),
        (["--recipe", "nothing", "--calibrate", "1"], "normzoo: 'nothing' is not a known recipe"),
    ],
)
def test_what_is_wrong_with_a_calibration_is_told(
    folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["convert", "plain.pt", "--to", "group", "--out", "out.pt", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (folder / "out.pt").exists()


@pytest.mark.slow
def test_ranks_start_from_the_same_network(folder: Path) -> None:
    from ranks import start_command

    convert = "model.convert={to: group, calibrate: 2}"
    start = ["run", "r.yaml", "model.checkpoint=plain.pt", convert]
    assert main([*start, "--out", "one"]) == 0
    process = start_command(folder, *start, "trainer.devices=2", "trainer.strategy=ddp_fork", "--out", "two")
    assert process.ended_with(100) == [0], process.output
    one, two = trained("one"), trained("two")
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.convert={calibrate: 3}", "model.convert: expected a mapping with to: and a norm"),
        ("model.convert={to: gruop}", "model.convert.to: 'gruop' is not a known norm; did you mean 'group'"),
        ("model.convert={to: group, calibrat: 3}", "did you mean 'calibrate'"),
        ("model.convert={to: group, calibrate: many}", "model.convert.calibrate: expected a number of batches"),
        ("model.convert={to: group, exclude: 3}", "model.convert.exclude: expected a pattern of names"),
        ("model.convert={to: group, include: nothing.*}", "nothing.*"),
        ("model.convert={to: group, calibrate: 100000}", "100000 batches of"),
        ("model.convrt={to: group}", "did you mean 'convert'"),
        ("model.checkpoint=nowhere.pt", "model.checkpoint: nowhere.pt: No such file"),
        ("model.checkpoint=r.yaml", "model.checkpoint: r.yaml is"),
        ("model.checkpoint=3", "model.checkpoint: expected the path of a file, not 3"),
        ("model={arch: resnet32_cifar, checkpoint: plain.pt}", "entries are missing, as 'layer1.3.conv1.weight'"),
        ("model={arch: resnet20_cifar, checkpoint: plain.pt, num_classes: 11}", "'fc.weight' has the shape (10, 64)"),
    ],
)
def test_what_is_wrong_is_told(folder: Path, capsys: pytest.CaptureFixture[str], override: str, message: str) -> None:
    assert main(["validate", "r.yaml", override]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_validation_loads_no_data(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any) -> Any:
        raise AssertionError("loaded")

    monkeypatch.setattr(FashionMNIST, "load", load)
    assert main(["validate", "r.yaml", "model.convert={to: group, calibrate: 2}"]) == 0
