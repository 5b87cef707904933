"""Capsules are written whole or not at all, and by ranks that do not wait for a collective."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import resource
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from capsules_small import ABOUT, make_capsule, make_tree, micro_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_function

from normzoo import load_capsule
from normzoo.capsules import folder as writing
from normzoo.capsules.folder import seal, unfinished, withdraw, write_shard
from normzoo.capsules.limit import encode_within
from normzoo.capsules.tensors import DTYPES
from normzoo.capsules.tree import LeftOut


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def manifest(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return content


def test_a_folder_is_a_capsule_when_its_manifest_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "capsules" / "step_00000031"
    for rank in range(2):
        path = write_shard(folder, rank, ABOUT, make_tree(rank))
        assert path == folder / f"rank_0000{rank}.json"
    assert files(folder) == ["rank_00000.json", "rank_00000.safetensors", "rank_00001.json", "rank_00001.safetensors"]
    assert unfinished(tmp_path) == [
        f"{folder} is an unfinished capsule: it has no manifest.json, "
        "and only ranks 0, 1 had written when the job ended"
    ]
    assert seal(folder, ABOUT, 2) == []
    assert unfinished(tmp_path) == []
    assert len(files(folder)) == 5
    content = manifest(folder)
    assert content["value"] == {"$float": "nan"}
    assert (content["schema_version"], content["kind"], content["ranks"], content["missing"]) == (
        1,
        "divergence",
        2,
        [],
    )
    reasons = {f"/snapshots/{i}/trainer/scheduler": "builtin_function_or_method" for i in range(2)}
    assert content["left_out"] == {"0": reasons, "1": reasons}


def test_the_tensors_are_a_file_that_safetensors_reads(tmp_path: Path) -> None:
    tensors = {str(dtype): torch.arange(3).to(dtype) for dtype in reversed(DTYPES)}
    tensors |= {
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 3),
        "transposed": torch.arange(6.0).reshape(2, 3).t(),
    }
    snapshot = {"step": 0, "module": tensors}
    write_shard(tmp_path / "c", 0, {}, {"frames": [], "snapshots": [snapshot]})
    path = tmp_path / "c" / "rank_00000.safetensors"
    loaded = safetensors.torch.load_file(path)
    assert len(loaded) == len(tensors)
    for name, tensor in tensors.items():
        again = loaded[f"/snapshots/0/module/{name}"]
        assert again.dtype == tensor.dtype
        assert torch.equal(again.float(), (tensor.t() if name == "transposed" else tensor).float())
    header = path.read_bytes()
    entries = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    for name, entry in entries.items():
        assert name == "__metadata__" or entry["data_offsets"][0] % loaded[name].dtype.itemsize == 0


def test_a_rank_that_is_late_is_missing_until_it_has_written(tmp_path: Path) -> None:
    folder = tmp_path / "capsules" / "a"
    write_shard(folder, 0, ABOUT, make_tree(0))
    assert seal(folder, {**ABOUT, "error": "first"}, 2, wait=0.1) == [1]
    assert unfinished(tmp_path) == [f"{folder} is a capsule without rank 1 of 2, which had not written in time"]
    assert load_capsule(folder).ranks == [0]
    write_shard(folder, 1, ABOUT, make_tree(1))
    assert seal(folder, {**ABOUT, "error": "second"}, 2) == []
    assert load_capsule(folder).ranks == [0, 1]
    assert load_capsule(folder).about["error"] == "first"


def write_as_rank(folder: str, rank: int | None = None) -> None:
    rank = int(os.environ["RANK"]) if rank is None else rank
    time.sleep(0.2 * rank)  # the first ranks do not wait for the last
    write_shard(Path(folder), rank, ABOUT, make_tree(rank, 3))
    seal(Path(folder), ABOUT, 3, wait=0.1)


def test_whichever_rank_comes_last_the_manifest_has_all(tmp_path: Path) -> None:
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(partial(write_as_rank, str(tmp_path)), range(3)))
    assert manifest(tmp_path)["missing"] == []
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.slow
def test_whichever_process_comes_last_the_manifest_has_all(tmp_path: Path) -> None:
    run_function(tmp_path / "run", write_as_rank, 3, str(tmp_path / "c"))
    assert manifest(tmp_path / "c")["missing"] == []
    assert not list((tmp_path / "c").glob("*.part"))


def test_a_manifest_that_is_overtaken_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank comes, and writes its manifest, between another rank's last look and its manifest."""
    folder, whole = tmp_path / "c", writing.write_json

    def overtaken(path: Path, content: dict[str, Any]) -> None:
        monkeypatch.setattr(writing, "write_json", whole)
        write_shard(folder, 1, ABOUT, make_tree(1))
        assert seal(folder, ABOUT, 2) == []
        whole(path, content)
        assert manifest(folder)["missing"] == [1]

    write_shard(folder, 0, ABOUT, make_tree(0))
    monkeypatch.setattr(writing, "write_json", overtaken)
    assert seal(folder, ABOUT, 2, wait=0.0) == []
    assert manifest(folder)["missing"] == []


