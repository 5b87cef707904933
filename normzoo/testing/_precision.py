"""Promises about precision narrower than float32."""

from __future__ import annotations

import torch
from torch import nn

from normzoo._shapes import HALF
from normzoo.testing._compare import BrokenError, agree, describe, finite
from normzoo.testing._inputs import MODES, sample, state, step, where
from normzoo.testing._promises import promise
from normzoo.testing._subject import Subject


def _of(subject: Subject, dtype: torch.dtype) -> nn.Module:
    """The layer made with a dtype if it has that option; it is not cast to it."""
    return subject.made(**({"dtype": dtype} if "dtype" in subject.parameters else {}))


@promise()
def half_precision(subject: Subject) -> None:
    """Half precision gives its own dtype and float32's values up to rounding; parameters and statistics are float32."""
    for dtype in HALF:
        eps = torch.finfo(dtype).eps
        for training in MODES:
            for shape in subject.shapes[:2]:
                half, single = (_of(subject, d).train(training) for d in (dtype, torch.float32))
                x = sample(shape, dtype)
                text = where(training, x)
                for name, value in state(half).items():
                    if value.dtype in HALF:
                        raise BrokenError(f"{name} of a layer made with dtype={dtype} is {value.dtype}")
                got, want = step(half, x), step(single, x.float())
                y = got["output"]
                if y is None or y.dtype != dtype:
                    raise BrokenError(f"{text}: the output is {describe(y) if y is not None else None}")
                for name, gradient in got.items():
                    finite(f"{text}: {name}", gradient)
                    loose = 2 if name == "output" else 16
                    agree(f"{text}: {name}, against float32", gradient, want[name], tolerance=loose * eps)
                half, single = (_of(subject, d).train(training) for d in (dtype, torch.float32))
                with torch.no_grad():  # some layers move statistics in backward, by rounded gradients
                    half(x)
                    single(x.float())
                held = state(single)
                for name, value in state(half).items():
                    agree(f"{text}: {name} afterwards, against float32", value, held[name], tolerance=1e-5)


@promise()
def mixed_precision(subject: Subject) -> None:
    """A float32 layer takes float64 input and vice versa; the output has the input's dtype, the state keeps its own."""
    for of_layer, of_x in ((torch.float32, torch.float64), (torch.float64, torch.float32)):
        for training in MODES:
            for shape in subject.shapes[:2]:
                layer, wide = (subject.made(dtype=d).train(training) for d in (of_layer, torch.float64))
                before, x = state(layer), sample(shape, of_x)
                text = f"{where(training, x)}, {str(of_layer).removeprefix('torch.')} layer"
                got, want, held = step(layer, x), step(wide, x.double()), state(wide)
                y = got["output"]
                if y is None or y.dtype != of_x:
                    raise BrokenError(f"{text}: the output is {describe(y) if y is not None else None}")
                for name, value in got.items():
                    agree(f"{text}: {name}, against float64", value, want[name], tolerance=1e-4)
                for name, value in state(layer).items():
                    if value.dtype != before[name].dtype:
                        raise BrokenError(f"{text}: {name} became {value.dtype}")
                    agree(f"{text}: {name} afterwards, against float64", value, held[name], tolerance=1e-5)


@promise()
def autocast(subject: Subject) -> None:
    """Under bfloat16 autocast outputs are as without it but for rounding, gradients finite, statistics float32."""
    for training in MODES:
        for dtype in (torch.float32, torch.bfloat16):
            layer, plain = (subject.made().train(training) for _ in range(2))
            x = sample(subject.shape, dtype).requires_grad_()
            text = f"{where(training, x)}, autocast to bfloat16"
            with torch.autocast("cpu", torch.bfloat16):
                y = layer(x)
            y.float().square().sum().backward()
            finite(f"{text}: output", y)
            finite(f"{text}: gradient of the input", x.grad)
            for name, p in layer.named_parameters():
                finite(f"{text}: gradient of {name}", p.grad)
            agree(f"{text}: output, against float32", y.float(), plain(x.detach().float()), tolerance=2**-6)
            narrow = [k for k, v in state(layer).items() if v.dtype in HALF]
            if narrow:
                raise BrokenError(f"{text}: {', '.join(narrow)} became half precision")
