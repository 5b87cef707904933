"""Which images a class leads, against loops over them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from normzoo.functional import images_led


@pytest.mark.parametrize("near", [0.6, 0.9, 1.0])
def test_images_are_counted_one_by_one(near: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(64, 5, dtype=torch.float64, generator=generator)
    logits[:20, 3] += 40  # certain
    labels = torch.randint(0, 5, (64,), generator=generator)
    logits.requires_grad_()
    [gradient] = torch.autograd.grad(F.cross_entropy(logits, labels), [logits])
    expected = [0] * 5
    for p, label in zip(logits.softmax(1).tolist(), labels.tolist(), strict=True):
        for c in range(5):
            expected[c] += p[c] - (c == label) >= near - 1e-12
    counts = images_led(gradient, 64, near - 1e-12)
    assert counts.tolist() == expected
    assert counts[3] >= 10
    assert counts.dtype is torch.int64


def test_the_images_of_all_ranks_count() -> None:
    gradient = torch.tensor([[0.25, -0.25], [0.24, -0.24]])
    assert images_led(gradient, 4).tolist() == [2, 0]
    assert images_led(gradient, 2).tolist() == [0, 0]


def test_nan_leads_nothing() -> None:
    assert images_led(torch.full((3, 2), torch.nan), 3).tolist() == [0, 0]
