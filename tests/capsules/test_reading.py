"""What a reader gets of a capsule."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from capsules_small import ABOUT, SENTENCE, make_capsule, make_tree
from report_runs import record

import normzoo
from normzoo import load_capsule
from normzoo.capsules import Capsule, CapsuleError
from normzoo.capsules.folder import seal, write_shard
from normzoo.capsules.reading import COLUMNS
from normzoo.capsules.tree import LeftOut

DEADLINE = 120  # seconds
PAGE = Path(__file__).parents[2] / "docs" / "capsules.md"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_capsule(tmp_path_factory.mktemp("run") / "capsules" / "step_00000031")


@pytest.fixture(scope="module")
def capsule(path: Path) -> Capsule:
    return load_capsule(path)


def test_a_capsule_is_found_in_its_run(path: Path, tmp_path: Path) -> None:
    assert load_capsule(path.parents[1]).path == path
    assert normzoo.Capsule is Capsule
    made = make_capsule(tmp_path / "metrics" / "capsules" / "step_00000002")  # as normzoo run lays its folders
    assert load_capsule(str(tmp_path)).path == made


def test_about_is_what_the_manifest_says(capsule: Capsule) -> None:
    assert capsule.about["sentence"] == SENTENCE
    assert capsule.about["versions"] == ABOUT["versions"]
    assert np.isnan(capsule.about["value"])
    assert capsule.ranks == [0, 1]


def test_frames_have_a_row_for_each_micro_batch_and_rank(capsule: Capsule) -> None:
    frames = capsule.frames
    assert frames.attrs["meaning"] == COLUMNS
    assert list(frames.columns) == list(COLUMNS)
    rows = [(s, r, m) for s in range(28, 32) for m in range(2) for r in range(2)]
    assert list(zip(frames["step"], frames["rank"], frames["micro_batch"], strict=True)) == rows
    losses = [s + m / 2 + r / 4 for s, r, m in rows]
    assert frames["loss"].tolist()[:-1] == losses[:-1]
    assert np.isnan(frames["loss"].iloc[-1])
    assert frames["lr"].unique().tolist() == pytest.approx([0.1])
    assert frames["norm"].tolist() == [1.0 + s for s, _, _ in rows]
    assert set(frames["applied"]) == {1.0}
    assert frames["scale"].isna().all()
    assert frames["ids"].tolist() == [[r, 2 * s + m] for s, r, m in rows]
    assert frames["hash"].tolist() == [f"{r}-{2 * s + m}" for s, r, m in rows]


def test_losses_of_a_rank_that_is_missing_are_known_of_the_others(tmp_path: Path) -> None:
    frames = load_capsule(make_capsule(tmp_path / "c", missing=(1,))).frames
    of_missing = frames[frames["rank"] == 1]
    assert of_missing["loss"].tolist()[:3] == [28.25, 28.75, 29.25]
    assert of_missing["hash"].isna().all()
    assert not frames[frames["rank"] == 0]["hash"].isna().any()


def test_frames_of_a_step_that_was_cut_short(tmp_path: Path) -> None:
    """Without norms, hyperparameters, or the losses of other ranks."""
    frame = {"step": 3, "epoch": 0, "hyperparameters": [], "norms": None, "scale": np.float32(2.0)}
    frame["micro_batches"] = [{"batch_idx": 3, "losses": [], "batch": None, "ids": None, "hash": None, "random": {}}]
    write_shard(tmp_path, 0, {}, {"frames": [frame], "snapshots": []})
    seal(tmp_path, {}, 1)
    [row] = load_capsule(tmp_path).frames.to_dict("records")
    assert (row["step"], row["rank"], row["micro_batch"], row["scale"]) == (3, 0, 0, 2.0)
    assert np.isnan([row["loss"], row["lr"], row["norm"], row["applied"]]).all()
    assert row["ids"] is row["hash"] is None


def test_a_snapshot(capsule: Capsule) -> None:
    last, first = capsule.state(), capsule.state(rank=1, step=28)
    assert (last["step"], first["step"]) == (30, 28)
    expected = make_tree()["snapshots"][0]
    assert torch.equal(first["module"]["weight"], expected["module"]["weight"])
    assert first["module"]["tied"].data_ptr() == first["module"]["weight"].data_ptr()
    state = expected["optimizers"][0]["state"][0]["momentum_buffer"]
    assert torch.equal(first["optimizers"][0]["state"][0]["momentum_buffer"], state)
    assert last["trainer"] == {"loops": {"step": 30}, "scheduler": LeftOut("builtin_function_or_method")}
    optimizer = torch.optim.SGD([first["module"]["weight"]], lr=0.5)
    optimizer.load_state_dict(first["optimizers"][0])
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_batches(capsule: Capsule) -> None:
    for rank in range(2):
        batches = capsule.batches(29, rank)
        assert len(batches) == 2
        for i, (images, more) in enumerate(batches):
            assert images.tolist() == torch.full((2, 3), 29.0 + i).tolist()
            assert more["label"].tolist() == [rank, i]


def test_all_that_a_rank_has_written(capsule: Capsule) -> None:
    tree = capsule.tree(1)
    random_states = tree["frames"][2]["micro_batches"][1]["random"]
    expected = make_tree(1)["frames"][2]["micro_batches"][1]["random"]
    assert torch.equal(random_states["torch"], expected["torch"])
    assert random_states["python"] == expected["python"]
    assert random_states["numpy"] == expected["numpy"]


def test_what_is_read_is_a_copy(tmp_path: Path) -> None:
    path = make_capsule(tmp_path / "c", ranks=1)
    file = path / "rank_00000.safetensors"
    before = file.read_bytes()
    state = load_capsule(path).state()
    with torch.no_grad():
        state["module"]["weight"].zero_()
    assert file.read_bytes() == before
    os.truncate(file, 10)
    assert state["module"]["weight"].sum() == 0


def test_records_of_the_remade_steps(tmp_path: Path) -> None:
    path = make_capsule(tmp_path / "c")
    assert load_capsule(path).records == {}
    written = record(tmp_path, "gradient_norm", {"step": 30, "norm": 2.0}, {"step": 31, "norm": 4.0})
    written.parent.rename(path / "records")
    assert load_capsule(path).records["gradient_norm"]["norm"].tolist() == [2.0, 4.0]


def test_frames_and_records_are_read_without_torch(path: Path) -> None:
    code = (
        "import sys, normzoo\n"
        f"capsule = normzoo.load_capsule({str(path)!r})\n"
        "assert len(capsule.frames) == 16 and capsule.frames['lr'].notna().all() and capsule.records == {}\n"
        "assert not {'torch', 'lightning'} & set(sys.modules)\n"
        "capsule.state()\n"
        "assert 'torch' in sys.modules and 'lightning' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=DEADLINE)


def test_what_is_not_there_is_told_in_a_sentence(capsule: Capsule, path: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is not there; give a capsule's folder"):
        load_capsule(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"manifest\.json is a file; give a capsule's folder"):
        load_capsule(path / "manifest.json")
    with pytest.raises(FileNotFoundError, match=r"no capsule in .*: it has no manifest\.json, and no folder capsules"):
        load_capsule(tmp_path)
    with pytest.raises(CapsuleError, match="has no snapshot of step 29 on rank 0; there are those of steps 28, 30$"):
        capsule.state(step=29)
    with pytest.raises(CapsuleError, match="has no batches of step 7; there are those of steps 28, 29, 30, 31$"):
        capsule.batches(7)
    with pytest.raises(CapsuleError, match="has nothing of rank 2; there are ranks 0, 1$"):
        capsule.state(rank=2)


def test_a_run_with_several_capsules_names_them(tmp_path: Path) -> None:
    paths = [make_capsule(tmp_path / "capsules" / name) for name in ("step_00000001", "step_00000002")]
    with pytest.raises(CapsuleError, match=f"has several capsules; give one of {paths[0]}, {paths[1]}$"):
        load_capsule(tmp_path)


def test_an_unfinished_capsule_is_none(tmp_path: Path) -> None:
    folder = tmp_path / "capsules" / "step_00000001"
    write_shard(folder, 0, ABOUT, make_tree())
    for path in (tmp_path, folder):
        with pytest.raises(CapsuleError, match=f"{folder} is an unfinished capsule: it has no manifest.json"):
            load_capsule(path)


def test_without_snapshots(tmp_path: Path) -> None:
    write_shard(tmp_path, 0, ABOUT, make_tree(snapshots=()))
    seal(tmp_path, ABOUT, 1)
    with pytest.raises(CapsuleError, match="has no snapshot of any step on rank 0; there are those of no step"):
        load_capsule(tmp_path).state()


def test_the_page_has_the_columns() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", PAGE.read_text(encoding="utf-8").split("## Frames")[1], re.MULTILINE)
    assert dict(rows[: len(COLUMNS)]) == COLUMNS
