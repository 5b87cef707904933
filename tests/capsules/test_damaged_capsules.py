"""Damaged and hostile capsules: one sentence that names the file, and nothing is executed."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from capsules_small import ABOUT, make_capsule, make_tree, rewrite
from damages import DAMAGES
from hypothesis import given, settings
from hypothesis import strategies as st
from sweeps import EXAMPLES

from normzoo.capsules import CapsuleError, load_capsule, sealed
from normzoo.capsules.folder import seal, unfinished, write_shard

FILES = ("manifest.json", "rank_00000.json", "rank_00000.safetensors", "rank_00001.json", "rank_00001.safetensors")


def read_all(folder: Path) -> None:
    capsule = load_capsule(folder)
    assert len(capsule.frames) == 16
    for rank in range(2):
        capsule.tree(rank)
        capsule.state(rank)
        capsule.batches(31, rank)


def hold_damage(folder: Path, name: str) -> None:
    with pytest.raises(CapsuleError) as caught:
        read_all(folder)
    assert str(folder / name) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    unfinished(folder.parents[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_capsule(tmp_path_factory.mktemp("run") / "capsules" / "step_00000031")
    read_all(path)
    return path


def damage_one_file(folder: Path, name: str, kind: Callable[..., bytes], seed: int) -> None:
    path = folder / name
    whole = path.read_bytes()
    damaged = kind(whole, Random(seed))
    path.write_bytes(damaged)
    try:
        if damaged != whole:
            hold_damage(folder, name)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("name", FILES[:3])
def test_each_kind_of_damage_is_noticed(folder: Path, name: str) -> None:
    for kind in DAMAGES:
        damage_one_file(folder, name, kind, 5)


def fuzz(folder: Path, examples: int) -> None:
    @settings(max_examples=examples)
    @given(st.sampled_from(FILES), st.sampled_from(DAMAGES), st.integers(0, 2**32))
    def property_holds(name: str, kind: Callable[..., bytes], seed: int) -> None:
        damage_one_file(folder, name, kind, seed)

    property_holds()


def test_damaged_files(folder: Path) -> None:
    fuzz(folder, 15)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_many_damaged_files(folder: Path) -> None:
    fuzz(folder, EXAMPLES)


@pytest.mark.parametrize("name", FILES[:3])
@pytest.mark.parametrize("what", ["folder", "pipe", "link to itself", "nothing"])
def test_something_else_in_the_place_of_a_file(folder: Path, tmp_path: Path, name: str, what: str) -> None:
    copy = shutil.copytree(folder, tmp_path / "capsules" / "c")
    path = copy / name
    path.unlink()
    {
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "link to itself": lambda: path.symlink_to(path),
        "nothing": lambda: None,
    }[what]()
    if (name, what) == ("manifest.json", "nothing"):
        with pytest.raises(CapsuleError, match="is an unfinished capsule"):
            load_capsule(copy)
    else:
        hold_damage(copy, name)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"schema_version": 2}, "is of schema_version 2, and this normzoo reads up to 1; use a newer normzoo"),
        ({"schema_version": "1"}, "is not a file of a capsule: its schema_version is '1'"),
        ({"schema_version": True}, "is not a file of a capsule: its schema_version is True"),
        ({"ranks": 10**12}, "is not a manifest"),
        ({"ranks": 0}, "is not a manifest"),
        ({"missing": [5]}, "is not a manifest"),
        ({"missing": "none"}, "is not a manifest"),
        ({"left_out": ["x"]}, "is not a manifest"),
        ({"sentence": 3}, "is not a manifest"),
        ({"error": {"$object": "os.system"}}, "is not a manifest"),
        ({"error": {"$tensor": "x"}}, "is not a manifest"),
    ],
    ids=str,
)
def test_manifests_of_others(folder: Path, tmp_path: Path, content: dict[str, Any], text: str) -> None:
    copy = shutil.copytree(folder, tmp_path / "c")
    rewrite(copy / "manifest.json", **content)
    with pytest.raises(CapsuleError, match=text):
        load_capsule(copy)


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2]",
        "{}",
        '{"check": 3, "schema_version": 1}',
        '{"check": null}',
        "nonsense",
        "",
        '{"check": NaN}',
        '{"check": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"check": ' + "9" * 10_000 + "}",
        "\ud800",
    ],
    ids=lambda text: text[:20],
)
def test_other_files_in_the_place_of_a_manifest(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text, errors="surrogatepass")
    with pytest.raises(CapsuleError, match=r"manifest\.json is (damaged|not a file of a capsule): it"):
        load_capsule(tmp_path)


def frame(**changes: Any) -> dict[str, Any]:
    micro_batch = {"batch_idx": 0, "losses": [1.0], "batch": None, "ids": None, "hash": None, "random": {}}
    content = {"step": 0, "epoch": 0, "hyperparameters": [], "norms": [], "scale": None, "micro_batches": [micro_batch]}
    return {**content, **changes}


DEEP: Any = 1
for _ in range(300):
    DEEP = [DEEP]
HOSTILE = {
    "a tensor that is not in the file": {"$tensor": "../../etc/passwd"},
    "a tensor of a name that is no text": {"$tensor": ["x"]},
    "an object": {"$object": "os.system", "args": ["true"]},
    "depth": DEEP,
    "an absurd shape": {"$tensor": "/frames/0/hyperparameters/0/0/lr", "shape": [10**20]},
    "an array of objects": {"$array": "/frames/0/hyperparameters/0/0/lr", "dtype": "O", "dense_shape": [1]},
}


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("place", ["batch", "frame"])
def test_hostile_trees_are_refused(folder: Path, tmp_path: Path, value: Any, place: str) -> None:
    copy = shutil.copytree(folder, tmp_path / "capsules" / "c")
    path = copy / "rank_00000.json"
    tree = json.loads(path.read_text())["tree"]
    if place == "batch":
        tree["frames"][3]["micro_batches"][0]["batch"] = value
        rewrite(path, tree=tree)
        assert len(load_capsule(copy).frames) == 16  # for which batches are not read
        with pytest.raises(CapsuleError, match=r"rank_00000\.(json|safetensors) "):
            load_capsule(copy).batches(31)
    else:
        tree["frames"][3]["norms"] = value
        rewrite(path, tree=tree)
        with pytest.raises(CapsuleError, match=r"rank_00000\.(json|safetensors) "):
            _ = load_capsule(copy).frames


@pytest.mark.parametrize(
    "tree",
    [
        3,
        {},
        {"frames": 3, "snapshots": []},
        {"frames": [3], "snapshots": [3]},
        {"frames": [{"step": 0}], "snapshots": [{}]},
        {"frames": [frame(micro_batches=[3])], "snapshots": None},
        {"frames": [frame(step={"$tuple": [1]})], "snapshots": []},
        {"frames": [frame(step="x"), frame(step=1)], "snapshots": []},
        {"frames": [frame(hyperparameters=[3])], "snapshots": []},
        {"frames": [frame(hyperparameters=[[3]])], "snapshots": []},
        {"frames": [frame(norms=[3])], "snapshots": []},
        {"frames": [frame(micro_batches=[{"losses": 3}])], "snapshots": []},
    ],
    ids=str,
)
def test_other_trees_have_no_frames(folder: Path, tmp_path: Path, tree: Any) -> None:
    copy = shutil.copytree(folder, tmp_path / "c")
    rewrite(copy / "rank_00000.json", tree=tree)
    with pytest.raises(CapsuleError, match=r"rank_00000\.json (is not a file of a capsule|has nothing at)"):
        _ = load_capsule(copy).frames
    with pytest.raises(CapsuleError, match=r"rank_00000\.json (is not a file of a capsule|has nothing at)|no snapshot"):
        load_capsule(copy).state()


@pytest.mark.parametrize(
    "content",
    [
        {"rank": 1},
        {"rank": "0"},
        {"left_out": 3},
        {"safetensors": 3},
        {"safetensors": {"bytes": 3, "header": [8, 0], "tensors": {}}},
        {"safetensors": {"bytes": "3", "header": [8, 0], "tensors": {}}},
    ],
    ids=str,
)
def test_other_json_in_the_place_of_a_shard(folder: Path, tmp_path: Path, content: dict[str, Any]) -> None:
    copy = shutil.copytree(folder, tmp_path / "c")
    rewrite(copy / "rank_00000.json", **content)
    with pytest.raises(CapsuleError, match=r"rank_00000\.(json|safetensors) is"):
        _ = load_capsule(copy).frames


@pytest.mark.parametrize(
    "header",
    [
        (2**63).to_bytes(8, "little"),
        (10**9).to_bytes(8, "little") + b"{}",
        b"\x02" + b"\0" * 7 + b"{}",
        (64).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[1000000000],"data_offsets":[0,4]}} ',
        (64).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4000000000]}}  ',
        b"",
    ],
    ids=repr,
)
def test_hostile_headers_are_refused(folder: Path, tmp_path: Path, header: bytes) -> None:
    copy = shutil.copytree(folder, tmp_path / "c")
    (copy / "rank_00000.safetensors").write_bytes(header)
    about = {"bytes": len(header), "header": [len(header), zlib.crc32(header)], "tensors": {"a": 0}}
    rewrite(copy / "rank_00000.json", safetensors=about)
    with pytest.raises(CapsuleError, match=r"rank_00000\.safetensors cannot be read: "):
        _ = load_capsule(copy).frames


def test_a_header_beyond_the_file_is_not_read(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "c")
    about = json.loads((copy / "rank_00000.json").read_text())["safetensors"]
    rewrite(copy / "rank_00000.json", safetensors={**about, "header": [10**15, 0]})
    with pytest.raises(CapsuleError, match=r"rank_00000\.safetensors is damaged: its header is not what was written"):
        _ = load_capsule(copy).frames


def test_huge_json_is_not_read(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealed, "_LONGEST", 100)
    with pytest.raises(CapsuleError, match=r"manifest\.json is not a file of a capsule: it has more than 100 bytes"):
        load_capsule(folder)


def test_tensors_that_changed_places(tmp_path: Path) -> None:
    """Those of another rank, of the same names and sizes."""
    for rank in range(2):
        write_shard(tmp_path / "c", rank, ABOUT, make_tree(rank))
    seal(tmp_path / "c", ABOUT, 2)
    first, second = (tmp_path / "c" / f"rank_0000{rank}.safetensors" for rank in range(2))
    shutil.copy(second, first)
    capsule = load_capsule(tmp_path / "c")
    assert len(capsule.frames) == 16
    with pytest.raises(CapsuleError, match=r"rank_00000\.safetensors is damaged: the tensor /frames/3/.*label is not"):
        capsule.batches(31)
