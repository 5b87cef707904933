"""ChannelMoments over updates, sites and merges."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from normzoo.metrics import ChannelMoments


def batches(offset: float = 1e4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, 3, 4, 4, generator=generator) * 2 + offset for n in (8, 1, 5, 16)]


def test_updates_are_the_union() -> None:
    moments = ChannelMoments(3)
    for x in batches():
        moments.update(x)
    whole = torch.cat(batches()).double()
    mean, var = moments.compute()
    assert_close(mean[0], whole.mean((0, 2, 3)), rtol=1e-12, atol=1e-6)
    assert_close(var[0], whole.var((0, 2, 3), correction=0), rtol=1e-6, atol=0)
    assert_close(moments.var(unbiased=True)[0], whole.var((0, 2, 3)), rtol=1e-6, atol=0)
    assert moments.count.tolist() == [[480.0] * 3]


def test_merging_states_is_updating_together() -> None:
    parts, whole = [], ChannelMoments(3)
    for x in batches():
        part = ChannelMoments(3)
        part.update(x)
        whole.update(x)
        parts.append(part)
    forward, backward = ChannelMoments(3), ChannelMoments(3)
    for part in parts:
        forward.merge_state(part)
    for part in reversed(parts):
        backward.merge_state(part)
    assert_close(forward.moments, whole.moments, rtol=1e-12, atol=0)
    assert_close(backward.moments, whole.moments, rtol=1e-12, atol=0)


def test_what_ranks_gather_is_merged() -> None:
    """As torchmetrics does: states stacked, and reduced by the function of the state."""
    parts = []
    for x in batches():
        part = ChannelMoments(3, sites=2)
        part.update(x, site=1)
        parts.append(part.moments)
    whole = ChannelMoments(3, sites=2)
    whole.update(torch.cat(batches()), site=1)
    assert_close(whole._reductions["moments"](torch.stack(parts)), whole.moments, rtol=1e-6, atol=0)


def test_sites_do_not_mix_and_reset_empties() -> None:
    moments = ChannelMoments(2, sites=2)
    moments.update(torch.tensor([[1.0, 3.0], [5.0, 7.0]]), channel_dim=0, site=1)
    assert moments.mean.tolist() == [[0.0, 0.0], [2.0, 6.0]]
    assert moments.var()[0].isnan().all()
    assert moments.var()[1].tolist() == [1.0, 1.0]
    moments.reset()
    assert int(moments.count.sum()) == 0


def test_forward_gives_the_batch_and_keeps_the_whole() -> None:
    moments = ChannelMoments(1)
    moments(torch.tensor([[1.0], [3.0]]))
    mean, _ = moments(torch.tensor([[10.0], [20.0]]))
    assert mean.item() == 15.0
    assert moments.mean.item() == 8.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ChannelMoments(0), "num_channels must be at least 1, not 0"),
        (lambda: ChannelMoments(1, sites=0), "sites must be at least 1, not 0"),
        (lambda: ChannelMoments(3).update(torch.ones(2, 4)), "has 4 channels along dimension 1, not 3"),
    ],
)
def test_bad_arguments(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
