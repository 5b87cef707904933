"""Whatever breaks a run, and on whichever ranks: one verdict, a whole capsule, and the run can be resumed."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import torch
from callbacks_small import SmallNet, loader, trainer
from capsules_small import make_capsule
from faulty_runs import AT, EVERY, PATIENCE, batches_of, fits
from perturbation import differences
from ranks import exit_codes
from sweeps import few, slow

from normzoo import Capsule, load_capsule, load_run
from normzoo.callbacks import Divergence
from normzoo.callbacks._run.isolation import HostCopies
from normzoo.capsules.folder import capsule_folders, unfinished
from normzoo.capsules.sealed import CapsuleError
from normzoo.testing.faults import FAULTS, POINTS

Plan = dict[str, Any]
DEADLINE = 60  # seconds, of each start of processes
KILLED, STOPPED = -9, 79  # exit codes
ENDING = ["exception", "sigterm", "sigkill"]
INNOCENT = ["dead_channel", "overflow"]
REPEATED = ["gradient_nan", "gradient_inf", "learning_rate"]  # when steps are made again
FEW = ["loss_nan", "gradient_nan", "dead_channel"]
SOME = [*FEW, "batch_scale", "weight_bit"]


def start(folder: Path, ranks: int, **plans: Plan) -> list[int]:
    """The exit codes of processes in which these fits are run, each in a folder of its name."""
    return exit_codes(folder / "processes", fits, ranks, str(folder), json.dumps(plans), deadline=DEADLINE)


def output(folder: Path) -> str:
    return (folder / "processes" / "output.txt").read_text()


def run(folder: Path, ranks: int, **plans: Plan) -> None:
    codes = start(folder, ranks, **plans)
    assert codes == [0] * ranks, output(folder)[-3000:]


def left(folder: Path, of_rank: int) -> dict[str, Any]:
    whole: dict[str, Any] = torch.load(folder / f"left{of_rank}.pt", weights_only=False)
    return whole


def assert_same_state(a: Path, b: Path, ranks: int, but: str = "") -> None:
    for rank in range(ranks):
        pair = [left(folder, rank)["state"] for folder in (a, b)]
        found = differences(*({key: value for key, value in state.items() if key != but} for state in pair))
        assert not found, f"rank {rank}: {found[:5]}"


def losses_of(folder: Path, ranks: int) -> dict[int, list[list[float]]]:
    """Of each step, and each rank, the losses of the micro-batches, as the run itself has seen them."""
    losses: dict[int, list[list[float]]] = {}
    for rank in range(ranks):
        for step, loss in json.loads((folder / f"losses{rank}.json").read_text()):
            losses.setdefault(step, [[] for _ in range(ranks)])[rank].append(loss)
    return losses


def first_bad_step(folder: Path, ranks: int, plan: Plan) -> int | None:
    """The first step with a loss, or a norm of the gradient, that is none, by what was logged."""
    losses = {
        step: [loss for of_rank in of_ranks for loss in of_rank] for step, of_ranks in losses_of(folder, ranks).items()
    }
    norms = load_run(folder / "log")["gradient_norm"]
    bad = [step for step, of_step in losses.items() if any(plan.get("threshold", 1e3) < x < math.inf for x in of_step)]
    if not plan.get("scaled"):
        bad += [step for step, of_step in losses.items() if not all(map(math.isfinite, of_step))]
        bad += norms["step"][(norms["of"] == "") & ~np.isfinite(norms["norm"])].tolist()
    return min(bad, default=None)


def assert_frames(capsule: Capsule, losses: dict[int, list[list[float]]], until: int, ranks: int, plan: Plan) -> None:
    """There are frames of all ranks up to a step, with their losses and, of each rank that has written, its batches."""
    each, accumulation = 1 + plan.get("several", False), plan.get("accumulation", 1)
    frames = capsule.frames[capsule.frames["step"] < until]
    for (step, rank), rows in frames.groupby(["step", "rank"]):
        expected = np.array(losses[step][rank], np.float32)
        np.testing.assert_array_equal(rows["loss"].to_numpy(np.float32), expected)
    for rank in capsule.ranks:
        tree = capsule.tree(rank)
        steps = [frame["step"] for frame in tree["frames"]]
        assert steps == list(range(steps[0], steps[-1] + 1, each))
        assert steps[0] <= max(steps[-1] - EVERY, 0)
        assert steps[-1] >= until - 1
        assert steps[0] == tree["snapshots"][0]["step"]
        before = [step for step in steps if step < until]
        assert {*frames.groupby(["step", "rank"]).groups} >= {(s, r) for s in before for r in range(ranks)}
        for step in before:
            batches = batches_of(step // each, rank, accumulation, ranks)
            assert not differences(capsule.batches(step, rank), batches)


def assert_verdict(folder: Path, ranks: int, plan: Plan) -> int | None:
    """All ranks have one verdict, on the step at which the run has broken; if there is one, a whole capsule says so."""
    verdicts = [left(folder, rank)["verdict"] for rank in range(ranks)]
    assert not any(differences(verdicts[0], verdict) for verdict in verdicts)
    step = first_bad_step(folder, ranks, plan)
    rows = load_run(folder / "log")["divergence"]
    assert (verdicts[0]["step"], rows["step"].tolist()) == (step, [] if step is None else [step])
    assert unfinished(folder / "log") == []
    if step is None:
        assert capsule_folders(folder / "log") == []
        return None
    capsule = load_capsule(folder / "log" / rows["capsule"][0])
    about, remade = capsule.about, capsule.about["remade"]
    assert (about["kind"], about["step"], about["ranks"], about["missing"]) == ("divergence", step, ranks, [])
    assert about["rule"] == rows["rule"][0]
    assert_frames(capsule, losses_of(folder, ranks), step, ranks, plan)
    assert (remade["why_not"], remade["to"]) == ("", step)
    # A norm may be judged before the loss of its step has come, with which that of the step made again is compared
    repeated = plan["fault"] in REPEATED or about["rule"] == "gradient not finite"
    assert remade["first_difference"] == (None if repeated else AT)
    assert {*capsule.records} >= {"gradient_norm", "parameter_norms"}
    return step


CELLS = [
    (2, {"how": "ddp"}, FEW),
    slow(1, {"how": "one"}, [fault for fault in FAULTS if fault not in (*ENDING, "overflow")], id="one"),
    slow(1, {"how": "one", "scaled": True}, [fault for fault in FAULTS if fault not in ENDING], id="one-scaled"),
    slow(2, {"how": "ddp"}, [f for f in FAULTS if f not in (*ENDING, *FEW, "overflow")], id="ddp-rest"),
    slow(2, {"how": "ddp", "accumulation": 3}, SOME, id="ddp-accumulation"),
    slow(2, {"how": "ddp", "scaled": True}, [*SOME, "overflow", "learning_rate"], id="ddp-scaled"),
    slow(2, {"how": "ddp", "several": True}, SOME, id="ddp-several"),
    slow(2, {"how": "fsdp"}, [f for f in FAULTS if f not in (*ENDING, "overflow")], id="fsdp"),
    slow(2, {"how": "fsdp", "accumulation": 2}, SOME, id="fsdp-accumulation"),
    slow(2, {"how": "fsdp", "several": True}, SOME, id="fsdp-several"),
    slow(4, {"how": "ddp"}, SOME, id="four-ddp"),
    slow(4, {"how": "fsdp"}, FEW, id="four-fsdp"),
]


@pytest.mark.parametrize(("ranks", "options", "faults"), CELLS)
def test_a_fault_is_one_alarm_on_all_ranks_and_an_innocent_one_none(
    tmp_path: Path, ranks: int, options: Plan, faults: list[str]
) -> None:
    plans: dict[str, Plan] = {fault: {**options, "fault": fault, "ranks": [ranks - 1]} for fault in faults}
    if options.get("scaled"):  # ranks that skip a step must do so together
        plans |= {f: {**plan, "ranks": [*range(ranks)]} for f, plan in plans.items() if f.startswith("gradient")}
    if "overflow" in plans:
        plans["overflow"]["threshold"] = 1e9  # the loss is large, yet finite
    innocent = [fault for fault in faults if fault in INNOCENT]
    run(tmp_path, ranks, **plans, **{f"{fault}-off": {**plans[fault], "watched": False} for fault in innocent})
    alarmed = {fault for fault, plan in plans.items() if assert_verdict(tmp_path / fault, ranks, plan) is not None}
    quiet = {*INNOCENT} | ({*FAULTS} - {"learning_rate"} if options.get("scaled") else set())
    assert alarmed - {"learning_rate"} == {*faults} - quiet - {"learning_rate"}
    for fault in innocent:
        assert_same_state(tmp_path / fault, tmp_path / f"{fault}-off", ranks)


@pytest.mark.slow
def test_a_fault_repeats_if_a_step_made_again_comes_by_its_point(tmp_path: Path) -> None:
    plans = {point: {"how": "one", "fault": "weight_nan", "point": point, "ranks": [0]} for point in POINTS}
    run(tmp_path, 1, **plans)
    for point in POINTS:
        capsule = load_capsule(tmp_path / point / "log")
        outside = {"batch start": AT, "batch end": AT + 1}  # of hooks that are called again
        assert capsule.about["remade"]["first_difference"] == outside.get(point), point


HEALTHY = [
    (2, {"how": "ddp", "accumulation": 2}),
    slow(1, {"how": "one"}, id="one"),
    slow(2, {"how": "ddp"}, id="ddp"),
    slow(2, {"how": "ddp", "scaled": True}, id="ddp-scaled"),
    slow(2, {"how": "ddp", "several": True}, id="ddp-several"),
    slow(2, {"how": "fsdp"}, id="fsdp"),
    slow(2, {"how": "fsdp", "accumulation": 3}, id="fsdp-accumulation"),
    slow(4, {"how": "ddp"}, id="four-ddp"),
]


@pytest.mark.parametrize(("ranks", "options"), HEALTHY)
def test_a_run_is_bit_for_bit_that_without_whether_or_not_there_is_an_alarm(
    tmp_path: Path, ranks: int, options: Plan
) -> None:
    every = {"every": not options.get("several")}  # under manual optimization some need more than they are given here
    plans = {"off": {"watched": False}, "on": every, "alarm": {**every, "alarm": True}}
    run(tmp_path, ranks, **{name: {**options, **plan} for name, plan in plans.items()})
    assert_same_state(tmp_path / "off", tmp_path / "on", ranks)
    assert_same_state(tmp_path / "off", tmp_path / "alarm", ranks)
    assert capsule_folders(tmp_path / "on" / "log") == []
    remade = load_capsule(tmp_path / "alarm" / "log").about["remade"]
    assert (remade["why_not"], remade["first_difference"], remade["to"]) == ("", None, AT)


Whole = Callable[[int, str, bool], Path]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The folder of a run that nothing breaks, by ranks, strategy, and whether it has an alarm."""
    made: dict[tuple[int, str, bool], Path] = {}

    def of(ranks: int, how: str, alarm: bool = False) -> Path:
        if (ranks, how, alarm) not in made:
            folder = made[ranks, how, alarm] = tmp_path_factory.mktemp("whole")
            run(folder, ranks, whole={"how": how, "alarm": alarm})
        return made[ranks, how, alarm] / "whole"

    return of


