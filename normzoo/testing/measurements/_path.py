"""The promises about the path of a step: nothing waits for the device, and a step that is not sampled costs nothing."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from normzoo.callbacks.measurement import Measurement
from normzoo.testing._compare import BrokenError
from normzoo.testing._promises import promise
from normzoo.testing.measurements._fits import Fit, OnSteps, Subject
from normzoo.testing.measurements._task import ACCUMULATION

READING = frozenset({"_local_scalar_dense", "equal", "is_nonzero"})  # operations whose result is on the host
METHODS = ("cpu", "tolist", "item")  # not all of which are dispatched for a tensor on the CPU
HOOKS = (
    *("on_train_batch_start", "on_before_backward", "on_after_backward", "on_before_optimizer_step"),
    *("on_train_batch_end", "activation", "gradient", "measure_applied", "measure_update"),
)
SELDOM = (0, 5)  # steps that are sampled
QUIET = (2, 3, 4, 7)  # steps in which nothing is measured, nor anything of the step before read


@promise()
def no_host_read(subject: Subject) -> None:
    """From the second sample on, nothing in a step reads a value on the host; rows are made in a later batch."""
    subject.rows(_path_fit(subject)[0])
    path = _path_fit(subject)[1]
    if path.early:
        raise BrokenError(f"rows of step {path.early[0]} are made in the batch in which it was measured")
    if path.reads:
        places = ", ".join(f"{what} ({times} times)" for what, times in path.reads.most_common(3))
        raise BrokenError(f"values are read on the host on the path of a step: {places}")


@promise()
def cost(subject: Subject) -> None:
    """Steps that are not sampled have the operations and hooks of a run without it; others have no hook not needed."""
    without = subject.once("operations without", lambda: _seldom_fit(subject, measured=False))
    seldom = subject.once("operations", lambda: _seldom_fit(subject, measured=True))
    subject.rows(seldom[0])
    for step in QUIET:
        for batch in range(step * ACCUMULATION, (step + 1) * ACCUMULATION):
            more = seldom[1].operations[batch] - without[1].operations[batch]
            if more:
                names = ", ".join(f"{name} ({times} times)" for name, times in more.most_common(4))
                raise BrokenError(f"micro-batch {batch}, of a step that is not sampled, has more operations: {names}")
            _check_hooks(seldom[0], without[0], batch, "of a step that is not sampled,", ())
    needs = subject.base[0].needs
    allowed = (
        *(("forward_pre hooks of modules", "forward hooks of modules") if "activations" in needs else ()),
        *(("hooks of parameters",) if "backward" in needs else ()),
        *(("pre-step hooks",) if "applied" in needs else ()),
        "post-step hooks",  # which a measurement may decide in each step
    )
    fitted = subject.base[1]
    for batch in range(len(fitted.module.notes.hooks)):
        _check_hooks(fitted, without[0], batch, f"with the needs {sorted(needs)}", allowed)


def _check_hooks(fitted: Fit, without: Fit, batch: int, when: str, allowed: tuple[str, ...]) -> None:
    here, there = (of.module.notes.hooks[batch] for of in (fitted, without))
    for name, count in here.items():
        if count > there.get(name, 0) and name not in allowed:
            raise BrokenError(f"micro-batch {batch}, {when} has {count} {name}, without it {there.get(name, 0)}")


class Operations(pl.Callback, TorchDispatchMode):
    """Counts the operations that are dispatched from the start of each micro-batch to that of the next."""

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.operations: list[Counter[str]] = [Counter()]

    def on_train_batch_start(self, *_: Any) -> None:
        """A micro-batch begins."""
        self.operations.append(Counter())

    def on_train_start(self, *_: Any) -> None:
        """What comes before the first micro-batch is not counted."""
        self.operations = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, and do it."""
        if self.operations:
            self.operations[-1][str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


class Path(pl.Callback, TorchDispatchMode):
    """Notes what is read on the host in the hooks of a measurement, and when its rows are made.

    On a GPU an operation that waits is an error there. On a CPU the operations and methods stand in that would wait on
    a GPU; ``Tensor.numpy``, which would fail there, is left to what is written for CPUs.

    Args:
        measurement: whose methods are wrapped.
        on_gpu: whether it measures there.

    Attributes:
        reads: how often values are read, by the operation and the place.
        early: steps whose rows were made in the micro-batch in which they were measured.
    """

    def __init__(self, measurement: Measurement, on_gpu: bool = False) -> None:
        TorchDispatchMode.__init__(self)
        self.reads: Counter[str] = Counter()
        self.early: list[int] = []
        self._on_gpu = on_gpu
        self._depth = self._reading = 0
        self._batch, self._ended = 0, False
        self._sent: list[int] = []  # the micro-batches in which samples were sent that are to be read
        self._samples = 0
        for name in HOOKS:
            self._wrap(measurement, name, self._on_path)
        self._wrap(measurement, "flush", self._in_flush)
        self._wrap(measurement, "send", self._in_send)
        self._wrap(measurement, "rows", self._in_rows)

    def on_train_batch_start(self, *_: Any) -> None:
        """A micro-batch begins."""
        self._batch += 1

    def on_train_end(self, *_: Any) -> None:
        """What was measured last is read now."""
        self._ended = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note what reads, and do it."""
        name = func.overloadpacket.__name__
        if name in READING:
            self._note(name)
        return func(*args, **(kwargs or {}))

    def _note(self, name: str) -> None:
        if self._depth and not self._reading and self._samples > 1 and not self._on_gpu:
            self.reads[f"{name} at {_caller()}"] += 1

    @contextlib.contextmanager
    def methods(self) -> Iterator[None]:
        """In which the methods of tensors that read values are noted."""
        with contextlib.ExitStack() as stack:
            for name in METHODS:
                original = getattr(torch.Tensor, name)

                def method(tensor: Any, *args: Any, _name: str = name, _do: Any = original, **kwargs: Any) -> Any:
                    self._note(f".{_name}()")
                    return _do(tensor, *args, **kwargs)

                stack.enter_context(mock.patch.object(torch.Tensor, name, method))
            yield

    @staticmethod
    def _wrap(measurement: Measurement, name: str, around: Callable[..., Any]) -> None:
        original = getattr(measurement, name)
        setattr(measurement, name, lambda *args, **kwargs: around(original, *args, **kwargs))

    def _on_path(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        self._depth += 1
        try:
            with self._cuda("error" if self._samples > 1 and not self._reading else "default"):
                return original(*args, **kwargs)
        finally:
            self._depth -= 1

    def _in_flush(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        self._reading += 1
        try:
            with self._cuda("default"):
                return original(*args, **kwargs)
        finally:
            self._reading -= 1

    @contextlib.contextmanager
    def _cuda(self, mode: str) -> Iterator[None]:
        """In which an operation that waits for the GPU is an error, or is not."""
        if not self._on_gpu:
            yield
            return
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def _in_send(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        self._samples += 1
        self._sent.append(self._batch)
        return original(*args, **kwargs)

    def _in_rows(self, original: Any, sample: Any, values: Any) -> Any:
        if self._sent.pop(0) == self._batch and not self._ended:
            self.early.append(sample.step)
        return original(sample, values)


def _path_fit(subject: Subject) -> tuple[Fit, Path]:
    def make() -> tuple[Fit, Path]:
        measurement = subject.make()
        on_gpu = torch.cuda.is_available()
        path, accelerator = Path(measurement, on_gpu), "gpu" if on_gpu else "cpu"
        with path.methods(), path:
            return subject.fit(measurement, callbacks=[path], epochs=1, accelerator=accelerator), path

    return subject.once("path", make)


def _seldom_fit(subject: Subject, measured: bool) -> tuple[Fit, Operations]:
    operations = Operations()
    with operations:
        measurements = [subject.make(OnSteps(*SELDOM))] if measured else []
        return subject.fit(*measurements, callbacks=[operations]), operations


def _caller() -> str:
    """The innermost frame that is neither of torch nor of this file."""
    frame: Any = sys._getframe(2)
    while frame is not None and (frame.f_code.co_filename == __file__ or "/torch/" in frame.f_code.co_filename):
        frame = frame.f_back
    return "?" if frame is None else f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}"
