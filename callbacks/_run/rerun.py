"""Steps of a run made again in place, and measured."""

from __future__ import annotations

import copy
import itertools
import math
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from normzoo.callbacks._run.batches import HostTensor
from normzoo.callbacks._run.facts import Run, rank_and_ranks
from normzoo.callbacks._run.frames import (
    Frame,
    MicroBatch,
    beside_the_module,
    hooks_of_optimizers,
    leaves_with_gradients,
    snapshot_of,
)
from normzoo.callbacks._run.gradients import local_values
from normzoo.callbacks._run.isolation import HostCopies, Snapshot, isolated
from normzoo.callbacks._run.record import LateRecord
from normzoo.callbacks._run.streams import set_random_streams
from normzoo.callbacks.parameter_norms import ParameterNorms
from normzoo.callbacks.schedule import Every, Schedule, Warmup

PATIENCE = 10.0  # seconds that ranks wait for each other, to write a capsule or to fail alike
_FAILURES = itertools.count()  # of steps made again, of all runs of this process


class Rerun:
    """The steps of some frames, made again in place and measured, after which the run is as before.

    Args:
        run: whose steps they are.
        folder: of the capsule, into whose ``records`` the measurements write.
        frames: of which the first has a snapshot.
        seconds: after which no further step is made.
        asked_by: the variable that asked for the callback whose capsule it is; one of the script has the steps measured
            by those of the script alone.
    """

    def __init__(self, run: Run, folder: Path, frames: Sequence[Frame], seconds: float, asked_by: str = "") -> None:
        self.run, self.folder, self.frames, self.seconds = run, folder, frames, seconds
        self.measurements = [m for m in run.measurements if m.steps_again and (asked_by or not m.asked_by)]
        self.losses: list[float] = []
        self.difference: int | None = None

    def make(self) -> dict[str, Any]:
        """Make the steps; what came of it, for the manifest.

        Raises:
            Exception: what a step has raised on some ranks and not on others, which wait for them in the step.
        """
        run, started = self.run, time.monotonic()
        for measurement in run.measurements:
            measurement._events.flush(run)
        measuring: list[Any] = []
        host = HostCopies()
        gradients = [(p.grad, host.copy(p.grad)) for p in leaves_with_gradients(run) if p.grad is not None]
        present = Snapshot(run.module, beside_the_module(run), copies=host, apart=hooks_of_optimizers(run))
        last, why = self.frames[0].step, ""
        try:
            copies = {id(m): self._copied(m) for m in self.measurements}
            more = self._more(copies.values())
            measuring = [*copies.values(), *more]
            snapshot_of(self.frames[0]).restore(run)
            with isolated(present, run), run.steps_again(copies, more, last) as train_on:
                last = self._steps(measuring, train_on, started)
        except Exception as error:  # of the user's code or of the machine: the run itself has no part in it
            if not all_come_here(run):
                raise
            why = f"{type(error).__name__}: {error_text(error)}"
        finally:
            for measurement in measuring:
                measurement.abandon()
            present.restore()
            for gradient, values in gradients:
                local_values(gradient.detach()).copy_(values)
        why = why or self._write_records(measuring)
        whys, differences, losses = zip(*of_all_ranks((why, self.difference, self.losses), run), strict=True)
        return {
            "from": self.frames[0].step,
            "to": last,
            "losses": [list(of_ranks) for of_ranks in zip(*losses, strict=False)],
            "first_difference": min((step for step in differences if step is not None), default=None),
            "seconds": time.monotonic() - started,
            "why_not": next(filter(None, whys), ""),
        }

    def _steps(self, measuring: Sequence[Any], train_on: Any, started: float) -> int:
        run = self.run
        for measurement in measuring:
            measurement.forget()
            measurement.prepare(run)
            measurement._record = LateRecord(run, measurement.schema, measurement.dirpath, measurement.label, "")
        for measurement in measuring:
            measurement.begin(run)
        for frame in self.frames:
            for optimizer, groups in zip(run.optimizers, frame.hyperparameters, strict=True):
                for group, values in zip(optimizer.param_groups, groups, strict=True):
                    group.update(values)
            for micro in frame.micro_batches:
                set_random_streams(micro.streams, run.device)
                loss = train_on(frame.step, micro.place, apply_to_collection(micro.batch, HostTensor, HostTensor.back))
                self._compare(frame.step, micro, loss)
            if any(of_all_ranks(time.monotonic() - started > self.seconds, run)):
                break
        for measurement in measuring:
            measurement.end(run)
        return frame.step

    def _write_records(self, measuring: Sequence[Any]) -> str:
        """Write what was measured, all or nothing; why it could not be written, or nothing."""
        try:
            for measurement in measuring:
                measurement._record.write()
        except OSError as error:
            shutil.rmtree(self.folder / "records", ignore_errors=True)
            return f"the records could not be written: {error_text(error)}"
        return ""

    def _compare(self, step: int, micro: MicroBatch, loss: Tensor | None) -> None:
        value = math.nan if loss is None else float(loss)
        self.losses.append(value)
        before = micro.losses[rank_and_ranks()[0]] if micro.losses else None
        if before is None or self.difference is not None or (math.isnan(value) and math.isnan(before)):
            return  # the bits of a NaN depend on the dtypes that it went through
        if np.float32(value).tobytes() != np.float32(before).tobytes():
            self.difference = step

    def _copied(self, measurement: Any) -> Any:
        """A copy that samples each step, or the last two if its samples take passes of their own."""
        try:
            copied = copy.deepcopy(measurement)
        except TypeError as error:  # as of a lock
            raise TypeError(f"{type(measurement).__name__} cannot be copied: {error}") from error
        each: Schedule = Every(1)
        if "extra_pass" in copied.needs:
            each = Warmup(max(self.frames[-1].step - 1, 0))
        copied.reschedule(each)
        apart = "" if copied.label is not None else measurement._prefix(self.run)
        copied.dirpath = str(self.folder / "records" / apart)
        return copied

    def _more(self, copies: Iterable[Any]) -> list[Any]:
        """The norms of each parameter, which are measured in any case."""
        records = str(self.folder / "records")
        own = any(type(m) is ParameterNorms and (m.label, m.dirpath) == (None, records) for m in copies)
        return [] if own else [ParameterNorms(1, dirpath=records)]


def all_come_here(run: Run) -> bool:
    """Whether all ranks have come here within some seconds: without a collective, which others may wait in."""
    if run.ranks == 1:
        return True
    store, key = torch.distributed.distributed_c10d._get_default_store(), f"normzoo/failed/{next(_FAILURES)}"
    deadline = time.monotonic() + PATIENCE
    count = store.add(key, 1)
    while count < run.ranks and time.monotonic() < deadline:
        time.sleep(0.01)
        count = store.add(key, 0)
    return count >= run.ranks


def error_text(error: BaseException) -> str:
    """An error for people, without its class."""
    return getattr(error, "strerror", None) or str(error)


def of_all_ranks(value: Any, run: Run) -> Iterator[Any]:
    """The values of all ranks, which must ask together."""
    ranks = run.ranks
    if ranks == 1:
        return iter([value])
    values: list[Any] = [None] * ranks
    torch.distributed.all_gather_object(values, value)
    return iter(values)
