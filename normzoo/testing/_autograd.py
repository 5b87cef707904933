"""Promises to autograd: activation checkpointing and batched gradients."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from normzoo.testing._compare import BrokenError, agree
from normzoo.testing._inputs import LAST, MODES, Tensors, sample, state, upstream, where
from normzoo.testing._promises import promise
from normzoo.testing._subject import Subject

Call = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]
# use_reentrant, and whether a recomputation may end inside the region: what comes after the last saved tensor is hidden
FORMS = ((False, True), (False, False), (True, True))


@promise()
def checkpointing(subject: Subject) -> None:
    """Under activation checkpoints of either form gradients are as without them, and statistics move once."""
    for training in MODES:
        for shape in subject.shapes[: 2 if training else 1]:
            want, twin = _step(subject.made().train(training), shape, lambda region, x: region(x))
            for reentrant, early_stop in FORMS:

                def call(region: Callable[[Tensor], Tensor], x: Tensor, reentrant: bool = reentrant) -> Tensor:
                    return checkpoint(region, x, use_reentrant=reentrant)

                text = f"{where(training, sample(shape))}, checkpoint(use_reentrant={reentrant})"
                text += "" if early_stop else ", set_checkpoint_early_stop(False)"
                try:
                    with set_checkpoint_early_stop(early_stop):
                        got, held = _step(subject.made().train(training), shape, call)
                except Exception as error:
                    raise BrokenError(f"{text}: {type(error).__name__}: {_first_line(error)}") from error
                for name, value in got.items():
                    agree(f"{text}: {name}", value, want[name], tolerance=1e-5)
                for name, value in held.items():
                    agree(f"{text}: {name} afterwards", value, twin[name], tolerance=1e-5)


def _step(layer: nn.Module, shape: tuple[int, ...], call: Call) -> tuple[Tensors, dict[str, Tensor]]:
    """Outputs and gradients of a step, and the state after it.

    Two regions, in which the layer is called twice between other functions, wait for one backward pass; two more
    forward passes, one of them without gradient, never get one.
    """

    def region(x: Tensor) -> Tensor:
        for _ in range(2):
            x = layer(x + 0.5 * x.sin()).tanh() * 1.5
        return x.square() + x

    inputs = [(sample(shape, seed=i) + i).requires_grad_() for i in range(3)]
    outputs = [call(region, x) for x in inputs]
    with torch.no_grad():
        layer(inputs[0])
    torch.autograd.backward(outputs[:2], [upstream(y.detach(), seed=i) for i, y in enumerate(outputs[:2])])
    results: Tensors = {f"gradient of {k}": p.grad for k, p in layer.named_parameters()}
    for i, (x, y) in enumerate(zip(inputs[:2], outputs, strict=False)):
        results |= {f"output {i}": y.detach(), f"gradient of input {i}": x.grad}
    return results, state(layer)


@promise()
def batched_gradients(subject: Subject) -> None:
    """Gradients batched by vmap (is_grads_batched, torch.vmap, jacobian's vectorize) are those taken one by one."""
    for training in MODES:
        for x in _in_each_format(subject):
            layer = subject.made().train(training)
            names, leaves = ["the input", *dict(layer.named_parameters())], [x, *layer.parameters()]
            y = layer(x)
            several = torch.stack([upstream(x.detach(), seed=i) for i in range(3)])

            def gradients(dy: Tensor, y: Tensor = y, leaves: list[Tensor] = leaves, **how: Any) -> tuple[Any, ...]:
                return torch.autograd.grad(y, leaves, dy, retain_graph=True, allow_unused=True, **how)

            one_by_one = [gradients(dy) for dy in several]
            ways = {
                "is_grads_batched=True": functools.partial(gradients, several, is_grads_batched=True),
                "torch.vmap": functools.partial(torch.vmap(gradients), several),
            }
            for way, batched in ways.items():
                text = f"{where(training, x)}, {way}"
                for name, got, *want in zip(names, _quietly(text, batched), *one_by_one, strict=True):
                    expected = None if want[0] is None else torch.stack(want)
                    agree(f"{text}: gradient of {name}", got, expected, tolerance=1e-4)
        x = sample(min(subject.shapes, key=math.prod))[:2]
        text = f"{where(training, x)}, jacobian"
        layer, twin = (subject.made().train(training) for _ in range(2))
        got = _quietly(text, functools.partial(jacobian, layer, x, vectorize=True))
        agree(f"{text}(vectorize=True)", got, jacobian(twin, x), tolerance=1e-4)


def _in_each_format(subject: Subject) -> Iterator[Tensor]:
    for shape in subject.shapes[:2]:
        yield sample(shape).requires_grad_()
        if len(shape) in LAST:
            yield sample(shape).contiguous(memory_format=LAST[len(shape)]).requires_grad_()


def _quietly(text: str, call: Callable[[], Any]) -> Any:
    """The result, without warnings that it came slowly."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call()
    except RuntimeError as error:
        raise BrokenError(f"{text}: {type(error).__name__}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")
