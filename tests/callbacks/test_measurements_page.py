"""docs/measurements.md is true: its tables name what there is, and its classes work wherever it says so."""

from __future__ import annotations

import re
import subprocess
import sys
import types
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from callbacks_small import SmallNet, images, loader, trainer
from ranks import run_function
from torch import nn
from torch.utils.data import DataLoader, Subset

from normzoo import load_run
from normzoo.callbacks import Column, Measurement, Run, Step
from normzoo.callbacks._run.facts import NEEDS
from normzoo.callbacks._run.loop import LoopRun
from normzoo.callbacks.measurement import UNITS
from normzoo.records.schema import KINDS, TYPES, Figure

PAGE = Path(__file__).parents[2] / "docs" / "measurements.md"
TEXT = PAGE.read_text(encoding="utf-8")


def table(head: str) -> list[tuple[list[str], str]]:
    """The rows of the table that begins so: what is in backticks in the first cell, and the others."""
    [rows] = re.findall(rf"^\| {re.escape(head)} \|.*\n\|[-|]*\n((?:\|.*\n)*)", TEXT, re.M)
    cells = [row.strip("|").split(" | ", 1) for row in rows.splitlines()]
    return [(re.findall(r'`"?((?:signed )?[a-z_0-9]+(?: map)?)[^`]*`', first), rest) for first, rest in cells]


def names(head: str) -> list[str]:
    return [name for found, _ in table(head) for name in found]


def classes() -> Any:
    """The classes of the page, without the fits; of a module that pickle finds."""
    module = sys.modules["example"] = types.ModuleType("example")
    for block in re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE):
        if "class " in block:
            exec(block.split("\n\n\ntrainer = ")[0], vars(module))
    return module


# Its tables


def test_the_tables_of_kinds_are_complete() -> None:
    assert set(names("in `needs`")) == {*NEEDS}
    assert set(names("kind | a value in a row")) == {*TYPES}
    assert set(names("kind | what is drawn")) == {*KINDS}
    for kind, rest in table("kind | a value in a row"):
        for name in kind:
            Column("x", name, "", logged=rest.split(" | ")[-1].startswith("yes"))
    units = next(rest for found, rest in table("attribute | default") if found == ["unit"])
    assert set(re.findall(r'`"([a-z-]+)"`', units)) == {*UNITS}


def test_the_table_of_attributes_says_their_defaults() -> None:
    for [name], rest in table("attribute | default"):
        default, told = getattr(Measurement, name), rest.split(" | ")[0].strip("`")
        assert told == repr(default).replace("'", '"') or (name in ("name", "key", "needs") and not default)
    public = {"name", "row", "columns", "figures", "key", "needs", "unit", "reduce", "shards"}
    assert set(names("attribute | default")) == public


def test_all_that_a_step_and_a_run_tell_is_there() -> None:
    [of_step, of_run] = re.findall(r"^\| attribute \| what it is \|\n\|[-|]*\n((?:\|.*\n)*)", TEXT, re.M)
    step = Step(LoopRun(nn.Linear(1, 1), [], [], 0), 0)
    for row in of_step.splitlines():
        for name in re.findall(r"`([a-z_]+)(?:\(\))?`", row.split(" | ")[0]):
            assert hasattr(step, name), name
    told = {n for row in of_run.splitlines() for n in re.findall(r"`([a-z_]+)[^`]*`", row.split(" | ")[0])}
    assert {n for n in told if not (hasattr(Run, n) or n in Run.__annotations__)} == set()


def test_the_methods_are_called_in_the_order_of_their_table(tmp_path: Path) -> None:
    calls: list[str] = []
    answers: dict[str, Any] = {
        "measure": {"x": torch.ones(())},
        "rows": [{"x": 1.0}],
        "activation": None,
        "measure_applied": None,
        "measure_update": None,
    }

    def noting(name: str) -> Any:
        def method(self: Measurement, *arguments: Any) -> Any:
            calls.append(name)
            if name == "sites":
                return {("net.0", "output"): arguments[0].module.net[0]}
            return answers[name] if name in answers else getattr(Measurement, name)(self, *arguments)

        return method

    told = names("method")
    attributes = {"name": "noted", "columns": (Column("x", "float", "", logged=True),), "needs": {*NEEDS}}
    noted = type("Noted", (Measurement,), {**attributes, **{name: noting(name) for name in told}})
    trainer(str(tmp_path), callbacks=[noted(1)], max_steps=2).fit(SmallNet(), loader())
    first = list(dict.fromkeys(calls))
    assert {*told} - {*first} == {"state_dict", "restore", "told"}  # nothing was saved, and there is no other
    assert first[:4] == ["forget", "sites", "check", "start"]
    once = [name for name, _ in groupby(calls)]
    assert once[once.index("start") :][:14] == [
        *("start", "before_batch", "activation", "parameters", "gradient", "after_backward", "samples", "parameters"),
        *("measure", "measure_applied", "measure_update", "before_batch", "activation", "parameters"),
    ]
    assert once[once.index("rows") - 2 :][:5] == ["gradient", "after_backward", "rows", "scalars", "suffix"]
    assert once[once.index("suffix") + 1] == "act"


# Its classes


