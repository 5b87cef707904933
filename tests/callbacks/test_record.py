"""The record on disk: what it holds, and what a kill or a resumed run leaves of it."""

from __future__ import annotations

import copy
import math
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from callbacks_small import SmallNet, loader, trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import Forks, start_script
from schemas import SCHEMAS
from sweeps import slow

import normzoo
from normzoo.callbacks import Divergence, GradientTails, LossAbove, LossSpike, RelativeLoss
from normzoo.records.schema import Column, Schema
from normzoo.records.segments import RecordError, Segment, read_segment

ROOT = Path(__file__).parents[2]
DEADLINE = 150  # seconds
CURVE = SCHEMAS["relative_loss"]


def curve(step: int, count: int = 1) -> list[dict[str, Any]]:
    row = {"step": step, "lr": 0.1, "multiples": [1.0, 2.0], "relative": [0.5, step], "headroom": None}
    row |= {
        "along": "gradient",
        "optimizer": 0,
        "headroom_bound": None,
        "headroom_low": 1.0,
        "headroom_low_bound": None,
    }
    return [{**row, "loss": float(i)} for i in range(count)]


def write(folder: Path, start: int, steps: list[int]) -> Path:
    segment = Segment(folder, CURVE, start)
    for step in steps:
        segment.append(curve(step))
    return segment.path


def steps(folder: Path, quantity: str = "relative_loss") -> list[int]:
    frames = normzoo.load_run(folder)
    return frames[quantity]["step"].tolist() if quantity in frames else []


# What is written


def test_large_samples_are_compressed_and_small_ones_are_not(tmp_path: Path) -> None:
    segment = Segment(tmp_path, CURVE, 0)
    samples = [curve(0), curve(1, count=1000), curve(2)]
    sizes = [segment.path.stat().st_size]
    for sample in samples:
        segment.append(sample)
        sizes.append(segment.path.stat().st_size)
    first, large, last = np.diff(sizes)
    batches = read_segment(segment.path).batches
    assert [batch.to_pylist() for batch in batches] == samples
    assert first == last >= batches[0].nbytes
    assert large < batches[1].nbytes / 4


@pytest.mark.parametrize(
    ("kind", "value"),
    [("int", 1.5), ("int", 2**63), ("int32", 2**31), ("int32", "1"), ("float", "1"), ("text", 1), ("bool", 2)],
)
def test_a_value_of_another_type_is_refused_by_its_column(tmp_path: Path, kind: str, value: Any) -> None:
    columns = [Column(f"of_{name}", name, "meaning") for name in ("int", "int32", "float", "text", "bool", "curve")]
    segment = Segment(tmp_path, Schema("several", "row", tuple(columns)), 0)
    rows: list[dict[str, Any]] = [{"step": 0, **{column.name: None for column in columns}} for _ in range(2)]
    segment.append(rows)
    size = segment.path.stat().st_size
    rows[1][f"of_{kind}"] = value
    with pytest.raises(ValueError, match=rf"several-000\.arrows: column 'of_{kind}' is of the type "):
        segment.append(rows)
    assert segment.path.stat().st_size == size


def test_arrow_alone_reads_a_segment(tmp_path: Path) -> None:
    trainer(str(tmp_path), callbacks=[GradientTails(2), RelativeLoss(4), Divergence()], max_steps=7).fit(
        SmallNet(), loader()
    )
    for name, count in (("gradient_tails", 4 * 5), ("relative_loss", 2), ("divergence", 0)):
        stream = pa.ipc.open_stream(tmp_path / "log" / f"{name}-000.arrows")
        table = stream.read_all()
        table.validate(full=True)
        assert table.num_rows == count
        about = {k.decode(): v.decode() for k, v in table.schema.metadata.items()}
        assert about["normzoo.quantity"] == name
        assert about["normzoo.start_step"] == "0"
        assert about["normzoo.version"] == normzoo.__version__
        assert [f.metadata[b"meaning"].decode() for f in table.schema] == [c.meaning for c in SCHEMAS[name].columns]
        assert [f.type for f in table.schema] == [c.type for c in SCHEMAS[name].columns]
    tails = pa.ipc.open_stream(tmp_path / "log" / "gradient_tails-000.arrows")
    assert [batch.num_rows for batch in tails] == [5] * 4  # a sample is a batch
    assert str(tails.schema.field("histogram").type) == "list<item: struct<bucket: int32, count: int64>>"


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_documentation_holds_the_table(name: str) -> None:
    text = (ROOT / "docs" / "callbacks.md").read_text(encoding="utf-8")
    assert SCHEMAS[name].markdown() in text


