"""``normzoo export``: one file, for any batch size, that computes what the network computes, or none."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from normzoo.cli import export
from normzoo.cli.main import main
from normzoo.models import create_model

RECIPE = """
model: {arch: resnet20_cifar, norm: batch}
data: {name: fashion_mnist, batch_size: 4}
optimizer: {name: sgd, lr: 0.1}
trainer: {max_steps: 2, accelerator: cpu, limit_val_batches: 0, enable_model_summary: false,
          enable_progress_bar: false}
"""
OF_ONES_OWN = ["--set", "model={class_path: exported_net.Model}", "--set", "optimizer=null"]
OWN = """
import lightning.pytorch as pl, torch
from torch import nn
class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten())
    def forward(self, x):
        return self.net(x)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "r.yaml").write_text(RECIPE)
    (tmp_path / "exported_net.py").write_text(OWN)
    return tmp_path


def outputs(path: str, x: torch.Tensor) -> torch.Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"input": x.numpy()})[0])


@pytest.mark.slow
def test_a_run_is_exported_and_folded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnx

    monkeypatch.setattr("normzoo.cli.report.try_report", lambda folder, code: code)
    monkeypatch.setattr("normzoo.cli.rehearse.rehearse", lambda *_: None)
    assert main(["run", "r.yaml", "--out", "run"]) == 0
    before = set(folder.rglob("*"))
    assert main(["export", "run", "plain.onnx"]) == 0
    assert main(["export", "run", "folded.onnx", "--fold"]) == 0
    said = capsys.readouterr().out
    assert "epoch=0-step=2.ckpt, input (N, 1, 28, 28); on random batches of 2 and 5" in said
    assert {path.name for path in folder.rglob("*")} - {path.name for path in before} == {"plain.onnx", "folded.onnx"}
    [checkpoint] = (folder / "run").rglob("*.ckpt")
    network = create_model("resnet20_cifar", "batch", num_classes=10, in_chans=1).eval()
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    network.load_state_dict({name.removeprefix("model."): value for name, value in state.items()})
    x = torch.randn(7, 1, 28, 28)
    with torch.no_grad():
        expected = network(x)
    for name in ("plain.onnx", "folded.onnx"):
        torch.testing.assert_close(outputs(name, x), expected, atol=1e-4, rtol=1e-4)
        onnx.checker.check_model(name)
    assert "BatchNormalization" not in [node.op_type for node in onnx.load("folded.onnx").graph.node]


@pytest.mark.slow
def test_a_module_of_ones_own_needs_the_shape_of_its_input_at_most(folder: Path) -> None:
    assert main(["export", "r.yaml", "a.onnx", *OF_ONES_OWN]) == 0
    assert outputs("a.onnx", torch.zeros(3, 1, 28, 28)).shape == (3, 2 * 26 * 26)
    assert main(["export", "r.yaml", "b.onnx", *OF_ONES_OWN, "--input", "1,8,8", "--fold"]) == 0
    assert outputs("b.onnx", torch.zeros(1, 1, 8, 8)).shape == (1, 2 * 6 * 6)


def test_a_file_that_differs_is_not_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = export._export

    def wrong(network: nn.Module, *more: Any) -> None:
        plain(network, *more)
        with torch.no_grad():
            next(p for name, p in network.named_parameters() if name == "net.1.bias").add_(3e-3)

    monkeypatch.setattr(export, "_export", wrong)
    assert main(["export", "r.yaml", "a.onnx", *OF_ONES_OWN]) == 1
    error = capsys.readouterr().err
    assert "a.onnx was not written: its outputs are 0.00" in error
    assert "from the network's, and at most 0.0001 is accepted" in error
    assert not [path for path in folder.iterdir() if "onnx" in path.name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["r.yaml", "a.onnx", "--set", "model=3"], "model: expected a mapping"),
        (["r.yaml", "a.onnx", "--set", "model.convert={to: group, calibrate: 2}"], "calibrated when a run starts"),
        (["r.yaml", "r.yaml"], "r.yaml exists and is not overwritten without --force"),
        (["r.yaml", "no/a.onnx"], "there is no folder no"),
        (["r.yaml", "."], ". is a folder"),
        ([".", "a.onnx"], ". is not a folder that normzoo run has written: it has no recipe.yaml"),
        (["nothing", "a.onnx"], "'nothing' is not a known recipe"),
        (["r.yaml", "a.onnx", "--input", "3x3"], "--input: expected the shape of one input, as 3,32,32, not '3x3'"),
        (["r.yaml", "a.onnx", "--checkpoint", "none.ckpt"], "none.ckpt: No such file"),
        (["r.yaml", "a.onnx", "--checkpoint", "exported_net.py"], "exported_net.py is"),
    ],
)
def test_what_is_wrong_is_told(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["export", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_packages_that_are_missing_are_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    assert main(["export", "r.yaml", "a.onnx"]) == 2
    assert "export needs the packages onnxscript: pip install 'normzoo[export]'" in capsys.readouterr().err


def test_a_network_beyond_one_file_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(export, "_MOST", 1_000_000)
    assert main(["export", "r.yaml", "a.onnx"]) == 2
    assert "bytes of weights, and one ONNX file holds less than 1,000,000" in capsys.readouterr().err