def assert_resumed(folder: Path, ranks: int, plan: Plan, whole: Path) -> None:
    """The run goes on from its last checkpoint as if nothing had been, and says which capsules lack something."""
    sentences = unfinished(folder / "broken" / "log")
    run(folder, ranks, broken={"how": plan["how"], "alarm": plan.get("alarm", False), "resumed": True})
    said = output(folder)
    assert all(said.count(sentence) == 1 for sentence in sentences)
    assert ("capsule without" in said or "unfinished" in said) == bool(sentences)
    assert_same_state(folder / "broken", whole, ranks, but="plain attributes")  # one counts the calls of a process
    for rank in range(ranks):
        verdicts = [left(f, rank)["verdict"] for f in (folder / "broken", whole)]
        assert not differences(*({k: v for k, v in verdict.items() if k != "row"} for verdict in verdicts))
    records, expected = load_run(folder / "broken" / "log"), load_run(whole / "log")
    assert {*records} == {*expected}
    for name, frame in expected.items():
        pair = (f.drop(columns="capsule", errors="ignore") for f in (records[name], frame))
        pd.testing.assert_frame_equal(*pair, check_exact=True)


def broken_cells() -> Iterator[Any]:
    """(ranks, how, fault, point, broken ranks): each way to end at each point, on one rank, on some, or on all."""
    fast = {(2, "ddp", "sigkill", "after backward"), (2, "ddp", "exception", "batch start")}
    for fault in ENDING:
        for i, point in enumerate(POINTS):
            yield slow(1, "one", fault, point, [0])
            cell = (2, "ddp", fault, point)
            broken = [0, 1] if fault == "sigterm" else [(i + 1) % 2]
            yield (*cell, broken) if cell in fast else slow(*cell, broken)
        yield slow(2, "fsdp", fault, "after backward", [0, 1] if fault == "sigterm" else [1])
        yield slow(4, "ddp", fault, "before step", [0, 1, 2, 3] if fault == "sigterm" else [1, 2])
    yield slow(2, "fsdp", "sigkill", "batch start", [0])
    yield slow(2, "fsdp", "exception", "batch end", [0, 1])
    yield slow(2, "ddp", "exception", "before step", [0, 1])
    yield slow(2, "ddp", "sigkill", "before backward", [0, 1])