def test_columns_are_those_of_the_table(tmp_path: Path) -> None:
    segment = Segment(tmp_path, CURVE, 0)
    [row] = curve(0)
    with pytest.raises(ValueError, match=r"relative_loss-000\.arrows: columns differ from the record's: \['extra'\]"):
        segment.append([{**row, "extra": 1}])
    del row["lr"]
    with pytest.raises(ValueError, match="lr"):
        segment.append([row])
    assert steps(tmp_path) == []


FLOATS = st.floats(width=64)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "int64": st.integers(-(2**63), 2**63 - 1),
    "int32": st.integers(-(2**31), 2**31 - 1),
    "double": FLOATS | st.none(),
    "string": st.text(max_size=8),
    "bool": st.booleans(),
    "list<item: double>": st.lists(FLOATS, max_size=4),
    "list<item: struct<bucket: int32, count: int64>>": st.lists(
        st.tuples(st.integers(-(2**31), 2**31 - 1), st.integers(-(2**63), 2**63 - 1)), max_size=4
    ),
}


def samples(quantity: Schema) -> st.SearchStrategy[list[list[dict[str, Any]]]]:
    row = st.fixed_dictionaries({c.name: VALUES[str(c.type)] for c in quantity.columns[1:]})
    return st.lists(st.lists(row, min_size=1, max_size=4), max_size=4)


def same(found: Any, written: Any) -> bool:
    """Equal bit for bit, but that the payload of NaN is not kept, and that null is NaN."""
    if isinstance(found, np.ndarray):
        expected = np.asarray(written, dtype=found.dtype).reshape(found.shape)
        return found.shape[0] == len(written) and np.array_equal(found, expected, equal_nan=found.dtype.kind == "f")
    if isinstance(found, float):
        written = math.nan if written is None else written
        return (math.isnan(found) and math.isnan(written)) or (found, math.copysign(1, found)) == (
            written,
            math.copysign(1, written),
        )
    return bool(found == written)


@pytest.mark.parametrize("name", SCHEMAS)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_rows_come_back_as_they_were(name: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    quantity, folder = SCHEMAS[name], tmp_path_factory.mktemp("run")
    written = []
    segment = Segment(folder, quantity, 0)
    for step, sample in enumerate(data.draw(samples(quantity))):
        rows = [{"step": step, **row} for row in sample]
        segment.append(rows)
        written += rows
    frame = normzoo.load_run(folder)[name]
    assert list(frame.columns) == [c.name for c in quantity.columns]
    assert len(frame) == len(written)
    for row, expected in zip(frame.to_dict("records"), written, strict=True):
        for column, value in expected.items():
            assert same(row[column], value), column


def test_a_frame_says_what_it_holds(tmp_path: Path) -> None:
    write(tmp_path, 0, [0, 1, 2])
    broken = write(tmp_path, 2, [2, 3])
    os.truncate(broken, broken.stat().st_size - 1)
    frame = normzoo.load_run(tmp_path)["relative_loss"]
    assert isinstance(frame, pd.DataFrame)
    assert frame["step"].tolist() == [0, 1, 2]
    attributes = {k: frame.attrs[k] for k in ("quantity", "segments", "broken_batches", "superseded_rows", "versions")}
    assert attributes == {
        "quantity": "relative_loss",
        "segments": 2,
        "broken_batches": 1,
        "superseded_rows": 1,
        "versions": [normzoo.__version__],
    }
    assert frame.attrs["meaning"]["lr"] == "learning rate of the first parameter group"


def test_a_segment_is_copied_and_pickled_with_its_owner(tmp_path: Path) -> None:
    segment = Segment(tmp_path, CURVE, 0)
    for step, made in enumerate((segment, copy.deepcopy(segment), pickle.loads(pickle.dumps(segment)))):
        made.append(curve(step))
    assert steps(tmp_path) == [0, 1, 2]


def test_numbers_go_on_after_999(tmp_path: Path) -> None:
    first = write(tmp_path, 0, [0, 1])
    first.rename(tmp_path / "relative_loss-999.arrows")
    assert write(tmp_path, 1, [1, 2]).name == "relative_loss-1000.arrows"
    assert write(tmp_path, 2, [2]).name == "relative_loss-1001.arrows"
    assert steps(tmp_path) == [0, 1, 2]


# What kills leave


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, list[int]]:
    """A segment of three samples of 1, 2 and 1 rows, and the ends of its schema and batches."""
    folder = tmp_path_factory.mktemp("small")
    segment = Segment(folder, CURVE, 0)
    ends = [segment.path.stat().st_size]
    for step, count in ((0, 1), (1, 2), (2, 1)):
        segment.append(curve(step, count))
        ends.append(segment.path.stat().st_size)
    return segment.path.read_bytes(), ends


