"""The command that replays: which capsule, in how many processes, and what is said of mistakes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import replays_small
from capsules_small import make_capsule
from lightning.pytorch import LightningModule
from ranks import TESTS, run_function
from replays_small import run, run_ranks_of

from normzoo._errors import RecipeError
from normzoo.capsules import Capsule, load_capsule
from normzoo.causes import Finding, Findings, read_findings
from normzoo.causes.titles import TITLES
from normzoo.cli.main import _join_overrides, build_parser, main
from normzoo.cli.replay import _again, _processes, chosen, run_folder
from normzoo.replaying.fit import in_a_fit
from normzoo.replaying.stage import Stage


def test_of_several_capsules_that_of_the_latest_alarm_is_chosen(tmp_path: Path) -> None:
    run = tmp_path / "version_0"
    for name in ("000_step_00000005", "002_step_00000031"):
        make_capsule(run / "capsules" / name)
    make_capsule(run / "capsules" / "003_interrupted", kind="signal")
    (run / "capsules" / "004_step_00000099").mkdir()  # not finished
    capsule, others = chosen(run)
    assert (capsule.path.name, others) == ("002_step_00000031", [0, 3])
    assert chosen(tmp_path)[0].path == capsule.path  # the only run in it
    assert chosen(run, 0)[0].path.name == "000_step_00000005"
    assert chosen(capsule.path)[1] == []
    assert run_folder(capsule.path) == run
    with pytest.raises(RecipeError, match=r"no capsule 1; it has 0, 2, 3"):
        chosen(run, 1)
    with pytest.raises(RecipeError, match=r"is a capsule itself"):
        chosen(capsule.path, 2)
    make_capsule(tmp_path / "version_1" / "metrics" / "capsules" / "000_interrupted", kind="exception")
    with pytest.raises(RecipeError, match=r"several runs with capsules; give one of .*version_0, .*version_1"):
        chosen(tmp_path)
    assert chosen(tmp_path / "version_1")[0].about["kind"] == "exception"
    (tmp_path / "version_1" / "recipe.yaml").touch()
    assert run_folder(chosen(tmp_path / "version_1")[0].path) == tmp_path / "version_1"


@pytest.mark.parametrize("what", ["nothing", "a file", "no capsules", "an unfinished one"])
def test_a_folder_without_a_capsule_is_refused_in_one_line(
    tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    if what == "a file":
        run.touch()
    elif what != "nothing":
        run.mkdir()
    if what == "an unfinished one":
        (run / "capsules" / "000_step_00000005").mkdir(parents=True)
    assert main(["replay", str(run)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_capsule_of_a_plain_loop_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make_capsule(tmp_path / "loop", ranks=1, settings={"module": "torch.nn:Linear", "threads": 1})
    assert main(["replay", str(made)]) == 2
    assert "is of a plain loop, whose steps cannot be made again" in capsys.readouterr().err


def test_a_capsule_is_replayed_in_as_many_processes_as_its_run_had(tmp_path: Path) -> None:
    one = load_capsule(make_capsule(tmp_path / "one", ranks=1))
    two = load_capsule(make_capsule(tmp_path / "two"))
    many = load_capsule(make_capsule(tmp_path / "many", ranks=1, settings={}))
    many.about["ranks"] = 10_000
    lacking = load_capsule(make_capsule(tmp_path / "lacking", missing=(1,)))
    sharded = load_capsule(make_capsule(tmp_path / "sharded", settings={"strategy": "ModelParallelStrategy"}))
    assert _processes(one, None) == (1, "")
    assert _processes(two, None)[0] == _processes(two, 2)[0] == 2
    assert _processes(two, 1)[0] == 1
    assert "not bit for bit" in _processes(two, 1)[1]
    assert "without rank 1 of 2" in _processes(lacking, None)[1]
    assert _processes(many, None)[0] == 1
    assert _processes(many, 10_000)[0] == 10_000
    assert _processes(sharded, None)[0] == 2
    for capsule, asked, text in (
        (two, 3, "the capsule is of 2 ranks; give 2, or 1, not 3"),
        (one, 2, "give 1, not 2"),
        (lacking, 2, "in one process only: --ranks 1"),
        (sharded, 1, "sharded over 2 ranks"),
    ):
        with pytest.raises(RecipeError, match=text):
            _processes(capsule, asked)


def test_options_go_to_the_ranks_as_they_were_given(tmp_path: Path) -> None:
    line = ["replay", "--module", "a.b:C", str(tmp_path), "--init=x y.yaml", "--ranks", "2", "--sites", "net.*"]
    arguments = build_parser().parse_args(_join_overrides(line))
    assert (arguments.module, arguments.init, arguments.ranks) == ("a.b:C", "x y.yaml", 2)
    capsule = load_capsule(make_capsule(tmp_path / "-c"))
    again = build_parser().parse_args(_join_overrides(_again(capsule, arguments)))
    assert (again.path, again.module, again.init, again.sites) == (str(capsule.path), "a.b:C", "x y.yaml", ["net.*"])


# The whole


def only_the_losses(capsule: Capsule, module: LightningModule, **options: Any) -> Findings:
    """Stands in for :func:`normzoo.replay`, which takes longer."""

    def ask(stage: Stage) -> str:
        stage.go_to(stage.steps[0])
        return f"The losses are {[stage.train(step) for step in stage.steps]}."

    fact = in_a_fit(capsule, module, ask, callbacks=options["callbacks"])
    return Findings([Finding("undetermined", "low", "Nobody asked.", "", sorted(TITLES)[0], "", 0.0)], [fact])


def test_a_run_is_replayed_and_reported_and_mistakes_are_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("normzoo.replaying.replay", only_the_losses)
    monkeypatch.chdir(tmp_path)
    folder = run(tmp_path, samples=240)
    (tmp_path / "wrong.yaml").write_text("sharded: 3\nratio: 1")
    (tmp_path / "larger.py").write_text(LARGER)
    (tmp_path / "fails.py").write_text(FAILS)
    capsys.readouterr()
    for options, code, text in (
        ([], 0, ""),
        (["--init", "wrong.yaml"], 2, "Net has no argument 'ratio'; did you mean rate?"),
        (
            ["--module", "larger.py"],
            2,
            "'net.5.weight' has the shape (3, 144) in the capsule and (5, 144) in the",
        ),
        (["--ranks", "2"], 2, "the capsule is of one rank; give 1, not 2"),
        (["--capsule", "7"], 2, "has no capsule 7; it has 0"),
        (["--module", "fails.py"], 1, "normzoo: the replay failed: ZeroDivisionError: on purpose"),
    ):
        assert main(["replay", str(folder), *options]) == code
        said = capsys.readouterr()
        assert text in said.err
        assert code != 2 or said.err.count("\n") == 1
        if not code:
            assert "alarm at step 11" in said.out or "diverged at step 11" in said.out
            assert f"the module: Net in {replays_small.__file__}" in said.out
            assert "- The losses are [" in said.out
            assert said.out.endswith(f"report: {folder / 'report.html'}\n")


LARGER = """
from replays_small import Net
from torch import nn
class Larger(Net):
    def __init__(self):
        super().__init__()
        self.net[5] = nn.Linear(144, 5)
"""
FAILS = """
from replays_small import Net
class Fails(Net):
    def training_step(self, batch, batch_idx):
        raise ZeroDivisionError("on purpose")
"""


@pytest.mark.slow
def test_a_run_is_replayed_with_all_questions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(tmp_path, net={"rate": 0.02}, samples=240)
    assert main(["replay", str(folder)]) == 0
    said = capsys.readouterr().out
    assert str(read_findings(folder / "capsules" / "000_step_00000011" / "replay")) in said


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whole", "sharded"])
def test_a_run_of_two_ranks_is_replayed_by_two(
    tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_function(tmp_path, run_ranks_of, 2, str(tmp_path), kind)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), *sys.path]))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert main(["replay", str(tmp_path / "lightning_logs" / "version_0")]) == 0
    said = capfd.readouterr().out
    assert "replaying in 2 processes, as many as the run had" in said
    assert "with the losses of the run" in said