@pytest.mark.parametrize(("ranks", "how", "fault", "point", "broken"), broken_cells())
def test_a_run_that_is_cut_short_leaves_a_capsule_and_is_resumed(
    tmp_path: Path, whole: Whole, ranks: int, how: str, fault: str, point: str, broken: list[int]
) -> None:
    plan = {"how": how, "fault": fault, "point": point, "ranks": broken}
    codes = start(tmp_path, ranks, broken=plan)
    ended = {"sigkill": KILLED, "exception": 1, "sigterm": 0}[fault]  # Lightning's code after SIGTERM
    assert codes == [ended if rank in broken else 1 for rank in range(ranks)], output(tmp_path)[-3000:]
    folders = capsule_folders(tmp_path / "broken" / "log")
    if fault == "sigkill" and len(broken) == ranks:
        assert folders == []
    else:
        assert [folder.name for folder in folders] == ["000_interrupted"]
        capsule = load_capsule(folders[0])
        about = capsule.about
        assert about["kind"] == ("signal" if fault == "sigterm" else "exception")
        assert about["missing"] == (broken if fault == "sigkill" else [])
        # Lightning ends the batch after SIGTERM; those that are not killed notice at one of the next collectives
        late = fault == "sigterm" or point == "batch end"
        assert about["step"] in ([AT, AT + 1] if fault == "sigkill" else [AT + late])
        if fault == "exception":
            assert about["error"].startswith("InjectedFaultError: the fault that was asked for")
            where = f" on rank {about['rank']}" if ranks > 1 else ""
            assert about["sentence"].startswith(f"the run failed at step {about['step']}{where}: InjectedFaultError: ")
            assert about["rank"] in broken
        elif fault == "sigterm":
            assert about["sentence"] == f"the run was ended by a signal at step {about['step']}"
        # The losses of the last step or two had not come
        assert_frames(capsule, losses_of(whole(ranks, how, False), ranks), AT - 1, ranks, plan)
    assert_resumed(tmp_path, ranks, plan, whole(ranks, how, False))


