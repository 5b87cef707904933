"""The module of a capsule's run, found in its recipe, by its class, or in a script that would train."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from normzoo._errors import RecipeError
from normzoo.cli._replayed import replayed
from normzoo.cli.user_code import load_object, load_recorded

NET = """
import sys
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn, optim

class Net(LightningModule):
    def __init__(self, width: int, act: nn.Module | None = None, depth: int = 1):
        super().__init__()
        self.arguments = (width, act, depth)
    def configure_optimizers(self):
        return optim.SGD(self.parameters(), lr=0.1)

class Clips(Callback):
    pass

def make(width=4):
    return Net(width)

def mistaken():
    return nn.Linear(2, 2)
"""
SCRIPT = (
    NET
    + """
assert len(sys.argv) == 1, "the arguments of another program"
Trainer(accelerator="cpu", logger=False, enable_checkpointing=False).fit(Net(2))
class Later(LightningModule):
    pass
"""
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    known = {*sys.modules}
    (tmp_path / "own_net.py").write_text(NET)
    (tmp_path / "script.py").write_text(SCRIPT)
    yield tmp_path
    for name in {*sys.modules} - known:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        replayed(*arguments, **options)
    return str(caught.value)


@pytest.mark.parametrize("path", ["own_net:Net", "own_net.Net", "own_net.py:Net", "./own_net.py:Net", "own_net.py"])
def test_a_class_is_found_by_module_and_by_file(folder: Path, path: str) -> None:
    assert load_object(path, "--module", LightningModule).__name__ == "Net"


def test_a_script_that_trains_is_left_where_it_would_start(folder: Path) -> None:
    fit, arguments = Trainer.fit, sys.argv
    for path in ("script.py:Net", "script:Net"):
        assert load_object(path, "--module", LightningModule).__module__ == "script"
    assert (Trainer.fit, sys.argv) == (fit, arguments)
    with pytest.raises(RecipeError, match=r"'Later' is not a known LightningModule.*It trains before; put that under"):
        load_object("script.py:Later", "--module", LightningModule)
    (folder / "torch.py").write_text(NET)  # of a name that another module has
    assert load_object("torch.py:Net", "--module", LightningModule).__name__ == "Net"
    assert sys.modules["torch"] is torch
    other = (
        NET.replace("lightning.pytorch", "pytorch_lightning") + "\nTrainer(accelerator='cpu', logger=False).fit(Net(2))"
    )
    (folder / "other.py").write_text(other)
    assert load_object("other.py:Net", "--module", LightningModule).__name__ == "Net"


def test_what_takes_long_to_import_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("normzoo.cli.user_code._SLOW", 0.01)
    (folder / "slow.py").write_text("import time\ntime.sleep(0.5)\n" + NET)
    load_object("slow.py", "--module", LightningModule)
    assert "slow.py has taken" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("nowhere:Net", "there is no module 'nowhere'"),
        ("own_net:Nett", "'Nett' is not a known LightningModule; did you mean 'Net'?"),
        ("nowhere.py:Net", "nowhere.py is not there"),
        ("Net", "expected package.module:Name or train.py:Name, not 'Net'"),
        (":", "expected package.module:Name"),
        ("bad.py:Net", "cannot import .*bad.py: SyntaxError"),
        ("raises.py:Net", "cannot import .*raises.py: KeyError"),
        ("exits.py:Net", "cannot import .*exits.py: it ends the program"),
        ("two.py", "expected a file with one LightningModule, and it has A, B; give two.py:Name"),
        ("own_net.missing:Net", "there is no module 'own_net.missing'"),
    ],
)
def test_what_cannot_be_imported_is_said_in_one_line(folder: Path, path: str, text: str) -> None:
    (folder / "bad.py").write_text("class Net(:")
    (folder / "raises.py").write_text("{}['x']")
    (folder / "exits.py").write_text(
        "import argparse\np = argparse.ArgumentParser()\np.add_argument('data')\np.parse_args()"
    )
    (folder / "two.py").write_text(NET + "class A(Net): pass\nclass B(Net): pass\ndel Net")
    with pytest.raises(RecipeError, match=text):
        load_object(path, "--module", LightningModule)


def test_a_class_is_found_where_it_was_in_the_run(folder: Path) -> None:
    (folder / "package" / "inner").mkdir(parents=True)
    for name in ("package", "package/inner"):
        (folder / name / "__init__.py").touch()
    (folder / "package" / "inner" / "net.py").write_text("from . import __name__ as inner\n" + NET)
    os.chdir("/")
    file = str(folder / "package" / "inner" / "net.py")
    assert load_recorded("package.inner.net:Net", file, "--module", LightningModule).__name__ == "Net"
    assert load_recorded("__main__:Net", str(folder / "script.py"), "--module", LightningModule).__name__ == "Net"
    assert load_recorded("<run_path>:Net", str(folder / "script.py"), "--module", LightningModule).__name__ == "Net"
    for recorded, at, text in (
        ("__main__:Net", None, "of a session, such as a notebook; give --module FILE.py:Net"),
        ("__main__:Net", "/nowhere/train.py", "/nowhere/train.py, which is not there"),
        ("a:f.<locals>.Net", None, "defined in a function; give --module"),
    ):
        with pytest.raises(RecipeError, match=text):
            load_recorded(recorded, at, "--module", LightningModule)


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    own = {"module": "__main__:Net", "module_file": str(folder / "own_net.py"), "hparams_name": "kwargs"}
    return {**own, "hparams": {"width": 3, "depth": 2, "other": 1}, **more}


def test_a_module_has_the_arguments_that_it_has_saved_and_those_given(folder: Path) -> None:
    (folder / "init.yaml").write_text("width: 5\nact: {class_path: torch.nn.ReLU}\n")
    made = replayed(settings(folder), folder)
    assert made.module.arguments == (3, None, 2)
    assert made.source == f"Net in {folder / 'own_net.py'}"
    width, act, depth = replayed(settings(folder), folder, init="init.yaml").module.arguments
    assert (width, type(act), depth) == (5, nn.ReLU, 2)
    assert replayed(settings(folder), folder, "own_net:make").module.arguments == (4, None, 1)
    assert replayed({}, folder, "own_net:Net", init="init.yaml").module.arguments[2] == 1
    whole = {"hparams_name": "width", "hparams": {"a": 1}}
    assert replayed(settings(folder, **whole), folder).module.arguments[0].a == 1


def test_arguments_that_are_missing_or_unknown_are_named(folder: Path) -> None:
    (folder / "wrong.yaml").write_text("widht: 5")
    (folder / "text.yaml").write_text("width: five")
    (folder / "list.yaml").write_text("[1]")
    own = settings(folder, hparams={}, hparams_name=None)
    assert "Net takes width, which the module has not saved by save_hyperparameters(); give" in refusal(own, folder)
    assert "width, which were saved as no plain data" in refusal({**own, "hparams_left_out": ["width"]}, folder)
    assert "Net has no argument 'widht'; did you mean width?" in refusal(own, folder, init="wrong.yaml")
    assert "expected int, not 'five'" in refusal(own, folder, init="text.yaml")
    assert "expected a mapping of arguments" in refusal(own, folder, init="list.yaml")
    assert "cannot read --init nowhere.yaml" in refusal(own, folder, init="nowhere.yaml")
    assert "does not name the class of its module" in refusal({}, folder)
    assert "own_net.py:Clips" not in (text := refusal({}, folder, "own_net:Clips"))
    assert "Clips is not a LightningModule" in text
    assert "and not a LightningModule" in refusal({}, folder, "own_net:mistaken")


def test_arguments_without_a_type_are_taken_as_they_are_given(folder: Path) -> None:
    net = NET.replace("width: int, act: nn.Module | None = None, depth: int = 1", "width, act=None, depth=1")
    (folder / "untyped.py").write_text(net)
    (folder / "init.yaml").write_text("width: 5\nact: {a: [1]}")
    own = {"module": f"{folder / 'untyped.py'}:Net", "hparams": {}, "hparams_name": None}
    module = replayed(own, folder, "untyped.py:Net", init="init.yaml").module
    assert module.arguments == (5, {"a": [1]}, 1)
    assert "--module FILE.py:FUNCTION" in refusal(own, folder, "untyped.py:Net")


def test_a_capsule_can_name_nothing_but_a_lightning_module(folder: Path) -> None:
    marked = folder / "marked"
    harmful = {"module": "os:system", "hparams": {"command": f"touch {marked}"}, "hparams_name": "kwargs"}
    assert "os:system, which is no LightningModule" in refusal(harmful, folder)
    assert not marked.exists()


def test_callbacks_are_those_that_a_function_returns(folder: Path) -> None:
    (folder / "more.py").write_text(
        "from own_net import Clips\ndef both(): return [Clips(), Clips()]\ndef none(): return 3"
    )
    [first, second] = replayed(settings(folder), folder, callbacks="more:both").callbacks
    assert type(first) is type(second)
    assert isinstance(first, Callback)
    assert len(replayed(settings(folder), folder, callbacks="own_net:Clips").callbacks) == 1
    assert "more:none gives 3, and not callbacks" in refusal(settings(folder), folder, callbacks="more:none")


def test_what_the_run_had_beside_its_module_is_named(folder: Path) -> None:
    (folder / "own_net.py").write_text(
        NET.replace("class Clips(Callback):\n    pass", CLIPS) + "\nclass Watches(Callback): pass\n"
    )
    own = {"callbacks": ["__main__:Clips", "__main__:Watches", "lightning.pytorch.callbacks:Timer"]}
    [notice] = replayed(settings(folder, **own), folder).notices
    assert "__main__:Clips, and the steps are made without them: give --callbacks FILE.py:function" in notice
    assert replayed(settings(folder, **own), folder, callbacks="own_net:Clips").notices == []
    assert replayed(settings(folder, datamodule="a:Data"), folder).notices == []  # which the module does not ask
    (folder / "asks.py").write_text(
        NET.replace("self.arguments =", "self.asks = lambda: self.trainer.datamodule\n        self.arguments =")
    )
    asking = settings(folder, datamodule="a:Data", module_file=str(folder / "asks.py"))
    assert replayed(asking, folder).notices == [
        "the run had the data module a:Data; if the module asks it, give --data FILE.py:Class"
    ]
    (folder / "data.py").write_text(
        "from lightning.pytorch import LightningDataModule\nclass Data(LightningDataModule): pass\n"
    )
    made = replayed(asking, folder, data="data.py")
    assert (type(made.datamodule).__name__, made.notices) == ("Data", [])


CLIPS = "class Clips(Callback):\n    def on_before_optimizer_step(self, trainer, pl_module, optimizer): ..."
RECIPE = """
model: {class_path: own_net.Net, init_args: {width: 7}}
data: {name: fashion_mnist, batch_size: 4}
callbacks: [{name: divergence}, {class_path: own_net.Clips}]
"""


def test_a_recipe_says_which_module_and_which_callbacks_take_part_in_a_step(folder: Path) -> None:
    (folder / "own_net.py").write_text(NET.replace("class Clips(Callback):\n    pass", CLIPS))
    (folder / "recipe.yaml").write_text(RECIPE)
    made = replayed({"module": "elsewhere:Net"}, folder)
    assert made.module.arguments[0] == 7
    assert [type(callback).__name__ for callback in made.callbacks] == ["Clips"]
    assert type(made.datamodule).__name__ == "FashionMNIST"
