"""Two real processes on gloo, with whole, sharded and split parameters: the curves are those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from sweeps import few

from normzoo import load_run

DEADLINE = 200  # seconds
RANKS = 2
CASES = ("ddp", "sharded", "tensor parallel")  # tests/golden_ranks.py has the first on two ranks as well
ALONG = ("gradient", "update")

SCRIPT = """
import os, sys, torch
from pathlib import Path
import lightning.pytorch as pl
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
sys.path.insert(0, os.environ["TESTS"])
from callbacks_small import images, trainer
from normzoo.callbacks import RelativeLoss

folder, world = Path(sys.argv[1]), int(os.environ.get("WORLD_SIZE", 1))
rank = int(os.environ.get("RANK", 0))

class Net(pl.LightningModule):
    def __init__(self, case):
        super().__init__()
        self.case, self.net = case, None
    def configure_model(self):
        if self.net is not None:
            return
        torch.manual_seed(0)
        # 33 values are not halved evenly
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 33), nn.LayerNorm(33), nn.Tanh(), nn.Linear(33, 8),
                            nn.ReLU(), nn.Linear(8, 4))
        if self.case == "sharded":
            from torch.distributed.fsdp import fully_shard
            mesh = self.device_mesh["data_parallel"]
            fully_shard(net[1], mesh=mesh)
            fully_shard(net, mesh=mesh)
        if self.case == "tensor parallel":
            from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
            plan = {"4": ColwiseParallel(), "6": RowwiseParallel()}
            parallelize_module(net, self.device_mesh["tensor_parallel"], plan)
        self.net = net
    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss
    def configure_optimizers(self):
        # foreach does not mix parameters that are split with others
        return torch.optim.AdamW(self.parameters(), lr=0.03, weight_decay=0.1, foreach=False)

def strategy(case):
    if world == 1:
        return {}
    if case == "ddp":
        return {"strategy": "ddp", "devices": world}
    from lightning.pytorch.strategies import ModelParallelStrategy
    sizes = (world, 1) if case == "sharded" else (1, world)
    return {"strategy": ModelParallelStrategy(*sizes, process_group_backend="gloo"), "devices": world}

for case in sys.argv[2:]:
    split = case not in ("tensor parallel", "one")
    for on in (False, True):
        pl.seed_everything(1, verbose=False)
        out = folder / case
        callbacks = [RelativeLoss(2, along=a, dirpath=str(out / a)) for a in ("gradient", "update")] if on else []
        whole, share = 16, 16 // world if split else 16
        first = rank * share if split else 0
        ours = [range(s * whole + first, s * whole + first + share) for s in range(8)]
        run = trainer(str(out), callbacks=callbacks, max_steps=8, use_distributed_sampler=False, logger=False,
                      num_sanity_val_steps=0, accumulate_grad_batches=2, **strategy(case))
        net = Net(case)
        run.fit(net, DataLoader(images(160), batch_sampler=ours))
        (out / f"recent-{rank}.txt").write_text(repr([callback.state_dict() for callback in callbacks]))
        state = {**net.state_dict(), **{f"optimizer {i}.{k}": v for i, s in enumerate(run.optimizers[0].state.values())
                                        for k, v in s.items()}}
        state = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in state.items()}
        torch.save({**state, "draws": torch.rand(2)}, out / f"{'on' if on else 'off'}-{rank}.pt")
"""


def run(folder: Path, case: str, ranks: int) -> Path:
    folder.joinpath(case).mkdir()
    run_ranks(folder, SCRIPT, ranks, str(folder), case, deadline=DEADLINE)
    return folder / case


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process has written."""
    return run(tmp_path_factory.mktemp("one"), "one", 1)


@pytest.fixture(scope="module", params=few(CASES, "sharded", "tensor parallel"))
def two(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes have written, whose parameters are whole, sharded or split."""
    return run(tmp_path_factory.mktemp("two"), request.param, RANKS)


def rows(folder: Path) -> list[dict[str, Any]]:
    return load_run(folder)["relative_loss"].to_dict("records")


@pytest.mark.parametrize("along", ALONG)
@pytest.mark.slow
def test_the_curve_is_that_of_one_process(one: Path, two: Path, along: str) -> None:
    alone, shared = rows(one / along), rows(two / along)
    assert [r["step"] for r in alone] == [r["step"] for r in shared] == [0, 2, 4, 6]
    assert len(list((two / along).iterdir())) == 1  # of rank 0
    for a, b in zip(alone, shared, strict=True):
        assert (a["along"], b["along"]) == (along, along)
        assert b["relative"][b["multiples"] == 0] == 1.0
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["relative"].tolist() == pytest.approx(b["relative"].tolist(), rel=1e-4)
        assert a["headroom"] == pytest.approx(b["headroom"], rel=1e-2)
        assert a["headroom_low"] == pytest.approx(b["headroom_low"], rel=1e-2)
        assert len(set(b["relative"])) == len(b["relative"])  # not of parameters gathered for another point


def test_all_ranks_keep_the_same_headrooms(two: Path) -> None:
    first, second = ((two / f"recent-{rank}.txt").read_text() for rank in range(RANKS))
    assert first == second
    assert first.count("None") + first.count("above") + first.count("below") == 2 * 4  # samples


@pytest.mark.parametrize("rank", range(RANKS))
def test_the_run_is_the_same_with_it(two: Path, rank: int) -> None:
    off, on = (torch.load(two / f"{name}-{rank}.pt") for name in ("off", "on"))
    assert off.keys() == on.keys()
    assert any(k.startswith("optimizer 0.exp_avg") for k in on)
    for name, value in off.items():
        assert torch.equal(value, on[name]), name
