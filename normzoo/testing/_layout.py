"""Promises about shapes and memory: ranks, channel axis, memory format, edges, refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from normzoo._shapes import HALF
from normzoo.testing._compare import BrokenError, agree, describe, finite
from normzoo.testing._inputs import LAST, MANY, MODES, sample, shape_of_rank, small_shapes, state, step, where
from normzoo.testing._promises import promise
from normzoo.testing._subject import Subject


@promise()
def ranks(subject: Subject) -> None:
    """Input of 2 to 5 dimensions gives finite output of its shape and dtype, or a ValueError that names the shape."""
    taken = 0
    for training in MODES:
        for rank in (2, 3, 4, 5):
            x = sample(shape_of_rank(rank, subject.num_features))
            y = _output_or_refusal(subject.made().train(training), x)
            if y is None:
                continue
            taken += 1
            text = where(training, x)
            if y.shape != x.shape or y.dtype != x.dtype:
                raise BrokenError(f"{text}: the output is {describe(y)}")
            finite(f"{text}: output", y)
    if not taken:
        raise BrokenError(f"inputs of 2 to 5 dimensions and {subject.num_features} channels were all refused")


def _output_or_refusal(layer: nn.Module, x: Tensor) -> Tensor | None:
    """The output, or None if the input was refused as it must be."""
    text = f"{where(layer.training, x)}"
    try:
        return layer(x)
    except ValueError as error:
        if str(tuple(x.shape)) not in str(error):
            raise BrokenError(f"{text}: the ValueError does not name the shape: {error}") from error
        return None
    except Exception as error:
        raise BrokenError(f"{text}: {type(error).__name__}, not a ValueError that names the shape: {error}") from error


@promise()
def channel_dim(subject: Subject) -> None:
    """channel_dim=-1 on (N, ..., C) is channel_dim=1 on the transpose: outputs, gradients, statistics."""
    subject.need_option("channel_dim")
    for training in MODES:
        for shape in subject.of_ranks(3, 4, 5):
            first, last = (subject.made(channel_dim=d).train(training) for d in (1, -1))
            x = sample(shape)
            text = f"{where(training, x.movedim(1, -1).contiguous())}, channel_dim=-1"
            want = step(first, x)
            got = step(last, x, call=_transposed(last))
            for name, gradient in got.items():
                agree(f"{text}: {name}, transposed", gradient, want[name], tolerance=1e-4)
            held = state(first)
            for name, value in state(last).items():
                agree(f"{text}: {name} afterwards", value, held[name], tolerance=1e-5)


def _transposed(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: layer(x.movedim(1, -1).contiguous()).movedim(-1, 1)


@promise()
def memory_format(subject: Subject) -> None:
    """Memory format in, memory format out, with equal values: contiguous, channels_last, channels_last_3d."""
    for training in MODES:
        for shape in subject.shapes:
            x = sample(shape)
            want = step(subject.made().train(training), x)
            _laid_out(f"{where(training, x)}", want["output"], torch.contiguous_format)
            if len(shape) in LAST:
                last = x.contiguous(memory_format=LAST[len(shape)])
                text = where(training, last)
                got = step(subject.made().train(training), last)
                _laid_out(text, got["output"], LAST[len(shape)])
                for name, value in got.items():
                    agree(f"{text}: {name}", value, want[name], tolerance=1e-5 if name == "output" else 1e-4)
                _other_dtypes(subject, shape, training)
            if len(shape) > 2 and "channel_dim" in subject.parameters:
                moved = x.movedim(1, -1).contiguous()
                y = subject.made(channel_dim=-1).train(training)(moved)
                _laid_out(f"{where(training, moved)}, channel_dim=-1", y, torch.contiguous_format)


def _other_dtypes(subject: Subject, shape: tuple[int, ...], training: bool) -> None:
    """Layers may compute half precision and float64 in other ways."""
    for dtype in (torch.float64, *HALF):
        x = sample(shape, dtype)
        last = x.contiguous(memory_format=LAST[len(shape)])
        with torch.no_grad():
            want, got = (subject.made().train(training)(v) for v in (x, last))
        _laid_out(where(training, x), want, torch.contiguous_format)
        _laid_out(where(training, last), got, LAST[len(shape)])
        agree(f"{where(training, last)}: output", got, want, tolerance=max(2 * torch.finfo(dtype).eps, 1e-5))


def _laid_out(text: str, y: Tensor | None, form: torch.memory_format) -> None:
    if y is None or not y.is_contiguous(memory_format=form):
        name = "contiguous" if form is torch.contiguous_format else str(form).removeprefix("torch.")
        raise BrokenError(f"{text}: the output is not {name}: strides {None if y is None else y.stride()}")


@promise()
def degenerate(subject: Subject) -> None:
    """One sample, one pixel, constant input: finite results, or a ValueError that names the shape; no trace is left."""
    c = subject.num_features
    ranks_taken = {len(shape) for shape in subject.shapes}
    for training in MODES:
        for shape in (*small_shapes(c), (3, c, 4, 3), (4, c)):
            if len(shape) not in ranks_taken:
                continue
            alike = shape in ((3, c, 4, 3), (4, c))
            x = torch.full(shape, 2.5) if alike else sample(shape)
            layer = subject.made().train(training)
            before = state(layer)
            text = where(training, x) + (", all values 2.5" if alike else "")
            if _output_or_refusal(layer, x) is None:
                for name, value in state(layer).items():
                    agree(f"{text}, refused: {name} afterwards", value, before[name])
                continue
            for name, gradient in step(subject.made().train(training), x).items():
                finite(f"{text}: {name}", gradient)
            for name, value in state(layer).items():
                finite(f"{text}: {name} afterwards", value)


@promise()
def one_value(subject: Subject) -> None:
    """Training on one value for each channel is refused, or gives gradients and leaves usable statistics."""
    taken = min(subject.shapes, key=len)
    shape, ordinary = (1, subject.num_features, *[1] * (len(taken) - 2)), sample((MANY, *taken[1:]))
    layer = subject.make().train()
    for i in range(20):
        layer(sample(ordinary.shape, seed=i))
    before = layer.eval()(ordinary).abs().max()
    text = where(True, torch.empty(shape))
    for i in range(100):
        if _output_or_refusal(layer.train(), sample(shape, seed=i)) is None:
            return
    of_inputs = [step(copy.deepcopy(layer), sample(shape, seed=i))["gradient of the input"] for i in range(3)]
    if not any(g is not None and g.any() for g in of_inputs):
        raise BrokenError(f"{text}: the gradient of the input is 0")
    after = layer.eval()(ordinary).abs().max()
    if not after <= 10 * before:
        change = f"the largest output of evaluation went from {before:.3g} to {after:.3g}"
        raise BrokenError(f"{text}, a hundred times: {change}")


@promise()
def empty(subject: Subject) -> None:
    """An empty batch or map keeps its shape, gives every parameter a gradient of zero and changes no statistic."""
    c = subject.num_features
    ranks_taken = {len(shape) for shape in subject.shapes}
    for training in MODES:
        for shape in ((0, c), (0, c, 4, 4), (2, c, 0, 3)):
            if len(shape) not in ranks_taken:
                continue
            layer, x = subject.made().train(training), torch.zeros(shape)
            before, text = state(layer), where(training, x)
            try:
                got = step(layer, x)
            except BrokenError:
                raise
            except Exception as error:
                raise BrokenError(f"{text}: {type(error).__name__}: {error}") from error
            for name, p in layer.named_parameters():
                if p.requires_grad:
                    agree(f"{text}: gradient of {name}", got[f"gradient of {name}"], torch.zeros_like(p))
            for name, value in state(layer).items():
                agree(f"{text}: {name} afterwards", value, before[name])


@promise()
def bad_input(subject: Subject) -> None:
    """A wrong number of channels, integers and a vector are refused by a ValueError that has the shape or dtype."""
    c = subject.num_features
    wrong = [torch.zeros((shape[0], c + 1, *shape[2:])) for shape in subject.shapes]
    for training in MODES:
        layer = subject.made().train(training)
        before = state(layer)
        for x in [*wrong, torch.zeros(c), torch.zeros(())]:
            _refused(layer, x, str(tuple(x.shape)))
        _refused(layer, torch.zeros(subject.shape, dtype=torch.int64), "int64")
        for name, value in state(layer).items():
            agree(f"{where(training, wrong[0])}, refused: {name} afterwards", value, before[name])
        if "channel_dim" in subject.parameters:
            last = subject.made(channel_dim=-1).train(training)
            for shape in subject.shapes:
                if len(shape) > 2:
                    x = torch.zeros((*shape[:-1], c + 1))
                    _refused(last, x, str(tuple(x.shape)))


def _refused(layer: nn.Module, x: Tensor, named: str) -> None:
    text = where(layer.training, x)
    try:
        y = layer(x)
    except ValueError as error:
        if named not in str(error):
            raise BrokenError(f"{text}: the ValueError does not have {named}: {error}") from error
    except Exception as error:
        raise BrokenError(f"{text}: {type(error).__name__}, not a ValueError that has {named}: {error}") from error
    else:
        raise BrokenError(f"{text}: accepted, the output is {describe(y)}")
