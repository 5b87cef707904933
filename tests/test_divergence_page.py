"""The example of docs/divergence.md runs as it stands, and what the page says of it is so."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from normzoo import Capsule, load_capsule, load_run

PAGE = (Path(__file__).parents[1] / "docs" / "divergence.md").read_text(encoding="utf-8")
DEADLINE = 240  # seconds, of a command
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[-+]?\d+)?")
NAME = re.compile(
    r"\S+(?:weight|bias)\b|/\S*/(?=lightning_logs)"
)  # of a parameter, or of a folder before that of the logs

pytestmark = pytest.mark.slow


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def shape(line: str) -> str:
    """A line without what differs between machines: numbers, and which parameters have the largest gradients."""
    text = NUMBER.sub("N", NAME.sub("NAME", re.sub("─+", "─", line)))
    return " ".join(re.sub("N(, N)+", "N", text).split())  # how many steps are told depends on the largest norm's


def run(command: str, folder: Path) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=DEADLINE,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[str, str, str]]]:
    """The folder in which the commands of the page were run, and of each what the page shows, and what it printed."""
    folder = tmp_path_factory.mktemp("example")
    (folder / "train.py").write_text(blocks("py")[0])
    commands = [
        (command, shown, run(command, folder))
        for console in blocks("console")
        for command, shown in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", console, re.MULTILINE)
    ]
    return folder, commands


@pytest.fixture(scope="module")
def capsule(printed: tuple[Path, object]) -> Capsule:
    return load_capsule(printed[0] / "lightning_logs" / "version_0")


def norms(folder: Path, version: int) -> pd.DataFrame:
    return load_run(folder / "lightning_logs" / f"version_{version}")["gradient_norm"]


def test_the_script_is_short() -> None:
    assert len(blocks("py")[0].splitlines()) <= 50


def test_the_commands_print_what_the_page_shows(printed: tuple[Path, list[tuple[str, str, str]]]) -> None:
    assert [command.split()[0] for command, _, _ in printed[1]] == [
        "python",
        "normzoo",
        "normzoo",
        "sed",
        "python",
        "normzoo",
    ]
    for command, shown, output in printed[1]:
        lines = [shape(line) for line in output.replace("\r", "\n").splitlines()]
        for line in filter(None, map(shape, shown.splitlines())):
            assert line == "..." or line.replace("...", "N") in lines, f"{command} printed\n{output}"


def test_the_alarm_is_of_the_gradient_and_its_steps_are_made_again(capsule: Capsule) -> None:
    about = capsule.about
    assert about["rule"] == "gradient spike"
    assert 40 <= about["step"] <= 65
    remade = about["remade"]
    assert (remade["first_difference"], remade["why_not"], remade["to"]) == (None, "", about["step"])
    assert remade["from"] % 16 == 0
    assert 16 <= about["step"] - remade["from"] < 32


def test_the_capsule_shows_the_rise_and_its_cause(capsule: Capsule) -> None:
    """All gradients that are large rise, those of the first block most; the updates were too long before."""
    record = capsule.records["parameter_norms"]
    first, last = (
        record[record["step"] == step].set_index("layer") for step in (record["step"].min(), record["step"].max())
    )
    largest = last["gradient"].nlargest(6).index
    assert (last["gradient"] / first["gradient"])[largest].min() > 3
    assert any(name.startswith("encoder.layers.0.") for name in largest[:3])
    assert first["relative_update"].median() > 0.03
    assert last["relative_update"].median() < 10 * first["relative_update"].median()
    assert first["gradient"].max() < 30


def test_the_run_with_the_other_learning_rate_holds(printed: tuple[Path, list[tuple[str, str, str]]]) -> None:
    folder, commands = printed
    assert load_run(folder / "lightning_logs" / "version_1")["divergence"].empty
    assert not (folder / "lightning_logs" / "version_1" / "capsules").exists()
    assert norms(folder, 0)["norm"].max() > 1e4
    assert norms(folder, 1)["norm"].max() < 10
    updates = [norms(folder, v).groupby("step")["relative_update"].median() for v in (0, 1)]
    assert updates[0][50] > 3 * updates[1][50]
    assert updates[1][150] < 3e-2
    losses = re.findall(r"loss: ([\d.]+)", commands[4][2])
    assert float(losses[-1]) < 0.5


@pytest.mark.parametrize("block", blocks("py")[1:])
def test_the_examples_run(block: str, printed: tuple[Path, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(printed[0])
    exec(compile(block, "divergence.md", "exec"), {})


@pytest.mark.parametrize(
    ("before", "planted", "shown"),
    [
        ("self.log(", "loss = loss * 1e4", r"At steps 16, [\d, ]+, 44, 45: loss [\d., ]+ \d\.\d+, 4\d{4}; "),
        (
            "(tokens,) = batch",
            'self.encoder.layers[2].linear1.weight.data[3, 5] = float("nan")',
            r"Step 45 .* 52 parameters. Weights are not finite before its update: encoder.layers.2.linear1.weight.\n",
        ),
        (
            "(tokens,) = batch",
            'raise ValueError("label")',
            r"the run failed at step 45: ValueError: label\n- At steps 16, [\d, ]+, 43, 44: loss ",
        ),
    ],
)
def test_other_causes_look_different(before: str, planted: str, shown: str, tmp_path: Path) -> None:
    script = blocks("py")[0].replace("RATE = 0.3", "RATE = 3e-3").replace("max_epochs=1", "max_steps=50")
    start, end = script.split(f"        {before}")
    plant = f"        if self.global_step == 45:\n            {planted}\n"
    (tmp_path / "train.py").write_text(f"{start}{plant}        {before}{end}")
    run("python train.py || true", tmp_path)
    assert re.search(shown, run("normzoo report lightning_logs/version_0", tmp_path))
