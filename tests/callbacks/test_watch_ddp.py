"""normzoo.watch in two real processes on gloo: what is reported equals one process on the union of the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks

from normzoo import load_run

RANKS = 2

SCRIPT = '''
import os, sys
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, os.environ["TESTS"])
from callbacks_small import SmallNet, images
import normzoo
from normzoo.callbacks import ChannelMoments, Divergence, GradientTails, RelativeLoss, Stop

folder, world = Path(sys.argv[1]), int(os.environ.get("WORLD_SIZE", 1))
rank = int(os.environ.get("RANK", 0))
if world > 1:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
data, results = images(160), {}


def loss_function(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def distribute(inner):
    return DistributedDataParallel(inner) if world > 1 else inner


def sharded(inner):
    return fully_shard(inner, mesh=init_device_mesh("cpu", (world,)))


def loop(case, callbacks, plain=True, wrap=None):
    """Ten steps, of 16 samples over all ranks."""
    torch.manual_seed(1)
    inner = SmallNet().net
    if plain:  # neither dropout nor batch norm, whose draws and statistics differ with the number of ranks
        inner[1], inner[3] = nn.Identity(), nn.Identity()
    torch.manual_seed(rank)
    model = (wrap or distribute)(inner)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    stopped = None
    entered = normzoo.watch(model, optimizer, *callbacks, dirpath=folder / case) if callbacks else nullcontext()
    with entered as watching:
        for step in range(10):
            share = 16 // world
            start = 16 * step + rank * share
            batch = data[start : start + share]
            loss = loss_function(model, batch)
            optimizer.zero_grad()
            loss.backward()
            if watching is not None:
                watching.batch(batch)
                watching.loss(loss * 0 + 5e3 if case == "diverges" and step == 5 and rank == world - 1 else loss)
                if rank == 0:
                    watching.state_dict()  # a checkpoint that rank 0 writes alone
                if watching.should_stop:
                    stopped = step
                    break
            optimizer.step()
    results[case] = {"weights": inner.state_dict(), "optimizer": optimizer.state_dict()["state"],
                     "draw": torch.rand(2), "stopped": stopped}


def relative_loss():
    return RelativeLoss(2, multiples=[0.5, 1.0, 4.0], loss=loss_function)


def every():
    return [GradientTails(2), ChannelMoments(2, sites=["*"], where="both"), relative_loss(),
            Divergence(action=Stop(None))]


loop("same", every())
if world > 1:
    loop("diverges", every())
    loop("on", every(), plain=False)
    loop("off", [], plain=False)
    moments = ChannelMoments(2, sites=["*"], where="both")
    loop("compiled", [GradientTails(2), moments], wrap=lambda inner: torch.compile(distribute(inner), backend="eager"))
    loop("sharded", [GradientTails(2), relative_loss()], wrap=sharded)
    dist.barrier()
torch.save(results, folder / f"rank{rank}.pt")
if world > 1:
    dist.destroy_process_group()
'''

FAILS = """
import os, sys
from datetime import timedelta
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import normzoo
from normzoo.callbacks import ChannelMoments, Divergence, GradientTails

dist.init_process_group("gloo", timeout=timedelta(seconds=60))
rank = dist.get_rank()
inner = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
model = DistributedDataParallel(inner)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
callbacks = [GradientTails(1), ChannelMoments(1), Divergence()]
try:
    with normzoo.watch(model, optimizer, *callbacks, dirpath=sys.argv[1] + "/fails") as watching:
        for step in range(4):
            loss = model(torch.randn(8, 4)).square().mean()
            loss.backward()
            if step == 3 and rank == 0:
                watching.loss(loss)  # on its way to a rank that does not answer
                raise KeyError("on one rank")
            if step == 3:
                break
            watching.loss(loss)
            optimizer.step()
except KeyError as error:
    torch.save({"error": repr(error), "step": watching.step}, sys.argv[1] + "/failed.pt")
os._exit(0)  # leaves without waiting for the other rank
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run on one rank, and one on two."""
    folder = tmp_path_factory.mktemp("watch")
    run_ranks(folder / "one", SCRIPT, 1, str(folder / "one"))
    run_ranks(folder / "two", SCRIPT, RANKS, str(folder / "two"))
    return folder


def ranks_of(runs: Path, case: str) -> list[dict[str, Any]]:
    return [torch.load(runs / "two" / f"rank{r}.pt", weights_only=False)[case] for r in range(RANKS)]


def assert_alike(one: list[dict[str, Any]], two: list[dict[str, Any]]) -> None:
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        for column in a.keys() - {"histogram", "alpha", "q50", "q99", "q999", "tail_ratio"}:  # of single values
            if isinstance(a[column], str | int):
                assert a[column] == b[column], column
            else:
                assert a[column] == pytest.approx(b[column], rel=1e-3, abs=1e-6, nan_ok=True), (a["step"], column)


@pytest.mark.parametrize(
    ("case", "quantity", "rows"),
    [
        ("same", "gradient_tails", 5 * 3),
        ("same", "channel_moments", 5 * 7 * 2),
        ("same", "relative_loss", 5),
        ("compiled", "channel_moments", 5 * 7 * 2),
        ("sharded", "gradient_tails", 5 * 3),
        ("sharded", "relative_loss", 5),
    ],
)
def test_two_ranks_report_what_one_rank_reports_on_the_union(runs: Path, case: str, quantity: str, rows: int) -> None:
    one = load_run(runs / "one" / "same")[quantity].to_dict("records")
    two = load_run(runs / "two" / case)[quantity].to_dict("records")
    assert len(one) == rows
    assert len(list((runs / "two" / case).glob(f"{quantity}-*"))) == 1  # rank 0's
    assert_alike(one, two)


def test_a_divergence_on_one_rank_asks_all_ranks_at_the_same_step(runs: Path) -> None:
    assert [r["stopped"] for r in ranks_of(runs, "diverges")] == [6, 6]
    assert [r["stopped"] for r in ranks_of(runs, "same")] == [None, None]
    [row] = load_run(runs / "two" / "diverges")["divergence"].to_dict("records")
    assert (row["step"], row["loss"]) == (5, 5e3)


def test_a_distributed_loop_ends_bit_for_bit_as_without(runs: Path) -> None:
    assert sorted(set(load_run(runs / "two" / "on")["channel_moments"]["step"])) == [0, 2, 4, 6, 8]
    for a, b in zip(ranks_of(runs, "on"), ranks_of(runs, "off"), strict=True):
        assert torch.equal(a["draw"], b["draw"])
        for k, v in a["weights"].items():
            assert torch.equal(v, b["weights"][k]), k
        for i, state in a["optimizer"].items():
            assert torch.equal(state["momentum_buffer"], b["optimizer"][i]["momentum_buffer"])


def test_compiled_and_distributed_the_names_are_the_models_own(runs: Path) -> None:
    frame = load_run(runs / "two" / "compiled")["gradient_tails"]
    assert set(frame["layer"]) == {"0.weight", "6.weight", "6.bias"}


def test_a_rank_that_fails_does_not_wait_for_the_others(tmp_path: Path) -> None:
    run_ranks(tmp_path / "run", FAILS, RANKS, str(tmp_path / "run"))
    assert torch.load(tmp_path / "run" / "failed.pt") == {"error": "KeyError('on one rank')", "step": 3}
    frames = load_run(tmp_path / "run" / "fails")
    assert sorted(set(frames["gradient_tails"]["step"])) == [0, 1]
    assert sorted(set(frames["channel_moments"]["step"])) == [0, 1]
