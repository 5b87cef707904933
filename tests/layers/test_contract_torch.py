"""What every layer of the registry promises to PyTorch: dtypes, memory formats, copies, devices, the compiler."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from norm_cases import (
    CASES,
    CHANNELS,
    FLAT_AND_IMAGE,
    IMAGE,
    ONE_EACH,
    SEQUENCE,
    VOLUME,
    assert_state,
    every_case,
    every_layer,
    gradients,
    sample,
    state_of,
    train_and_eval,
)
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close

import normzoo


@train_and_eval
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [IMAGE, VOLUME], ids=["4d", "5d"])
@every_layer
def test_memory_format_is_kept(case, shape, dtype, training):
    memory_format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    layer, other = (case.made().train(training) for _ in range(2))
    x = sample(shape, dtype)
    y = layer(x.contiguous(memory_format=memory_format))
    assert y.is_contiguous(memory_format=memory_format)
    z = other(x)
    assert z.is_contiguous()
    assert_close(y, z, rtol=max(2 * torch.finfo(dtype).eps, 1e-5), atol=1e-5)


@train_and_eval
@pytest.mark.parametrize("shape", [SEQUENCE, IMAGE, VOLUME], ids=["3d", "4d", "5d"])
@every_layer
def test_channel_dim_last_keeps_the_memory_format(case, shape, training):
    y = case.make(channel_dim=-1).train(training)(sample(shape, torch.float32).movedim(1, -1).contiguous())
    assert y.is_contiguous(), f"contiguous input of shape {tuple(y.shape)} gave strides {y.stride()}"


@train_and_eval
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("case", "shape"), FLAT_AND_IMAGE)
def test_half_precision_input(case, shape, dtype, training):
    half, single = (case.made(dtype=d).train(training) for d in (dtype, torch.float32))
    x, dy = sample(shape, dtype), sample(shape, dtype, seed=1)
    got, want = gradients(half, x, dy), gradients(single, x.float(), dy.float())
    assert {v.dtype for v in half.state_dict().values()} <= {torch.float32, torch.int64}
    assert got["y"].dtype == got["x"].dtype == dtype
    eps = torch.finfo(dtype).eps
    for name, value in want.items():
        loose = 1 if name == "y" else 8
        assert_close(got[name].float(), value, rtol=loose * eps, atol=loose * eps * value.abs().max().item())
    assert_state(half, state_of(single), rtol=1e-6, atol=1e-7)


@train_and_eval
@every_case
def test_autocast_gives_no_nan_and_keeps_statistics(case, training):
    layer, plain = (case.made().train(training) for _ in range(2))
    torch.manual_seed(0)
    conv = nn.Conv2d(3, CHANNELS, 3)
    image = sample((2, 3, 6, 6), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        x = conv(image)
        y = layer(x)
    y.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in (*conv.parameters(), *layer.parameters()))
    assert_close(y.float(), plain(x.detach().float()), rtol=2**-7, atol=2**-6)


@train_and_eval
@pytest.mark.parametrize(
    ("of_x", "of_layer"), [(torch.float64, torch.float32), (torch.float32, torch.float64)], ids=str
)
@every_case
def test_mixed_single_and_double_precision(case, of_x, of_layer, training):
    layer, twin = (case.made(dtype=of_layer).train(training) for _ in range(2))
    x = sample(IMAGE, of_x)
    y, state = case.expect(layer, x)
    assert_close(layer(x).double(), y, rtol=1e-5, atol=1e-5)
    assert_state(layer, state, rtol=1e-5, atol=1e-6)
    got = gradients(twin, x, torch.ones_like(x))
    assert got["y"].dtype == got["x"].dtype == of_x
    assert {v.dtype for v in twin.state_dict().values()} <= {of_layer, torch.int64}


@every_case
def test_output_may_be_overwritten_before_backward(case):
    layer, other = case.made(), case.made()
    x = sample(IMAGE, torch.float32).requires_grad_()
    layer(x * 1).relu_().sum().backward()
    z = sample(IMAGE, torch.float32).requires_grad_()
    other(z * 1).relu().sum().backward()
    assert_close(x.grad, z.grad, rtol=0, atol=0)


@pytest.mark.parametrize("case", [c for c in CASES if c.like_torch], ids=str)
def test_state_dict_goes_to_and_from_torch(case):
    layer, theirs = case.made(), nn.BatchNorm2d(CHANNELS, eps=case.make().eps)
    x = sample(IMAGE, torch.float32)
    assert list(layer.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(theirs.eval()(x), layer.eval()(x))
    theirs.train()(x)
    back = case.make()
    back.load_state_dict(theirs.state_dict(), strict=True)
    assert back.num_batches_tracked == 4
    assert torch.equal(theirs.eval()(x), back.eval()(x))


@pytest.mark.parametrize("batches", [1, 3, 7, 40])
def test_a_cumulative_average_in_double_precision_is_that_of_torch(batches):
    layer = normzoo.create_norm("batch", CHANNELS, momentum=None, dtype=torch.float64)
    theirs = nn.BatchNorm2d(CHANNELS, momentum=None, dtype=torch.float64)
    for i in range(batches):
        x = sample(IMAGE, seed=i)
        layer(x), theirs(x)
    assert_close(layer.running_mean, theirs.running_mean, rtol=0, atol=1e-15)
    assert_close(layer.running_var, theirs.running_var, rtol=1e-15, atol=1e-15)


@every_case
def test_copies_are_equal_and_independent(case):
    layer = case.made()
    stream = io.BytesIO()
    torch.save(layer.state_dict(), stream)
    stream.seek(0)
    loaded = case.make()
    loaded.load_state_dict(torch.load(stream, weights_only=True), strict=True)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded]
    x = sample(IMAGE, torch.float32)
    y = layer(x)
    for other in copies:
        assert repr(other) == repr(layer)
        assert torch.equal(other(x), y)
        assert_state(other, state_of(layer), rtol=0)


@train_and_eval
@every_case
def test_meta_device(case, training):
    layer = case.make(device="meta").train(training)
    assert all(t.is_meta for t in (*layer.parameters(), *layer.buffers()))
    for shape in case.shapes:
        y = layer(torch.empty(shape, device="meta"))
        assert y.is_meta
        assert y.shape == shape
    layer.to_empty(device="cpu").reset_parameters()
    assert_state(layer, state_of(case.make()), rtol=0)


@train_and_eval
@every_case
def test_functional_call_leaves_the_layer_alone(case, training):
    layer, held = case.make().train(training), case.made().train(training)
    fresh = state_of(layer)
    given = {k: v.clone() for k, v in held.state_dict().items()}
    x = sample(IMAGE, torch.float32)
    assert torch.equal(functional_call(layer, given, (x,)), held(x))
    assert_state(layer, fresh, rtol=0)
    assert all(torch.equal(given[k], v) for k, v in held.state_dict().items())


@train_and_eval
@pytest.mark.parametrize(
    "case", [pytest.param(c, id=str(c), marks=[] if c.name == "evonorm_b0" else pytest.mark.slow) for c in ONE_EACH]
)
def test_exports_for_any_batch_size(case, training):
    layer = case.made().train(training)
    twin = copy.deepcopy(layer)
    size = torch.export.Dim("size", min=2, max=64)
    x, dynamic = sample((4, *IMAGE[1:]), torch.float32), {"x": {0: size}}
    if case.name == "ghost_batch" and training:
        with pytest.raises(torch._dynamo.exc.UserError, match=r"size\(\)\[0\] % 2\) == 0"):  # of two samples each
            torch.export.export(layer, (x,), dynamic_shapes=dynamic, strict=False)
        return
    exported = torch.export.export(layer, (x,), dynamic_shapes=dynamic, strict=False).module()
    other = sample((7, *IMAGE[1:]), torch.float32, seed=1)
    with torch.no_grad():
        assert_close(exported(other), twin(other), rtol=1e-5, atol=1e-5)
    assert_state(exported, state_of(twin), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo, where a graph breaks
@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=str(c), marks=[] if c.name == "batch_renorm" else pytest.mark.slow) for c in ONE_EACH],
)
def test_compiles_without_graph_breaks(case, request, monkeypatch):
    """A control process moves buffers in backward, which the compiler cannot see: around it the graph is broken."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(request.config.cache.mkdir("inductor")))
    torch._dynamo.reset()
    layer = case.made()
    twin = copy.deepcopy(layer)
    for training in (True, False):
        fullgraph = case.differentiates[0 if training else 1]
        options = {"cpp_cache_precompile_headers": False}  # those go to /tmp
        compiled = torch.compile(layer, fullgraph=fullgraph, options=options)
        compiled.train(training)
        twin.train(training)
        for step in range(2):
            x, dy = (sample(IMAGE, torch.float32, seed=step + i) for i in (0, 9))
            got, want = gradients(compiled, x, dy), gradients(twin, x, dy)
            assert got.keys() == want.keys()
            for name, value in want.items():
                assert_close(got[name], value)
            assert_state(layer, state_of(twin), rtol=1e-5, atol=1e-6)