UPDATE = "normzoo.callbacks.parameter_norms.ParameterNorms.measure_update"
WRITING: dict[
    str, set[str]
] = {  # where a rank can be killed while it writes a capsule, and what it leaves in the folder
    UPDATE: set(),
    "normzoo.capsules.shard._write_tensors": set(),
    "normzoo.capsules.tensors.data_of": {"part"},
    "normzoo.capsules.shard.write_json": {"safetensors"},
    "normzoo.callbacks.recorder.seal": {"safetensors", "json"},
    "normzoo.capsules.folder.write_json": {"safetensors", "json"},
}


def files_of(folder: Path, rank: int) -> set[str]:
    return {path.name.split(".")[-1] for path in folder.glob(f"rank_{rank:05d}.*")}


@pytest.mark.parametrize("place", few(WRITING, "normzoo.capsules.tensors.data_of", "normzoo.callbacks.recorder.seal"))
def test_a_capsule_that_is_cut_off_in_the_writing_is_none(tmp_path: Path, whole: Whole, place: str) -> None:
    plan = {"how": "one", "alarm": True, "killed": place, "ranks": [0]}
    assert start(tmp_path, 1, broken=plan) == [KILLED]
    folders = capsule_folders(tmp_path / "broken" / "log")
    if place == UPDATE:  # nothing is written before the steps have been made again
        assert folders == []
    else:
        assert files_of(folders[0], 0) == WRITING[place]
        with pytest.raises(CapsuleError, match="is an unfinished capsule: it has no manifest"):
            load_capsule(folders[0])
    assert_resumed(tmp_path, 1, plan, whole(1, "one", True))
    names = [folder.name for folder in capsule_folders(tmp_path / "broken" / "log")]
    assert names == [f"{i:03d}_step_{AT:08d}" for i in range(1 + len(folders))]
    capsule = load_run(tmp_path / "broken" / "log")["divergence"]["capsule"].tolist()
    assert capsule == [f"capsules/{names[-1]}"]
    assert load_capsule(tmp_path / "broken" / "log" / capsule[0]).about["missing"] == []