@pytest.mark.slow
def test_a_segment_cut_off_at_any_byte_holds_the_batches_before(small: tuple[bytes, list[int]], tmp_path: Path) -> None:
    data, ends = small
    path = tmp_path / "relative_loss-000.arrows"
    path.write_bytes(data)
    for cut in range(len(data), -1, -1):
        os.truncate(path, cut)
        contents = read_segment(path)
        whole = sum(end <= cut for end in ends[1:])
        assert [batch["step"].to_pylist() for batch in contents.batches] == [[0], [1, 1], [2]][:whole], cut
        assert contents.broken == (cut not in ends), cut
        if cut % 100 == 0 or cut in ends:
            frame = normzoo.load_run(tmp_path)["relative_loss"]
            assert frame["step"].tolist() == [0, 1, 1, 2][: (0, 1, 3, 4)[whole]], cut


@pytest.mark.parametrize("flip", [slow(0xFF, id="all bits"), pytest.param(None, id="one bit")])
@pytest.mark.slow
def test_a_damaged_byte_is_never_read(small: tuple[bytes, list[int]], tmp_path: Path, flip: int | None) -> None:
    data, ends = small
    path = tmp_path / "relative_loss-000.arrows"
    path.write_bytes(data)
    for at in range(len(data)):
        with path.open("r+b") as file:
            file.seek(max(at - 1, 0))
            file.write(data[max(at - 1, 0) : at] + bytes([data[at] ^ (flip or 1 << (at % 8))]))
        try:
            contents = read_segment(path)
        except RecordError as error:
            assert re.search(r"relative_loss-000\.arrows is (damaged|not an Arrow IPC stream)", str(error))  # noqa: PT017
        else:  # the last batch may have been cut off as it was written
            assert at >= ends[-2]
            assert ([batch.num_rows for batch in contents.batches], contents.broken) == ([1, 2], 1), at


def test_damage_is_told_in_a_sentence(small: tuple[bytes, list[int]], tmp_path: Path) -> None:
    data, ends = small
    path = tmp_path / "relative_loss-000.arrows"
    path.write_bytes(data[: ends[1] + 200] + b"\0\1" + data[ends[1] + 202 :])
    message = f"{path} is damaged: batch 1, at byte {ends[1]} of {ends[3]}, is not what was written"
    with pytest.raises(RecordError, match=message):
        normzoo.load_run(tmp_path)


def test_a_tail_of_zeros_is_left_out(small: tuple[bytes, list[int]], tmp_path: Path) -> None:
    """As some file systems leave after a power cut."""
    data, ends = small
    (tmp_path / "relative_loss-000.arrows").write_bytes(data[: ends[2] + 8] + bytes(len(data) - ends[2] - 8))
    frame = normzoo.load_run(tmp_path)["relative_loss"]
    assert (len(frame), frame.attrs["broken_batches"]) == (3, 1)


