"""Activation checkpoints: the recomputation is the function that the first pass was, and statistics move once."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from norm_cases import assert_state, sample, state_of
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import normzoo
from normzoo.functional import _recomputation, batch_renorm
from normzoo.layers.renorm import BatchRenorm

SHAPE = (8, 6, 3, 3)
# Layers whose training output depends on what moves between a first pass and its recomputation, and one that does not.
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "batch_renorm": ("batch_renorm", {"r_max": 3.0, "d_max": 5.0}),
    "batch_renorm-schedule": ("batch_renorm", {"r_max": [(0, 1), (6, 3)], "d_max": [(0, 0), (6, 5)], "momentum": None}),
    "power": ("power", {"warmup": 0}),
    "power-warm-up": ("power", {"warmup": 4, "groups": 2}),
    "online": ("online", {}),
    "online-layer": ("online", {"compensation": "layer", "momentum": 0.1}),
    "batch": ("batch", {}),
}
FORMS = {"early-stop": (False, True), "to-the-end": (False, False), "reentrant": (True, True)}
every_layer = pytest.mark.parametrize("name", LAYERS)
every_form = pytest.mark.parametrize("form", FORMS)


@dataclass
class Run:
    """What a scenario calls: the layer, and regions that are checkpointed or, for comparison, not."""

    layer: nn.Module
    form: str
    checkpointed: bool
    inputs: list[Tensor] = field(default_factory=list)

    def __call__(self, region: Callable[..., Tensor], *args: Tensor) -> Tensor:
        if not self.checkpointed:
            return region(*args)
        _, early_stop = FORMS[self.form]
        with set_checkpoint_early_stop(early_stop):
            return checkpoint(region, *args, use_reentrant=self.reentrant)

    @property
    def reentrant(self) -> bool:
        return FORMS[self.form][0]

    def input(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
        x = (sample(SHAPE, dtype, seed=seed) + seed).requires_grad_()
        self.inputs.append(x)
        return x


def loss(y: Tensor, seed: int = 0) -> Tensor:
    return (y.double() * sample(SHAPE, seed=50 + seed)).sum()


def between(layer: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The layer between other functions, so that what a recomputation gets wrong reaches the gradients."""
    return lambda x: layer(x + x.sin()).tanh().square() * 2


def once(run: Run) -> None:
    loss(run(between(run.layer), run.input())).backward()


def twice_in_a_region(run: Run) -> None:
    loss(run(lambda x: run.layer(run.layer(x).sin()), run.input())).backward()


def twice_on_one_input(run: Run) -> None:
    loss(run(lambda x: run.layer(x).sin() * run.layer(x), run.input())).backward()


def a_loop(run: Run) -> None:
    """More calls than are remembered without a graph."""

    def region(x: Tensor) -> Tensor:
        many = isinstance(run.layer, BatchRenorm) and not run.reentrant
        for _ in range(_recomputation.LIMIT + 6 if many else 6):
            x = run.layer(x).sin()
        return x

    loss(run(region, run.input())).backward()


def two_forward_passes(run: Run) -> None:
    one, two = (run(between(run.layer), run.input(seed)) for seed in (0, 1))
    (loss(one) + loss(two, 1)).backward()


def two_forward_passes_on_one_input(run: Run) -> None:
    x = run.input()
    one, two = (run(between(run.layer), x) for _ in range(2))
    (loss(one) + loss(two, 1)).backward()


def the_first_of_two_on_one_input(run: Run) -> None:
    x = run.input()
    one, _two = (run(between(run.layer), x) for _ in range(2))
    loss(one).backward()


def backward_passes_in_any_order(run: Run) -> None:
    x = run.input()
    outputs = [run(between(run.layer), x) for _ in range(3)]
    for i in (1, 0, 2):
        loss(outputs[i], i).backward()


def other_passes_between(run: Run) -> None:
    x = run.input()
    y = run(between(run.layer), x)
    with torch.no_grad():
        for seed in range(3):
            run.layer(run.input(seed))
        between(run.layer)(x)
    run.layer.eval()
    with torch.inference_mode():
        run.layer(x)
    run.layer.train()
    loss(y).backward()