@pytest.mark.slow
@pytest.mark.parametrize("place", [*WRITING][:-1])  # of two ranks one alone may write the manifest
@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_is_killed_in_the_writing_is_missing(tmp_path: Path, whole: Whole, place: str, killed: int) -> None:
    plan = {"how": "ddp", "alarm": True, "killed": place, "ranks": [killed]}
    assert start(tmp_path, 2, broken=plan) == [KILLED if rank == killed else 1 for rank in range(2)]
    *of_alarms, of_error = map(load_capsule, capsule_folders(tmp_path / "broken" / "log"))
    assert (of_error.about["kind"], of_error.about["missing"]) == ("exception", [killed])
    assert_resumed(tmp_path, 2, plan, whole(2, "ddp", True))
    assert len(of_alarms) == (place != UPDATE)  # as steps cannot be made again
    if not of_alarms:
        return
    [of_alarm] = of_alarms
    wrote = "json" in WRITING[place]
    assert files_of(of_alarm.path, killed) == WRITING[place]
    assert (of_alarm.about["kind"], of_alarm.about["missing"]) == ("divergence", [] if wrote else [killed])
    assert_frames(of_alarm, losses_of(whole(2, "ddp", True), 2), AT, 2, plan)


@pytest.mark.parametrize("action", [slow("stop"), slow("raise")])
def test_an_action_ends_all_ranks_and_the_run_can_go_on(tmp_path: Path, whole: Whole, action: str) -> None:
    plan = {"how": "ddp", "alarm": True, "action": action}
    codes = start(tmp_path, 2, broken=plan)
    assert codes == [STOPPED if action == "stop" else 1] * 2, output(tmp_path)[-3000:]
    log = tmp_path / "broken" / "log"
    assert [folder.name for folder in capsule_folders(log)] == [f"000_step_{AT:08d}"]
    assert load_run(log)["divergence"]["stopped"].tolist() == [True]
    assert (log / "diverged.ckpt").exists() == (action == "stop")
    (log / "diverged.ckpt").unlink(missing_ok=True)
    run(tmp_path, 2, broken={"how": "ddp", "alarm": True, "resumed": True})
    assert_same_state(tmp_path / "broken", whole(2, "ddp", True), 2, but="plain attributes")


