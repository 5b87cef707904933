"""Running statistics estimated anew on several ranks, in real processes."""

from __future__ import annotations

import datetime as dt
import math
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_function
from statistics_small import (
    OPTIONS,
    RUNNING,
    ZOO,
    C,
    assert_same,
    batches,
    everything,
    statistics,
)
from torch import nn
from torch.testing import assert_close

import normzoo
from normzoo import reestimate_statistics

DEADLINE = 60.0


def shards(world, seed=0):
    """Batches of each rank: uneven in number and size; the second rank of three has none."""
    data = batches((6, 2, 5, 3, 4), seed=seed)
    return [data[:3], [], data[3:]] if world == 3 else [data[:4], data[4:]]


def net(name):
    torch.manual_seed(1)

    def norm(channels):
        if name == "SyncBatchNorm":
            return nn.SyncBatchNorm(channels)
        options = dict(OPTIONS.get(name, {}))
        if name != "ghost_batch":
            options["sync"] = True
        else:
            options["ghost_size"] = 8
        return normzoo.create_norm(name, channels, **options)

    wide = C if name == "batch_group" else 8
    return nn.Sequential(norm(C), nn.Conv2d(C, wide, 2), nn.ReLU(), nn.Dropout(), norm(wide)).double()


KINDS_OF_NETS = [*ZOO, "SyncBatchNorm"]


def on_rank():
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", timeout=dt.timedelta(seconds=DEADLINE / 2))
    rank, world = dist.get_rank(), dist.get_world_size()
    found: dict[str, Any] = {"counted": {}, "states": {}, "errors": {}}
    mine = shards(world)[rank]
    calls = []
    gather, dist.all_gather = dist.all_gather, lambda *a, **k: (calls.append(1), gather(*a, **k))[1]
    for name in KINDS_OF_NETS:
        model = net(name)
        if rank == 1:  # running statistics differ by rank
            for m in (model[0], model[4]):
                for b in statistics(m):
                    getattr(m, b).add_(0.25)
        wrapped = nn.parallel.DistributedDataParallel(model) if name == "batch" else model
        before = everything(model)
        calls.clear()
        found["counted"][name] = len(reestimate_statistics(wrapped, iter(mine))), len(calls)
        assert_same(before, everything(model), but=RUNNING)
        found["states"][name] = model.state_dict()
    model = net("batch")
    before = everything(model)
    for case, data in {
        "bad": [x[:, :3] for x in mine[:1]] if rank == 0 else mine,
        "none": [],
        "not finite": [x * math.nan for x in mine],
    }.items():
        try:
            reestimate_statistics(model, data)
            found["errors"][case] = None
        except ValueError as error:
            found["errors"][case] = str(error)
        assert_same(before, everything(model))
    torch.save(found, f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="no gloo in this build")
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_with_shards_equal_one_rank_with_all(world, tmp_path):
    run_function(tmp_path, on_rank, world, deadline=DEADLINE)
    ranks = [torch.load(tmp_path / f"rank{r}.pt") for r in range(world)]
    data = [x for shard in shards(world) for x in shard]
    for name in KINDS_OF_NETS:
        one = net(name)
        reestimate_statistics(one, data)
        for rank in ranks:
            assert rank["counted"][name] == (2, 1), name
            for key, value in one.state_dict().items():
                if any(key.endswith(r) for r in RUNNING):
                    assert_close(
                        rank["states"][name][key], value, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
                    )
                    assert torch.equal(rank["states"][name][key], ranks[0]["states"][name][key])
    for r, rank in enumerate(ranks):
        bad = "batch 0 could not be run" if r == 0 else "rank 0 failed, so that the statistics of none were replaced"
        assert rank["errors"]["bad"].startswith(bad)
        assert rank["errors"]["none"] == "there are no batches to take statistics from"
        assert rank["errors"]["not finite"] == "the statistics of 0 (BatchNorm) are not finite"
