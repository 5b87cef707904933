"""Whatever a user gets wrong is told in one line, with exit code 2, before anything is written."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from normzoo.cli.build import build
from normzoo.cli.main import main
from normzoo.cli.recipe import read

SMALL = """
model: {arch: resnet20_cifar, norm: batch}
data: {name: fashion_mnist, batch_size: 16}
trainer: {max_steps: 1, accelerator: cpu}
"""

CASES = {
    "recipe": (["quikstart"], ["'quikstart'", "'quickstart'"]),
    "recipe file": (["missing.yaml"], ["missing.yaml", "No such file"]),
    "norm": (["small.yaml", "model.norm=gruop"], ["small.yaml", "model.norm", "'group'"]),
    "norm option": (["small.yaml", "model.norm={name: group, grups: 8}"], ["model.norm.grups", "'groups'"]),
    "norm option type": (["small.yaml", "model.norm={name: group, groups: many}"], ["model.norm.groups", "int"]),
    "norm option value": (
        ["small.yaml", "model.norm={name: batch_renorm, r_max: 0}"],
        ["model", "bn1 (16 channels)", "r_max must be at least 1"],
    ),
    "norm beside weights": (["small.yaml", "model.norm=gruop+ws"], ["model.norm", "'gruop'", "'group'"]),
    "method for weights": (["small.yaml", "model.norm=group+wz"], ["model.norm", "'wz'", "method for weights", "'ws'"]),
    "method for weights alone": (["small.yaml", "model.norm=ws"], ["model.norm", "'ws'", "'group+ws'"]),
    "norm option beside weights": (
        ["small.yaml", "model.norm={name: group+ws, grups: 8}"],
        ["model.norm.grups", "GroupNorm", "'groups'"],
    ),
    "arch": (["small.yaml", "model.arch=resnet21_cifar"], ["small.yaml", "model", "'resnet20_cifar'"]),
    "arch without norms": (
        ["small.yaml", "model.arch=nf_resnet26"],
        ["model", "NormFreeNet has no normalization layer to convert"],
    ),
    "model key": (["small.yaml", "model.chanels_last=true"], ["model.chanels_last", "'channels_last'"]),
    "model shape": (["small.yaml", "model=resnet18"], ["small.yaml", "model", "arch:"]),
    "data": (["small.yaml", "data=fashon_mnist"], ["data", "'fashion_mnist'"]),
    "data key": (["small.yaml", "data.batchsize=3"], ["data.batchsize", "'batch_size'"]),
    "data type": (["small.yaml", "data.batch_size=many"], ["data.batch_size", "int", "'many'"]),
    "data value": (["small.yaml", "data.batch_size=0"], ["data", "at least 1"]),
    "data folder": (["small.yaml", "data={name: cifar10, root: nowhere}"], ["data", "'nowhere'", "download=True"]),
    "class folders": (["small.yaml", "data={name: image_folder, root: nowhere}"], ["data", "nowhere/train"]),
    "trainer key": (["small.yaml", "trainer.max_epoch=3"], ["trainer.max_epoch", "'max_epochs'"]),
    "trainer type": (["small.yaml", "--trainer.max_epochs", "three"], ["trainer.max_epochs", "int", "'three'"]),
    "trainer value": (["small.yaml", "trainer.accelerator=abacus"], ["trainer", "abacus"]),
    "callback": (["small.yaml", "callbacks=[divergnce]"], ["callbacks[0]", "'divergence'"]),
    "callback key": (["small.yaml", "callbacks=[{name: divergence, treshold: 1}]"], ["treshold", "'threshold'"]),
    "callback value": (["small.yaml", "callbacks=[{name: gradient_tails, every_n_steps: 0}]"], ["at least 1"]),
    "callback schedule": (
        ["small.yaml", "callbacks=[{name: gradient_tails, every_n_steps: {class_path: Warmup, init_args.start: -1}}]"],
        ["callbacks[0]: start must be a whole number of at least 0, not -1"],
    ),
    "callback schedule class": (
        ["small.yaml", "callbacks=[{name: gradient_tails, every_n_steps: {class_path: normzoo.callbacks.LogSpacd}}]"],
        ["callbacks[0].every_n_steps", "has no attribute 'LogSpacd'"],
    ),
    "callback schedule option": (
        [
            "small.yaml",
            "callbacks=[{name: gradient_tails, every_n_steps: {class_path: LogSpaced, init_args: {per: 1}}}]",
        ],
        ["callbacks[0].every_n_steps", "'per' is not accepted"],
    ),
    "callback schedule list": (
        ["small.yaml", "callbacks=[{name: gradient_tails, every_n_steps: [1]}]"],
        ["callbacks[0].every_n_steps: expected int or package.module.Class, not [1]"],
    ),
    "activation": (
        ["small.yaml", "model.norm={name: batch, act_layer: relu}"],
        ["model.norm.act_layer: expected null or package.module.Class, not 'relu'"],
    ),
    "activation class": (
        ["small.yaml", "model.norm={name: batch, act_layer: torch.nn.Relu}"],
        ["model.norm.act_layer: 'torch.nn.Relu' is not accepted", "has no attribute 'Relu'"],
    ),
    "callback folder in a file": (
        ["small.yaml", "callbacks=[{name: divergence, dirpath: small.yaml/records}]"],
        ["callbacks[0].dirpath: cannot make the folder 'small.yaml/records'", "small.yaml is not a folder"],
    ),
    "callback folder that is a file": (
        ["small.yaml", "callbacks=[{name: divergence, dirpath: small.yaml}]"],
        ["callbacks[0].dirpath: cannot make the folder 'small.yaml'", "small.yaml is not a folder"],
    ),
    "callback folder with a long name": (
        ["small.yaml", f"callbacks=[{{name: divergence, dirpath: {'d' * 300}}}]"],
        ["callbacks[0].dirpath: cannot make the folder 'ddd", "File name too long"],
    ),
    "callbacks shape": (["small.yaml", "callbacks=divergence"], ["callbacks", "a list"]),
    "optimizer": (["small.yaml", "optimizer=sgdd"], ["optimizer", "'sgd'"]),
    "optimizer key": (["small.yaml", "optimizer={name: sgd, lrr: 1}"], ["optimizer.lrr", "'lr'"]),
    "optimizer type": (["small.yaml", "optimizer={name: sgd, lr: fast}"], ["optimizer.lr", "float", "'fast'"]),
    "optimizer value": (["small.yaml", "optimizer={name: sgd, lr: -1.0}"], ["optimizer", "Invalid learning rate"]),
    "scheduler": (["small.yaml", "lr_scheduler=cosin"], ["lr_scheduler", "'cosine'"]),
    "scheduler option missing": (["small.yaml", "lr_scheduler=cosine"], ["lr_scheduler", "T_max"]),
    "optimizer of no value": (["small.yaml", "optimizer={name: sgd, lr: null}"], ["optimizer.lr", "not null"]),
    "not an optimizer": (
        ["small.yaml", "optimizer={class_path: torch.nn.Linear, init_args: {out_features: 4}}"],
        ["optimizer", "'torch.nn.Linear'", "not a subclass of Optimizer"],
    ),
    "not a scheduler": (["small.yaml", "lr_scheduler={class_path: torch.optim.SGD}"], ["lr_scheduler", "LRScheduler"]),
    "scheduler that cannot step": (
        ["small.yaml", "lr_scheduler={name: step, step_size: 0}"],
        ["lr_scheduler", "its first step fails", "ZeroDivisionError"],
    ),
    "scheduler that needs a metric": (
        ["small.yaml", "lr_scheduler={class_path: torch.optim.lr_scheduler.ReduceLROnPlateau}"],
        ["lr_scheduler", "ReduceLROnPlateau follows a metric"],
    ),
    "channels of other images": (["small.yaml", "model.in_chans=3"], ["model.in_chans: 3", "the data has 1"]),
    "no channels": (["small.yaml", "model.in_chans=0"], ["model.in_chans: 0", "the data has 1"]),
    "too few classes": (["small.yaml", "model.num_classes=9"], ["model.num_classes: 9", "the data has 10"]),
    "section": (["small.yaml", "optimzer.lr=1"], ["optimzer", "'optimizer'"]),
    "seed": (["small.yaml", "seed=-1"], ["small.yaml", "seed", "-1"]),
    "override": (["small.yaml", "lr"], ["'lr'", "KEY=VALUE"]),
    "override below a number": (["small.yaml", "seed.x=1"], ["seed"]),
    "class path": (["small.yaml", "callbacks=[{class_path: nowhere.Thing}]"], ["callbacks[0]", "nowhere"]),
    "class path member": (["small.yaml", "data={class_path: normzoo.data.Nothing}"], ["data", "Nothing"]),
    "class path beside options": (["small.yaml", "data={class_path: normzoo.data.CIFAR10, root: x}"], ["init_args"]),
    "init_args": (["small.yaml", "data={class_path: normzoo.data.CIFAR10, init_args: 3}"], ["data.init_args", "3"]),
    "not a data module": (
        ["small.yaml", "data={class_path: pathlib.Path}"],
        ["data", "not a subclass of LightningDataModule"],
    ),
    "seed too large": (["small.yaml", "seed=4294967296"], ["seed", "4294967295"]),
    "arch of no name": (["small.yaml", "model.arch=null"], ["model.arch"]),
    "override without value": (["small.yaml", "--trainer.max_epochs"], ["trainer.max_epochs", "KEY=VALUE"]),
    "override of extends": (["small.yaml", "extends=quickstart"], ["extends", "only in a file"]),
    "sweep of a sweep": (["small.yaml", "sweep={sweep: [1]}"], ["sweep", "cannot be swept"]),
    "trainer refuses": (["small.yaml", "trainer.limit_val_batches=7.5"], ["trainer", "limit_val_batches"]),
    "unit of time": (
        ["small.yaml", "trainer.max_time={hour: 1}"],
        ["trainer.max_time: 'hour' is not a known unit of time; did you mean 'hours'?"],
    ),
    "unit that is a number": (["small.yaml", "trainer.max_time={1: 2}"], ["trainer.max_time: '1' is not a known unit"]),
    "part of an hour": (
        ["small.yaml", "trainer.max_time={hours: 1.5}"],
        ["trainer.max_time.hours: expected a whole number, not 1.5"],
    ),
    "hours that are true": (["small.yaml", "trainer.max_time={hours: true}"], ["max_time.hours", "not True"]),
    "time that is a number": (
        ["small.yaml", "trainer.max_time=5"],
        ["trainer.max_time: expected a time as DD:HH:MM:SS, or a mapping such as {hours: 12}, not 5"],
    ),
    "time of two parts": (["small.yaml", "trainer.max_time=00:30"], ["trainer.max_time: expected a time", "'00:30'"]),
    "no time": (["small.yaml", "trainer.max_time={}"], ["trainer.max_time: must be above 0, not {}"]),
    "no time in digits": (["small.yaml", "trainer.max_time=00:00:00:00"], ["trainer.max_time: must be above 0"]),
    "time before": (["small.yaml", "trainer.max_time={hours: -1}"], ["must be above 0, not {'hours': -1}"]),
    "time without end": (
        ["small.yaml", f"trainer.max_time={{days: {10**12}}}"],
        ["trainer.max_time: {'days': 1000000000000} is longer than a time can be"],
    ),
    "time of many digits": (["small.yaml", f"trainer.max_time={'9' * 5000}:00:00:00"], ["trainer.max_time: expected"]),
    "unit of time between validations": (
        ["small.yaml", "trainer.val_check_interval={hour: 1}"],
        ["trainer.val_check_interval: 'hour' is not a known unit of time"],
    ),
    "time between validations": (
        ["small.yaml", "trainer.val_check_interval=daily"],
        ["trainer.val_check_interval: expected a number of batches, a time as DD:HH:MM:SS, or", "not 'daily'"],
    ),
    "unit of time of a timer": (
        ["small.yaml", "callbacks=[{class_path: lightning.pytorch.callbacks.Timer, init_args: {duration: {hour: 1}}}]"],
        ["callbacks[0].duration: 'hour' is not a known unit of time"],
    ),
    "profiler": (["small.yaml", "trainer.profiler=abc"], ["trainer", "'simple', 'advanced'"]),
    "option of a profiler": (
        [
            "small.yaml",
            "trainer.profiler={class_path: lightning.pytorch.profilers.SimpleProfiler, init_args: {dirpath: 3}}",
        ],
        [
            "trainer.profiler: ",
            ("is not accepted: dirpath: expected str, Path, null\n", "dirpath: expected null, str, Path\n"),
        ],
    ),
    "option of a strategy": (
        [
            "small.yaml",
            "trainer.strategy={class_path: lightning.pytorch.strategies.ModelParallelStrategy, "
            "init_args: {data_parallel_size: no}}",
        ],
        ["trainer.strategy: ", "is not accepted: data_parallel_size: expected 'auto', int\n"],
    ),
    "option of a plugin missing": (
        [
            "small.yaml",
            "trainer.plugins={class_path: lightning.pytorch.plugins.MixedPrecision, init_args: {precision: 16-mixed}}",
        ],
        ["trainer.plugins: ", "is not accepted: the following arguments are required: device\n"],
    ),
    "plugins": (["small.yaml", "trainer.plugins=[abc]"], ["trainer.plugins: expected", "not ['abc']"]),
    "strategy": (
        ["small.yaml", "trainer.strategy={a: 1}"],
        [
            (
                "trainer.strategy: expected str, not {'a': 1}\n",
                "trainer.strategy: {'a': 1} is not accepted: Option 'a' is not accepted\n",
            )
        ],
    ),
    "logger": (["small.yaml", "trainer.logger={a: {b: 1}}"], ["trainer.logger: 'logger' is not a known option"]),
    "yaml": (["broken.yaml"], ["broken.yaml", "line 2"]),
    "key twice": (["twice.yaml"], ["twice.yaml", "'seed'"]),
    "not a mapping": (["list.yaml"], ["list.yaml", "mapping"]),
    "section missing": (["nodata.yaml"], ["nodata.yaml", "'data'"]),
    "sweep shape": (["small.yaml", "sweep.optimizer.lr=3"], ["sweep", "list of values"]),
    "sweep key": (["small.yaml", "sweep={optimzer.lr: [1]}"], ["sweep", "'optimizer'"]),
    "extends itself": (["circle.yaml"], ["circle.yaml", "extends itself"]),
    "extends itself by another path": (["round.yaml"], ["x/../round.yaml", "extends itself"]),
    "a folder": (["folder.yaml"], ["folder.yaml", "Is a directory"]),
    "a pipe": (["pipe.yaml"], ["pipe.yaml", "empty"]),
    "endless": (["/dev/zero"], ["/dev/zero", "longer than"]),
    "null byte in the name": (["a\0.yaml"], ["null byte"]),
    "escape in the name": (["\x1b[31m\n.yaml"], ["\\x1b[31m"]),
    "long name": (["x" * 9999 + ".yaml"], ["xxx ... xxx", "too long"]),
    "not UTF-8": (["latin.yaml"], ["latin.yaml", "UTF-8", "byte 4"]),
    "keys that are numbers": (["small.yaml", "model.norm={class_path: a.B, 1: 2}"], ["model.norm", "not 1"]),
    "class path of no text": (["small.yaml", "model.norm={class_path: [a]}"], ["model.norm.class_path", "['a']"]),
    "init_args of nothing": (
        ["small.yaml", "optimizer={class_path: torch.optim.SGD, init_args: }", "sweep={optimizer.lr: [1]}"],
        ["optimizer.init_args", "not null"],
    ),
    "option of init_args of nothing": (
        ["small.yaml", "optimizer={class_path: torch.optim.SGD, init_args: }", "optimizer.lr=1"],
        ["override 'optimizer.lr=1'", "init_args is null"],
    ),
    "options that are numbers": (["small.yaml", "optimizer={name: sgd, 1: 2}"], ["optimizer.1", " lr,"]),
    "text that would be YAML": (["small.yaml", f"trainer.max_epochs='{'[' * 999}'"], ["trainer.max_epochs", "int"]),
    "date": (["small.yaml", "seed=2001-99-99"], ["seed", "'2001-99-99'"]),
    "depth of a value": (["small.yaml", f"seed={'[' * 500}"], ["override", "32 deep"]),
    "depth of a key": (["small.yaml", f"model{'.a' * 500}=1"], ["override", "at most 32"]),
    "empty key": (["small.yaml", "model..norm=1"], ["override 'model..norm=1'"]),
    "no key": (["small.yaml", "="], ["'='"]),
    "dots": (["small.yaml", "..=1"], ["override '..=1'"]),
    "alias within itself": (["small.yaml", "trainer=&t {plugins: *t}"], ["override", "alias", "contains it"]),
    "position with other digits": (["small.yaml", "callbacks=[divergence]", "callbacks.\u00b2=1"], ["\u00b2"]),
    "bytes that are no text": (["small.yaml", "model.\udce4=1"], ["\\udce4", "not UTF-8"]),
    "callbacks that are none": (["small.yaml", "callbacks=0"], ["callbacks", "a list", "0"]),
    "trainer that is none": (["small.yaml", "trainer=[]"], ["trainer", "mapping", "[]"]),
    "callback twice": (
        ["small.yaml", "callbacks=[lr_monitor, divergence, divergence]"],
        ["callbacks[2]: the same as callbacks[1]"],
    ),
    "rate that is no number": (["small.yaml", "optimizer={name: sgd, lr: .nan}"], ["optimizer.lr: nan"]),
    "infinite rate": (["small.yaml", "optimizer={name: sgd, lr: '1e999'}"], ["optimizer.lr: inf"]),
    "no number in a list": (["small.yaml", "optimizer={name: adam, betas: [.nan, 0]}"], ["optimizer.betas: nan"]),
    "no number for a norm": (["small.yaml", "model.norm={name: group, eps: .nan}"], ["model.norm.eps: nan"]),
    "rate that is true": (["small.yaml", "optimizer={name: sgd, lr: true}"], ["optimizer.lr", "not True"]),
    "module that exits": (["small.yaml", "callbacks=[{class_path: exits.X}]"], ["callbacks[0]", "SystemExit"]),
    "folder name too long": (["small.yaml", f"data={{name: cifar10, root: {'x' * 999}}}"], ["data", "too long"]),
    "points": (
        ["small.yaml", f"sweep={{seed: {[*range(101)]}, optimizer.lr: {[*range(100)]}}}"],
        ["10,100 points", "10,000"],
    ),
    "axis of no key": (["small.yaml", "sweep={model..norm: [1]}"], ["sweep: 'model..norm'"]),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(SMALL)
    (tmp_path / "broken.yaml").write_text("model: {arch: x\nseed: ]")
    (tmp_path / "twice.yaml").write_text(SMALL + "seed: 1\nseed: 2\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "nodata.yaml").write_text("model: {arch: resnet20_cifar}\n")
    (tmp_path / "circle.yaml").write_text("extends: circle.yaml\n")
    (tmp_path / "x").mkdir()
    (tmp_path / "round.yaml").write_text("extends: x/../round.yaml\n")
    (tmp_path / "folder.yaml").mkdir()
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "latin.yaml").write_bytes("# \xe4".encode() + "\xe4".encode("latin-1"))
    (tmp_path / "exits.py").write_text("raise SystemExit(3)\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("command", ["validate", "run"])
def test_one_line_and_exit_code_2(case: str, command: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(folder.iterdir())
    arguments, expected = CASES[case]
    assert main([command, *arguments]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1, error
    assert len(error) <= 300
    assert error.strip().isprintable()
    for part in expected:
        wordings = (part,) if isinstance(part, str) else part  # the messages of newer jsonargparse, or older
        assert any(wording in error for wording in wordings), error
    assert "Traceback" not in error
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    "time",
    [
        "trainer.max_time={days: 1, hours: 12}",
        "trainer.max_time=01:12:00:00",
        "trainer.max_time={hours: -1, minutes: 61}",
        "trainer.max_time=null",
        "trainer.val_check_interval={minutes: 5}",
        "trainer.val_check_interval=00:00:05:00",
        "trainer.val_check_interval=0.5",
        "callbacks=[{class_path: lightning.pytorch.callbacks.Timer, init_args: {duration: {hours: 1}}}]",
    ],
)
def test_times_are_accepted_in_both_forms_as_lightning_does(time: str, folder: Path) -> None:
    recipe = read("small.yaml", [time])
    build(recipe.config, recipe.source).trainer(logger=False, default_root_dir=folder)


@pytest.mark.parametrize("norm", ["{name: group, groups: 5}", "group+ws", "group"])
def test_groups_that_do_not_divide_become_some_that_do(norm: str, folder: Path) -> None:
    assert main(["validate", "small.yaml", f"model.norm={norm}"]) == 0


def test_an_existing_folder_is_never_overwritten(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "mine").mkdir()
    (folder / "mine" / "notes").write_text("keep")
    assert main(["run", "small.yaml", "--out", "mine"]) == 2
    assert "never overwritten" in capsys.readouterr().err
    assert [p.name for p in (folder / "mine").iterdir()] == ["notes"]


def test_a_folder_needs_a_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "small.yaml", "--out", ""]) == 2
    assert "--out: expected the name of a new folder, not ''" in capsys.readouterr().err


def test_overrides_are_not_said_to_be_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["validate"])
    assert "the following arguments are required: recipe; see" in capsys.readouterr().err


def test_a_sweep_needs_a_grid(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "small.yaml"]) == 2
    assert "no sweep: section" in capsys.readouterr().err


def test_a_sweep_refuses_processes_that_run_the_command_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "small.yaml", "sweep={seed: [1, 2]}", "trainer.devices=2"]) == 2
    assert "ddp_spawn" in capsys.readouterr().err


def test_a_report_needs_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "."]) == 2
    assert "no runs in ." in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["lst"], ["show"], ["list", "norm"], [], ["run", "x", "-x" * 999 + "\x1b"]])
def test_argparse_errors_have_the_same_exit_code(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert len(error) <= 300
    assert error.strip().isprintable()


@pytest.mark.parametrize("command", ["show", "sweep", "run", "validate"])
@pytest.mark.parametrize("recipe", ["folder.yaml", "pipe.yaml", "latin.yaml", "broken.yaml", "a\0.yaml", "circle.yaml"])
def test_other_commands_say_the_same(
    command: str, recipe: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(folder.iterdir())
    assert main([command, recipe]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert sorted(folder.iterdir()) == before
