"""The variable together with capsules, replays, recipes and checks of measurements."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import pandas.testing
import pytest
import torch
from callbacks_small import SmallNet, loader, trainer
from plugin_small import added, install
from replays_small import Net, run

import normzoo
from normzoo import load_capsule
from normzoo.callbacks import Divergence, GradientNorm
from normzoo.capsules.folder import capsule_folders
from normzoo.cli.main import main
from normzoo.records.reading import read_records
from normzoo.replaying.fit import in_a_fit

OWN = """
import lightning.pytorch as pl
import torch
from torch import nn

class Model(pl.LightningModule):
    def __init__(self, width: int = 4):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(784, width), nn.ReLU(), nn.Linear(width, 10))
    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])
    def validation_step(self, batch, batch_idx):
        pass
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
"""
RECIPE = """
model: {class_path: model_of_mine.Model}
data: {name: fashion_mnist, batch_size: 4}
trainer: {max_steps: 3, accelerator: cpu, enable_checkpointing: false, enable_model_summary: false,
          enable_progress_bar: false}
callbacks: [{name: gradient_norm, every_n_steps: 2}]
"""


class Diverges(SmallNet):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * (1e6 if batch_idx == 9 else 1)


class NoCopies(GradientNorm):
    """Cannot be copied to measure steps that are made again."""

    name = "no_copies"

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


def diverged(folder: Path, *callbacks: Any) -> tuple[dict[str, Any], Any]:
    """The records and the capsule of a run that diverges at step 9."""
    torch.manual_seed(0)
    made = trainer(str(folder), callbacks=[*callbacks], max_steps=12)
    made.fit(Diverges(), loader())
    [capsule] = [load_capsule(path) for path in capsule_folders(folder / "log")]
    return read_records(folder / "log"), capsule


def test_records_and_capsules_are_those_of_callbacks_in_the_script(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(monkeypatch)
    by_hand, of_hand = diverged(tmp_path / "hand", GradientNorm(), Divergence())
    install(monkeypatch, "gradient_norm,divergence")
    by_variable, of_variable = diverged(tmp_path / "variable")
    assert by_hand.keys() == by_variable.keys() == {"gradient_norm", "divergence"}
    for name, frame in by_hand.items():
        pandas.testing.assert_frame_equal(frame, by_variable[name])
    assert of_variable.about["step"] == of_hand.about["step"] == 9
    remade = of_variable.about["remade"]
    assert (remade["why_not"], remade["first_difference"]) == ("", None)
    assert remade["losses"] == of_hand.about["remade"]["losses"]
    assert of_variable.records.keys() == of_hand.records.keys()
    for name, frame in of_hand.records.items():
        pandas.testing.assert_frame_equal(frame, of_variable.records[name])


def test_the_capsule_of_the_scripts_own_divergence_is_as_without_the_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its steps are made again without the added measurements, of which one cannot measure them."""
    install(monkeypatch)
    _, of_plain = diverged(tmp_path / "plain", Divergence())
    install(monkeypatch, f"gradient_norm,parameter_norms,divergence,{__name__}.NoCopies")
    records, own = diverged(tmp_path / "added", Divergence())
    assert "parameter_norms" in records
    assert own.about["remade"]["why_not"] == of_plain.about["remade"]["why_not"] == ""
    assert own.about["remade"]["losses"] == of_plain.about["remade"]["losses"]
    assert own.records.keys() == of_plain.records.keys() == {"parameter_norms"}
    added_one = load_capsule(capsule_folders(tmp_path / "added" / "log" / "NORMZOO")[0])
    assert "cannot be copied" in added_one.about["remade"]["why_not"]


def test_a_replay_measures_nothing_more(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, "gradient_norm,divergence")
    capsule = load_capsule(run(tmp_path))
    monkeypatch.chdir(tmp_path)
    before = {*tmp_path.rglob("*")}
    assert in_a_fit(capsule, Net(), lambda stage: added(stage.trainer)) == []
    assert {*tmp_path.rglob("*")} == before


def test_a_check_of_a_measurement_is_not_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from normzoo.testing.measurements._fits import fit
    from normzoo.testing.measurements._task import BASE, small_net

    install(monkeypatch, "gradient_tials")
    fitted = fit(small_net, (GradientNorm(),), tmp_path, BASE)
    assert (fitted.error, added(fitted.trainer)) == (None, [])


def test_a_recipe_is_measured_as_well(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its rehearsal and its run; a measurement that the recipe has too gets a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    Path("model_of_mine.py").write_text(OWN)
    Path("mine.yaml").write_text(RECIPE)
    install(monkeypatch, "gradient_norm:every_n_steps=1,divergence")
    assert main(["run", "mine.yaml", "--out", "measured"]) == 0
    records = normzoo.load_run("measured")
    assert records["gradient_norm"]["step"].unique().tolist() == [0, 2]
    assert "divergence" in records
    assert normzoo.load_run(Path("measured", "metrics", "NORMZOO"))["gradient_norm"]["step"].nunique() == 3
    install(monkeypatch, "gradient_nrom")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["run", "mine.yaml", "--out", "malformed"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("normzoo: NORMZOO: 'gradient_nrom' is not a known meas")
    assert not Path("malformed").exists()
