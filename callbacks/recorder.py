"""What is kept of the last steps of a run, so that a divergence can be explained: a ring of steps, and snapshots."""

from __future__ import annotations

import copy
import itertools
import math
import re
import shutil
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn  # type: ignore[attr-defined]
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from normzoo.callbacks._run.facts import Run, plain_name, rank_and_ranks
from normzoo.callbacks._run.gradients import local_values
from normzoo.callbacks._run.isolation import HostCopies, Snapshot, isolated
from normzoo.callbacks._run.memory import available_memory, ranks_of_this_machine, size_text
from normzoo.callbacks._run.ranks import Reading, is_sharded
from normzoo.callbacks._run.record import LateRecord, of_rank_zero
from normzoo.callbacks._run.streams import random_streams, set_random_streams
from normzoo.callbacks.parameter_norms import ParameterNorms
from normzoo.callbacks.sample_ids import RecordingBatchSampler
from normzoo.callbacks.schedule import Every, Schedule, Warmup, is_number, is_whole
from normzoo.capsules.folder import listed_ranks, seal, unfinished, withdraw, write_shard

_PLAIN = (type(None), bool, int, float, complex, str, bytes, np.generic, torch.device, torch.dtype)
_NUMBERED = re.compile(r"(\d+)_")  # the folder of a capsule
_PATIENCE = 10.0  # seconds that ranks wait for each other, to write a capsule or to fail alike
_FAILURES = itertools.count()  # of steps made again, of all runs of this process
_MOST_OF_A_STEP = 1024  # micro-batches that are kept of one step
_SHARE = 4  # a part of the memory that is free when training starts


