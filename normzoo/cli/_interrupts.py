"""Signals that ask a run to end: the first one ends it after the current batch, the second one at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer

from normzoo.callbacks._run.ranks import Reading
from normzoo.cli._safe_points import SafePoints

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interrupted(SystemExit):
    """Training ends because the process received a signal; launchers of processes take it for an exit, not a crash."""


class Interrupts:
    """The signals this process has received since :func:`listening` began.

    A thread of its own reads them, because a handler in Python would have to wait while the main thread is inside a
    long call, such as a collective that waits for a rank that is gone.

    Attributes:
        received: the first signal, or None.
        before_exit: called with the first signal before the second signal ends the process.
        to_children: sends a signal to the processes of other ranks that this process has started, or None.
    """

    def __init__(self, child: bool = False) -> None:
        """With ``child`` a second signal does nothing, because the parent process sends on what it receives."""
        self.received: signal.Signals | None = None
        self.before_exit: Callable[[signal.Signals], None] | None = None
        self.to_children: Callable[[int], None] | None = None
        self._child = child
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._handlers: dict[signal.Signals, Any] = {}
        self._wakeup = -1
        self._thread = threading.Thread(target=self._read, name="normzoo-interrupts", daemon=True)

    @property
    def exit_code(self) -> int:
        """128 and the number of the signal, as shells have it; 0 if there was none."""
        return 0 if self.received is None else 128 + self.received

    def start(self) -> None:
        """Take the place of the handlers of signals that are not ignored."""
        self._wakeup = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if handler != signal.SIG_IGN:  # under nohup, or in a background job of a shell
                self._handlers[number] = handler
        self.take_handlers()
        self._thread.start()

    def take_handlers(self) -> None:
        """Install the handlers, again if something else has installed its own since."""
        for number in self._handlers:
            signal.signal(number, _ignore)

    def stop(self) -> None:
        """Stop listening, and put back what was there before :meth:`start`."""
        self.put_back()
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._write_end)
        self._thread.join()
        os.close(self._read_end)

    def put_back(self, but: signal.Signals | None = None) -> None:
        """Install the handlers that were there before :meth:`start`."""
        for number, handler in self._handlers.items():
            if number != but:
                signal.signal(number, handler)

    def _read(self) -> None:
        while data := os.read(self._read_end, 1):
            if data[0] in self._handlers:
                self._act(signal.Signals(data[0]))

    def _act(self, number: signal.Signals) -> None:
        if self.received is None:
            self.received = number
            if number == getattr(signal, "SIGHUP", None):  # the terminal is gone; writing to it would fail
                sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            if not self._child:
                _tell(f"{number.name}: the run ends after the current batch; a second signal ends it at once")
            if self.to_children is not None:
                self.to_children(number)
        elif not self._child:
            try:
                if self.before_exit is not None:
                    self.before_exit(self.received)
                if self.to_children is not None:
                    self.to_children(signal.SIGKILL)
            finally:
                _tell(f"{number.name}: the run was ended at once")
                os._exit(self.exit_code)


_current: Interrupts | None = None


@contextlib.contextmanager
def listening(child: bool = False) -> Iterator[Interrupts]:
    """Note signals, instead of raising an exception wherever the process happens to be; nested, it is one object.

    In a thread that is not the main one nothing is noted, since Python gives signals to the main thread only.
    """
    global _current
    if _current is not None or not _in_main_thread():
        yield _current or Interrupts()
        return
    _current = Interrupts(child)
    _current.start()
    try:
        yield _current
    finally:
        _current.stop()
        _current = None


class StopOnSignal(Callback):
    """Ends ``fit`` after the batch in which a signal came, on all ranks after the same batch; the first of callbacks.

    Where gradients are accumulated it is the last batch of a step. A validation that runs is ended at once.

    Args:
        points: saves ``interrupted.ckpt``; None for no checkpoint.
    """

    def __init__(self, points: SafePoints | None = None) -> None:
        self._points = points
        self._pending: Reading | None = None
        self._stopping = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listen in a process that a launcher has started."""
        global _current
        if _current is None and _in_main_thread():
            _current = Interrupts(child=True)
            _current.start()
        self._pending, self._stopping = None, False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave before the first batch; several ranks may not have received the signal yet, and train on."""
        self._leave_if(_received() and trainer.world_size == 1)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the handlers back from Lightning."""
        self._take_handlers(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the handlers back from Lightning."""
        self._take_handlers(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Leave, now that the metrics of the last batch have been logged."""
        if self._stopping and SafePoints.is_between_steps(trainer, batch_idx):
            self._leave(trainer, "batch")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Decide whether this was the last batch; with several ranks the decision of the batch before."""
        if trainer.world_size == 1:
            stopping = _received()
        else:
            pending, here = self._pending, torch.tensor(float(_received()), device=pl_module.device)
            self._pending = Reading(here, "max")
            stopping = pending is not None and bool(pending.read())
        self._stopping |= stopping
        if self._stopping and self._points is not None:
            self._points.ask(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave after the last batch of the epoch before, if no validation came; a last epoch ends as ever."""
        if self._stopping:
            self._leave(trainer, "epoch")

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Leave in place of the next batch; with several ranks only if training ended before."""
        if self._stopping or (_received() and trainer.world_size == 1):
            self._leave(trainer, "" if trainer.sanity_checking else "validation")

    def _leave(self, trainer: Trainer, point: str) -> None:
        if self._points is not None and point:
            self._points.save_interrupted(trainer, point)
        self._leave_if(True)

    def _leave_if(self, condition: bool) -> None:
        if condition:
            raise Interrupted(_current.exit_code if _current is not None else 1)

    def _take_handlers(self, trainer: Trainer) -> None:
        environment = getattr(trainer.strategy, "cluster_environment", None)
        requeues = isinstance(environment, SLURMEnvironment) and environment.auto_requeue
        if _current is not None and not requeues:
            _current.take_handlers()


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _received() -> bool:
    return _current is not None and _current.received is not None


def _ignore(number: int, frame: object) -> None:
    """A handler that only lets Python write the signal's number to the pipe."""


def _tell(message: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # a terminal that is gone, or a closed stream
        print(f"\nnormzoo: {message}", file=sys.stderr, flush=True)


def _forget_in_child() -> None:
    """Keep a forked process, such as a worker that loads data, from writing to its parent's pipe.

    A worker goes on ignoring Ctrl-C, which a terminal sends to all processes, as the parent needs it to the end.
    """
    global _current
    if _current is not None:
        signal.set_wakeup_fd(-1)
        _current.put_back(but=signal.SIGINT)
        _current = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
