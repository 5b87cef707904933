"""Two real processes on gloo: what is reported equals one process on the union of the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from ranks import run_ranks

from normzoo import load_run

RANKS = 2

SCRIPT = '''
import os, sys, torch
from pathlib import Path
import lightning.pytorch as pl
from torch.utils.data import DataLoader
sys.path.insert(0, os.environ["TESTS"])
from callbacks_small import SmallNet, images, trainer
from normzoo.callbacks import ChannelMoments, Divergence, GradientNoise, GradientTails, RelativeLoss, Stop

case, folder, world = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
rank = int(os.environ.get("LOCAL_RANK", 0))

class Net(SmallNet):
    """Neither dropout nor batch norm, whose draws and statistics differ with the number of ranks."""
    def __init__(self):
        super().__init__()
        self.net[1], self.net[3] = torch.nn.Identity(), torch.nn.Identity()
        self.rare = torch.nn.Identity()
    def training_step(self, batch, batch_idx):
        if len(batch[0]) == 1:
            self.rare(batch[0])
        loss = super().training_step(batch, batch_idx)
        if case == "one_rank_diverges" and batch_idx == 5 and self.global_rank == world - 1:
            loss = loss * 0 + 5e3 + 0 * loss
        return loss

class Splits(GradientNoise):
    """Of another class, as a Trainer takes one callback with a state of each."""

pl.seed_everything(1, verbose=False)
net = Net()
data = images(160)
whole = 16
sizes = [7, 1, 3, 5] if "uneven" in case else [whole // world] * world
accumulate = len(sizes) // world
ends = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
ours = [range(step * whole + ends[i], step * whole + ends[i + 1]) for step in range(10)
        for i in range(rank * accumulate, (rank + 1) * accumulate)]
loader = DataLoader(data, batch_sampler=ours)
callbacks = [GradientTails(2), RelativeLoss(2), Divergence(action=Stop(None)),
             ChannelMoments(2, sites=["net.*", "rare"], where="both"),
             *([GradientNoise(2), Splits(2, split=2, dirpath=str(folder / "split"))] if len(sizes) > 1 else [])]
options = {"strategy": "ddp", "devices": world} if world > 1 else {}
run = trainer(str(folder), callbacks=callbacks, max_steps=10, use_distributed_sampler=False,
              num_sanity_val_steps=0, accumulate_grad_batches=accumulate, **options)
if "compiled" in case:
    net.net = torch.compile(net.net, backend="eager")
if "uneven" in case:
    class Compresses(pl.Callback):
        """A communication hook of the user's own."""
        def on_train_start(self, trainer, pl_module):
            if world > 1:
                from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
                trainer.strategy.model.register_comm_hook(None, allreduce_hook)
    run.callbacks.append(Compresses())
run.fit(net, loader)
torch.save({"weights": net.state_dict(), "optimizer": run.optimizers[0].state_dict(), "steps": run.global_step,
            "draw": torch.rand(2), "diverged": callbacks[2].state_dict()},
           folder / f"rank{rank}.pt")
