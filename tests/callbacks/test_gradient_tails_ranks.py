"""GradientTails over real processes: layers shared out under DDP, shards under FSDP2, noise of all ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import run_ranks

from normzoo import load_run

TRAIN = '''
import json, os, sys, torch
from pathlib import Path
import lightning.pytorch as pl
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
sys.path.insert(0, os.environ["TESTS"])
from callbacks_small import SmallNet, images, trainer
from normzoo.callbacks import GradientTails

how, folder = sys.argv[1], Path(sys.argv[2])
rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

class Net(SmallNet):
    """Neither dropout nor batch norm, whose draws and statistics differ with the number of ranks."""
    def __init__(self):
        super().__init__()
        self.net[1], self.net[3] = torch.nn.Linear(8, 8), torch.nn.Identity()
        self.net[6] = torch.nn.Linear(128, 4)
        self.odd = torch.nn.Linear(4, 3)  # not to be cut evenly
    def training_step(self, batch, batch_idx):
        x = self.net[0](batch[0])
        x = self.net[2](x)
        x = self.odd(self.net[6](self.net[5](self.net[4](x))))
        return x.square().mean() + 0 * self.net[1](batch[0][..., 0, :]).sum()
    def configure_model(self):
        if how == "fsdp":
            for module in (self.net[0], self.net[1], self.net[6], self.odd):
                fully_shard(module, mesh=self.device_mesh["data_parallel"])

class Counts(GradientTails):
    """Notes how many values this rank measured."""
    measured = []
    def histograms(self, tensors, step=0):
        self.measured.append(sum(t.numel() for t in tensors))
        return super().histograms(tensors, step)

pl.seed_everything(1, verbose=False)
net, whole = Net(), 8
ours = [range(step * whole + rank * whole // world, step * whole + (rank + 1) * whole // world) for step in range(10)]
of = ["gradient", "update"] + (["noise"] if how == "ddp" else [])
callback = Counts(2, of=of)
strategy = {
    "ddp": "ddp",
    "fsdp": ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1, process_group_backend="gloo"),
}.get(how, "auto")
run = trainer(str(folder), callbacks=[callback], max_steps=5, use_distributed_sampler=False, devices=world,
              strategy=strategy, gradient_clip_val=None)
run.fit(net, DataLoader(images(160), batch_sampler=ours))
(folder / f"rank{rank}.json").write_text(json.dumps(callback.measured))
'''

SHARDS = """
import json, os, sys, torch, torch.distributed as dist
from pathlib import Path
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from normzoo.callbacks._run.ranks import SharedHistograms, own_parts
from normzoo.functional.histogram_and_moments import histogram_and_moments

dist.init_process_group("gloo")
torch.manual_seed(0)
wholes = [torch.randn(7, 3), torch.randn(1, 5), torch.randn(300), torch.randn(6, 4) * 1e-20]
mesh = init_device_mesh("cpu", (2, 2))
placed = [[Replicate(), Shard(0)], [Shard(0), Replicate()], [Shard(0), Shard(0)], [Replicate(), Replicate()]]
tensors = [distribute_tensor(t, mesh, p) for t, p in zip(wholes, placed)] + [torch.arange(9.0)]
parts = own_parts(tensors)
mine = [i for i, part in enumerate(parts) if part is not None]
found = histogram_and_moments([part for part in parts if part is not None]) if mine else None
shared = SharedHistograms(found, mine, [t.numel() for t in tensors], 3, True, torch.device("cpu"))
counts, moments = shared.read()
expected = histogram_and_moments([*wholes, torch.arange(9.0)])
refused = ""
try:
    own_parts([DTensor.from_local(torch.ones(4), mesh, [Partial(), Replicate()])])
except ValueError as error:
    refused = str(error)
Path(sys.argv[1], f"rank{dist.get_rank()}.json").write_text(json.dumps({
    "counts": torch.equal(counts, expected[0]),
    "off": float(((moments - expected[1]).abs() / expected[1].abs().clamp(min=1e-80)).nan_to_num().max()),
    "refused": refused, "mine": sum(p.numel() for p in parts if p is not None)}))
dist.destroy_process_group()
"""


def launch(folder: Path, script: str, ranks: int, *arguments: str) -> list[Any]:
    run_ranks(folder, script, ranks, *arguments)
    return [json.loads((folder / f"rank{r}.json").read_text()) for r in range(ranks)]


def rows(folder: Path) -> list[dict[str, Any]]:
    return load_run(folder / "log")["gradient_tails"].to_dict("records")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("one")
    return folder, launch(folder, TRAIN, 1, "one", str(folder))


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_ranks_report_what_one_does_on_the_union_and_share_the_work(
    tmp_path: Path, how: str, one: tuple[Path, list[Any]]
) -> None:
    measured = launch(tmp_path, TRAIN, 2, how, str(tmp_path))
    alone, (whole,) = rows(one[0]), one[1]
    found = rows(tmp_path)
    noise = [r for r in found if r["of"] == "noise"]
    found = [r for r in found if r["of"] != "noise"]
    assert len(found) == len(alone) == 3 * 2 * 7
    for a, b in zip(alone, found, strict=True):
        assert (a["step"], a["of"], a["layer"], a["size"]) == (b["step"], b["of"], b["layer"], b["size"])
        assert b["counted"] == b["size"]
        for stat in ("max", "l2", "kurtosis"):
            assert a[stat] == pytest.approx(b[stat], rel=2e-3, abs=1e-7, nan_ok=True), (a["of"], a["layer"], stat)
        assert a["q50"] == pytest.approx(b["q50"], rel=2**-3), (a["of"], a["layer"])
    assert len(list((tmp_path / "log").glob("gradient_tails-*"))) == 1  # rank 0's
    if how == "fsdp":
        assert [sum(m) for m in zip(*measured, strict=True)] == whole
    else:
        gradients = [[m[i] for i in range(0, len(m), 3)] for m in measured]  # gradient, noise, update in each sample
        assert [sum(m) for m in zip(*gradients, strict=True)] == whole[::2]
        assert all(max(m) <= 0.87 * whole[0] for m in gradients)  # the largest layer is 84 % of all
        _check_noise(noise, found)


def _check_noise(noise: list[dict[str, Any]], gradients: list[dict[str, Any]]) -> None:
    """Of two ranks the differences to the mean are each other's negatives."""
    sizes = {r["layer"]: r["size"] for r in gradients}
    assert len(noise) == 3 * 7
    for row in noise:
        assert row["size"] == row["counted"] == 2 * sizes[row["layer"]]
        half = 1 << 11  # buckets of one sign, with 3 mantissa bits
        counts = {int(bucket): int(count) for bucket, count in row["histogram"]}
        assert all(counts.get(bucket ^ half, 0) == count for bucket, count in counts.items() if bucket % half)
    assert any(r["l2"] > 0 for r in noise)


def test_shards_and_replicas_are_each_measured_once(tmp_path: Path) -> None:
    found = launch(tmp_path, SHARDS, 4, str(tmp_path))
    for of_rank in found:
        assert of_rank["counts"]
        assert of_rank["off"] < 1e-9
        assert "is not reduced yet" in of_rank["refused"]
    assert sum(of_rank["mine"] for of_rank in found) == 21 + 5 + 300 + 24 + 9
    assert np.count_nonzero([of_rank["mine"] for of_rank in found]) == 4