def test_a_shard_that_is_damaged_is_missing(tmp_path: Path) -> None:
    for rank in range(2):
        write_shard(tmp_path / "c", rank, ABOUT, make_tree(rank))
    path = tmp_path / "c" / "rank_00001.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    assert seal(tmp_path / "c", ABOUT, 2, wait=0.0) == [1]


def test_each_unfinished_capsule_is_told(tmp_path: Path) -> None:
    make_capsule(tmp_path / "capsules" / "1_whole")
    make_capsule(tmp_path / "capsules" / "2_partly", ranks=3, missing=(0, 2))
    (tmp_path / "capsules" / "3_empty").mkdir()
    path = make_capsule(tmp_path / "capsules" / "4_damaged") / "manifest.json"
    path.write_bytes(path.read_bytes()[:-1])
    partly, empty, damaged = unfinished(tmp_path)
    assert partly.endswith("2_partly is a capsule without ranks 0, 2 of 3, which had not written in time")
    assert empty.endswith("3_empty is an unfinished capsule: it has no manifest.json, and no rank had written")
    assert damaged == f"{path} is damaged: it is not valid JSON"
    assert unfinished(tmp_path / "nowhere") == []


@contextlib.contextmanager
def disk_of(size: int) -> Iterator[None]:
    """Files cannot grow beyond a size, for which the system raises EFBIG as it raises ENOSPC for a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("part", ["safetensors", "json"])
def test_of_what_does_not_fit_on_the_disk_nothing_stays(tmp_path: Path, part: str) -> None:
    folder = tmp_path / "capsules" / "c"
    write_shard(tmp_path / "whole", 0, ABOUT, make_tree(0))
    tree = make_tree(0) if part == "safetensors" else {**make_tree(0), "text": "x" * 100_000}
    size = (tmp_path / "whole" / "rank_00000.safetensors").stat().st_size
    with disk_of(size - 1 if part == "safetensors" else size), pytest.raises(OSError, match="File too large"):
        write_shard(folder, 0, ABOUT, tree)
    assert not folder.exists()
    write_shard(folder, 1, ABOUT, make_tree(1))
    with disk_of(size - 1), pytest.raises(OSError, match="File too large"):
        write_shard(folder, 0, ABOUT, tree)
    assert files(folder) == ["rank_00001.json", "rank_00001.safetensors"]


def test_a_manifest_that_does_not_fit_leaves_the_one_before(tmp_path: Path) -> None:
    write_shard(tmp_path, 0, ABOUT, make_tree(0))
    assert seal(tmp_path, ABOUT, 2, wait=0.0) == [1]
    write_shard(tmp_path, 1, ABOUT, make_tree(1))
    with disk_of(10), pytest.raises(OSError, match="File too large"):
        seal(tmp_path, ABOUT, 2)
    assert manifest(tmp_path)["missing"] == [1]
    assert not list(tmp_path.glob("*.part"))


def test_what_is_withdrawn_leaves_other_ranks_and_capsules_that_have_a_manifest(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    for rank in range(2):
        write_shard(folder, rank, ABOUT, make_tree(rank))
    withdraw(folder, 0)
    assert files(folder) == ["rank_00001.json", "rank_00001.safetensors"]
    withdraw(folder, 1)
    assert not folder.exists()
    withdraw(folder, 1)
    write_shard(folder, 0, ABOUT, make_tree(0))
    seal(folder, ABOUT, 1)
    withdraw(folder, 0)
    assert load_capsule(folder).ranks == [0]


def test_a_rank_writes_once(tmp_path: Path) -> None:
    write_shard(tmp_path, 0, ABOUT, make_tree(0))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match="the rank has written this capsule before"):
        write_shard(tmp_path, 0, ABOUT, make_tree(1))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("about", [{"loss": torch.ones(1)}, {1: 2}, {"$tuple": 3}], ids=str)
def test_about_is_plain_data(tmp_path: Path, about: dict[Any, Any]) -> None:
    with pytest.raises(ValueError, match="about must be a dictionary of plain data without tensors, not "):
        seal(tmp_path, about, 1)
    with pytest.raises(ValueError, match="about must be a dictionary of plain data without tensors, not "):
        write_shard(tmp_path / "c", 0, about, make_tree(0))
    assert not (tmp_path / "c").exists()


def tensor_bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


ORDER = [
    "/now/module",
    *(f"/frames/{i}/micro_batches/{j}/batch" for i, j in itertools.product(range(4), range(2))),
    *(f"/snapshots/{i}/{key}" for i in range(2) for key in ("optimizers", "module", "trainer")),
    *(f"/frames/{i}/micro_batches/{j}/random" for i, j in itertools.product(range(4), range(2))),
]


@settings(max_examples=30)
@given(st.integers(0, 50_000))
def test_what_is_beyond_max_bytes_is_left_out_in_order(max_bytes: int) -> None:
    tree = make_tree(0)
    encoded = encode_within(tree, max_bytes)
    left_out = [path for path, reason in encoded.left_out.items() if reason == f"beyond max_bytes={max_bytes}"]
    assert set(left_out) == set(ORDER[: len(left_out)])
    assert tensor_bytes(encoded.tensors) <= max_bytes or len(left_out) == len(ORDER)
    if left_out:  # with one thing less left out it would not fit
        for path in ORDER[: len(left_out) - 1]:
            *place, key = (int(part) if part.isdecimal() else part for part in path.split("/")[1:])
            part = tree
            for step in place:
                part = part[step]
            part[key] = None
        assert tensor_bytes(encode_within(tree, None).tensors) > max_bytes


def test_shared_tensors_count_once_and_go_with_the_last_place_that_has_them() -> None:
    images = torch.zeros(100)
    frames = [{"step": s, "micro_batches": [micro_batch(s, [0.0], [images])]} for s in range(3)]
    tree = {"frames": frames, "snapshots": []}
    random = tensor_bytes(encode_within(tree, None).tensors) - 400
    assert encode_within(tree, random + 400).left_out == {}
    left_out = encode_within(tree, random + 399).left_out
    assert [*left_out] == [f"/frames/{i}/micro_batches/0/batch" for i in range(3)]
    assert frames[0]["micro_batches"][0]["batch"] == [images]


def test_what_was_too_large_says_so_when_it_is_read(tmp_path: Path) -> None:
    write_shard(tmp_path, 0, ABOUT, make_tree(0, 1), max_bytes=0)
    assert seal(tmp_path, ABOUT, 1) == []
    capsule = load_capsule(tmp_path)
    assert capsule.batches(31) == [LeftOut("beyond max_bytes=0")] * 2
    assert capsule.state()["module"] == LeftOut("beyond max_bytes=0")
    assert capsule.frames["loss"].notna().sum() == 7