def many_passes_before(run: Run) -> None:
    with torch.no_grad():
        for seed in range(_recomputation.LIMIT + 6):
            run.layer(sample(SHAPE, seed=seed % 3) + seed % 3)
    once(run)


def losses_dropped(run: Run) -> None:
    for seed in (0, 1, 0):
        run(between(run.layer), run.input(seed))
    once(run)


def accumulated_over_one_batch(run: Run) -> None:
    for _ in range(3):
        once(run)


def nested(run: Run) -> None:
    inner = between(run.layer)
    loss(run(lambda x: run(inner, run(inner, x)).sin() + run(inner, x.cos()), run.input())).backward()


def frozen(run: Run) -> None:
    """Nothing in the layer's own graph, and something after it that needs its output."""
    run.layer.requires_grad_(False)
    scale = torch.full((6, 1, 1), 1.5, dtype=torch.float64, requires_grad=True)
    run.inputs.append(scale)
    x = sample(SHAPE)
    loss(run(lambda s: (run.layer(x) * s).tanh() * s, scale)).backward()


def detached(run: Run) -> None:
    loss(run(lambda x: run.layer(x).detach() * x, run.input())).backward()


def dropped_units(run: Run) -> None:
    """Two passes over one batch with different random numbers, as in R-Drop."""
    torch.manual_seed(0)
    x = run.input()
    one, two = (run(lambda v: nn.functional.dropout(run.layer(v), 0.3).sin(), x) for _ in range(2))
    (loss(one) + loss(two, 1)).backward()


def kept_for_a_second_backward(run: Run) -> None:
    y = run(between(run.layer), run.input())
    loss(y).backward(retain_graph=True)
    if not run.reentrant:
        run(between(run.layer), run.input())
    loss(y, 1).backward()


def under_autocast(run: Run) -> None:
    run.layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        y = run(between(run.layer), run.input(dtype=torch.float32))
    loss(y).backward()


SCENARIOS = [
    once,
    twice_in_a_region,
    twice_on_one_input,
    a_loop,
    two_forward_passes,
    two_forward_passes_on_one_input,
    the_first_of_two_on_one_input,
    backward_passes_in_any_order,
    other_passes_between,
    many_passes_before,
    losses_dropped,
    accumulated_over_one_batch,
    nested,
    frozen,
    detached,
    dropped_units,
    kept_for_a_second_backward,
    under_autocast,
]


def _marks(name: str, scenario: int) -> list[Any]:
    return [] if scenario < 2 or name in ("batch_renorm", "power", "online") else [pytest.mark.slow]


def _cases() -> list[Any]:
    """Every scenario for one layer of each kind; for the others all but the first ones are slow."""
    return [
        pytest.param(name, form, scenario, id=f"{name}-{form}-{scenario.__name__}", marks=_marks(name, i))
        for name in LAYERS
        for form in FORMS
        for i, scenario in enumerate(SCENARIOS)
    ]


def trained(name: str, **more: Any) -> nn.Module:
    """A layer with statistics after two steps of training."""
    norm, options = LAYERS[name]
    layer = normzoo.create_norm(norm, 6, **{"dtype": torch.float64, **options, **more})
    for seed in (20, 21):
        loss(layer(sample(SHAPE, seed=seed).requires_grad_() * 1)).backward()
    layer.zero_grad()
    return layer


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # the first pass of a nested reentrant one
@pytest.mark.parametrize(("name", "form", "scenario"), _cases())
def test_a_recomputation_is_its_first_pass(name, form, scenario):
    layer = trained(name)
    got, want = Run(copy.deepcopy(layer), form, True), Run(layer, form, False)
    for run in (got, want):
        scenario(run)
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if layer.weight.dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    leaves = [[*run.inputs, *run.layer.parameters()] for run in (got, want)]
    assert any(leaf.grad is not None for leaf in leaves[1])
    for a, b in zip(*leaves, strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            assert_close(a.grad, b.grad, **tolerance)
    assert_state(got.layer, state_of(want.layer), **tolerance)


@every_form
@pytest.mark.parametrize("name", normzoo.list_norms())
def test_early_layers_of_a_network_get_their_gradients(name, form):
    """Two layers and convolutions in one region; what torch's own layers do to their statistics the zoo's do not."""
    options = {"groups": 2} if "groups" in normzoo.norm_info(name).options else {}
    torch.manual_seed(0)
    norms = [normzoo.create_norm(name, 6, dtype=torch.float64, **options) for _ in range(2)]
    convolutions = [nn.Conv2d(6, 6, 1, dtype=torch.float64) for _ in range(3)]
    network = nn.Sequential(convolutions[0], norms[0], nn.GELU(), convolutions[1], norms[1], nn.GELU(), convolutions[2])
    twin = copy.deepcopy(network)
    for seed in range(3):
        for net, on in ((network, True), (twin, False)):
            run = Run(net, form, on)
            loss(run(net, run.input(seed)), seed).backward()
    for (key, a), b in zip(network.named_parameters(), twin.parameters(), strict=True):
        assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-8, msg=lambda text, key=key: f"{key}: {text}")
    for (key, a), b in zip(network.named_buffers(), twin.buffers(), strict=True):
        assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")