def test_the_loss_in_evaluation_is_that_of_the_module_in_evaluation(tmp_path: Path) -> None:
    net = SmallNet()
    expected = []

    class Net(SmallNet):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.eval()
            with torch.no_grad():
                expected.append(nn.functional.cross_entropy(self.net(batch[0]), batch[1]).item())
            self.train()

    net = Net()
    measurement = classes().LossInEvaluation(1)
    trainer(str(tmp_path), callbacks=[measurement], max_steps=3).fit(net, loader())
    frame = load_run(tmp_path / "log")["loss_in_evaluation"]
    # Running statistics have moved once between the two
    torch.testing.assert_close(torch.tensor(frame["evaluation"]), torch.tensor(expected).double(), rtol=0.2, atol=0.05)
    assert net.training
    assert net.calls == 3


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable")
def test_a_stalled_run_ends_and_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    stalled = classes().Stalled
    run = trainer(str(tmp_path), callbacks=[stalled(1, patience=2, dirpath=str(tmp_path / "r"))], max_steps=200)
    run.fit(SmallNet(lr=0.0), loader())
    waited = load_run(tmp_path / "r")["stalled"]["waited"].tolist()
    assert waited.index(2) == len(waited) - 2
    assert run.global_step == len(waited)  # one step later
    run.save_checkpoint(tmp_path / "end.ckpt")
    again = stalled(1, patience=10**6, dirpath=str(tmp_path / "r"))
    trainer(str(tmp_path / "again"), callbacks=[again], max_steps=run.global_step + 3).fit(
        SmallNet(lr=0.0), loader(), ckpt_path=str(tmp_path / "end.ckpt")
    )
    frame = load_run(tmp_path / "r")["stalled"]
    assert frame["step"].tolist() == list(range(run.global_step + 3))
    assert (frame["lowest"].diff().dropna() <= 0).all()
    for row in frame.itertuples():
        assert row.lowest == frame["loss"][: row.Index + 1].min()


class Sharded(SmallNet):
    """Without layers whose output depends on other samples; each rank trains on its part of each batch of 16."""

    def __init__(self) -> None:
        super().__init__(lr=0.0)
        self.net[1], self.net[3] = nn.Identity(), nn.Identity()

    def train_dataloader(self) -> DataLoader:
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        return DataLoader(Subset(images(48), range(rank, 48, ranks)), batch_size=16 // ranks)


def on_ranks(folder: str) -> None:
    page = classes()
    measurements = [page.WeightNorm(1), page.Zeros(1), page.LossInEvaluation(1), page.Stalled(1, patience=10**6)]
    ranks: dict[str, Any] = {"devices": 2, "strategy": "ddp"} if folder.endswith("two") else {}
    torch.manual_seed(0)
    trainer(folder, callbacks=measurements, max_steps=3, use_distributed_sampler=False, **ranks).fit(Sharded())


def test_two_ranks_record_what_one_does_of_the_union(tmp_path: Path) -> None:
    frames = []
    for count, name in ((1, "one"), (2, "two")):
        run_function(tmp_path / name, on_ranks, count, str(tmp_path / name))
        frames.append(load_run(tmp_path / name / "log"))
    one, two = frames
    assert set(one) == set(two) == {"weight_norm", "zeros", "loss_in_evaluation", "stalled"}
    assert one["weight_norm"].equals(two["weight_norm"])
    assert one["zeros"].equals(two["zeros"])
    for record in ("loss_in_evaluation", "stalled"):
        for column in one[record]:
            assert one[record][column].tolist() == pytest.approx(two[record][column].tolist(), rel=1e-5), column


WITHOUT_THE_CLASS = """
import sys
from normzoo import load_run
from normzoo.report import draw, load_runs
frame = load_run("run")["zeros"]
assert frame.attrs["meaning"]["share"] == "share of its outputs that are 0", frame.attrs
assert "Zeros over depth" in draw(load_runs("run"))
assert not {"own_measurements", "torch", "lightning"} & set(sys.modules)
"""


def test_a_recipe_takes_it_by_class_path_and_the_report_draws_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from normzoo.cli.main import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    [block] = [b for b in re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.M) if "class Zeros" in b]
    imports = "from normzoo.callbacks import Column, Figure, Measurement\n"
    (tmp_path / "own_measurements.py").write_text(imports + block)
    (tmp_path / "own.yaml").write_text(
        "model: {arch: resnet20_cifar, norm: batch}\n"
        "data: {name: fashion_mnist, batch_size: 16}\n"
        "optimizer: {name: sgd, lr: 0.1}\n"
        "trainer: {max_steps: 3, limit_val_batches: 1, enable_checkpointing: false, enable_progress_bar: false}\n"
        "callbacks: [{class_path: own_measurements.Zeros, init_args: {every_n_steps: 2}}]\n"
    )
    assert main(["run", "own.yaml", "--out", "run"]) == 0, capsys.readouterr().err
    assert "Zeros over depth" in (tmp_path / "run" / "report.html").read_text()
    (tmp_path / "own_measurements.py").unlink()
    subprocess.run([sys.executable, "-c", WITHOUT_THE_CLASS], check=True, timeout=150)


def test_figures_of_every_kind_can_be_asked_for() -> None:
    for kind in KINDS:
        Figure("F", kind, x="step", y="step", z="step" if kind == "heat map" else "")
