"""What two ranks compute over gloo is what one computes on the union of their data."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from ranks import run_ranks
from torch.testing import assert_close

from normzoo.metrics import ChannelMoments, LogHistogram, NoiseScale

RANK = """
import json
from pathlib import Path
import torch
import torch.distributed as dist
from normzoo.metrics import ChannelMoments, LogHistogram, NoiseScale

dist.init_process_group("gloo")
rank = dist.get_rank()
x = torch.load("x.pt")[rank]
histogram, moments, noise = LogHistogram(2), ChannelMoments(3), NoiseScale(1, 2)
histogram.update(x, layer=1)
moments.update(x)
noise.update(x.square(), x.square().mean() / 2)
counts, (mean, var), found = histogram.compute(), moments.compute(), noise.compute()
result = [counts.nonzero().tolist(), int(counts.sum()), mean.tolist(), var.tolist(), found.trace.item()]
Path(f"rank{rank}.json").write_text(json.dumps(result))
dist.destroy_process_group()
"""


def test_two_ranks_equal_the_union(tmp_path: Path) -> None:
    parts = [torch.randn(n, 3, generator=torch.Generator().manual_seed(n)) + 1e3 for n in (40, 7)]
    torch.save(parts, tmp_path / "x.pt")
    run_ranks(tmp_path, RANK, 2)
    results = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
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
