"""Whatever a recipe or override holds: it works, or ends with exit code 2, one short line and nothing written."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sweeps import EXAMPLES

import normzoo.cli.rehearse
import normzoo.cli.run
from normzoo.cli.main import main

OWN = """
import lightning.pytorch as pl
import torch
from torch import nn

class Model(pl.LightningModule):
    def __init__(self, width: int = 10, rate: float = 0.1):
        super().__init__()
        self.net, self.rate = nn.Linear(784, width), rate
    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0].flatten(1)), batch[1])
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.rate)
"""
SMALL: dict[str, Any] = {
    "seed": 3,
    "model": {"class_path": "fuzzed_parts.Model", "init_args": {"width": 10}},
    "data": {"name": "fashion_mnist", "batch_size": 4},
    "trainer": {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "limit_train_batches": 2,
        "max_time": "00:01:00:00",
    },
    "callbacks": [{"name": "gradient_tails", "every_n_steps": 2}, "divergence"],
}
ZOO: dict[str, Any] = {
    **SMALL,
    "model": {"arch": "resnet20_cifar", "norm": {"name": "group", "groups": 8}, "channels_last": True},
    "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
    "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1}},
    "sweep": {"optimizer.lr": [0.1], "callbacks.divergence.strict": [True]},
}
GOOD = [SMALL, ZOO, {"extends": "base.yaml", "seed": 1, "trainer": {"precision": "bf16-mixed"}}]


def values(text: str) -> list[str]:
    """Those that a text has, with three spaces or the end of a line after each."""
    return [value.strip() for line in text.splitlines() for value in line.split("   ") if value.strip()]


# As they are written; most are wrong at most places
SCALARS = [
    *values(
        r"""
        null   ~   true   no   0   1   -1   7   2147483648   -9223372036854775809   1e400   0.5   -0.5   1e-3   .nan
        .inf   -.inf   010   0x1f   0x_   0b_   1_0   1:30   2001-01-01   2001-99-99   ''   x   =   <<   '<<'   '0x_'
        '2001-99-99'   '{a: *b}'   '[[['   '\0'   "\0"   "\x1b[31m"   "\ud800"   "\U00110000"   "a\nb\n"   ä   [red]
        group   batch   sgd   divergence   fashion_mnist   auto   gpu   ddp   quickstart   /   ..   a/b   os.system   .
        torch.nn.Linear   torch.optim.Optimizer   lightning.pytorch.Callback   builtins.dict   nowhere.At
        """
    ),
    *("9" * 30, "9" * 5000, "0x" + "f" * 5000, f"'{'[' * 999}'", "'" + "long " * 99 + "'", "a" * 3000, "\t"),
]
NODES = [
    *values(
        """
        !!set {a}   !!omap [a: 1]   !!binary aGk=   !!timestamp 2001-01-01   !!python/name:os.system ''   !own x
        !!str 3   !!int x   !!int ''   !!float 3   !!bool x   !!null x   !!map []   !!seq {}   []   {}   [null]   {1: 2}
        {null: 1}   {.nan: 1}   {true: 1, 1: 2}   {a: 1, a: 2}   {[a]: 1}   {? {a: 1} : 2}   &a [*a]   &b {c: *b}   *no
        &m {name: group}   {<<: {name: sgd}, lr: 1}   {<<: [{a: 1}, 3]}   {<<: 3}   - - a   a: b: c   %   @   `   |
        ? a   ---   {class_path: x}   {class_path: null}   {class_path: 3, init_args: 4}   {class_path: a.B, 1: 2}
        {init_args: }   {class_path: torch.optim.SGD, init_args: }   {class_path: torch.optim.SGD, init_args: [lr]}
        {name: [1]}   {name: sgd, 1: 2}   {class_path: normzoo.callbacks.Warmup, init_args: {start: 1}}
        [divergence, divergence]   [lr_monitor, {name: x}]   [&x [1, 2], *x, *x, [*x, &y [*x, *x], *y]]
        """
    ),
    *("[" * 40 + "]" * 40, "{a: " * 40 + "}" * 40, "[" * 2000, "{a: " * 500),
    "[&l0 [x, x], " + ", ".join(f"&l{i + 1} [{', '.join([f'*l{i}'] * 10)}]" for i in range(8)) + "]",
]
WILD = st.one_of(
    st.sampled_from(SCALARS),
    st.sampled_from(NODES),
    st.text(max_size=6),
    st.integers(-(2**70), 10_000).map(str),
    st.floats().map(lambda x: repr(x) if math.isfinite(x) else f".{str(x).replace('-', '')}"),
)
TOKENS = [*": \n\t\0-[]{},#|>%'\"\ufeff", "&a ", "*a", "<<: ", "!!"]


def positions(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from positions(value, (*path, key))


@st.composite
def changed(draw: st.DrawFn) -> str:
    """The text of a good recipe with values and keys replaced, removed, added and moved."""
    config = copy.deepcopy(draw(st.sampled_from(GOOD)))
    raw: list[str] = []

    def wild() -> str:
        raw.append(draw(WILD))
        return f"@{len(raw) - 1}@"

    for _ in range(draw(st.integers(1, 3))):
        *above, last = draw(st.sampled_from([*positions(config)] or [("seed",)]))
        node = config
        for step in above:
            node = node[step]
        kind = draw(st.sampled_from(["value", "value", "value", "remove", "key", "add", "wrap", "move"]))
        if kind == "value":
            node[last] = wild()
        elif kind == "remove":
            node.pop(last, None) if isinstance(node, dict) else node.pop(last)
        elif kind == "wrap":
            node[last] = draw(st.sampled_from([[node[last]], {"name": node[last]}, {"a": node[last]}]))
        elif kind == "move":
            node[last] = copy.deepcopy(draw(st.sampled_from([*SMALL.values(), *ZOO.values()])))
        elif isinstance(node, dict):
            node[wild()] = wild() if kind == "add" else node.pop(last, None)
        else:
            node.append(wild())
    text = json.dumps(config)
    for i, written in enumerate(raw):
        text = text.replace(f'"@{i}@"', written)
    return text


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """The bytes of a good recipe with some changed, cut, doubled and added."""
    data = json.dumps(draw(st.sampled_from(GOOD)), indent=draw(st.sampled_from([None, 1]))).encode()
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        to = draw(st.integers(at, min(len(data), at + 20)))
        new = draw(
            st.one_of(
                st.binary(max_size=3), st.sampled_from(TOKENS).map(str.encode), st.just(data[at:to] * 2), st.just(b"")
            )
        )
        data = data[:at] + new + data[to:]
    return draw(st.sampled_from([data, data, data, data[: len(data) // 2], b"\xff\xfe" + data, b"\xef\xbb\xbf" + data]))


KEYS = [
    *(".".join(map(str, path)) for path in positions(ZOO)),
    *values(". .. model..norm seed.x nowhere extends sweep callbacks.9 callbacks.² <<".replace(" ", "   ")),
    *values(
        "trainer.plugins   trainer.strategy   trainer.profiler   trainer.val_check_interval   model.norm.act_layer"
    ),
    *("", "model.\x1b", "model.\udce4", "model" + ".a" * 400),
]
OVERRIDES = st.one_of(
    st.tuples(st.sampled_from(KEYS), WILD).map("=".join),
    st.tuples(st.sampled_from(["", "-", "--"]), st.sampled_from(KEYS)).map("".join),
    st.text(st.characters(codec=None), max_size=8),
    st.sampled_from(["=", "==", "--", "---", "-x", "--out", "--out=", "--=", "x=", " = "]),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder to work in, where nothing trains for long."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "fuzzed_parts.py").write_text(OWN)
    (folder / "base.yaml").write_text(json.dumps(SMALL))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", [*sys.path])
        patch.setattr(sys, "dont_write_bytecode", True)
        patch.setattr(normzoo.cli.run, "train", lambda *args: normzoo.cli.run.Outcome("finished", 0))
        patch.setattr("normzoo.cli.report.try_report", lambda folder, code: code)
        yield folder


def check(folder: Path, command: str, recipe: bytes, overrides: list[str], tried: bool) -> int:
    """Run a command on a recipe and hold it to its promise; without the step unless ``tried``, which takes longer."""
    path = folder / "fuzzed.yaml"
    path.write_bytes(recipe)
    before = sorted(folder.iterdir())
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(normzoo.cli.run, "new_folder", lambda out, name: folder)
        if not tried:
            patch.setattr(normzoo.cli.rehearse, "_why_not", lambda *args: "no step")
        try:
            code = main([command, "fuzzed.yaml", *overrides])
        except SystemExit as stop:  # of argparse
            code = stop.code
    assert code in (0, 2), err.getvalue()
    if code == 2:
        line = err.getvalue()
        assert out.getvalue() == ""
        assert line.endswith("\n")
        assert line.rstrip("\n").isprintable(), line
        assert len(line.rstrip("\n")) <= 300
        assert line.startswith("normzoo")
    assert sorted(folder.iterdir()) == before
    return code


def hold(examples: int, one_in: int) -> Any:
    """Examples for the four kinds of recipes; the step is made for one in so many."""

    def decorate(test: Any) -> Any:
        given_ = given(
            st.sampled_from(["validate", "run"]),
            st.one_of(changed().map(lambda text: text.encode("utf-8", "surrogatepass")), damaged()),
            st.one_of(st.just([]), st.lists(OVERRIDES, min_size=1, max_size=2)),
            st.integers(1, one_in).map(lambda i: i == one_in),
        )
        some = settings(
            max_examples=examples, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
        )
        return some(given_(test))

    return decorate


@hold(100, one_in=40)
def test_any_recipe(folder: Path, command: str, recipe: bytes, overrides: list[str], tried: bool) -> None:
    check(folder, command, recipe, overrides, tried)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@hold(EXAMPLES, one_in=10)
def test_any_of_many_recipes(folder: Path, command: str, recipe: bytes, overrides: list[str], tried: bool) -> None:
    check(folder, command, recipe, overrides, tried)


@pytest.mark.parametrize("config", GOOD)
@pytest.mark.parametrize("command", ["validate", "run"])
def test_what_the_fuzzer_starts_from_is_good(folder: Path, command: str, config: dict[str, Any]) -> None:
    assert check(folder, command, json.dumps(config).encode(), [], tried=True) == 0


@pytest.mark.parametrize("key", ["seed", "callbacks", "trainer.devices"])
def test_each_wild_value(folder: Path, key: str) -> None:
    section, _, option = key.partition(".")
    head = json.dumps({k: v for k, v in SMALL.items() if k != section})[:-1]
    for written in [*SCALARS, *NODES]:
        value = f"{{{option}: {written}}}" if option else written
        text = f'{head}, "{section}": {value}}}'
        check(folder, "validate", text.encode("utf-8", "surrogatepass"), [], tried=False)


def test_each_wild_value_as_an_override(folder: Path) -> None:
    for written in [*SCALARS, *NODES]:
        check(folder, "validate", json.dumps(SMALL).encode(), [f"trainer={written}"], tried=False)
