"""Reading plain Lightning folders: of CSVLogger, of TensorBoardLogger, of both, damaged and resumed."""

from __future__ import annotations

import enum
import itertools
import math
import random
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from damages import DAMAGES
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from report_runs import make_run, record
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.util.tensor_util import make_tensor_proto
from torch.utils.tensorboard import SummaryWriter

from normzoo.report import load_runs, read_runs
from normzoo.report.event_files import read_events
from normzoo.report.runs import Run

HPARAMS = {"lr": 0.1, "norm": "batch", "seed": 3, "layers": (8, 16), "act": torch.nn.ReLU}
ROWS: list[tuple[int, dict[str, float]]] = [
    (0, {"train_loss": 2.0, "epoch": 0}),
    (1, {"train_loss": 1.5, "epoch": 0}),
    (1, {"val_loss": 1.75, "val_acc": 0.5, "epoch": 0}),
    (2, {"train_loss": math.inf, "epoch": 1}),
    (3, {"train_loss": math.nan, "epoch": 1}),
]


def log(logger: Any, rows: list[tuple[int, dict[str, float]]] = ROWS) -> Path:
    logger.log_hyperparams(HPARAMS)
    for step, metrics in rows:
        logger.log_metrics(metrics, step)
    logger.finalize("success")
    return Path(logger.log_dir)


def rows_of(run: Run, metric: str) -> list[tuple[int, float, float]]:
    rows = run.metrics[run.metrics["metric"] == metric]
    return [*zip(rows["step"].tolist(), rows["epoch"].tolist(), rows["value"].tolist(), strict=True)]


def event(value: Summary.Value | None = None, step: int = 0, time: float = 0.0) -> bytes:
    data = Event(wall_time=time, step=step, summary=Summary(value=[] if value is None else [value])).SerializeToString()
    return framed(data)


def framed(data: bytes) -> bytes:
    length = len(data).to_bytes(8, "little")
    check = [masked_crc32c(part).to_bytes(4, "little") for part in (length, data)]
    return length + check[0] + data + check[1]


def scalar(tag: str, value: float) -> Summary.Value:
    return Summary.Value(tag=tag, simple_value=value)


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_a_folder_of_a_logger_is_a_run(kind: Any, tmp_path: Path) -> None:
    for _ in range(2):
        log(kind(tmp_path))
    runs = load_runs(tmp_path / "lightning_logs")
    assert [run.name for run in runs] == ["version_0", "version_1"]
    assert [run.name for run in load_runs(tmp_path)] == ["version_0", "version_1"]
    for run in runs:
        assert [*run.metrics] == ["step", "epoch", "metric", "value"]
        assert run.metrics.drop(columns="metric").dtypes.tolist() == [np.int64, np.float64, np.float64]
        assert {*run.metrics["metric"]} == {"train_loss", "val_loss", "val_acc"}
        loss = rows_of(run, "train_loss")
        assert loss[:3] == [(0, 0.0, 2.0), (1, 0.0, 1.5), (2, 1.0, math.inf)]
        assert loss[3][:2] == (3, 1.0)
        assert math.isnan(loss[3][2])
        assert rows_of(run, "val_acc") == [(1, 0.0, 0.5)]
        assert run.curve("train_loss") == ([0, 1], [2.0, 1.5])
        assert (run.state, run.of_recipe, run.loss) == ("–", False, "train_loss")
        assert (run.not_finite_at, run.has_diverged, run.diverged_at) == (2, True, None)
        assert run.problems == []


def test_hyperparameters_are_the_recipe(tmp_path: Path) -> None:
    class Kind(enum.Enum):
        PLAIN = 1

    logger = TensorBoardLogger(tmp_path)
    more = {"path": Path("a/b"), "kind": Kind.PLAIN, "model": torch.nn.Linear(1, 1), "none": None, "args": {"x": [1]}}
    logger.log_hyperparams(Namespace(**HPARAMS, **more))
    logger.finalize("success")
    [run] = load_runs(tmp_path)
    assert run.problems == []
    assert run.config == {
        "lr": 0.1,
        "norm": "batch",
        "seed": 3,
        "layers": [8, 16],
        "act": "torch.nn.modules.activation.ReLU",
        "path": run.config["path"],
        "kind": "PLAIN",
        "model": "torch.nn.modules.linear.Linear",
        "none": None,
        "args": {"x": [1]},
    }
    assert run.metrics.empty  # of hp_metric, -1, which only says that nothing was logged
    assert "PosixPath" in run.config["path"] or run.config["path"] == "a/b"