class Recorder:
    """Keeps the last steps of a run in host memory, and writes them to a capsule when the run diverges.

    Every ``steps`` steps a snapshot is taken of the run's state: parameters, buffers, optimizers, scaler, schedulers,
    counters, metrics, averages, callbacks, loaders. Two are kept, and of all steps since the older one the batch, the
    random streams, the hyperparameters, and the losses and norms that were measured; so at least ``steps`` steps before
    a divergence are known, or all since training started.

    At an alarm these steps are made again in place, by the Trainer's own loop, with the measurements of the run
    sampling each; the run then goes on bit for bit as if nothing had been. Callbacks of others take part in that with
    those hooks that stand between forward pass and update. A plain loop's steps cannot be made again.

    If the batches take too much memory, the ids of their samples are kept in their place where the loader has a
    :class:`RecordingBatchSampler`, else checksums of their content; then steps are not made again.

    Args:
        steps: between snapshots.
        max_memory: bytes of host memory that this rank may take; by default a quarter of what is free when training
            starts, shared among the ranks of the machine. Snapshots that would take more are left out, with a warning.
        max_disk: bytes that a capsule may take on disk, of each rank.
        seconds: how long steps are made again, before the rest is left out; None for never.

    Raises:
        ValueError: for arguments out of range.
    """

    def __init__(
        self,
        steps: int = 16,
        *,
        max_memory: float | None = None,
        max_disk: float = 4e9,
        seconds: float | None = 60.0,
    ) -> None:
        if not (is_whole(steps) and steps > 0):
            raise ValueError(f"steps must be a whole number of at least 1, not {steps!r}")
        for name, value in (("max_memory", max_memory), ("max_disk", max_disk), ("seconds", seconds)):
            if not (value is None and name != "max_disk") and not (is_number(value) and value > 0):
                raise ValueError(f"{name} must be a number above 0, not {value!r}")
        self.steps, self.max_memory, self.max_disk, self.seconds = steps, max_memory, max_disk, seconds
        self._reset()

    def _reset(self) -> None:
        self._root: Path | None = None
        self._serial = itertools.count()
        self._frames: deque[Frame] = deque()
        self._free: HostCopies | None = None  # of a snapshot that was dropped
        self._told: Any = None  # the batch, by a plain loop
        self._memory: float = 0.0  # for the snapshots
        self._budget = math.inf
        self._batches = 0  # bytes of those that are kept
        self._kept = ""  # of a batch: "batch", "ids" or "checksums"; empty before the first one

    def __getstate__(self) -> dict[str, Any]:
        fresh = Recorder(self.steps, max_memory=self.max_memory, max_disk=self.max_disk, seconds=self.seconds)
        return vars(fresh)

    # What a measurement calls, in this order

    def start(self, run: Run, folder: Path | None) -> None:
        """Training starts, or goes on: say what memory is taken, and which capsules of earlier runs are unfinished.

        Args:
            run: that starts.
            folder: of the capsules; None for a run that writes nothing. All ranks must start together.
        """
        self._reset()
        if folder is None:
            return
        root, number = folder / "capsules", 0
        if rank_and_ranks()[0] == 0 and root.is_dir():
            earlier = [int(match[1]) for path in root.iterdir() if (match := _NUMBERED.match(path.name))]
            number = max(earlier, default=-1) + 1
            for sentence in unfinished(folder):
                rank_zero_warn(sentence)
        # The number goes along in a path, which is what is shared
        shared = of_rank_zero(root / str(number), run.device)
        assert shared is not None
        self._root, self._serial = root, itertools.count(int(shared.name))
        free = available_memory()
        if self.max_memory is not None:
            self._budget = self.max_memory
        elif free is not None:
            self._budget = free / _SHARE / ranks_of_this_machine(run.ranks)
        size = 2 * size_of_state(run)
        if size <= self._budget:
            self._memory = size
            rank_zero_info(
                f"snapshots for a capsule take about {size_text(size)} of host memory on each rank; the recorder may "
                f"take {size_text(self._budget)}"
            )
        else:
            rank_zero_warn(
                f"a capsule will hold no snapshots of the run's state: they would take about {size_text(size)} of host "
                f"memory on each rank, and the recorder may take {size_text(self._budget)}; pass "
                f"Recorder(max_memory={size:.2g}) if there is as much"
            )

    def batch_told(self, batch: Any) -> None:
        """A plain loop tells the micro-batch whose loss it tells next."""
        self._told = batch

    def batch_begins(self, run: Run, batch: Any, batch_idx: int) -> MicroBatch | None:
        """A micro-batch is about to be trained on.

        Returns:
            what is kept of it, which :meth:`judged` takes; None if nothing is.
        """
        if self._root is None:
            return None
        if batch is None:
            batch, self._told = self._told, None
        if not self._frames or self._frames[-1].step != run.step:
            self._begin_frame(run)
        micro = MicroBatch(run.place(batch_idx), random_streams(run.device))
        self._frames[-1].append(micro)
        if batch is not None:
            self._keep_batch(run, micro, batch)
        return micro

    def judged(self, micro: MicroBatch | None, losses: Sequence[float | None], scale: float | None) -> None:
        """The losses of all ranks for a micro-batch have come, and the scale of a GradScaler."""
        if micro is not None:
            micro.losses, micro.scale = [math.nan if loss is None else loss for loss in losses], scale

    def norms(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """The norms of the gradient at a step have come: rows of ``GradientNorm``."""
        for row in rows:
            for frame in self._frames:
                if frame.step == row["step"] and not (row["of"] and row["norm"] is None):
                    frame.norms.append({k: v for k, v in row.items() if v is not None})

    def capsule(self, run: Run, about: Mapping[str, Any]) -> Path | None:
        """Make the steps again and write the capsule of an alarm; all ranks together.

        Args:
            run: that has diverged.
            about: ``step`` of the alarm and what else the capsule is to say of it.

        Returns:
            the capsule's folder; None if there is none.
        """
        if self._root is None:
            return None
        folder = self._root / f"{next(self._serial):03d}_step_{about['step']:08d}"
        remade = self._make_again(run, folder, about["step"])
        written = self._write(run, folder, {"kind": "divergence", **about, "remade": remade}, _PATIENCE)
        if any(_of_all_ranks(written, run)):
            return folder
        if rank_and_ranks()[0] == 0:
            shutil.rmtree(folder, ignore_errors=True)  # the records
        return None

    def interrupted(self, run: Run, error: BaseException) -> Path | None:
        """Write the capsule of a run that an error or a signal cuts short; this rank alone, and not for Ctrl-C."""
        if self._root is None or not self._frames or isinstance(error, KeyboardInterrupt):
            return None
        folder = self._root / f"{next(self._serial):03d}_interrupted"
        signalled = type(error).__name__ in (
            "SIGTERMException",
            "Interrupted",
        )  # of Lightning, of normzoo run
        about = {
            "kind": "signal" if signalled else "exception",
            "step": run.step,
            "error": f"{type(error).__name__}: {error}",
            "remade": {"why_not": "the run was cut short"},  # and other ranks may be gone
        }
        if not self._write(run, folder, about, 0.0):  # ranks that end later add themselves
            return None
        rank_zero_info(f"the run was cut short; normzoo report shows its last steps, which are in {folder}")
        return folder

    def end(self) -> None:
        """Training has ended: let go of everything."""
        self._reset()

    # What is kept

    def _begin_frame(self, run: Run) -> None:
        sizes = [[len(group["params"]) for group in optimizer.param_groups] for optimizer in run.optimizers]
        frame = Frame(run.step, [_hyperparameters(optimizer) for optimizer in run.optimizers], sizes)
        saved = [f for f in self._frames if f.saved is not None]
        due = not saved or len(self._frames) - self._frames.index(saved[-1]) >= self.steps
        due = due or frame.group_sizes != self._frames[-1].group_sizes  # steps are not made again across such a change
        if self._memory and due and _is_complete(run):
            if len(saved) > 1:  # the steps before the newer one go with the older one
                while self._frames[0] is not saved[1]:
                    dropped = self._frames.popleft().saved
                    self._free = dropped.copies if dropped is not None else self._free
            frame.saved = Saved(run, self._free)
            self._free = None
            if (size := 2 * frame.saved.nbytes) <= self._budget:
                self._memory = max(self._memory, size)
            else:
                self._memory, frame.saved = 0.0, None
                rank_zero_warn(
                    f"a capsule will hold no snapshots of the run's state: they take {size_text(size)} of host memory "
                    f"on each rank, and the recorder may take {size_text(self._budget)}; pass "
                    f"Recorder(max_memory={size:.2g}) if there is as much"
                )
        while not self._memory and len(self._frames) >= 2 * self.steps:
            self._frames.popleft()
        self._batches = sum(micro.nbytes for earlier in self._frames for micro in earlier.micro_batches)
        self._frames.append(frame)

    def _keep_batch(self, run: Run, micro: MicroBatch, batch: Any) -> None:
        micro.ids = self._ids(run)
        if not self._kept:
            self._kept = self._choose(run, batch, micro)
        if self._kept == "batch":
            micro.batch, micro.nbytes = host_copy(batch), sum(map(_nbytes, _leaves(batch)))
            self._batches += micro.nbytes
            if self._memory + self._batches > self._budget:
                self._kept = self._kept_instead(micro, *self._too_large(self._batches))
                for kept in (micro for frame in self._frames for micro in frame.micro_batches):
                    kept.batch = None
        if self._kept != "batch" or micro.batch is None:
            micro.checksums = _checksums(batch)

    def _choose(self, run: Run, batch: Any, micro: MicroBatch) -> str:
        """What is kept of batches, decided at the first one, and said if it is not the batches themselves."""
        if host_copy(batch) is None:
            return self._kept_instead(micro, "hold objects of classes that cannot be copied")
        size = sum(map(_nbytes, _leaves(batch))) * 2 * self.steps * run.most_accumulation
        return "batch" if self._memory + size <= self._budget else self._kept_instead(micro, *self._too_large(size))

    def _too_large(self, size: float) -> tuple[str, str]:
        why = f"would take {size_text(size)} of host memory beside {size_text(self._memory)} of snapshots"
        more = f"; give Recorder fewer steps than {self.steps} or more than {size_text(self._budget)} as max_memory"
        return why, more

    def _kept_instead(self, micro: MicroBatch, why: str, advice: str = "") -> str:
        """What is kept in the place of batches, and say so."""
        instead = "ids" if micro.ids is not None else "checksums"
        what = "the ids of their samples" if instead == "ids" else "checksums of their content"
        rank_zero_warn(
            f"a capsule will hold {what} in the place of the batches, which {why}; its steps are not made again at an "
            f"alarm{advice}"
        )
        return instead

    def _ids(self, run: Run) -> list[Any] | None:
        samplers = [getattr(loader, "batch_sampler", None) for loader in run.loaders()]
        recording = [sampler for sampler in samplers if isinstance(sampler, RecordingBatchSampler)]
        return recording[0].next_ids() if len(recording) == 1 else None

    # What becomes of it

    def _make_again(self, run: Run, folder: Path, until: int) -> dict[str, Any]:
        """Make the steps since a snapshot again, up to that of the alarm; what came of it, for the manifest."""
        frames = list(self._frames)
        known = [frame for frame in frames if frame.step <= until]
        steps = [f.step for f in known if f.saved is not None and f.group_sizes == known[-1].group_sizes]
        why_not = run.why_not_again()
        if self.seconds is None:
            why_not = "Recorder(seconds=None) leaves it out"
        elif not why_not and any(m.batch is None for frame in frames for m in frame.micro_batches):
            why_not = "the batches were not kept"
        elif not why_not and any(frame.count > _MOST_OF_A_STEP for frame in frames):
            why_not = f"the run has gone on for more than {_MOST_OF_A_STEP} micro-batches without counting a step"
        elif not why_not and (iterators := [name for f in frames if f.saved for name in f.saved.all.iterators]):
            why_not = f"the module holds an iterator, a {iterators[0]}, and what is drawn from it cannot be put back"
        passed = (frames[-1].began - frames[0].began) / max(len(frames) - 1, 1)
        said = list(_of_all_ranks((why_not, steps, passed), run))
        why_not = next((why for why, *_ in said if why), "")
        starts = sorted(set.intersection(*(set(steps) for _, steps, _ in said)))
        if why_not or not starts:
            return {"why_not": why_not or "there is no snapshot"}
        assert self.seconds is not None
        # An older snapshot shows more; but the steps have to fit into the time
        passed = max(passed for *_, passed in said)
        counts = {start: sum(start <= frame.step for frame in frames) for start in starts}
        first = next((start for start in starts if counts[start] * passed <= self.seconds / 2), starts[-1])
        return Again(run, folder, [f for f in frames if first <= f.step <= until], self.seconds).make()

    def _write(self, run: Run, folder: Path, about: Mapping[str, Any], wait: float) -> bool:
        rank, ranks = rank_and_ranks()
        now = {**about, "ranks": ranks, "strategy": run.strategy, "time": time.time()}
        try:
            for frame in self._frames:
                if frame.saved is not None:
                    frame.saved.copies.wait()
            tree: dict[str, Any] = {
                "frames": [frame.tree() for frame in self._frames],
                "snapshots": [frame.saved.tree() for frame in self._frames if frame.saved is not None],
            }
            if about["kind"] == "divergence":  # after an error a GPU may not answer any more
                tree["now"] = {"checksums": checksums(_module_tensors(run))}
            write_shard(folder, rank, now, tree, max_bytes=int(self.max_disk))
            missing = seal(folder, now, ranks, wait)
        except (OSError, RuntimeError) as error:  # a full disk, or a GPU that does not answer any more
            withdraw(folder, rank)
            rank_zero_warn(f"the capsule {folder} could not be written: {error_text(error)}")
            return False
        if missing and wait:
            late = f"{listed_ranks(missing)} of {ranks}, which had not written in {wait:g} s"
            rank_zero_warn(f"the capsule {folder} is without {late}")
        return True


@dataclass
class MicroBatch:
    """What is kept of a micro-batch; see :meth:`tree`."""

    place: dict[str, Any]
    streams: dict[str, Any]
    batch: Any = None
    nbytes: int = 0  # of the batch
    ids: list[Any] | None = None
    checksums: list[Reading] | None = None
    losses: list[float] = field(default_factory=list)
    scale: float | None = None

    def tree(self) -> dict[str, Any]:
        """For the capsule."""
        return {
            **self.place,
            "losses": self.losses,
            "batch": apply_to_collection(self.batch, HostTensor, lambda copied: copied.value),
            "ids": self.ids,
            "hash": None if self.checksums is None else " ".join(_hex(reading.read()) for reading in self.checksums),
            "random": self.streams,
        }


@dataclass
class Frame:
    """One step: from the first of its micro-batches to the optimizer's update."""

    step: int
    hyperparameters: list[list[dict[str, Any]]]
    group_sizes: list[list[int]]  # the number of parameters in each group of each optimizer
    micro_batches: deque[MicroBatch] = field(default_factory=deque)
    count: int = 0  # of micro-batches, also of those that are not kept
    norms: list[dict[str, Any]] = field(default_factory=list)
    saved: Saved | None = None  # the state before it
    began: float = field(default_factory=time.monotonic)

    def append(self, micro: MicroBatch) -> None:
        """Take in a micro-batch, in the place of the first one if there are too many."""
        self.count += 1
        self.micro_batches.append(micro)
        if len(self.micro_batches) > _MOST_OF_A_STEP:
            self.micro_batches.popleft()

    def tree(self) -> dict[str, Any]:
        """For the capsule."""
        scales = [m.scale for m in self.micro_batches if m.scale is not None]
        return {
            "step": self.step,
            "epoch": self.micro_batches[0].place["epoch"] if self.micro_batches else None,
            "hyperparameters": self.hyperparameters,
            "norms": self.norms,
            "scale": scales[-1] if scales else None,
            "micro_batches": [m.tree() for m in self.micro_batches],
        }


def _saved(frame: Frame) -> Saved:
    """The snapshot of a frame that has one."""
    assert frame.saved is not None
    return frame.saved


class Saved:
    """A snapshot of a run's state in host memory.

    Args:
        run: whose state it is.
        free: copies whose memory may be used again.
    """

    def __init__(self, run: Run, free: HostCopies | None) -> None:
        self.step = run.step
        self.copies = HostCopies(free)
        self._gradients = [(p, None if p.grad is None else self.copies.copy(p.grad)) for p in _carrying(run)]
        self.all = Snapshot(run.module, _beside(run), copies=self.copies, gradients=False, apart=_hooks(run))
        tensors = _module_tensors(run)
        self._placements = {name: str(t.placements) for name, t in tensors.items() if is_sharded(t)}  # type: ignore[attr-defined]
        state = {
            "module": tensors,
            "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
            "trainer": run.state(),
        }
        self._tree = apply_to_collection(state, Tensor, self.copies.copy)
        self.copies.complete()

    @property
    def nbytes(self) -> int:
        """The memory that it takes."""
        return self.copies.nbytes + self.all.nbytes_of_arrays

    def restore(self, run: Run) -> None:
        """Put the run back to where it was."""
        self.copies.wait()
        self.all.restore()
        for p in _leaves_of(run):
            p.grad = None
        for p, values in self._gradients:
            p.grad = None if values is None else _gradient_of(p, values)

    def tree(self) -> dict[str, Any]:
        """For the capsule."""
        about = {"step": self.step, "placements": self._placements, "checksums": checksums(self._tree["module"])}
        return {**about, **self._tree}


class Again:
    """The steps of some frames, made again in place and measured, after which the run is as before.

    Args:
        run: whose steps they are.
        folder: of the capsule, into whose ``records`` the measurements write.
        frames: of which the first has a snapshot.
        seconds: after which no further step is made.
    """

    def __init__(self, run: Run, folder: Path, frames: Sequence[Frame], seconds: float) -> None:
        self.run, self.folder, self.frames, self.seconds = run, folder, frames, seconds
        self.losses: list[float] = []
        self.difference: int | None = None

    def make(self) -> dict[str, Any]:
        """Make the steps; what came of it, for the manifest.

        Raises:
            Exception: what a step has raised on some ranks and not on others, which wait for them in the step.
        """
        run, started = self.run, time.monotonic()
        for measurement in run.measurements:
            measurement.flush(run)
        measuring: list[Any] = []
        host = HostCopies()
        gradients = [(p.grad, host.copy(p.grad)) for p in _leaves_of(run) if p.grad is not None]
        present = Snapshot(run.module, _beside(run), copies=host, apart=_hooks(run))
        last, why = self.frames[0].step, ""
        try:
            copies = {id(m): self._copied(m) for m in run.measurements if m.steps_again}
            more = self._more(copies.values())
            measuring = [*copies.values(), *more]
            _saved(self.frames[0]).restore(run)
            with isolated(present, run), run.steps_again(copies, more, last) as train_on:
                last = self._steps(measuring, train_on, started)
        except Exception as error:  # of the user's code or of the machine: the run itself has no part in it
            if not _all_come_here(run):
                raise
            why = f"{type(error).__name__}: {error_text(error)}"
        finally:
            for measurement in measuring:
                measurement.abandon()
            present.restore()
            for gradient, values in gradients:
                local_values(gradient.detach()).copy_(values)
        why = why or self._write_records(measuring)
        whys, differences, losses = zip(*_of_all_ranks((why, self.difference, self.losses), run), strict=True)
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
            if any(_of_all_ranks(time.monotonic() - started > self.seconds, run)):
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


class HostTensor(NamedTuple):
    """A tensor of a batch in host memory, and where it was."""

    value: Tensor
    device: torch.device
    requires_grad: bool

    def back(self) -> Tensor:
        """A copy where it was, which is a leaf."""
        on_cpu = self.device.type == "cpu"
        copied = self.value.clone() if on_cpu else self.value.to(self.device, non_blocking=True)
        return copied.requires_grad_(self.requires_grad)


def host_copy(batch: Any) -> Any:
    """A copy of a batch with a :class:`HostTensor` for each tensor; None if it holds objects that cannot be copied."""
    if not all(isinstance(value, (Tensor, np.ndarray, *_PLAIN)) for value in _leaves(batch)):
        return None
    try:
        return apply_to_collection(batch, (Tensor, np.ndarray), _copied)
    except (AttributeError, TypeError, ValueError):  # of containers that are not made from what they hold
        return None


def _copied(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.copy()
    tensor = value.detach()
    if not tensor.is_cuda or tensor.layout != torch.strided:
        return HostTensor(tensor.cpu() if tensor.is_cuda else tensor.clone(), tensor.device, value.requires_grad)
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    return HostTensor(host.copy_(tensor, non_blocking=True), tensor.device, value.requires_grad)


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """For each tensor the sum of its values' bits, modulo 2^64, as 16 hexadecimal digits."""
    return {name: _hex(bit_sum(local_values(t.detach()))) for name, t in tensors.items()}


def bit_sum(x: Tensor) -> Tensor:
    """The sum of the bits of all values, read as whole numbers, modulo 2^64: (), int64.

    It does not depend on the order of the values; a change of a single bit changes it.

    Example:
        >>> bit_sum(torch.tensor([1.0, 2.0])).item() == 0x3F800000 + 0x40000000
        True
    """
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    x = x.values() if x.is_nested else x
    x = torch.view_as_real(x.resolve_conj()).contiguous() if x.is_complex() else x.resolve_neg()
    x = x.to_dense() if x.layout != torch.strided else x
    return x.view(kinds[x.element_size()]).sum(dtype=torch.int64)


def size_of_state(run: Run) -> int:
    """Bytes of parameters, buffers and optimizer states of this rank; without states yet, what is usual."""
    size = sum(local_values(t.detach()).nbytes for t in _module_tensors(run).values())
    for optimizer in run.optimizers:
        states = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        if states:
            size += sum(local_values(v.detach()).nbytes for v in states)
            continue
        for group in optimizer.param_groups:  # Adam keeps two moments, SGD with momentum one buffer
            copies = 2 if "betas" in group else 1 if group.get("momentum") or "lr_decay" in group else 0
            size += copies * sum(local_values(p.detach()).nbytes for p in group["params"] if not is_lazy(p))
    return size


def _leaves(value: Any) -> Iterator[Any]:
    """What is in a batch beside containers."""
    if isinstance(value, Mapping):
        value = list(value.values())
    elif is_dataclass(value):
        value = [getattr(value, f.name, None) for f in fields(value)]
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for element in value:
            yield from _leaves(element)
    else:
        yield value


def _nbytes(value: Any) -> int:
    """The memory that a part of a batch takes, if it is a tensor or an array."""
    if isinstance(value, Tensor) and value.layout == torch.sparse_coo:
        return value._indices().nbytes + value._values().nbytes
    if isinstance(value, Tensor) and value.layout != torch.strided:
        return value.numel() * value.element_size()
    return getattr(value, "nbytes", 0)


def _checksums(batch: Any) -> list[Reading]:
    tensors = [value for value in _leaves(batch) if isinstance(value, Tensor) and value.numel()]
    return [Reading(bit_sum(tensor.detach())) for tensor in tensors]


def _hex(value: Tensor) -> str:
    return f"{int(value) % 2**64:016x}"


def _hyperparameters(optimizer: Optimizer) -> list[dict[str, Any]]:
    """What an optimizer's groups hold beside parameters."""
    return [
        {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in group.items() if k != "params"}
        for group in optimizer.param_groups
    ]


def _module_tensors(run: Run) -> dict[str, Tensor]:
    """Parameters and all buffers, by name."""
    both = itertools.chain(run.module.named_parameters(), run.module.named_buffers())
    return {plain_name(name): t for name, t in both if not is_lazy(t)}


def _is_complete(run: Run) -> bool:
    """Whether all parameters have values, which those of lazy modules have after their first batch."""
    return not any(map(is_lazy, itertools.chain(run.module.parameters(), run.module.buffers())))


def _beside(run: Run) -> list[Any]:
    """What a step may move beside the module."""
    scaler = [vars(run.scaler)] if run.scaler is not None else []
    return [*map(vars, run.optimizers), *scaler, *map(vars, run.schedulers)]


def _leaves_of(run: Run) -> list[Tensor]:
    """What may have gradients: the parameters of the module and of the optimizers, each once."""
    optimized = (p for o in run.optimizers for group in o.param_groups for p in group["params"])
    return [*dict.fromkeys(itertools.chain(run.module.parameters(), optimized))]


def _carrying(run: Run) -> list[Tensor]:
    """Parameters whose gradients a step may find from those before, as only the code of the user drops them."""
    optimized = {id(p) for o in run.optimizers for group in o.param_groups for p in group["params"]}
    return [p for p in _leaves_of(run) if not run.automatic or id(p) not in optimized]


def _gradient_of(p: Tensor, values: Tensor) -> Tensor:
    """A gradient of a parameter, of the values that this rank had."""
    if values.layout != torch.strided:
        return values.to(p.device)
    gradient = torch.empty_like(p, dtype=values.dtype, requires_grad=False)
    local_values(gradient).copy_(values)
    return gradient


def _hooks(run: Run) -> list[Any]:
    """Where optimizers keep their hooks, which come and go with measurements."""
    return [hooks for optimizer in run.optimizers for name, hooks in vars(optimizer).items() if name.endswith("_hooks")]


def _all_come_here(run: Run) -> bool:
    """Whether all ranks have come here within some seconds: without a collective, which others may wait in."""
    if run.ranks == 1:
        return True
    store, key = torch.distributed.distributed_c10d._get_default_store(), f"normzoo/failed/{next(_FAILURES)}"
    deadline = time.monotonic() + _PATIENCE
    count = store.add(key, 1)
    while count < run.ranks and time.monotonic() < deadline:
        time.sleep(0.01)
        count = store.add(key, 0)
    return count >= run.ranks


def error_text(error: BaseException) -> str:
    """An error for people, without its class."""
    return getattr(error, "strerror", None) or str(error)


def _of_all_ranks(value: Any, run: Run) -> Iterator[Any]:
    """The values of all ranks, which must ask together."""
    ranks = run.ranks
    if ranks == 1:
        return iter([value])
    values: list[Any] = [None] * ranks
    torch.distributed.all_gather_object(values, value)
    return iter(values)
