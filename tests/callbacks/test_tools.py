"""What callbacks, watch and the command say of a Trainer's tools that act on torch's batch norms only."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    Callback,
    EMAWeightAveraging,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import nn
from torch.utils.data import DataLoader

import normzoo
from normzoo.callbacks import Divergence, GradientTails
from normzoo.callbacks._run.tools import passed_over
from normzoo.cli.main import main

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
SYNC = "sync_batchnorm=True synchronizes torch's batch norms only, not "
SWA = "StochasticWeightAveraging recomputes running statistics of torch's batch norms only: for "
UPDATE = "(use_buffers=False) leaves running statistics to update_bn, which recomputes "
UPDATE += "those of torch's batch norms only: for "
FREEZE = " freezes running statistics of torch's batch norms only, and train_bn is for no others: those of "
REESTIMATE = "call normzoo.reestimate_statistics(model, batches) after fit"


class Net(LightningModule):
    def __init__(self, *norms: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = nn.Sequential(nn.Linear(4, 4), *norms), nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return self.head(self.backbone(batch)).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class MadeLater(Net):
    def __init__(self, *norms: nn.Module) -> None:
        super().__init__()
        self.norms = norms

    def configure_model(self):
        self.backbone = nn.Sequential(*self.norms)


def norm(name: str, **options: object) -> nn.Module:
    if isinstance(normzoo.norm_info(name).options.get("groups"), int):
        options["groups"] = 2
    return normzoo.create_norm(name, 4, **options)


def said(model: nn.Module, *callbacks: Callback, **options: object) -> list[str]:
    return passed_over(Trainer(callbacks=list(callbacks), **{**QUIET, **options}), model)


def test_nothing_is_said_where_tools_do_right():
    plain = Net(norm("batch"), nn.BatchNorm1d(4), norm("group"), norm("frozen_batch"), norm("batch", sync=True))
    tools = [StochasticWeightAveraging(0.1), EMAWeightAveraging(use_buffers=False), BackboneFinetuning()]
    assert said(plain, tools[0], sync_batchnorm=True) == [SWA + f"backbone.5 (BatchNorm), {REESTIMATE}"]
    plain.backbone[5].sync = False
    for tool in tools:
        assert said(plain, tool, sync_batchnorm=True) == []
    assert said(Net(norm("batch_renorm")), WeightAveraging()) == []


@pytest.mark.parametrize("name", normzoo.list_norms())
def test_every_layer_with_batch_statistics_is_named(name):
    layer = norm(name)
    batch = normzoo.norm_info(name).batch_statistics and name != "batch"
    for options in ({"sync_batchnorm": True}, {"callbacks": StochasticWeightAveraging(0.1)}):
        callbacks = [options.pop("callbacks")] if "callbacks" in options else []
        assert len(said(Net(layer), *callbacks, **options)) == batch
    for tool in (EMAWeightAveraging(use_buffers=False), BackboneFinetuning()):
        (sentence,) = said(Net(layer), tool) or [""]
        assert (f"backbone.1 ({type(layer).__name__})" in sentence) == batch
        assert len(sentence) <= 300


def test_sync_batchnorm():
    able = Net(norm("batch_renorm"), norm("batch", act_layer=nn.ReLU), norm("batch_renorm"), norm("evonorm_b0"))
    kinds = "backbone.1 and 3 more (BatchRenorm, BatchNorm, EvoNormB0): make them with sync=True"
    assert said(able, sync_batchnorm=True) == [SYNC + kinds]
    for layer in able.backbone[1:]:
        layer.sync = True
    assert said(able, sync_batchnorm=True) == []
    assert said(Net(norm("batch_renorm"))) == []
    alone = Net(norm("ghost_batch"), norm("online"))
    kinds = "backbone.1 and 1 more (GhostBatchNorm, OnlineNorm), which cannot take statistics over all ranks"
    assert said(alone, sync_batchnorm=True) == [SYNC + kinds]
    many = Net(*map(norm, ("batch_renorm", "l1_batch", "switchable", "power")))
    (sentence,) = said(many, sync_batchnorm=True)
    assert "backbone.1 and 3 more (BatchRenorm, L1BatchNorm, SwitchableNorm, ...)" in sentence


def test_sync_batchnorm_on_a_cpu():
    (sentence,) = said(Net(norm("batch")), sync_batchnorm=True, strategy="ddp_spawn")
    assert sentence == (
        "sync_batchnorm=True makes backbone.1 (BatchNorm) torch.nn.SyncBatchNorm, which works on GPUs only: leave it "
        "out, and make them with sync=True"
    )
    assert said(Net(nn.BatchNorm1d(4)), sync_batchnorm=True, strategy="ddp_spawn") == []  # torch says it


@pytest.mark.parametrize("ranks", [1, 2])
def test_layers_beside_synchronized_ones(ranks):
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(norm("batch"), norm("batch_renorm")))
    sentences = passed_over(SimpleNamespace(callbacks=[], world_size=ranks), model)
    what = "torch.nn.SyncBatchNorm.convert_sync_batchnorm synchronizes torch's batch norms only, not 1 (BatchRenorm)"
    assert sentences == ([f"{what}: make them with sync=True"] if ranks > 1 else [])


@pytest.mark.parametrize(
    ("tool", "text"),
    [
        (StochasticWeightAveraging(0.1), SWA),
        (WeightAveraging(use_buffers=False), f"WeightAveraging{UPDATE}"),
        (EMAWeightAveraging(use_buffers=False), f"EMAWeightAveraging{UPDATE}"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_averages_of_weights(tool, text):
    model = Net(norm("batch"), norm("power"), norm("online"), norm("layer"))
    stream = "backbone.3 (OnlineNorm), run batches through the model in training mode after fit"
    assert said(model, tool) == [f"{text}backbone.2 (PowerNorm), {REESTIMATE}", text + stream]


def test_finetuning():
    class Mine(BaseFinetuning):
        pass

    model = Net(norm("batch"), norm("batch_renorm"))
    model.head = norm("l1_batch")
    freezable = "backbone.2 (BatchRenorm) go on moving; normzoo.freeze_norms(model) fixes them"
    assert said(model, BackboneFinetuning()) == [f"BackboneFinetuning{FREEZE}{freezable}"]
    other = "head (L1BatchNorm) go on moving; put them in evaluation mode before fit"
    assert said(model, Mine()) == [f"Mine{FREEZE}{freezable}", f"Mine{FREEZE}{other}"]
    normzoo.freeze_norms(model)
    assert said(model, BackboneFinetuning()) == []


@pytest.mark.parametrize("cls", [Net, MadeLater])
def test_callbacks_say_it_once(cls, tmp_path: Path):
    callbacks = [Divergence(dirpath=str(tmp_path / "a")), GradientTails(dirpath=str(tmp_path / "b"))]
    trainer = Trainer(**QUIET, callbacks=callbacks, max_steps=1, sync_batchnorm=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(cls(nn.Linear(4, 4), norm("batch_renorm")), DataLoader(torch.randn(8, 4), batch_size=4))
    assert [w.category for w in caught if str(w.message).startswith(SYNC)] == [UserWarning]


def test_layers_put_in_evaluation_mode_before_fit_stay_so(tmp_path: Path):
    model = Net(norm("l1_batch"))
    model.backbone[1].eval()
    trainer = Trainer(**QUIET, callbacks=[BackboneFinetuning(unfreeze_backbone_at_epoch=9)], max_steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, DataLoader(torch.randn(8, 4), batch_size=4))
    assert model.backbone[1].num_batches_tracked == 0


def test_a_watched_loop_says_it(monkeypatch, tmp_path: Path):
    model = nn.Sequential(nn.Linear(4, 4), nn.SyncBatchNorm(4), norm("batch_renorm"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monkeypatch.setattr("normzoo.callbacks._run.loop.LoopRun.ranks", 2)
    watching = normzoo.watch(model, optimizer, Divergence(), dirpath=tmp_path)
    with pytest.warns(UserWarning, match=r"synchronizes torch's batch norms only, not 2 \(BatchRenorm\)"), watching:
        pass


RECIPE = """
model: {arch: resnet20_cifar, norm: {name: batch_renorm}}
data: {name: fashion_mnist, batch_size: 16}
optimizer: {name: sgd, lr: 0.05}
trainer: {max_steps: 1, accelerator: cpu, limit_val_batches: 0, enable_checkpointing: false,
          enable_model_summary: false, sync_batchnorm: true}
"""


def test_the_command_says_it(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("sync.yaml").write_text(RECIPE, encoding="utf-8")
    assert main(["validate", "sync.yaml"]) == 0
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"sync.yaml: {SYNC}")
    assert line.endswith("and 18 more (BatchRenorm): make them with sync=True")
    with pytest.warns(UserWarning, match="synchronizes torch's batch norms only"):
        assert main(["run", "sync.yaml", "--out", "out"]) == 0
    assert main(["validate", "sync.yaml", "model.norm.sync=true"]) == 0
    assert capsys.readouterr().err == ""
