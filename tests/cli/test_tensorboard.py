"""TensorBoard of a run: few tags unless all are asked for, and what the HParams tab shows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from normzoo.cli.main import main
from normzoo.report import load_runs

RECIPE = """
seed: 3
model: {arch: resnet20_cifar, norm: {name: group, groups: 4}}
data: {name: fashion_mnist, batch_size: 4}
optimizer: {name: sgd, lr: 0.05}
trainer: {max_steps: 2, accelerator: cpu, log_every_n_steps: 1, limit_val_batches: 1, num_sanity_val_steps: 0,
          val_check_interval: 2, enable_checkpointing: false, enable_model_summary: false, enable_progress_bar: false}
callbacks: [{name: gradient_tails, every_n_steps: 1}, {name: gradient_norm, every_n_steps: 1}, lr_monitor]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("normzoo.cli.report.try_report", lambda folder, code: code)
    monkeypatch.setattr("normzoo.cli.rehearse.rehearse", lambda *_: None)
    (tmp_path / "r.yaml").write_text(RECIPE)
    return tmp_path


def events(run: str) -> Any:
    found = EventAccumulator(f"{run}/tensorboard")
    found.Reload()
    return found


def test_few_tags_unless_all_are_asked_for(folder: Path) -> None:
    for name, more in (("few", []), ("all", ["tensorboard=all"])):
        assert main(["run", "r.yaml", *more, "--out", name]) == 0
    few, every = events("few").Tags(), events("all").Tags()
    assert {*few["scalars"]} == {
        *("train/loss", "train/accuracy", "test/loss", "test/accuracy", "epoch", "lr-SGD"),
        *("gradient_norm/norm", "gradient_norm/applied", "gradient_norm/factor"),
    }
    assert few["distributions"] == []
    assert {*few["scalars"]} < {*every["scalars"]}
    assert len(every["scalars"]) > 200
    assert every["distributions"]
    one, other = (load_runs(folder / name)[0] for name in ("few", "all"))
    assert {*one.metrics} == {*other.metrics}  # the file and the records have all of them
    assert len(one.record("gradient_tails")) == len(other.record("gradient_tails")) > 0


def test_the_hparams_tab_has_settings_and_metrics(folder: Path) -> None:
    assert main(["run", "r.yaml", "--out", "run"]) == 0
    found = events("run")
    content = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    settings = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert settings["optimizer.lr"].number_value == 0.05
    assert settings["model.norm.name"].string_value == "group"
    assert settings["seed"].number_value == 3
    assert not any(name.startswith("callbacks") for name in settings)
    content = found.SummaryMetadata("_hparams_/experiment").plugin_data.content
    metrics = plugin_data_pb2.HParamsPluginData.FromString(content).experiment.metric_infos
    tags = {metric.name.tag for metric in metrics}
    assert tags == {"train/loss", "train/accuracy", "test/loss", "test/accuracy"}
    assert tags <= {*found.Tags()["scalars"]}
    assert found.Scalars("test/loss")[-1].value == pytest.approx(load_runs(folder / "run")[0].curve("test/loss")[1][-1])


def test_a_wrong_choice_is_told(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert main(["validate", "r.yaml", "tensorboard=many"]) == 2
    assert "r.yaml: tensorboard: expected few or all, not 'many'" in capsys.readouterr().err