@pytest.mark.parametrize(("ranks", "how"), [(1, "one"), slow(2, "ddp"), slow(2, "fsdp")])
def test_a_run_goes_on_if_steps_cannot_be_made_again(tmp_path: Path, ranks: int, how: str) -> None:
    failing = {"how": how, "alarm": True, "failing": UPDATE, "ranks": [*range(ranks)]}
    run(tmp_path, ranks, off={"how": how, "watched": False}, failing=failing)
    assert_same_state(tmp_path / "off", tmp_path / "failing", ranks)
    capsule = load_capsule(tmp_path / "failing" / "log")
    assert capsule.about["missing"] == []
    assert capsule.about["remade"]["why_not"] == "OSError: No space left on device"
    assert capsule.records == {}


@pytest.mark.parametrize(
    ("how", "broken", "place"),
    [
        ("ddp", 0, UPDATE),
        slow("ddp", 1, "normzoo.callbacks.parameter_norms.ParameterNorms.begin"),
        slow("ddp", 0, "normzoo.callbacks._run.batches.HostTensor.back"),
        slow("ddp", 1, "normzoo.callbacks.parameter_norms.ParameterNorms.rows"),
        slow("fsdp", 0, UPDATE),
        slow("fsdp", 1, "normzoo.callbacks._run.batches.HostTensor.back"),
    ],
)
def test_ranks_do_not_wait_for_one_that_cannot_make_steps_again(
    tmp_path: Path, how: str, broken: int, place: str
) -> None:
    """It cannot join the others in their step any more, so that the run ends, with a capsule."""
    assert start(tmp_path, 2, broken={"how": how, "alarm": True, "failing": place, "ranks": [broken]}) == [1, 1]
    [folder] = capsule_folders(tmp_path / "broken" / "log")
    about = load_capsule(folder).about
    assert (about["kind"], about["missing"]) == ("exception", [])
    assert about["error"] == "OSError: [Errno 28] No space left on device"