def test_a_recomputation_with_other_rounding_is_known_and_another_input_is_not():
    layer = trained("batch_renorm")
    x = sample(SHAPE)
    with torch.no_grad():
        first = layer(x)
    one, two = copy.deepcopy(layer), copy.deepcopy(layer)
    assert_close(_in_backward(lambda: layer(x * (1 + 1e-7))), first, rtol=1e-6, atol=1e-6)
    assert (one(x) - first).abs().max() > 1e-3
    assert_close(_in_backward(lambda: layer(x * 1.01)), two(x * 1.01))


def test_a_pass_of_nan_hides_no_other():
    layer, x = trained("batch_renorm"), sample(SHAPE)
    with torch.no_grad():
        first = layer(x)
        kept = copy.deepcopy(layer.state_dict())
        layer(x * torch.nan)
        layer.load_state_dict(kept)
        layer(x + 1)
    assert_close(_in_backward(lambda: layer(x)), first)


def _in_backward(call: Callable[[], Any]) -> Any:
    """The result of a call inside a backward pass."""
    results: list[Any] = []
    leaf = torch.zeros((), requires_grad=True)
    leaf.register_hook(lambda _: results.append(call()))
    (leaf * 1).backward()
    return results[0]


def test_statistics_stay_in_a_backward_pass_and_move_after_an_error_in_it():
    layer = trained("batch")
    before = state_of(layer)
    _in_backward(lambda: layer(sample(SHAPE)))
    assert_state(layer, before, rtol=0)

    def fails() -> None:
        raise ArithmeticError("in a hook")

    with pytest.raises(ArithmeticError):
        _in_backward(fails)
    assert not _recomputation.in_backward()
    layer(sample(SHAPE))
    assert layer.num_batches_tracked == before["num_batches_tracked"] + 1


def test_what_a_reentrant_region_needs_and_was_dropped_is_an_error():
    layer, x = trained("batch_renorm"), sample(SHAPE).requires_grad_()
    with torch.no_grad():
        for _ in range(_recomputation.LIMIT):
            layer(x)
    y = checkpoint(layer, x, use_reentrant=True)
    loss(y).backward()  # enough room
    y = checkpoint(layer, x, use_reentrant=True)
    with torch.no_grad():
        for _ in range(_recomputation.LIMIT):
            layer(x)
    with pytest.raises(RuntimeError, match=r"more than 64 times since, .* use checkpoint\(use_reentrant=False\)"):
        loss(y).backward()


@pytest.mark.parametrize("alike", [False, True])
def test_in_another_thread_a_dropped_pass_reads_the_statistics_of_now_or_of_a_like_input(alike: bool):
    """As on a GPU, whose backward passes run in a thread of autograd's."""
    layer, x = trained("batch_renorm"), sample(SHAPE).requires_grad_()
    first, remembered = copy.deepcopy(layer), []
    y = checkpoint(layer, x, use_reentrant=True)
    later = x.detach() if alike else 3 * sample(SHAPE, seed=1) + 1
    with torch.no_grad():
        for _ in range(_recomputation.LIMIT):
            remembered.append(copy.deepcopy(layer))
            layer(later)
    before = state_of(layer)
    thread = threading.Thread(target=loss(y).backward)
    thread.start()
    thread.join()
    assert_state(layer, before, rtol=0)

    def gradient(other: nn.Module) -> Tensor:
        return torch.autograd.grad(loss(other(x)), x)[0]

    assert x.grad is not None
    assert not torch.allclose(x.grad, gradient(first))
    readings = remembered if alike else [layer]
    assert any(torch.allclose(x.grad, gradient(other), rtol=1e-12) for other in readings)


