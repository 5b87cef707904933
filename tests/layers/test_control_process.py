"""Layers whose backward is a rule of its own and not the gradient of the output, held to that rule written as loops.

Online normalization's backward is the authors' control process, power normalization's their approximation; both move
buffers. Batch-instance normalization's gates have the gradient of projected descent.
"""

from __future__ import annotations

import math

import norm_references as references
import numpy as np
import pytest
import torch
from norm_cases import CASES, CHANNELS, FLAT, IMAGE, VOLUME, array, assert_state, gradients, sample, state_of
from norm_references import Options, State
from torch import nn
from torch.testing import assert_close

ONLINE = [case for case in CASES if case.name == "online"]
POWER = [case for case in CASES if case.name == "power"]
GATED = [case for case in CASES if case.name == "batch_instance"]
SHAPES = [FLAT, IMAGE, VOLUME]
Gradients = dict[str, np.ndarray]


def online_backward(x: np.ndarray, dy: np.ndarray, s: State, o: Options) -> Gradients:
    """Gradients by the authors' recursions; moves all four running statistics."""
    z, stds = references.online_normalized(x, s, o, training=True)
    before_compensation = references.scale_shift(z, s)
    d = np.zeros_like(dy)
    for n in range(x.shape[0]):
        y = before_compensation[n]
        if o["compensation"] == "clamp":
            d[n] = dy[n] * (np.abs(y) <= o["clamp_value"])
        elif o["compensation"] == "layer":
            scale = 1 / math.sqrt((y**2).sum() / y.size + 1e-5)
            d[n] = scale * dy[n] - y * scale**3 * (dy[n] * y).sum() / y.size
        else:
            d[n] = dy[n]
    dx, rate = np.empty_like(x), o["momentum_backward"]
    for c in range(x.shape[1]):
        for n in range(x.shape[0]):
            t = d[n, c] * s["weight"][c] - rate * s["drift_scale"][c] * z[n, c]
            s["drift_scale"][c] += (t * z[n, c]).sum() / t.size
            dx[n, c] = t / stds[n, c] - rate * s["drift_mean"][c]
            s["drift_mean"][c] += dx[n, c].sum() / t.size
    return {"x": dx, **_of_affine(z, d)}


def power_backward(x: np.ndarray, dy: np.ndarray, s: State, o: Options) -> Gradients:
    """Gradients by the authors' approximation; moves the quadratic mean, the count and ``ema_gz``."""
    z, q = references.power_normalized(x, s, o, training=True)
    d = np.empty_like(x)
    for c in range(x.shape[1]):
        h = dy[:, c] * s["weight"][c] - o["momentum_backward"] * s["ema_gz"][c] * z[:, c]
        d[:, c] = h / math.sqrt(q[c] + o["eps"])
        s["ema_gz"][c] += (h * z[:, c]).sum() / h.size
    dx = d.copy()
    if o["groups"] is not None:  # the ordinary gradient of the group scaling
        for at in references.positions(x):
            for channels in references.blocks(x.shape[1], o["groups"]):
                v, dv = x[at][channels], d[at][channels]
                scale = 1 / math.sqrt((v**2).sum() / v.size + o["eps"])
                dx[at][channels] = scale * dv - v * scale**3 * (dv * v).sum() / v.size
    return {"x": dx, **_of_affine(z, dy)}


def _of_affine(z: np.ndarray, dy: np.ndarray) -> Gradients:
    channels = range(z.shape[1])
    return {
        "weight": np.array([(dy[:, c] * z[:, c]).sum() for c in channels]),
        "bias": np.array([dy[:, c].sum() for c in channels]),
    }


BACKWARD = {"online": online_backward, "power": power_backward}
every_process = pytest.mark.parametrize("case", ONLINE + POWER, ids=str)