WRITER = """
import random, resource, signal, sys
from pathlib import Path
import numpy as np
from normzoo.callbacks import GradientTails
from normzoo.records.segments import Segment

folder, start, how = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]

def rows(step):
    # Hardly compressed, so that a write takes a while
    values = np.random.default_rng(step).integers(0, 2**31, (3, 15_000, 2))
    return [{"step": step, "of": "gradient", "layer": f"layer{i}", "size": int(v.sum()), "counted": 0,
             "max": float(step), "l2": 0.0, "kurtosis": None,
             "q50": 0.0, "q99": 0.0, "q999": 0.0, "tail_ratio": None, "alpha": None, "zeros": 0, "nonfinite": 0,
             "mantissa_bits": 3, "histogram": v} for i, v in enumerate(values)]

segment = Segment(folder, GradientTails.schema, start)
if how == "limit":  # the kernel cuts the third sample in half, then kills
    segment.append(rows(start))
    size = segment.path.stat().st_size
    segment.append(rows(start + 1))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(2.5 * size), resource.RLIM_INFINITY))
    segment.append(rows(start + 2))
elif how == "full":  # the disk is full for a while
    segment.append(rows(start))
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(1.5 * segment.path.stat().st_size), resource.RLIM_INFINITY))
    try:
        segment.append(rows(start + 1))
    except OSError as error:
        print("refused", flush=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    segment.append(rows(start + 2))
else:
    for step in range(start, 10**6):
        segment.append(rows(step))
"""


def writer(folder: Path, start_step: int, how: str = "") -> Forks:
    """A process that writes records into ``folder``, and has its script beside it."""
    return start_script(folder.parent / "writer", WRITER, str(folder), str(start_step), how)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def check_writers_rows(folder: Path) -> list[int]:
    frame = normzoo.load_run(folder)["gradient_tails"]
    for row in frame.to_dict("records"):
        assert row["size"] == row["histogram"].sum()
        assert row["max"] == row["step"]
    found = frame["step"].tolist()
    assert found == [step for step in sorted(set(found)) for _ in range(3)]  # whole samples
    return sorted(set(found))


def test_a_writer_killed_at_any_time_leaves_whole_samples(folder: Path) -> None:
    random_times = random.Random(0)
    written: list[int] = []
    most = 0
    end = time.monotonic() + DEADLINE
    sizes = [random_times.randint(0, 3_000_000) for _ in range(8)]  # some are reached in the middle of a write
    for round_, size in enumerate(sizes):
        start_step = random_times.randint(max(0, len(written) - 3), len(written))  # a checkpoint of before the kill
        before = {p.name: p.stat().st_size for p in folder.iterdir()}
        process = writer(folder, start_step)
        try:
            while sum(p.stat().st_size for p in folder.iterdir() if p.name not in before) <= size:
                assert process.running, process.output
                assert time.monotonic() < end
                time.sleep(random_times.uniform(0, 0.003))
        finally:
            process.kill()
        assert process.codes == [-signal.SIGKILL]
        written = check_writers_rows(folder)
        assert written == list(range(len(written)))
        assert len(written) >= start_step
        most = max(most, len(written))
        assert {n: (folder / n).stat().st_size for n in before} == before
        assert len(list(folder.iterdir())) == round_ + 1
        assert time.monotonic() < end
    assert most > 3


def test_a_writer_killed_in_the_middle_of_a_write_leaves_half_a_batch(folder: Path) -> None:
    assert writer(folder, 0, "limit").ended_with(DEADLINE) == [-signal.SIGXFSZ]
    assert check_writers_rows(folder) == [0, 1]
    assert normzoo.load_run(folder)["gradient_tails"].attrs["broken_batches"] == 1
    assert writer(folder, 1, "limit").ended_with(DEADLINE) == [-signal.SIGXFSZ]
    assert check_writers_rows(folder) == [0, 1, 2]
    assert normzoo.load_run(folder)["gradient_tails"].attrs["broken_batches"] == 2


def test_a_write_that_is_refused_leaves_the_file_as_it_was(folder: Path) -> None:
    process = writer(folder, 0, "full")
    assert process.ended_with(DEADLINE) == [0], process.output
    assert process.output == "refused\n"
    assert check_writers_rows(folder) == [0, 2]
    assert normzoo.load_run(folder)["gradient_tails"].attrs["broken_batches"] == 0


# Resumed runs