def _remembered(layer: nn.Module) -> int:
    history = _recomputation._histories.get(layer.running_mean)
    return 0 if history is None else sum(ref() is not None for ref in history._passes)


def test_what_is_remembered_is_bounded_and_ends_with_the_graph_and_the_layer():
    layer, x = trained("batch_renorm"), sample(SHAPE).requires_grad_()
    for _ in range(3):
        loss(layer(x)).backward()
    assert _remembered(layer) == 0, "without checkpoints nothing is"
    with torch.inference_mode():
        layer(x)
    assert _remembered(layer) == 0
    for _ in range(100):
        loss(checkpoint(layer, x, use_reentrant=False)).backward()
    assert _remembered(layer) <= 2
    with torch.no_grad():
        for _ in range(100):
            layer(x)
    assert _remembered(layer) == _recomputation.LIMIT
    statistics = weakref.ref(layer.running_mean)
    count = len(_recomputation._histories)
    del layer
    gc.collect()
    assert statistics() is None
    assert len(_recomputation._histories) < count


def test_hooks_that_never_end_do_not_collect_passes():
    layer, x = trained("batch_renorm"), sample(SHAPE).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        for _ in range(_recomputation.LIMIT + 20):
            loss(layer(x)).backward()
    assert _remembered(layer) <= _recomputation.LIMIT


def test_copies_and_state_dicts_hold_nothing_of_pending_passes():
    layer, x = trained("batch_renorm"), sample(SHAPE).requires_grad_()
    keys, attributes = set(layer.state_dict()), set(layer.__dict__)
    y = checkpoint(layer, x, use_reentrant=False)
    twin = copy.deepcopy(layer)
    assert set(layer.state_dict()) == keys
    assert set(layer.__dict__) == attributes
    assert _remembered(twin) == 0
    loss(y).backward()


def test_the_function_alone_is_recomputed_with_the_statistics_it_read():
    x = sample(SHAPE).requires_grad_()
    got, want = [], []
    for found, on in ((got, True), (want, False)):
        mean, var = torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)

        def region(x: Tensor, mean: Tensor = mean, var: Tensor = var) -> Tensor:
            return batch_renorm(x, mean, var, r_max=3.0, d_max=5.0, training=True).sin()

        y = checkpoint(region, x, use_reentrant=False) if on else region(x)
        found += [*torch.autograd.grad(loss(y), x), mean, var]
    for a, b in zip(got, want, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("name", ["l1_batch", "online", "proxy", "batch"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradients_with_a_graph_are_those_without(name, training):
    """Also where what a formula takes was computed from other things that it takes."""
    if (name, training) == ("online", True):
        pytest.skip("its training has no second derivative")
    torch.manual_seed(0)
    layer = normzoo.create_norm(name, 6, dtype=torch.float64).train(training)
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            tensor.add_(torch.rand_like(tensor) if tensor.is_floating_point() else 1)
    leaves = [sample(SHAPE).requires_grad_(), *layer.parameters()]
    y = loss(layer(leaves[0]))
    want = torch.autograd.grad(y, leaves, retain_graph=True)
    for a, b in zip(torch.autograd.grad(y, leaves, create_graph=True), want, strict=True):
        assert_close(a, b)


@every_layer
def test_second_derivatives_inside_a_checkpoint(name):
    if name.startswith(("power", "online")):
        pytest.skip("its training has no second derivative")
    layer = trained(name)
    found = []
    for on in (True, False):
        twin, x = copy.deepcopy(layer), sample(SHAPE).requires_grad_()
        y = Run(twin, "early-stop", on)(between(twin), x)
        (gradient,) = torch.autograd.grad(loss(y), x, create_graph=True)
        found.append([*torch.autograd.grad(gradient.square().sum(), [x, *twin.parameters()]), *twin.buffers()])
    for a, b in zip(*found, strict=True):
        assert_close(a, b, rtol=1e-8, atol=1e-8)