def test_the_settings_of_the_command_line_interface_have_precedence(tmp_path: Path) -> None:
    folder = log(CSVLogger(tmp_path))
    (folder / "config.yaml").write_text("seed_everything: 7\ntrainer: {max_epochs: 2}\nmodel: {lr: 0.1}\n")
    [run] = load_runs(tmp_path)
    assert run.config == {"seed_everything": 7, "trainer": {"max_epochs": 2}, "model": {"lr": 0.1}}
    (folder / "config.yaml").write_text("of: something else\n")
    [run] = load_runs(tmp_path)
    assert run.config["lr"] == 0.1


def test_settings_that_cannot_be_read_are_named_and_the_metrics_are_read(tmp_path: Path) -> None:
    folder = log(CSVLogger(tmp_path))
    for content in ("a: [", "- 1", "a: " + "[" * 90 + "]" * 90):
        (folder / "hparams.yaml").write_text(content)
        [run] = load_runs(tmp_path)
        assert run.config == {}
        [problem] = run.problems
        assert str(folder / "hparams.yaml") in problem
        assert len(run.logged["train_loss"]) == 4


def test_nothing_of_a_file_of_settings_is_carried_out(tmp_path: Path) -> None:
    folder = log(CSVLogger(tmp_path))
    (folder / "hparams.yaml").write_text(f"a: !!python/object/apply:os.mkdir [{tmp_path / 'made'}]\n")
    [run] = load_runs(tmp_path)
    assert run.config == {"a": f"os.mkdir({tmp_path / 'made'})"}
    assert not (tmp_path / "made").exists()


def test_a_folder_of_both_loggers_counts_once(tmp_path: Path) -> None:
    rows = [(0, {"loss": 0.1, "epoch": 0})]
    folder = log(CSVLogger(tmp_path, version=0), rows)
    assert log(TensorBoardLogger(tmp_path, version=0), [*rows, (1, {"extra": 0.5, "epoch": 0})]) == folder
    [run] = load_runs(tmp_path)
    assert rows_of(run, "loss") == [(0, 0.0, 0.1)]  # of the CSV, which is not rounded to float32
    assert rows_of(run, "extra") == [(1, 0.0, 0.5)]


def test_a_resumed_run_takes_the_place_of_what_it_has_made_again(tmp_path: Path) -> None:
    def file(number: int, *events: bytes) -> None:
        content = b"".join(events)
        (tmp_path / f"events.out.tfevents.17000000{number:02d}.host.1.0").write_bytes(content)

    first = [event(scalar("loss", s), s, 10.0 + s) for s in range(6)]
    again = [event(scalar("loss", 10 * s), s, 50.0 + s) for s in range(4, 8)]
    file(9, event(time=10.0), *first, event(scalar("acc", 0.5), 5, 16.0))
    file(1, event(time=50.0), *again)  # later by its events, not by its name
    file(5, event(time=90.0), event(scalar("test", 1.0), 0, 91.0))
    [run] = load_runs(tmp_path)
    assert run.curve("loss") == ([0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 40, 50, 60, 70])
    assert run.curve("acc") == ([5], [0.5])
    assert run.curve("test") == ([0], [1.0])


def test_curves_that_are_logged_together_keep_their_names(tmp_path: Path) -> None:
    writer = SummaryWriter(tmp_path / "run")
    for step in range(3):
        writer.add_scalars("loss/parts", {"a": step, "b": -step}, step)
    writer.add_scalar("loss/all", 1.0, 0)
    writer.add_histogram("weights", torch.arange(9.0), 0)
    writer.add_text("note", "text")
    writer.add_image("picture", torch.zeros(3, 2, 2))
    writer.close()
    [run] = load_runs(tmp_path)
    assert run.name == "run"
    assert {*run.logged} == {"loss/all", "loss/parts/a", "loss/parts/b"}
    assert run.curve("loss/parts/b") == ([0, 1, 2], [0.0, -1.0, -2.0])


