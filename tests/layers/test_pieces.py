"""Cut into pieces for the cache, or into virtual batches for a kernel, a layer computes what it computes whole."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from norm_cases import CASES, assert_state, sample, state_of
from torch.testing import assert_close

from normzoo.functional import _pieces, ghost

SHAPE = (9, 6, 6, 7)  # large enough that statistics of samples are kept for backward


def run(layer, x, dy):
    """Output and gradients."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x)
    y.backward(dy)
    return {"y": y.detach(), "x": x.grad, **{n: p.grad for n, p in layer.named_parameters()}}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["first", "last"])
@pytest.mark.parametrize("case", [pytest.param(c, id=str(c)) for c in CASES])
def test_pieces_are_the_whole(case, memory_format, training, monkeypatch):
    layer = case.made(dtype=torch.float64).train(training)
    twin = copy.deepcopy(layer)
    for step in range(2):
        x, dy = (sample(SHAPE, seed=step + i).contiguous(memory_format=memory_format) for i in (0, 9))
        want = run(twin, x, dy)
        with monkeypatch.context() as patch:
            patch.setattr(_pieces, "PIECE", 4 * x[0].numel())
            patch.setattr(ghost, "LARGE", 1)
            assert len(_pieces.pieces(x)) == 3
            got = run(layer, x, dy)
        assert got.keys() == want.keys()
        for name, value in want.items():
            assert_close(got[name], value, msg=lambda text, name=name: f"{name}: {text}")
        assert_state(layer, state_of(twin), rtol=1e-9, atol=1e-12)


# The others' backward is a control process, which is held to its own recursion elsewhere.
DIFFERENTIATED = [
    pytest.param(case, training, id=f"{case}-{'train' if training else 'eval'}")
    for case in CASES
    for training, differentiated in zip((True, False), case.differentiates, strict=True)
    if differentiated
]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["first", "last"])
@pytest.mark.parametrize(("case", "training"), DIFFERENTIATED)
def test_the_fast_form_is_the_formula(case, training, memory_format, monkeypatch):
    layer = case.made(dtype=torch.float64).train(training)
    twin = copy.deepcopy(layer)
    x, dy = (sample(SHAPE, seed=i).contiguous(memory_format=memory_format) for i in (0, 9))
    with _pieces.whole_formulas():
        want = run(twin, x, dy)
    monkeypatch.setattr(ghost, "LARGE", 1)
    for name, value in run(layer, x, dy).items():
        assert_close(value, want[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("ghost_size", "memory_format", "called"),
    [(16, torch.channels_last, True), (15, torch.channels_last, False), (16, torch.contiguous_format, False)],
)
def test_the_kernel_is_called_for_each_large_virtual_batch(ghost_size, memory_format, called, monkeypatch):
    calls = []
    each = SimpleNamespace(apply=lambda *arguments: calls.append(arguments) or (None, None, None))
    monkeypatch.setattr(ghost, "_EachGhost", each)
    x = torch.randn(32, 32, 16, 16).contiguous(memory_format=memory_format)
    assert x[:16].numel() == ghost.LARGE
    ghost.ghost_batch_norm(x, ghost_size=ghost_size, training=True)
    assert bool(calls) == called
