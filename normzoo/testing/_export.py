"""Promises to compilers and exporters."""

from __future__ import annotations

import importlib.util
import io
import os
import shutil
import warnings

import torch

from normzoo.testing._compare import BrokenError, NotApplicableError, agree
from normzoo.testing._inputs import MODES, sample, state, step, where
from normzoo.testing._promises import promise
from normzoo.testing._subject import Subject


@promise(slow=True)
def compile(subject: Subject) -> None:
    """torch.compile(fullgraph=True) gives the outputs, gradients and statistics of the layer as it is."""
    if not shutil.which(os.environ.get("CXX", "c++")) and not shutil.which("g++") and not shutil.which("clang++"):
        raise NotApplicableError("torch.compile needs a C++ compiler, and none is installed")
    x = sample(subject.shape)
    for training in MODES:
        torch.compiler.reset()
        layer, twin = (subject.made().train(training) for _ in range(2))
        compiled = torch.compile(layer, fullgraph=True)
        text = f"{where(training, x)}, compiled"
        for i in range(2):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    got = step(layer, x + i, call=compiled, seed=i)
            except Exception as error:
                raise BrokenError(f"{text}: {_first_lines(error)}") from error
            want = step(twin, x + i, seed=i)
            for name, value in got.items():
                agree(f"{text}, step {i}: {name}", value, want[name], tolerance=1e-4)
            held = state(twin)
            for name, value in state(layer).items():
                agree(f"{text}, step {i}: {name} afterwards", value, held[name], tolerance=1e-4)
    torch.compiler.reset()


@promise(slow=True)
def export(subject: Subject) -> None:
    """torch.export gives a program with the outputs and statistics of the layer, training and evaluating."""
    x = sample(subject.shape)
    for training in MODES:
        layer, twin = (subject.made().train(training) for _ in range(2))
        text = f"{where(training, x)}, exported"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                program = torch.export.export(layer, (x,), strict=False).module()
        except Exception as error:
            raise BrokenError(f"{text}: {_first_lines(error)}") from error
        for i in range(2):
            with torch.no_grad():
                agree(f"{text}, step {i}: output", program(x + i), twin(x + i), tolerance=1e-5)
        exported = state(program)
        for name, value in state(twin).items():
            agree(f"{text}: {name} afterwards", exported.get(name), value, tolerance=1e-5)


@promise(slow=True)
def export_dynamic(subject: Subject) -> None:
    """torch.export with a dynamic batch size gives one program with the layer's outputs and statistics."""
    size = torch.export.Dim("size", min=2, max=64)
    x, other = sample((4, *subject.shape[1:])), sample((7, *subject.shape[1:]), seed=1)
    for training in MODES:
        layer, twin = (subject.made().train(training) for _ in range(2))
        text = f"{where(training, x)}, exported with a dynamic batch size"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exported = torch.export.export(layer, (x,), dynamic_shapes=({0: size},), strict=False)
            program = exported.module()
        except Exception as error:
            raise BrokenError(f"{text}: {_first_lines(error)}") from error
        with torch.no_grad():
            agree(f"{text}, batch of {len(other)}: output", program(other), twin(other), tolerance=1e-5)
        held = state(program)
        for name, value in state(twin).items():
            agree(f"{text}, batch of {len(other)}: {name} afterwards", held.get(name), value, tolerance=1e-5)


@promise(slow=True)
def onnx(subject: Subject) -> None:
    """In evaluation the layer exports to ONNX, and ONNX Runtime gives its output."""
    missing = [m for m in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(m) is None]
    if missing:
        raise NotApplicableError(f"{' and '.join(missing)} not installed")
    import onnxruntime  # type: ignore[import-untyped,unused-ignore]

    layer, x = subject.made().eval(), sample(subject.shape)
    text = f"{where(False, x)}, ONNX"
    stream = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(layer, (x,), dynamo=True, verbose=False)
            if program is None:
                raise BrokenError(f"{text}: torch.onnx.export returned nothing")
            stream.write(program.model_proto.SerializeToString())
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(stream.getvalue(), options, providers=["CPUExecutionProvider"])
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    except BrokenError:
        raise
    except Exception as error:
        raise BrokenError(f"{text}: {_first_lines(error)}") from error
    with torch.no_grad():
        agree(f"{text}: output", torch.from_numpy(y), layer(x), tolerance=1e-4)


def _first_lines(error: BaseException, count: int = 8) -> str:
    """The error at the root: exporters wrap what went wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: " + " | ".join(line for line in str(error).splitlines()[:count] if line.strip())