def test_scalars_in_tensors_are_read(tmp_path: Path) -> None:
    values = [
        Summary.Value(tag="new", tensor=make_tensor_proto(np.float32(0.25))),
        Summary.Value(tag="text", tensor=make_tensor_proto("a")),
        Summary.Value(tag="several", tensor=make_tensor_proto(np.ones(3))),
    ]
    path = tmp_path / "events.out.tfevents.1"
    path.write_bytes(b"".join(event(value, 4) for value in values))
    assert read_events(path).scalars == [("new", 4, 0.25)]


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["a", "b"]), st.integers(0, 2**40), st.floats(width=32)), max_size=30),
    st.binary(max_size=6000),
)
def test_scalars_are_those_that_tensorboard_reads(
    tmp_path_factory: pytest.TempPathFactory, logged: list[tuple[str, int, float]], note: bytes
) -> None:
    folder = tmp_path_factory.mktemp("events")
    records = [event(scalar(tag, value), step, 1.0) for tag, step, value in logged]
    records.insert(len(records) // 2, framed(Event(wall_time=1.0, graph_def=note).SerializeToString()))
    (folder / "events.out.tfevents.1").write_bytes(b"".join(records))
    twin = EventAccumulator(str(folder), size_guidance={"scalars": 0}, purge_orphaned_data=False)
    twin.Reload()
    read = read_events(folder / "events.out.tfevents.1")
    assert read.damage == ""
    for tag in {tag for tag, _, _ in logged}:
        expected = [(e.step, e.value) for e in twin.Scalars(tag)]
        values = [(s.step, s.value) for s in read.scalars if s.tag == tag]
        assert np.array_equal(np.array(values), np.array(expected), equal_nan=True)
        assert len(values) == sum(tag == other for other, _, _ in logged)


def test_a_file_that_is_cut_off_anywhere_is_read_up_to_there(tmp_path: Path) -> None:
    records = [event(scalar("loss", float(s)), s) for s in range(4)]
    whole = b"".join(records)
    path = tmp_path / "events.out.tfevents.1"
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        read = read_events(path)
        there = sum(sum(map(len, records[: i + 1])) <= length for i in range(4))
        assert [s.value for s in read.scalars] == [0.0, 1.0, 2.0, 3.0][:there]
        assert read.damage == ""


def test_a_changed_byte_is_named_and_what_is_whole_is_read(tmp_path: Path) -> None:
    records = [event(scalar("loss", float(s)), s) for s in range(3)]
    large = Event(step=3, graph_def=bytes(5000), summary=Summary(value=[scalar("loss", 3.0)]))
    records.append(framed(large.SerializeToString()))
    records += [event(scalar("loss", 4.0), 4)]
    whole = b"".join(records)
    path = tmp_path / "events.out.tfevents.1"
    random_places = random.Random(0).sample(range(len(whole)), 20)
    for place in [*range(0, 120, 3), *random_places, len(whole) - 1]:
        data = bytearray(whole)
        data[place] ^= 4
        path.write_bytes(data)
        hit = next(i for i in range(5) if place < sum(map(len, records[: i + 1])))
        offset = place - sum(map(len, records[:hit]))
        [run] = load_runs(tmp_path)
        expected = [s for s in range(5) if (s < hit if offset < 12 else s != hit)]
        assert run.curve("loss")[1] == expected, place
        [problem] = run.problems
        assert problem.startswith(f"{path} is damaged: the record at byte {place - offset} of {len(whole)} ")


@pytest.mark.parametrize("content", [b"", b"\0" * 50, b"not events at all, but text of some length"])
def test_a_file_that_holds_no_events(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "events.out.tfevents.1"
    path.write_bytes(content)
    [run] = load_runs(tmp_path)
    assert run.metrics.empty
    assert [problem.startswith(str(path)) for problem in run.problems] == ([True] if content else [])


def test_a_record_that_is_no_event_is_named(tmp_path: Path) -> None:
    path = tmp_path / "events.out.tfevents.1"
    path.write_bytes(framed(b"\xff" * 20) + event(scalar("loss", 1.0)))
    read = read_events(path)
    assert [s.value for s in read.scalars] == [1.0]
    assert read.damage == f"the record at byte 0 of {path.stat().st_size} is no event"


def test_a_damaged_table_is_a_damaged_run(tmp_path: Path) -> None:
    log(CSVLogger(tmp_path))
    path = log(CSVLogger(tmp_path)) / "metrics.csv"
    path.write_text(path.read_text() + "1,2\n")
    runs, [damaged] = read_runs(tmp_path)
    assert [run.name for run in runs] == ["version_0"]
    assert damaged.name == "version_1"
    assert damaged.problem.startswith(f"{path} is damaged: line 7 has 2 values for")


def test_a_table_of_something_else_is_no_run(tmp_path: Path) -> None:
    log(CSVLogger(tmp_path))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "metrics.csv").write_text("name,value\na,1\n")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "metrics.csv").mkdir()
    assert [run.name for run in load_runs(tmp_path)] == ["version_0"]
    with pytest.raises(ValueError, match="no runs in"):
        load_runs(tmp_path / "other")


def test_a_run_that_has_logged_nothing_is_one(tmp_path: Path) -> None:
    (tmp_path / "version_0").mkdir()
    (tmp_path / "version_0" / "hparams.yaml").write_text("{}\n")
    [run] = load_runs(tmp_path)
    assert run.metrics.empty
    assert (run.loss, run.not_finite_at, run.end("loss")) == (None, None, None)


