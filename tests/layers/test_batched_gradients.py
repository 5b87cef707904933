"""Gradients that vmap batches, beyond the promise of all layers: other kernels, precisions, states and ranks."""

from __future__ import annotations

import pytest
import torch
from norm_cases import CASES, FLAT, IMAGE, sample
from torch import Tensor, nn
from torch.autograd.functional import jacobian
from torch.testing import assert_close

import normzoo
from normzoo.functional import _pieces, ghost

# torch.vmap tells of operations that it runs one by one
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


def one_by_one_and_batched(layer: nn.Module, x: Tensor) -> list[tuple[Tensor | None, ...]]:
    """The gradients of input and parameters for three vectors: in turn, by autograd's vmap, and by torch.vmap."""
    leaves = [x.requires_grad_(), *layer.parameters()]
    y = layer(x)
    vectors = torch.stack([sample(tuple(x.shape), x.dtype, seed=i) for i in range(3)])

    def gradients(dy: Tensor, **how: bool) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(y, leaves, dy, retain_graph=True, allow_unused=True, **how)

    each = zip(*[gradients(dy) for dy in vectors], strict=True)
    one_by_one = tuple(None if found[0] is None else torch.stack(found) for found in each)
    return [one_by_one, gradients(vectors, is_grads_batched=True), torch.vmap(gradients)(vectors)]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["first", "last"])
@pytest.mark.parametrize("case", [case for case in CASES if case.name == "ghost_batch"], ids=str)
def test_of_a_kernel_for_each_virtual_batch(case, memory_format, monkeypatch):
    monkeypatch.setattr(ghost, "LARGE", 1)  # where the memory format allows it
    layer = case.made(dtype=torch.float64)
    x = sample(IMAGE).contiguous(memory_format=memory_format)
    want, *batched = one_by_one_and_batched(layer, x)
    for got in batched:
        for a, b in zip(got, want, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert_close(a, b)


@pytest.mark.parametrize(
    "name", ["batch_renorm", "evonorm_b0", "layer_channel", "rms", "affine", "proxy", "ghost_batch"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_single_and_half_precision(name, dtype):
    x = sample(IMAGE, dtype)
    want, *batched = one_by_one_and_batched(normzoo.create_norm(name, 6), x)
    eps = torch.finfo(dtype).eps
    for got in batched:
        for a, b in zip(got, want, strict=True):
            if b is not None:
                assert_close(a, b, rtol=32 * eps, atol=32 * eps * b.abs().max().item())


@pytest.mark.parametrize("name", ["batch", "group", "iter_norm", "switchable", "filter_response"])
def test_gradcheck_with_batched_gradients(name):
    options = {"groups": 2} if "groups" in normzoo.norm_info(name).options else {}
    layer = normzoo.create_norm(name, 6, dtype=torch.float64, **options)
    x = sample(IMAGE).requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,), check_batched_grad=True, fast_mode=True)


def test_a_jacobian_is_vectorized_through_several_layers_in_a_row():
    torch.manual_seed(0)
    norms = [normzoo.create_norm(n, 6, dtype=torch.float64) for n in ("rms", "batch_instance", "l1_batch")]
    network = nn.Sequential(norms[0], nn.Linear(6, 6, dtype=torch.float64), norms[1], nn.GELU(), norms[2])
    x = sample(FLAT)
    assert_close(jacobian(network, x, vectorize=True), jacobian(network, x))


@pytest.mark.parametrize("name", ["power", "online"])
def test_a_backward_that_moves_a_state_is_refused_before_it_moves(name):
    layer = normzoo.create_norm(name, 6, dtype=torch.float64)
    states = {k: v.clone() for k, v in layer.named_buffers() if k in ("ema_gz", "drift_mean", "drift_scale")}
    assert states
    x = sample(FLAT)
    message = rf"{name} normalization in training has no batched gradient, .* \(vectorize=False, .*\) or call eval\(\)"
    with pytest.raises(RuntimeError, match=message):
        jacobian(layer, x, vectorize=True)
    with pytest.raises(RuntimeError, match=message):
        one_by_one_and_batched(layer, x)
    fresh = normzoo.create_norm(name, 6, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=message):
        jacobian(fresh, x, vectorize=True)
    for key, value in states.items():
        assert torch.equal(dict(fresh.named_buffers())[key], value)
    layer.eval()
    assert_close(jacobian(layer, x, vectorize=True), jacobian(layer, x))


@pytest.mark.parametrize(
    ("how", "message"),
    [({"create_graph": True}, "second derivative .* create_graph=True"), ({}, "batched gradient .* with vmap")],
)
def test_with_statistics_over_ranks_both_are_refused(how, message):
    dy = torch.ones(2)

    def ask(dy: Tensor) -> Tensor:
        with torch.set_grad_enabled(bool(how)):
            _pieces.by_formula(dy, sync=True)
        return dy

    with pytest.raises(RuntimeError, match=f"a layer with sync=True has no {message}"):
        ask(dy) if how else torch.vmap(ask)(dy)
    with torch.no_grad():
        assert not _pieces.by_formula(dy, sync=True)
