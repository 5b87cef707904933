"""Promises about the formula: signature, reference, derivatives, cancellation."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from normzoo.testing._compare import BrokenError, NotApplicableError, agree
from normzoo.testing._inputs import LAST, MODES, sample, small_shapes, state, step, where
from normzoo.testing._promises import promise
from normzoo.testing._subject import Subject


@promise()
def signature(subject: Subject) -> None:
    """num_features is first, options are keyword-only with defaults, device and dtype last; a typo is a TypeError."""
    parameters = list(subject.parameters.values())
    names = [p.name for p in parameters]
    text = f"the signature is ({', '.join(map(str, parameters))})"
    if not parameters or names[0] != "num_features":
        raise BrokenError(f"the first argument is not num_features: {text}")
    first, *rest = parameters
    if first.kind is not first.POSITIONAL_OR_KEYWORD or first.default is not first.empty:
        raise BrokenError(f"num_features must be a required argument that can be given by position: {text}")
    swallowing = [str(p) for p in rest if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if swallowing:
        raise BrokenError(f"{' and '.join(swallowing)} would hide a mistyped option: {text}")
    wrong = [p.name for p in rest if p.kind is not p.KEYWORD_ONLY or p.default is inspect.Parameter.empty]
    if wrong:
        raise BrokenError(f"{', '.join(wrong)} must be keyword-only with a default: {text}")
    if names[-2:] != ["device", "dtype"]:
        raise BrokenError(f"the last arguments are not device and dtype: {text}")
    typo: dict[str, Any] = {"no_such_option": 1}
    try:
        subject.factory(subject.num_features, **typo)
    except TypeError:
        return
    except Exception as error:
        raise BrokenError(f"no_such_option=1 gave {type(error).__name__}: {error}, not a TypeError") from error
    raise BrokenError("no_such_option=1 was accepted")


@promise()
def reference(subject: Subject) -> None:
    """Output and state equal the reference's in float64, over several steps, also for one sample and for one pixel."""
    if subject.reference is None:
        raise NotApplicableError("no reference was given")
    ranks = {len(shape) for shape in subject.shapes}
    small = [shape for shape in small_shapes(subject.num_features) if len(shape) in ranks]
    for training in MODES:
        for shape in (*subject.shapes, *small):
            layer = subject.made(dtype=torch.float64).train(training)
            if shape in small and not _takes(subject, shape, training):
                continue
            for i in range(3):
                x = sample(shape, torch.float64, seed=i)
                text = f"{where(training, x)}, step {i}"
                with torch.no_grad():
                    given = subject.reference(layer, x.clone())
                want, held = given if isinstance(given, tuple) else (given, {})
                with torch.set_grad_enabled(i > 0):  # a layer may have another path for each
                    got = layer(x)
                agree(f"{text}: output", got, torch.as_tensor(want), tolerance=1e-10)
                for name, value in state(layer).items():
                    if name in held:
                        agree(f"{text}: {name} afterwards", value, held[name], tolerance=1e-10)


def _takes(subject: Subject, shape: tuple[int, ...], training: bool) -> bool:
    try:
        subject.made(dtype=torch.float64).train(training)(sample(shape, torch.float64))
    except ValueError:
        return False
    return True


@promise()
def gradcheck(subject: Subject) -> None:
    """The gradients of input and parameters are those of the output, by finite differences in float64."""
    for training in MODES:
        for shape in subject.shapes:
            _compare(torch.autograd.gradcheck, subject, shape, training, fast=len(shape) > 2)


@promise()
def gradgradcheck(subject: Subject) -> None:
    """The gradients can be differentiated again, right by finite differences in float64."""
    for training in MODES:
        for shape in subject.shapes[:2]:
            _compare(torch.autograd.gradgradcheck, subject, shape, training, fast=True)


def _compare(by: Callable[..., bool], subject: Subject, shape: tuple[int, ...], training: bool, fast: bool) -> None:
    layer = subject.made(dtype=torch.float64).train(training)
    function, parameters = _pure(layer)
    x = sample(shape, torch.float64)
    inputs = [v.detach().clone().requires_grad_() for v in (x, *parameters)]
    try:
        by(function, inputs, fast_mode=fast)
    except RuntimeError as error:  # GradcheckError is one
        raise BrokenError(f"{where(training, x)}: {_shortened(str(error))}") from error


def _pure(layer: nn.Module) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The layer as a function of input and parameters that starts from the same statistics each time."""
    names = [k for k, _ in layer.named_parameters()]
    buffers = {k: v.detach().clone() for k, v in layer.named_buffers()}

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        fresh = {k: v.clone() for k, v in buffers.items()}
        return functional_call(layer, {**dict(zip(names, parameters, strict=True)), **fresh}, (x,))

    return function, list(layer.parameters())


def _shortened(text: str, most: int = 700) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[:most]} ..."


@promise()
def large_offset(subject: Subject) -> None:
    """In float32 a mean of 1e4 at a spread of 1 costs at most 1e-2 of output and statistics: nothing cancels."""
    channels = subject.num_features
    shape = (8, channels, 8, 8) if len(subject.shape) == 4 else (64, *subject.shape[1:])
    noise = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = (noise + 1e4).float()
    for training in MODES:
        for memory_format in (torch.contiguous_format, LAST.get(x.ndim)):
            if memory_format is None:
                continue
            laid = x.contiguous(memory_format=memory_format)
            single, double = (_offset(subject.made(dtype=d)).train(training) for d in (torch.float32, torch.float64))
            text = where(training, laid)
            with torch.no_grad():
                agree(f"{text}: output", single(laid), double(laid.double()), tolerance=1e-2)
            of_double = state(double)
            for name, value in state(single).items():
                agree(f"{text}: {name} afterwards", value, of_double[name], tolerance=1e-2)


def _offset(layer: nn.Module) -> nn.Module:
    mean = dict(layer.named_buffers()).get("running_mean")
    if mean is not None:
        mean += 1e4
    return layer


@promise()
def affine_false(subject: Subject) -> None:
    """Without affine there is neither weight nor bias, and the layer is the one with affine at its start."""
    subject.need_option("affine")
    plain, fresh = subject.make(affine=False), subject.make(affine=True)
    names, with_affine = ({k for k, _ in layer.named_parameters()} for layer in (plain, fresh))
    left = {"weight", "bias"} & names
    if left:
        raise BrokenError(f"with affine=False there still is the parameter {' and '.join(sorted(left))}")
    if names != with_affine - {"weight", "bias"}:
        raise BrokenError(f"with affine=False the parameters are {sorted(names)}, with affine {sorted(with_affine)}")
    for training in MODES:
        for shape in subject.shapes:
            x = sample(shape)
            got, want = step(plain.train(training), x), step(fresh.train(training), x)
            for name in ("output", "gradient of the input"):
                agree(f"{where(training, x)}: {name} with affine=False", got[name], want[name], tolerance=1e-5)


@promise()
def activation(subject: Subject) -> None:
    """act_layer=A gives A of the output that the layer has without an activation, and the gradients of that."""
    subject.need_option("act_layer")
    for training in MODES:
        for shape in subject.shapes[:2]:
            x = sample(shape)
            plain, active = (subject.made(act_layer=a).train(training) for a in (None, nn.Tanh))
            got, want = step(active, x), step(plain, x, call=_followed_by_tanh(plain))
            text = f"{where(training, x)}, act_layer=torch.nn.Tanh"
            for name, value in got.items():
                agree(f"{text}: {name}", value, want.get(name), tolerance=1e-5)


def _followed_by_tanh(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: layer(x).tanh()