def test_records_beside_a_log_belong_to_the_run(tmp_path: Path) -> None:
    folder = log(CSVLogger(tmp_path))
    path = record(folder, "divergence", {"step": 2, "loss": math.inf, "rule": "not finite", "stopped": True})
    path.rename(folder / path.name)
    (folder / "metrics").rmdir()
    [run] = load_runs(tmp_path)
    assert (run.diverged_at, run.has_diverged, run.watched) == (2, True, True)
    assert "train_loss" in run.logged


def test_names_over_several_folders_are_short_and_differ(tmp_path: Path) -> None:
    for sweep in ("a", "b"):
        for point in ("01-norm=batch", "02-norm=group"):
            make_run(tmp_path / sweep / point, tails=False)
    log(CSVLogger(tmp_path / "logs"))
    a, b, logs = (tmp_path / name for name in ("a", "b", "logs"))
    names = [run.name for run in load_runs(a, logs)]
    assert names == ["01-norm=batch", "02-norm=group", "version_0"]
    names = [run.name for run in load_runs(a, b)]
    assert names == ["a/01-norm=batch", "a/02-norm=group", "b/01-norm=batch", "b/02-norm=group"]
    assert [run.name for run in load_runs(tmp_path)] == [*names, "lightning_logs/version_0"]
    assert [run.name for run in load_runs(a, a / "01-norm=batch", tmp_path / "b" / ".." / "a")] == [
        "01-norm=batch",
        "02-norm=group",
    ]
    with pytest.raises(ValueError, match=f"no runs in {tmp_path / 'nothing'}"):
        load_runs(a, tmp_path / "nothing")


def test_a_run_knows_its_sweep(tmp_path: Path) -> None:
    make_run(tmp_path / "sweep" / "01-lr=1", tails=False)
    make_run(tmp_path / "alone", tails=False)
    (tmp_path / "sweep" / "sweep.yaml").write_text("model: {norm: batch}\nsweep: {optimizer.lr: [1, 2]}\n")
    assert [run.sweep for run in load_runs(tmp_path)] == [{}, {"optimizer.lr": [1, 2]}]


def test_reading_event_files_imports_neither_torch_nor_tensorflow(tmp_path: Path) -> None:
    log(TensorBoardLogger(tmp_path / "tb"))
    log(CSVLogger(tmp_path / "csv"))
    code = (
        "import sys\n"
        "from normzoo.report.runs import read_runs\n"
        "for folder in sys.argv[1:]:\n"
        "    [run], _ = read_runs(folder)\n"
        "    print(len(run.metrics), *({'torch', 'lightning', 'tensorflow', 'tensorboard'} & sys.modules.keys()))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "csv"), str(tmp_path / "tb")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True)
    assert printed.stdout.splitlines() == ["6", "6 tensorboard"]


def test_the_metrics_of_a_run_of_ours_are_tidy_and_keep_what_is_not_finite(tmp_path: Path) -> None:
    [run] = load_runs(make_run(tmp_path / "run", tails=False))
    values = rows_of(run, "train/loss")
    assert values[:5] == [(s, 0.0, 2.0 - s / 10) for s in range(5)]
    assert math.isnan(values[5][2])
    assert rows_of(run, "train/accuracy")[-1] == (9, 0.0, math.inf)
    assert rows_of(run, "test/accuracy") == [(4, 0.0, 0.75), (9, 0.0, 0.5)]


@pytest.mark.parametrize("name", ["hparams.yaml", "metrics.csv", "events"])
def test_one_damaged_file_of_each_kind_is_named_or_harmless(name: str, tmp_path: Path) -> None:
    log(CSVLogger(tmp_path, version=0))
    folder = log(CSVLogger(tmp_path, version=1))
    log(TensorBoardLogger(tmp_path, version=1))
    path = next(folder.glob("*tfevents*")) if name == "events" else folder / name
    whole = path.read_bytes()
    noticed = 0
    for kind, seed in itertools.product(DAMAGES, range(3)):
        path.write_bytes(kind(whole, random.Random(seed)))
        runs, damaged = read_runs(tmp_path)
        assert len(runs) + len(damaged) == 2
        assert runs[0].name == "version_0"
        problems = [run.problem for run in damaged] + [problem for run in runs for problem in run.problems]
        assert all(str(path) in problem for problem in problems)
        assert all(len(problem.splitlines()) == 1 for problem in problems)
        noticed += len(problems)
    assert noticed > 0