SEAMS = {
    "one start": ([(0, [0, 2, 4], "whole")], [0, 2, 4]),
    "resumed": ([(0, [0, 2, 4, 6], "whole"), (3, [4, 6, 8], "whole")], [0, 2, 4, 6, 8]),
    "resumed where it ended": ([(0, [0, 2, 4], "whole"), (5, [6, 8], "whole")], [0, 2, 4, 6, 8]),
    "twice at the same step": ([(0, [0, 2, 4], "whole"), (3, [4, 6], "whole"), (3, [4], "whole")], [0, 2, 4]),
    "a resumed run resumed": ([(0, [0, 2, 4], "whole"), (3, [4, 6, 8], "whole"), (7, [8, 10], "whole")],
                              [0, 2, 4, 6, 8, 10]),
    "then at an earlier step": ([(0, [0, 2, 4, 6], "whole"), (5, [6, 8], "whole"), (2, [2, 4], "whole")], [0, 2, 4]),
    "then from the start": ([(0, [0, 2, 4, 6], "whole"), (5, [6, 8], "whole"), (0, [0], "whole")], [0]),
    "an empty one": ([(0, [0, 2, 4], "whole"), (3, [], "whole")], [0, 2]),
    "an empty one first": ([(0, [], "whole"), (0, [0, 2], "whole")], [0, 2]),
    "killed in its first batch": ([(0, [0, 2, 4], "whole"), (3, [4], "cut")], [0, 2]),
    "killed in its schema": ([(0, [0, 2, 4], "whole"), (3, [], "cut")], [0, 2, 4]),
    "killed before its schema": ([(0, [0, 2, 4], "whole"), (3, [], "nothing"), (3, [4, 6], "whole")], [0, 2, 4, 6]),
    "nothing at all": ([(0, [], "nothing")], []),
}  # fmt: skip


def lay(folder: Path, start: int, taken: list[int], end: str) -> None:
    path = write(folder, start, taken)
    os.truncate(path, {"whole": path.stat().st_size, "cut": path.stat().st_size - 5, "nothing": 0}[end])


@pytest.mark.parametrize(("segments", "expected"), SEAMS.values(), ids=SEAMS)
def test_rows_of_a_resumed_run_take_the_place_of_earlier_ones(
    tmp_path: Path, segments: list[tuple[int, list[int], str]], expected: list[int]
) -> None:
    for segment in segments:
        lay(tmp_path, *segment)
    assert steps(tmp_path) == expected