'''


def launch(folder: Path, case: str, ranks: int, torchrun: bool = False) -> list[dict[str, Any]]:
    run_ranks(folder, SCRIPT, ranks, case, str(folder), str(ranks), torchrun=torchrun)
    return [torch.load(folder / f"rank{r}.pt", weights_only=False) for r in range(ranks)]


def rows(folder: Path, quantity: str) -> list[dict[str, Any]]:
    return load_run(folder / "log")[quantity].to_dict("records")


@pytest.mark.slow
def test_two_ranks_report_what_one_rank_reports_on_the_union(tmp_path: Path) -> None:
    launch(tmp_path / "one", "same", 1)
    launch(tmp_path / "two", "same", RANKS, torchrun=True)  # new processes, which hash strings differently
    one, two = (rows(tmp_path / f, "gradient_tails") for f in ("one", "two"))
    assert len(one) == len(two) == 5 * 3
    assert len(list((tmp_path / "two" / "log").glob("gradient_tails-*"))) == 1  # rank 0's
    for a, b in zip(one, two, strict=True):
        assert (a["step"], a["layer"], a["size"]) == (b["step"], b["layer"], b["size"])
        for stat in ("max", "l2", "kurtosis"):
            assert a[stat] == pytest.approx(b[stat], rel=1e-3, abs=1e-6), (a["step"], a["layer"], stat)
    assert {r["gradients"] for r in rows(tmp_path / "two", "gradient_noise")} == {RANKS}
    one, two = (rows(tmp_path / f, "relative_loss") for f in ("one", "two"))
    assert [r["step"] for r in one] == [r["step"] for r in two] == [0, 2, 4, 6, 8]
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["relative"] == pytest.approx(b["relative"], rel=1e-3)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """The folder of runs on one rank, on two, and on two with a compiled network, and what each rank left.

    With a communication hook of the user's own, and a module that only one rank calls.
    """
    folder = tmp_path_factory.mktemp("uneven")
    cases = {"one": ("uneven", 1), "two": ("uneven", RANKS), "compiled": ("uneven, compiled", RANKS)}
    return folder, {name: launch(folder / name, *case) for name, case in cases.items()}


Uneven = tuple[Path, dict[str, list[dict[str, Any]]]]


@pytest.mark.slow
def test_uneven_micro_batches_on_two_ranks_are_merged_as_those_of_one(uneven: Uneven) -> None:
    one, two = (rows(uneven[0] / f, "channel_moments") for f in ("one", "two"))
    assert {r["step"] for r in one} == {0, 2, 4, 6, 8}
    assert {r["layer"] for r in one} == {"rare", *(f"net.{i}" for i in range(7))}
    assert len(one) == len(two) == 5 * 8 * 2
    for a, b in zip(one, two, strict=True):
        for column in ("step", "layer", "where", "depth", "channels", "count", "dead"):
            assert a[column] == b[column], (a["layer"], column)
        for column in ("mean", "variance", "variance_max"):
            assert a[column] == pytest.approx(b[column], rel=1e-4, abs=1e-6), (a["step"], a["layer"], column)
    assert {r["count"] for r in one if r["layer"] == "net.0"} == {16 * 64}
    assert {r["count"] for r in one if r["layer"] == "rare"} == {64}
    one, two = (rows(uneven[0] / f, "gradient_noise") for f in ("one", "two"))
    assert [r["step"] for r in one] == [r["step"] for r in two] == [0, 2, 4, 6, 8]
    for a, b in zip(one, two, strict=True):
        assert a["gradients"] == b["gradients"] == 4
        assert a["small_batch"] == pytest.approx(4 / (1 / 7 + 1 + 1 / 3 + 1 / 5))
        for column in set(a) - {"step", "gradients", "factor"}:
            assert a[column] == pytest.approx(b[column], rel=2e-3), (a["step"], column)


@pytest.mark.slow
def test_parts_of_batches_on_two_ranks_are_merged_as_those_of_one(uneven: Uneven) -> None:
    one, two = (load_run(uneven[0] / name / "split")["gradient_noise"] for name in ("one", "two"))
    # One sample has no parts; of three, one part is a single sample, which a rank leaves out once it has seen more
    assert set(one["gradients"]) == set(two["gradients"][1:]) == {4}
    assert two["gradients"][0] == 6
    now = [c for c in one.columns if not c.startswith("mean_")]
    pd.testing.assert_frame_equal(one[now][1:], two[now][1:], rtol=2e-3)


@pytest.mark.slow
def test_moments_of_a_compiled_network_are_merged_over_ranks(uneven: Uneven) -> None:
    """Those that each rank takes in a pass of our own, which does not wait for other ranks."""
    folder, ranks = uneven
    frames = [load_run(folder / name / "log")["channel_moments"] for name in ("two", "compiled")]
    pd.testing.assert_frame_equal(*frames, rtol=1e-6)
    for a, b in zip(ranks["two"], ranks["compiled"], strict=True):
        assert torch.equal(a["draw"], b["draw"])
        assert all(torch.allclose(v, w) for v, w in zip(a["weights"].values(), b["weights"].values(), strict=True))


@pytest.mark.slow
def test_a_divergence_on_one_rank_stops_all_ranks_at_the_same_step(tmp_path: Path) -> None:
    ranks = launch(tmp_path / "run", "one_rank_diverges", RANKS)
    assert [r["steps"] for r in ranks] == [7, 7]
    assert [r["diverged"]["step"] for r in ranks] == [5, 5]
    assert ranks[0]["diverged"] == ranks[1]["diverged"]
    assert len(rows(tmp_path / "run", "divergence")) == 1
