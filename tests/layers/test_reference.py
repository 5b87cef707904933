"""Layers against float64 numbers from their authors' code, which ``reference/<layer>.json`` holds with their origin.

One table says how the authors' options, parameters and buffers are called here, and where a layer departs from their
numbers on purpose. ``left_out`` in a file names what its layer does not do at all.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import normzoo
from normzoo.functional.weight import scale_weight, standardize_weight

FOLDER = Path(__file__).parent / "reference"
RTOL, ATOL = 1e-7, 1e-9

Case = dict[str, Any]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Difference:
    """A departure from the authors that the layer documents.

    Attributes:
        quantity: "output", "grad_input", "grad_<parameter>" or the name of a buffer after the step.
        reason: what the layer does instead.
        expected: (case, the authors' number, our buffers before) -> the number here, with nan where it does not
            follow from theirs; None where none of it does.
        concerns: the cases it is about.
    """

    quantity: str
    reason: str
    expected: Callable[[Case, Tensor, Tensors], Tensor] | None
    concerns: Callable[[Case], bool] = lambda case: True


@dataclass(frozen=True)
class Reference:
    """How one file is read.

    Attributes:
        options: (case) -> our options.
        names: of parameters and buffers, theirs to ours.
        parameters: (case, renamed parameters) -> ours.
        state: (case, renamed buffers) -> ours.
        order: (case) -> the order of samples in which our layer is to see the batch.
        differences: that the layer documents.
        atol: absolute tolerance, relative to the largest number.
    """

    options: Callable[[Case], dict[str, Any]]
    names: Mapping[str, str] = field(default_factory=dict)
    parameters: Callable[[Case, Tensors], Tensors] = lambda case, held: held
    state: Callable[[Case, Tensors], Tensors] = lambda case, held: held
    order: Callable[[Case], list[int]] = lambda case: list(range(case["shape"][0]))
    differences: tuple[Difference, ...] = ()
    atol: float = ATOL

    def renamed(self, held: Mapping[str, list[float]]) -> Tensors:
        return {self.names.get(k, k): torch.tensor(v, dtype=torch.float64) for k, v in held.items()}

    def loaded(self, case: Case) -> tuple[Tensors, Tensors]:
        """Our parameters and buffers before the step."""
        parameters = self.parameters(case, self.renamed(case["params"]))
        return parameters, self.state(case, self.renamed(case["state_before"]))

    def array(self, case: Case, name: str) -> Tensor:
        return torch.tensor(case[name], dtype=torch.float64).view(case["shape"])[self.order(case)]

    def theirs(self, case: Case) -> Tensors:
        """What the authors' code gave, under our names."""
        gradients = {f"grad_{k}": v for k, v in self.renamed(case["grad_params"]).items()}
        state = self.state(case, self.renamed(case["state_after"]))
        return {**{k: self.array(case, k) for k in ("output", "grad_input")}, **gradients, **state}

    def expected(self, case: Case, before: Tensors) -> dict[str, Tensor | None]:
        """What our layer is to give; None where a documented difference leaves nothing to compare."""
        numbers: dict[str, Tensor | None] = dict(self.theirs(case))
        for difference in self.differences:
            if difference.concerns(case):
                value = numbers.get(difference.quantity)
                numbers[difference.quantity] = difference.expected and difference.expected(case, value, before)
        return numbers


def options(case: Case, **ours: str) -> dict[str, Any]:
    """Those of the authors' options that the case sets, under our names: ``ours=theirs``."""
    return {k: case["options"][v] for k, v in ours.items() if v in case["options"]}


def rate(case: Case, name: str, default: float) -> float:
    """Our momentum, where the authors' is the share kept."""
    return 1 - case["options"].get(name, default)


def channel_last(case: Case) -> dict[str, int]:
    return {"channel_dim": -1} if case["options"]["channels_last"] else {}


def over_n_minus_one(momentum: float, count: int, after: Tensor, before: Tensor) -> Tensor:
    """What a running average of biased variances would be, had the last one been unbiased."""
    batch = before + (after - before) / momentum
    return before + momentum * (batch * count / (count - 1) - before)


def batch_group_state(case: Case, held: Tensors) -> Tensors:
    if case["training"]:
        held = {**held, "running_var": held["running_var_unbiased"]}
    repeats = case["shape"][1] // case["options"]["groups"]
    return {k: held[k].repeat_interleave(repeats) for k in ("running_mean", "running_var")}


def _within(case: Case) -> Tensor:
    gate = torch.tensor(case["params"]["gate"])
    return (gate >= 0) & (gate <= 1)


def _only_within(case: Case, value: Tensor, _: Tensors) -> Tensor:
    mask = _within(case)
    return torch.where(mask if value.ndim == 1 else mask.view(1, -1, 1, 1), value, math.nan)


def _projected(case: Case, value: Tensor, _: Tensors) -> Tensor:
    gate = torch.tensor(case["params"]["gate"])
    return torch.where(((gate == 1) & (value < 0)) | ((gate == 0) & (value > 0)), 0.0, value)


def l1_state(case: Case, held: Tensors) -> Tensors:
    if "running_scale" in held:
        return {"running_mean": held["running_mean"], "running_var": held["running_scale"].square()}
    inverse = held["running_var"]
    scale = torch.where(inverse == 0, 0.0, 1 / inverse - case["options"]["eps"])
    return {"running_mean": held["running_mean"], "running_var": scale.square()}


def _average_of_scales(case: Case, _: Tensor, before: Tensors) -> Tensor:
    old, new = (torch.tensor(case[k]["running_var"], dtype=torch.float64) for k in ("state_before", "state_after"))
    kept = case["options"]["momentum"]
    batch = (1 - kept) / (new - kept * old) - case["options"]["eps"]
    return (kept * before["running_var"].sqrt() + (1 - kept) * batch).square()


def _without_batch(case: Case) -> bool:
    return not case["options"].get("using_bn", True)


def with_third_logit(case: Case, held: Tensors) -> Tensors:
    """A logit of minus infinity, which is a share of zero, where the authors' layer has no batch statistics."""
    missing = torch.tensor([-math.inf]) if _without_batch(case) else torch.tensor([])
    return {k: torch.cat([v, missing]) if k in ("mean_weight", "var_weight") else v for k, v in held.items()}


def _with_zero(case: Case, value: Tensor, _: Tensors) -> Tensor:
    return torch.cat([value, torch.zeros(1)])


def interleaved(case: Case) -> list[int]:
    """The samples of each virtual batch one after the other, where the authors' virtual batches are strided."""
    n, size = case["shape"][0], case["options"]["virtual_batch_size"]
    stride = 1 if case["options"]["variant"] == "hoffer" else n // size
    return [i for start in range(stride) for i in range(start, n, stride)]


def ghost_state(case: Case, held: Tensors) -> Tensors:
    return {k: v.view(-1, case["shape"][1]).mean(0) for k, v in held.items()}


def _ghost(variant: str) -> Callable[[Case], bool]:
    return lambda case: case["training"] and case["options"]["variant"] == variant


def power_options(case: Case) -> dict[str, Any]:
    given = {"alpha_fwd": 0.9, "alpha_bkw": 0.9, "group_num": 1, **case["options"]}
    return {
        **options(case, eps="eps", warmup="warmup_iters"),
        "momentum": 1 - given["alpha_fwd"],
        "momentum_backward": 1 - given["alpha_bkw"],
        "groups": given["group_num"] if given["group_scaling"] else None,
    }


def evonorm_s0_groups(case: Case) -> int:
    """The authors lower the number of groups until it divides the channels; here it must."""
    groups, channels = case["options"].get("num_groups", 32), case["shape"][1]
    return max(g for g in range(1, groups + 1) if channels % g == 0)


GAMMA_BETA = {"gamma": "weight", "beta": "bias"}
_STATELESS = "the authors' layer has no statistics here, and the share of ours is zero"
_CLIPPED = "a gate outside [0, 1] counts as clipped; the authors clip it after each step of training"

REFERENCES = {
    "affine": Reference(channel_last, {"alpha": "weight", "beta": "bias"}),
    "batch_group": Reference(
        lambda case: options(case, groups="groups", eps="eps", momentum="momentum"), state=batch_group_state
    ),
    "batch_instance": Reference(
        lambda case: options(case, eps="eps", momentum="momentum", affine="affine"),
        differences=(
            Difference("grad_gate", "no gradient leads a gate at its bound further out", _projected),
            *(
                Difference(quantity, _CLIPPED, _only_within, lambda case: not _within(case).all())
                for quantity in ("output", "grad_input", "grad_weight", "grad_gate")
            ),
        ),
    ),
    "batch_renorm": Reference(
        lambda case: options(case, r_max="r_max", d_max="d_max", momentum="alpha", eps="eps"),
        {**GAMMA_BETA, "mu": "running_mean", "sigma": "running_var"},
        state=lambda case, held: {**held, "running_var": held["running_var"].square() - case["options"]["eps"]},
        atol=1e-7,  # r_max and d_max are float32 tensors
    ),
    "derf": Reference(lambda case: {**channel_last(case), **options(case, affine="affine")}),
    "divisive": Reference(
        lambda case: {
            **options(case, mean_window="sum_window", square_window="sup_window", affine="affine"),
            "learn_sigma": True,
        }
    ),
    "dynamic_tanh": Reference(lambda case: {**channel_last(case), **options(case, affine="affine")}),
    "evonorm_b0": Reference(
        lambda case: {"eps": case["options"].get("epsilon", 1e-5), "momentum": rate(case, "decay", 0.9)},
        {**GAMMA_BETA, "moving_variance": "running_var"},
        differences=(
            Difference(
                "running_var",
                "the running average is of the unbiased variance, as in timm; the authors' is of the biased one",
                lambda case, after, before: over_n_minus_one(
                    rate(case, "decay", 0.9), math.prod(case["shape"]) // case["shape"][1], after, before["running_var"]
                ),
                lambda case: case["training"],
            ),
        ),
    ),
    "evonorm_s0": Reference(
        lambda case: {"groups": evonorm_s0_groups(case), **options(case, eps="epsilon")}, GAMMA_BETA
    ),
    "filter_response": Reference(
        lambda case: {"eps": case["options"]["eps"] + abs(case["params"].get("eps_l", [0.0])[0])},
        GAMMA_BETA,
        parameters=lambda case, held: {k: v for k, v in held.items() if k != "eps_l"},
        differences=(
            Difference("grad_eps_l", "eps is fixed, not learnt", None, lambda case: case["options"]["eps_learned"]),
        ),
    ),
    "ghost_batch": Reference(
        lambda case: {
            **options(case, ghost_size="virtual_batch_size", eps="eps", momentum="momentum"),
            **({"momentum": rate(case, "momentum", 0.99)} if case["options"]["variant"] == "keras" else {}),
        },
        state=ghost_state,
        order=interleaved,
        differences=(
            *(
                Difference(
                    quantity, "statistics move once for each batch, not for each virtual batch", None, _ghost("hoffer")
                )
                for quantity in ("running_mean", "running_var")
            ),
            Difference(
                "running_var",
                "the running average is of unbiased variances; Keras' is of biased ones",
                lambda case, after, before: over_n_minus_one(
                    rate(case, "momentum", 0.99), 2 * math.prod(case["shape"][2:]), after, before["running_var"]
                ),
                _ghost("keras"),
            ),
        ),
    ),
    "instance": Reference(lambda case: options(case, eps="eps")),
    "iter_norm": Reference(
        lambda case: options(
            case, groups="num_groups", iterations="T", eps="eps", momentum="momentum", affine="affine"
        ),
        {"running_wm": "running_whitening"},
        state=lambda case, held: {
            **held,
            "running_whitening": held["running_whitening"].view(
                case["options"]["num_groups"], *2 * [case["shape"][1] // case["options"]["num_groups"]]
            ),
        },
    ),
    "l1_batch": Reference(
        lambda case: {"eps": case["options"]["eps"], "momentum": rate(case, "momentum", 0.1)},
        state=l1_state,
        differences=(
            Difference(
                "running_var",
                "the running average is of the scale; that of lp_norm.py is of its inverse",
                _average_of_scales,
                lambda case: case["training"] and "running_var" in case["state_after"],
            ),
        ),
    ),
    "layer_channel": Reference(lambda case: {**channel_last(case), **options(case, eps="eps")}),
    "local_response": Reference(
        lambda case: options(case, size="size", alpha="alpha", beta="beta", k="k", mean="divided")
    ),
    "online": Reference(
        lambda case: {
            **options(case, eps="eps", clamp_value="clamp_val"),
            "momentum": rate(case, "alpha_fwd", 0.999),
            "momentum_backward": rate(case, "alpha_bkw", 0.99),
            "compensation": {"ac": "clamp", "ls": "layer", "": None}[case["options"].get("ecm", "ac")],
        },
        {"m": "running_mean", "var": "running_var", "u": "drift_mean", "v": "drift_scale"},
    ),
    "positional": Reference(lambda case: {"affine": False, **options(case, eps="epsilon", unbiased="unbiased")}),
    "power": Reference(
        power_options,
        {"iters": "num_batches_tracked"},
        state=lambda case, held: {**held, "num_batches_tracked": held["num_batches_tracked"][0].long()},
    ),
    "proxy": Reference(
        lambda case: {
            **options(case, groups="norm_groups", eps="norm_eps", proxy_eps="proxy_eps", samples="num_samples"),
            "act_layer": {"swish": nn.SiLU, "relu": nn.ReLU}[case["options"]["activation"]],
        },
        {**GAMMA_BETA, "proxy_gamma": "proxy_weight", "proxy_beta": "proxy_bias"},
    ),
    # An eps of 1e-8 outside the root, as in the author's PyTorch file, is one inside it, up to 1e-8.
    "rms": Reference(
        lambda case: {"channel_dim": -1, **options(case, eps="eps", bias="bias")},
        {"scale": "weight", "offset": "bias"},
    ),
    "switchable": Reference(
        lambda case: {"unbiased_instance": True, "momentum": rate(case, "momentum", 0.9), **options(case, eps="eps")},
        parameters=with_third_logit,
        differences=(
            *(Difference(q, _STATELESS, _with_zero, _without_batch) for q in ("grad_mean_weight", "grad_var_weight")),
            *(Difference(q, _STATELESS, None, _without_batch) for q in ("running_mean", "running_var")),
        ),
    ),
}

# Functions of weights, with the options that each published rule is.
WEIGHTS: dict[str, tuple[Callable[..., Tensor], dict[str, dict[str, bool]]]] = {
    "weight_standardized": (
        standardize_weight,
        {
            "qiao_pytorch": {"unbiased": True, "eps_on_std": True},
            "qiao_tensorflow": {"eps_on_std": True},
            "bit_pytorch": {},
            "timm_StdConv2d_default": {},
            "timm_StdConv2d_bit": {},
        },
    ),
    "scaled_ws": (
        scale_weight,
        {"deepmind": {"clamp": True}, "timm_ScaledStdConv2d_default": {}, "timm_nfnet": {}},
    ),
}

# PyTorch's own layers are the reference of these; "none" adds a bias.
WITHOUT_FILE = {"batch", "frozen_batch", "group", "layer", "none"}


@functools.cache
def read(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text())


def modes(case: Case) -> list[bool]:
    """Where there is no state, training and evaluation are the same function."""
    return [case["training"]] if case["state_before"] else [True, False]


CASES = [(name, i, case) for name in REFERENCES for i, case in enumerate(read(name)["cases"])]
RUNS = [
    pytest.param(name, case, training, layout, id=f"{name}-{i}-{'train' if training else 'eval'}-{layout}")
    for name, i, case in CASES
    for training in modes(case)
    for layout in ("contiguous_format", "channels_last")
    if layout == "contiguous_format" or len(case["shape"]) == 4
]
WEIGHT_CASES = [(name, i, case) for name in WEIGHTS for i, case in enumerate(read(name)["cases"])]


def assert_agrees(actual: Tensor, expected: Tensor, atol: float, what: str) -> None:
    """Equal where ``expected`` is not nan."""
    assert actual.shape == expected.shape, what
    known = ~expected.isnan()
    assert known.any(), f"nothing of {what} is compared"
    actual, expected = actual[known].double(), expected[known].double()
    atol *= max(1.0, expected.abs().max().item())
    assert_close(actual, expected, rtol=RTOL, atol=atol, msg=lambda text: f"{what}: {text}")


def step(layer: nn.Module, x: Tensor, dy: Tensor) -> Tensors:
    """One forward and backward pass: the output, all gradients, and the buffers after it."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x)
    y.backward(dy)
    gradients = {f"grad_{k}": p.grad for k, p in layer.named_parameters()}
    return {"output": y.detach(), "grad_input": x.grad, **gradients, **dict(layer.named_buffers())}


def made(name: str, case: Case) -> tuple[nn.Module, Tensors]:
    """Our layer as the authors' was before the step, and its buffers."""
    reference = REFERENCES[name]
    chosen = reference.options(case)
    layer = normzoo.create_norm(name, case["shape"][chosen.get("channel_dim", 1)], **chosen, dtype=torch.float64)
    parameters, state = reference.loaded(case)
    assert {k for k, _ in layer.named_parameters()} == set(parameters)
    layer.load_state_dict({**dict(layer.named_buffers()), **parameters, **state})
    return layer, {k: v.clone() for k, v in layer.named_buffers()}


@pytest.mark.parametrize(("name", "case", "training", "layout"), RUNS)
def test_layer_gives_the_authors_numbers(name, case, training, layout):
    reference = REFERENCES[name]
    layer, before = made(name, case)
    layer.train(training)
    memory_format = getattr(torch, layout)
    x, dy = (reference.array(case, k).contiguous(memory_format=memory_format) for k in ("input", "grad_output"))
    if name == "batch_renorm" and training and x.numel() == x.shape[1]:  # 0 by the algorithm, without a gradient
        with pytest.raises(ValueError, match="more than one value per channel"):
            layer(x)
        return
    actual = step(layer, x, dy)
    expected = reference.expected(case, before)
    if "num_batches_tracked" in before:  # only power's authors count batches
        expected.setdefault("num_batches_tracked", before["num_batches_tracked"] + training)
    for quantity, value in actual.items():
        if (number := expected.pop(quantity)) is not None:
            assert_agrees(value, number, reference.atol, f"{name}, {case['label']!r}, {quantity}")
    assert all(number is None for number in expected.values()), f"not compared: {list(expected)}"


@pytest.mark.parametrize(
    ("name", "case"), [pytest.param(name, case, id=f"{name}-{i}") for name, i, case in WEIGHT_CASES]
)
def test_standardized_weight_is_the_authors(name, case):
    transform, variants = WEIGHTS[name]
    given = dict(case["options"])
    chosen = {**variants[given.pop("variant")], **given}
    weight, dy = (torch.tensor(case[k], dtype=torch.float64).view(case["shape"]) for k in ("input", "grad_output"))
    leaves = [weight.requires_grad_()]
    leaves += [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in case["params"].values()]
    y = transform(*leaves, **chosen)
    y.backward(dy)
    expected = [case["output"], case["grad_input"], *case["grad_params"].values()]
    for actual, numbers in zip([y.detach(), *(t.grad for t in leaves)], expected, strict=True):
        assert_agrees(actual, torch.tensor(numbers, dtype=torch.float64).view_as(actual), ATOL, case["label"])


def test_every_layer_file_and_case_is_used():
    files = {path.stem for path in FOLDER.iterdir()}
    assert files == set(REFERENCES) | set(WEIGHTS)
    assert set(normzoo.list_norms()) == set(REFERENCES) | WITHOUT_FILE
    counted = {name: (FOLDER / f"{name}.json").read_text().count('{"label":') for name in files}
    used = [name for name, _, _ in CASES + WEIGHT_CASES]
    assert {name: used.count(name) for name in files} == counted
    assert min(counted.values()) > 0
    assert {(p.values[0], id(p.values[1])) for p in RUNS} == {(name, id(case)) for name, _, case in CASES}


@pytest.mark.parametrize("name", [*REFERENCES, *WEIGHTS])
def test_file_says_where_its_numbers_come_from_and_what_it_lacks(name):
    file = read(name)
    assert set(file) == {"origin", "left_out", "cases"}
    assert file["origin"]
    assert all(file["left_out"].values())
    modes_with_state = [case["training"] for case in file["cases"] if case["state_before"]]
    if modes_with_state:
        assert modes_with_state.count(True) >= 2
        assert modes_with_state.count(False) >= 1
    if name in WEIGHTS:
        assert {case["options"]["variant"] for case in file["cases"]} <= set(WEIGHTS[name][1])


@pytest.mark.parametrize(
    ("name", "difference"),
    [
        pytest.param(name, difference, id=f"{name}-{difference.quantity}-{i}")
        for name, reference in REFERENCES.items()
        for i, difference in enumerate(reference.differences)
    ],
)
def test_every_difference_is_needed(name, difference):
    """Each is about some case and, unless it leaves nothing to compare, changes a number there."""
    concerned = [case for n, _, case in CASES if n == name and difference.concerns(case)]
    assert concerned
    assert difference.reason
    changed = difference.expected is None
    for case in concerned if difference.expected else ():
        theirs = REFERENCES[name].theirs(case).get(difference.quantity)
        _, before = made(name, case)
        if theirs is not None:
            ours = difference.expected(case, theirs, before)
            changed |= ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert changed


@pytest.mark.parametrize("name", REFERENCES)
def test_a_slightly_wrong_layer_would_be_caught(name):
    """A shift of 1e-5 in any quantity is too large."""
    case = read(name)["cases"][0]
    reference = REFERENCES[name]
    _, before = made(name, case)
    for quantity, number in reference.expected(case, before).items():
        if number is not None and number.is_floating_point():
            with pytest.raises(AssertionError, match=quantity):
                assert_agrees(number + 1e-5 * max(1.0, number.abs().max().item()), number, reference.atol, quantity)