ROOM = 40_000  # bytes; more than any file of the run takes, and less than a capsule's


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[bool]:
    """A file system of a size in a folder, if this process may mount one."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(
    ("ranks", "how", "full"), [(1, "one", [0]), slow(2, "ddp", [0, 1]), slow(2, "ddp", [0]), slow(2, "ddp", [1])]
)
def test_a_run_goes_on_if_the_disk_is_full(tmp_path: Path, ranks: int, how: str, full: list[int]) -> None:
    plan = {"how": how, "alarm": True, "disk": ROOM, "ranks": full}
    run(tmp_path, ranks, off={"how": how, "watched": False}, full=plan)
    assert_same_state(tmp_path / "off", tmp_path / "full", ranks)
    rows, folders = load_run(tmp_path / "full" / "log")["divergence"], capsule_folders(tmp_path / "full" / "log")
    assert rows["step"].tolist() == [AT]
    said = output(tmp_path)
    if len(full) == ranks:
        assert (folders, rows["capsule"].isna().tolist()) == ([], [True])
    else:
        capsule = load_capsule(tmp_path / "full" / "log" / rows["capsule"][0])
        assert capsule.about["missing"] == full
        assert all(files_of(capsule.path, rank) == set() for rank in full)
    warned = said.count("could not be written: File too large"), said.count(f"which had not written in {PATIENCE:g} s")
    assert warned == ((1, 0) if 0 in full else (0, 1))


@pytest.mark.parametrize(("ranks", "how"), [(1, "one"), slow(2, "ddp")])
def test_a_real_disk_that_is_full_holds_nothing_half(tmp_path: Path, ranks: int, how: str) -> None:
    capsules = tmp_path / "full" / "log" / "capsules"
    with small_disk(capsules, 64 * 1024) as mounted:
        plan = {"how": how, "alarm": True, "ranks": [*range(ranks)], **({} if mounted else {"disk": ROOM})}
        run(tmp_path, ranks, off={"how": how, "watched": False}, full=plan)
        assert [*capsules.iterdir()] == []
    assert output(tmp_path).count("could not be written: " + ("No space left" if mounted else "File too large")) == 1
    assert_same_state(tmp_path / "off", tmp_path / "full", ranks)
    assert load_run(tmp_path / "full" / "log")["divergence"]["capsule"].isna().all()


@pytest.mark.parametrize(("ranks", "how"), [slow(1, "one"), slow(2, "ddp")])
def test_a_run_that_fails_on_a_full_disk_fails_by_its_own_error(tmp_path: Path, ranks: int, how: str) -> None:
    plan = {"how": how, "disk": 12_000, "ranks": [*range(ranks)]}  # less than a checkpoint takes
    assert start(tmp_path, ranks, full=plan) == [1] * ranks
    said = output(tmp_path)
    assert "OSError: [Errno 27] File too large" in said
    assert said.count("could not be written: File too large") == 1
    assert capsule_folders(tmp_path / "full" / "log") == []


@pytest.mark.parametrize(("ranks", "how"), [slow(1, "one"), slow(2, "ddp")])
def test_records_that_cannot_be_written_are_left_out_of_a_capsule(tmp_path: Path, ranks: int, how: str) -> None:
    plan = {"how": how, "alarm": True, "failing": "normzoo.callbacks._run.record.LateRecord.write", "ranks": [0]}
    run(tmp_path, ranks, off={"how": how, "watched": False}, failing=plan)
    assert_same_state(tmp_path / "off", tmp_path / "failing", ranks)
    capsule = load_capsule(tmp_path / "failing" / "log")
    remade = capsule.about["remade"]
    assert (remade["to"], remade["first_difference"]) == (AT, None)
    assert remade["why_not"] == "the records could not be written: No space left on device"
    assert (capsule.about["missing"], capsule.records) == ([], {})


@pytest.mark.slow
def test_ranks_agree_if_one_has_no_memory_for_snapshots(tmp_path: Path) -> None:
    run(tmp_path, 2, off={"watched": False}, little={"alarm": True, "memory": 1000, "ranks": [1]})
    assert_same_state(tmp_path / "off", tmp_path / "little", 2)
    capsule = load_capsule(tmp_path / "little" / "log")
    assert (capsule.about["missing"], capsule.about["remade"]) == (
        [],
        {"why_not": "no snapshot of the run's state was kept"},
    )
    assert [len(capsule.tree(rank)["snapshots"]) for rank in range(2)] == [2, 0]


class Fails(pl.Callback):
    """Raises an error of the run at a step."""

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_step == AT:
            raise ZeroDivisionError("of the run")


def test_the_error_of_the_run_is_the_one_to_see_if_a_gpu_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dead(*_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(HostCopies, "wait", dead)
    made = trainer(str(tmp_path), callbacks=[Fails(), Divergence()])
    with (
        pytest.warns(UserWarning, match="000_interrupted could not be written: CUDA error: an illegal memory access"),
        pytest.raises(ZeroDivisionError, match="of the run"),
    ):
        made.fit(SmallNet(), loader())
    assert capsule_folders(tmp_path / "log") == []


def test_a_capsule_has_a_number_above_those_that_are_there(tmp_path: Path) -> None:
    make_capsule(tmp_path / "log" / "capsules" / "004_interrupted")
    made = trainer(str(tmp_path), callbacks=[Fails(), Divergence()])
    with (
        pytest.warns(UserWarning, match="Experiment logs directory .* exists and is not empty"),
        pytest.raises(ZeroDivisionError),
    ):
        made.fit(SmallNet(), loader())
    assert [path.name for path in capsule_folders(tmp_path / "log")] == ["004_interrupted", "005_interrupted"]
