"""Two real processes on gloo, with whole, sharded and split parameters: the curves are those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks

from normzoo import load_run

DEADLINE = 200  # seconds
RANKS = 2
CASES = ("ddp", "sharded", "tensor parallel")
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process and then two have written."""
    folder = tmp_path_factory.mktemp("sharded")
    for case in ("one", *CASES):
        (folder / case).mkdir()
    run_ranks(folder, SCRIPT, 1, str(folder), "one")
    run_ranks(folder, SCRIPT, RANKS, str(folder), *CASES, deadline=DEADLINE)
    return folder


def rows(folder: Path) -> list[dict[str, Any]]:
    return load_run(folder)["relative_loss"].to_dict("records")


@pytest.mark.parametrize("along", ALONG)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_the_curve_is_that_of_one_process(folder: Path, case: str, along: str) -> None:
    one, two = rows(folder / "one" / along), rows(folder / case / along)
    assert [r["step"] for r in one] == [r["step"] for r in two] == [0, 2, 4, 6]
    assert len(list((folder / case / along).iterdir())) == 1  # of rank 0
    for a, b in zip(one, two, strict=True):
        assert (a["along"], b["along"]) == (along, along)
        assert b["relative"][b["multiples"] == 0] == 1.0
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["relative"].tolist() == pytest.approx(b["relative"].tolist(), rel=1e-4)
        assert a["headroom"] == pytest.approx(b["headroom"], rel=1e-2)
        assert a["headroom_low"] == pytest.approx(b["headroom_low"], rel=1e-2)
        assert len(set(b["relative"])) == len(b["relative"])  # not of parameters gathered for another point


@pytest.mark.parametrize("case", CASES)
def test_all_ranks_keep_the_same_headrooms(folder: Path, case: str) -> None:
    first, second = ((folder / case / f"recent-{rank}.txt").read_text() for rank in range(RANKS))
    assert first == second
    assert first.count("None") + first.count("above") + first.count("below") == 2 * 4  # samples


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize("case", CASES)
def test_the_run_is_the_same_with_it(folder: Path, case: str, rank: int) -> None:
    off, on = (torch.load(folder / case / f"{name}-{rank}.pt") for name in ("off", "on"))
    assert off.keys() == on.keys()
    assert any(k.startswith("optimizer 0.exp_avg") for k in on)
    for name, value in off.items():
        assert torch.equal(value, on[name]), name
