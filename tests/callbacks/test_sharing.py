"""Histograms on their way to the host: counts of any size."""

from __future__ import annotations

import pytest
import torch

from normzoo.callbacks._run.ranks import SharedHistograms
from normzoo.functional.buckets import Layout
from normzoo.functional.central_moments import COLUMNS


@pytest.mark.parametrize("size", [5, 2**31 - 1, 2**31, 2**31 + 5, 2**40])
def test_a_bucket_may_hold_every_value_of_a_tensor(size: int) -> None:
    counts = torch.zeros(2, Layout(3).size, dtype=torch.int64)
    counts[0, 7], counts[1, 9] = size, 3
    moments = torch.linspace(1, 2, 2 * COLUMNS, dtype=torch.float64).view(2, COLUMNS) * size
    shared = SharedHistograms((counts, moments), [2, 0], [3, 1, size], 3, False, torch.device("cpu"))
    read_counts, read_moments = shared.read()
    assert torch.equal(read_counts[[2, 0]], counts)
    assert torch.equal(read_moments[[2, 0]], moments)
    assert not read_counts[1].any()