@settings(max_examples=60, deadline=None)
@given(
    starts=st.lists(
        st.tuples(st.integers(0, 12), st.integers(0, 4), st.sampled_from(["whole", "cut", "nothing"])), max_size=5
    )
)
def test_a_record_is_what_one_list_would_hold(
    starts: list[tuple[int, int, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Against a list that is cut at each start, with every row marked by its segment."""
    folder, truth = tmp_path_factory.mktemp("run"), []
    for number, (start, count, end) in enumerate(starts):
        segment = Segment(folder, CURVE, start)
        for step in range(start, start + count):
            segment.append([{**curve(step)[0], "lr": float(number)}])
        size = segment.path.stat().st_size
        os.truncate(segment.path, {"whole": size, "cut": size - 5, "nothing": 0}[end])
        if end == "whole" or (end == "cut" and count):
            taken = range(start, start + count - (end == "cut"))
            truth = [row for row in truth if row[0] < start] + [(step, float(number)) for step in taken]
    if starts:
        frame = normzoo.load_run(folder)["relative_loss"]
        numbers = frame.get("lr", frame["step"])  # no column but the step if no segment has a schema
        assert list(zip(frame["step"].tolist(), numbers.tolist(), strict=True)) == truth


def test_a_column_that_an_earlier_version_lacked_is_null(tmp_path: Path) -> None:
    old = Schema("relative_loss", CURVE.row, CURVE.columns[:3])
    Segment(tmp_path, old, 0).append([{"step": 0, "lr": 0.5, "loss": 1.0}])
    write(tmp_path, 1, [1])
    frame = normzoo.load_run(tmp_path)["relative_loss"]
    assert frame["lr"].tolist() == [0.5, 0.1]
    assert frame["multiples"][0] is None
    assert frame["multiples"][1].tolist() == [1.0, 2.0]


def test_a_column_that_changed_its_type_is_an_error(tmp_path: Path) -> None:
    old = Schema("relative_loss", CURVE.row, (CURVE.columns[0], Column("lr", "text", "")))
    Segment(tmp_path, old, 0).append([{"step": 0, "lr": "high"}])
    write(tmp_path, 1, [1])
    with pytest.raises(RecordError, match=r"-000\.arrows to relative_loss-001\.arrows do not go together"):
        normzoo.load_run(tmp_path)


def test_a_quantity_of_the_users_own_is_read(tmp_path: Path) -> None:
    own = Schema("cosine", "one sampled step", (Column("x", "float", ""),))
    Segment(tmp_path, own, 0).append([{"step": 3, "x": 0.5}])
    assert normzoo.load_run(tmp_path)["cosine"].to_dict("list") == {"step": [3], "x": [0.5]}


# Errors


def test_what_is_no_record_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is not there; give a run's folder"):
        normzoo.load_run(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no records \(QUANTITY-NNN\.arrows\) in "):
        normzoo.load_run(tmp_path)
    path = tmp_path / "relative_loss-000.arrows"
    path.write_text("step,loss\n")
    with pytest.raises(FileNotFoundError, match="is a file; give a run's folder"):
        normzoo.load_run(path)
    with pytest.raises(RecordError, match=r"-000\.arrows is not an Arrow IPC stream, so not a record of normzoo"):
        normzoo.load_run(tmp_path)
    table = pa.table({"step": [1, 2]})
    with pa.ipc.new_stream(str(path), table.schema) as stream:
        stream.write_table(table)
    with pytest.raises(RecordError, match=r"-000\.arrows is an Arrow IPC stream, but not a record of normzoo"):
        normzoo.load_run(tmp_path)
    with pa.ipc.new_file(str(path), table.schema) as file:
        file.write_table(table)
    with pytest.raises(RecordError, match="is not an Arrow IPC stream"):
        normzoo.load_run(tmp_path)


def test_a_run_folder_is_read_like_the_folder_of_its_records(tmp_path: Path) -> None:
    write(tmp_path / "run" / "metrics", 0, [0, 1])
    assert steps(tmp_path / "run") == steps(tmp_path / "run" / "metrics") == [0, 1]
    assert steps(Path(os.path.relpath(tmp_path / "run"))) == [0, 1]


def loaded(code: str) -> set[str]:
    watched = {"torch", "lightning", "timm", "matplotlib", "vl_convert", "pandas", "pyarrow"}
    code += f"\nimport sys; print(*({watched} & set(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


def test_reading_needs_neither_torch_nor_lightning(tmp_path: Path) -> None:
    write(tmp_path, 0, [0])
    found = loaded(f"import normzoo; assert len(normzoo.load_run({str(tmp_path)!r})['relative_loss']) == 1")
    assert found == {"pandas", "pyarrow"}
    assert loaded("import normzoo") == set()


# Callbacks


@pytest.mark.parametrize("kind", [GradientTails, RelativeLoss])
def test_two_callbacks_of_a_kind_need_two_folders(tmp_path: Path, kind: Any) -> None:
    with pytest.raises(ValueError, match=f"two {kind.__name__} would write the same record in .*; give one of them a"):
        trainer(str(tmp_path), callbacks=[kind(), kind()]).fit(SmallNet(), loader())
    other = tmp_path / "other"
    made = trainer(str(tmp_path), callbacks=[kind(2), kind(3, dirpath=str(other))], max_steps=4)
    made.fit(SmallNet(), loader())
    name = {GradientTails: "gradient_tails", RelativeLoss: "relative_loss"}[kind]
    assert sorted({*steps(tmp_path / "log", name)}) == [0, 2]
    assert sorted({*steps(other, name)}) == [0, 3]


def test_each_fit_opens_a_segment_and_a_new_run_takes_the_old_ones_place(tmp_path: Path) -> None:
    tails = GradientTails(1, dirpath=str(tmp_path))
    for count in (4, 2):
        trainer(str(tmp_path), callbacks=[tails], max_steps=count, logger=False).fit(SmallNet(), loader())
    assert sorted(p.name for p in tmp_path.glob("*.arrows")) == [
        "gradient_tails-000.arrows",
        "gradient_tails-001.arrows",
    ]
    assert sorted({*steps(tmp_path, "gradient_tails")}) == [0, 1]
    going_on = trainer(str(tmp_path), callbacks=[tails], max_steps=2, logger=False)
    net = SmallNet()
    going_on.fit(net, loader())
    going_on.fit_loop.epoch_loop.max_steps = 5
    going_on.fit(net, loader())
    assert sorted({*steps(tmp_path, "gradient_tails")}) == [0, 1, 2, 3, 4]


class Fails(pl.Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 3:
            raise RuntimeError("lost")


def test_a_sample_of_a_run_that_failed_is_not_written_by_the_next(tmp_path: Path) -> None:
    tails = GradientTails(1, dirpath=str(tmp_path))
    with pytest.raises(RuntimeError, match="lost"):
        trainer(str(tmp_path), callbacks=[tails, Fails()], logger=False).fit(SmallNet(), loader())
    assert tails._pending is not None
    trainer(str(tmp_path), callbacks=[tails], max_steps=2, logger=False).fit(SmallNet(), loader())
    assert sorted({*steps(tmp_path, "gradient_tails")}) == [0, 1]


class Scripted(SmallNet):
    def __init__(self, losses: dict[int, float]) -> None:
        super().__init__(lr=0.0)
        self.losses = losses

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.net(batch[0]).sum() * 0 + self.losses.get(batch_idx, 1.0 + batch_idx)


class SavesAfter(pl.Callback):
    """Saves a checkpoint at the end of a batch, before the callbacks have read its loss."""

    def __init__(self, batch: int, path: Path) -> None:
        self.batch, self.path = batch, path

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch:
            trainer.save_checkpoint(self.path)


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable")
@pytest.mark.parametrize("accumulated", [1, 4])
def test_a_divergence_is_on_record_once_whenever_the_run_was_saved(tmp_path: Path, accumulated: int) -> None:
    """The loss of batch 5 diverges; saved right after it, at a later batch, and at an earlier one."""
    for saved, expected in ((5, 1), (6, 1), (4, 1)):
        folder = tmp_path / f"saved{saved}"

        def run(count: int, folder: Path = folder, **options: Any) -> Divergence:
            callback = Divergence(rules=[LossAbove(), LossSpike(3.0, window=4)], dirpath=str(folder))
            saves = [SavesAfter(saved, folder / "saved.ckpt")] if not options else []  # noqa: B023
            made = trainer(
                str(folder),
                callbacks=[callback, *saves],
                max_steps=count,
                accumulate_grad_batches=accumulated,
                logger=False,
            )
            made.fit(Scripted({5: 2e3, 6: 3e3}), loader(), **options)
            return callback

        first = run(20 // accumulated)
        again = run(20 // accumulated, ckpt_path=folder / "saved.ckpt", weights_only=False)
        frame = normzoo.load_run(folder)["divergence"]
        assert len(frame) == expected, (saved, frame)
        assert frame["loss"].tolist() == [first.loss] if saved >= 5 else [again.loss]
        assert frame["rule"].tolist() == ["threshold"]
        state = torch.load(folder / "saved.ckpt", weights_only=False)["callbacks"]["Divergence"]
        assert state["recent"] == [2.0, 3.0, 4.0, 5.0]  # the pending loss too, if it did not diverge


def test_only_rank_zero_writes(tmp_path: Path) -> None:
    from normzoo.callbacks import Run
    from normzoo.callbacks._run.record import Record

    run = Run()
    run.writes, run.loggers = False, []
    record = Record(run, Divergence.schema, None, None, "")
    record.folder = tmp_path
    record.start(0)
    record.append([{"step": 1}])
    assert list(tmp_path.iterdir()) == []


def test_a_segment_of_nothing_has_no_schema(tmp_path: Path) -> None:
    path = tmp_path / "relative_loss-000.arrows"
    path.touch()
    assert read_segment(path).schema is None
    frame = normzoo.load_run(tmp_path)["relative_loss"]
    assert (list(frame.columns), len(frame), frame.attrs["broken_batches"]) == (["step"], 0, 1)
