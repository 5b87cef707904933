"""What two ranks compute over gloo is what one computes on the union of their data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from torch.testing import assert_close

from normzoo.metrics import ChannelMoments, LogHistogram, NoiseScale

RANK = """
import json, sys
import torch
import torch.distributed as dist
from normzoo.metrics import ChannelMoments, LogHistogram, NoiseScale

rank, store, x = int(sys.argv[1]), sys.argv[2], torch.load(sys.argv[3])[int(sys.argv[1])]
dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
histogram, moments, noise = LogHistogram(2), ChannelMoments(3), NoiseScale(1, 2)
histogram.update(x, layer=1)
moments.update(x)
noise.update(x.square(), x.square().mean() / 2)
counts, (mean, var), found = histogram.compute(), moments.compute(), noise.compute()
print(json.dumps([counts.nonzero().tolist(), int(counts.sum()), mean.tolist(), var.tolist(), found.trace.item()]))
dist.destroy_process_group()
"""


def test_two_ranks_equal_the_union(tmp_path: Path) -> None:
    parts = [torch.randn(n, 3, generator=torch.Generator().manual_seed(n)) + 1e3 for n in (40, 7)]
    torch.save(parts, tmp_path / "x.pt")
    arguments = [str(tmp_path / "store"), str(tmp_path / "x.pt")]
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), *arguments], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    printed = [process.communicate(timeout=120)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0]
    results = [json.loads(text.splitlines()[-1]) for text in printed]
    assert results[0] == results[1]
    histogram, moments, noise = LogHistogram(2), ChannelMoments(3), NoiseScale(1, 2)
    histogram.update(torch.cat(parts), layer=1)
    moments.update(torch.cat(parts))
    for x in parts:
        noise.update(x.square(), x.square().mean() / 2)
    filled, total, mean, var, trace = results[0]
    assert filled == histogram.counts.nonzero().tolist()
    assert total == 47 * 3
    assert_close(torch.tensor(mean, dtype=torch.float64), moments.mean, rtol=1e-12, atol=1e-5)
    assert_close(torch.tensor(var, dtype=torch.float64), moments.var(), rtol=1e-6, atol=0)
    assert abs(trace / noise.compute().trace.item() - 1) < 1e-12