def _gradients(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of this step alone."""
    layer.zero_grad()
    return gradients(layer, x, dy)


def _laid_out(x: torch.Tensor, memory_format: str) -> torch.Tensor:
    last = torch.channels_last_3d if x.ndim == 5 else torch.channels_last
    return x.contiguous(memory_format=last) if memory_format == "channels_last" and x.ndim > 3 else x


def _assert_gradients(got: dict[str, torch.Tensor], want: Gradients, tolerance: float) -> None:
    assert got.keys() - {"y"} <= want.keys()
    for name in got.keys() - {"y"}:
        want_tensor = torch.from_numpy(want[name])
        assert_close(got[name].double(), want_tensor, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("of_dy", ["contiguous", "channels_last"])
@pytest.mark.parametrize("of_x", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=["2d", "4d", "5d"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@every_process
def test_backward_is_the_recursion_of_the_authors(case, affine, shape, of_x, of_dy):
    layer = case.made(affine=affine, dtype=torch.float64)
    expected, options = state_of(layer), case.options_of(layer)
    for step in range(3):
        x, dy = _laid_out(sample(shape, seed=step), of_x), _laid_out(sample(shape, seed=step + 10), of_dy)
        want = BACKWARD[case.name](array(x), array(dy), expected, options)
        got = _gradients(layer, x, dy)
        _assert_gradients(got, want, 1e-11)
        assert got["x"].stride() == x.stride()
        assert_state(layer, expected, rtol=1e-11, atol=1e-11)


@every_process
def test_single_precision_follows_the_recursion(case):
    layer = case.made()
    expected, options = state_of(layer), case.options_of(layer)
    for step in range(3):
        x, dy = (sample(IMAGE, torch.float32, seed=step + i) for i in (0, 10))
        want = BACKWARD[case.name](array(x), array(dy), expected, options)
        _assert_gradients(_gradients(layer, x, dy), want, 1e-4)
        assert_state(layer, expected, rtol=1e-4, atol=1e-5)


@every_process
def test_a_batch_longer_than_a_block_of_the_recurrence(case):
    layer = case.made(dtype=torch.float64)
    expected, options = state_of(layer), case.options_of(layer)
    x, dy = sample((600, CHANNELS)), sample((600, CHANNELS), seed=1)
    want = BACKWARD[case.name](array(x), array(dy), expected, options)
    _assert_gradients(gradients(layer, x, dy), want, 1e-9)
    assert_state(layer, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", ONLINE, ids=str)
def test_online_normalization_takes_samples_one_by_one(case):
    """A batch of four is four batches of one, in the outputs, the gradients and what is held afterwards."""
    together, apart = (case.made(dtype=torch.float64) for _ in range(2))
    x, dy = sample((4, *IMAGE[1:])), sample((4, *IMAGE[1:]), seed=1)
    whole = gradients(together, x, dy)
    parts = []
    for n in range(4):
        parts.append(_gradients(apart, x[n : n + 1], dy[n : n + 1]))
    for name, value in whole.items():
        pieces = [part[name] for part in parts]
        assert_close(value, torch.cat(pieces) if name in "xy" else sum(pieces), rtol=1e-11, atol=1e-11)
    assert_state(apart, state_of(together), rtol=1e-11, atol=1e-11)


@every_process
def test_drift_is_read_when_backward_runs(case):
    """Two forwards, then their backwards in reverse, as with a layer used twice in a network."""
    layer = case.made(dtype=torch.float64)
    expected, options = state_of(layer), case.options_of(layer)
    inputs = [sample(IMAGE, seed=i).requires_grad_() for i in range(2)]
    before = [{k: v.copy() for k, v in expected.items()}]
    outputs = []
    for x in inputs:
        y, after = case.expect(layer, x)
        outputs.append(layer(x))
        before.append(after)
        assert_close(outputs[-1], y, rtol=1e-11, atol=1e-11)
    moved = {k: expected[k] for k in ("drift_mean", "drift_scale", "ema_gz") if k in expected}
    for i in (1, 0):
        dy = sample(IMAGE, seed=10 + i)
        outputs[i].backward(dy)
        state = {**before[i], **moved}
        want = BACKWARD[case.name](array(inputs[i]), array(dy), state, options)
        assert_close(inputs[i].grad, torch.from_numpy(want["x"]), rtol=1e-11, atol=1e-11)
    assert_state(layer, {**before[-1], **moved}, rtol=1e-11, atol=1e-11)


@every_process
def test_evaluation_has_the_ordinary_gradient_and_moves_nothing(case):
    layer = case.made(dtype=torch.float64).eval()
    before = state_of(layer)
    gradients(layer, sample(IMAGE), sample(IMAGE, seed=1))
    assert_state(layer, before, rtol=0)


@every_process
def test_a_wrong_recursion_is_caught(case):
    """The drift of the states is large enough to be seen: without it the gradients differ."""
    layer = case.made(dtype=torch.float64)
    expected, options = state_of(layer), {**case.options_of(layer), "momentum_backward": 0.0}
    x, dy = sample(IMAGE), sample(IMAGE, seed=1)
    want = BACKWARD[case.name](array(x), array(dy), expected, options)
    with pytest.raises(AssertionError):
        _assert_gradients(gradients(layer, x, dy), want, 1e-3)
    with pytest.raises(AssertionError):
        assert_state(layer, expected, rtol=1e-3)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", GATED, ids=str)
def test_gates_at_their_bounds_are_drawn_only_inward(case, training):
    """Of the gradient in the clipped gate, what leads further out is 0; there is some of each kind."""
    gates = np.array([-0.5, 0.0, 0.25, 0.75, 1.0, 1.5])
    kept = set()
    for sign in (1, -1):
        layer = case.made(dtype=torch.float64).train(training)
        layer.load_state_dict({**layer.state_dict(), "gate": torch.from_numpy(gates)})
        x, dy = sample(IMAGE), sign * sample(IMAGE, seed=1)
        batch, instance = references.batch_and_instance(array(x), state_of(layer), case.options_of(layer), training)
        y, _ = case.expect(layer, x)
        want = np.empty(CHANNELS)
        for c, gate in enumerate(gates):
            slope = (array(dy)[:, c] * (batch[:, c] - instance[:, c])).sum() * state_of(layer)["weight"][c]
            outward = (gate >= 1 and slope < 0) or (gate <= 0 and slope > 0)
            want[c] = 0.0 if outward else slope
            kept.add((c, bool(outward)))
        got = gradients(layer, x, dy)
        assert_close(got["y"], y, rtol=1e-11, atol=1e-11)
        np.testing.assert_allclose(array(got["gate"]), want, rtol=1e-9, atol=1e-9)
    assert {(c, False) for c in range(CHANNELS)} | {(c, True) for c in (0, 1, 4, 5)} == kept


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo, where a graph breaks
@pytest.mark.parametrize("case", [ONLINE[0], POWER[0]], ids=str)
def test_a_backward_that_moves_a_state_compiles_with_a_break_of_the_graph(case):
    torch._dynamo.reset()
    layer, twin = case.made(), case.made()
    compiled = torch.compile(layer)
    for step in range(2):
        x, dy = (sample(IMAGE, torch.float32, seed=step + i) for i in (0, 9))
        got, want = _gradients(compiled, x, dy), _gradients(twin, x, dy)
        assert got.keys() == want.keys()
        for name, value in want.items():
            assert_close(got[name], value)
        assert_state(layer, state_of(twin), rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()
