"""What is kept of the last steps of a run, so that a divergence can be explained: a ring of steps, and snapshots."""

from __future__ import annotations

import itertools
import math
import re
import shutil
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn  # type: ignore[attr-defined]

from normzoo.callbacks._run.batches import batch_checksums, checksums, host_copy, leaves, nbytes
from normzoo.callbacks._run.facts import Run, rank_and_ranks
from normzoo.callbacks._run.frames import (
    MOST_OF_A_STEP,
    Frame,
    MicroBatch,
    SavedState,
    hyperparameters,
    is_complete,
    module_tensors,
    size_of_state,
)
from normzoo.callbacks._run.isolation import HostCopies
from normzoo.callbacks._run.memory import available_memory, ranks_of_this_machine, size_text
from normzoo.callbacks._run.record import of_rank_zero
from normzoo.callbacks._run.rerun import PATIENCE, Rerun, error_text, of_all_ranks
from normzoo.callbacks._run.settings import module_settings, torch_settings
from normzoo.callbacks._run.streams import random_streams
from normzoo.callbacks.sample_ids import RecordingBatchSampler
from normzoo.callbacks.schedule import is_number, is_whole
from normzoo.capsules.folder import listed_ranks, seal, unfinished, withdraw, write_shard

_NUMBERED = re.compile(r"(\d+)_")  # the folder of a capsule
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
        most: capsules of alarms that a fit leaves: the first one, and the latest ones.

    Raises:
        ValueError: for arguments out of range.
    """

    asked_by = ""  # the variable that asked for the callback that it is of; empty for one of the script

    def __init__(
        self,
        steps: int = 16,
        *,
        max_memory: float | None = None,
        max_disk: float = 4e9,
        seconds: float | None = 60.0,
        most: int = 5,
    ) -> None:
        if not (is_whole(steps) and steps > 0):
            raise ValueError(f"steps must be a whole number of at least 1, not {steps!r}")
        if not (is_whole(most) and most > 1):
            raise ValueError(f"most must be a whole number of at least 2, not {most!r}")
        for name, value in (("max_memory", max_memory), ("max_disk", max_disk), ("seconds", seconds)):
            if not (value is None and name != "max_disk") and not (is_number(value) and value > 0):
                raise ValueError(f"{name} must be a number above 0, not {value!r}")
        self.steps, self.max_memory, self.max_disk = steps, max_memory, max_disk
        self.seconds, self.most = seconds, most
        self._reset()

    def _reset(self) -> None:
        self._root: Path | None = None
        self._written: list[Path] = []  # of alarms
        self._serial = itertools.count()
        self._frames: deque[Frame] = deque()
        self._free: HostCopies | None = None  # of a snapshot that was dropped
        self._next_batch: Any = None  # the batch, by a plain loop
        self._memory: float = 0.0  # for the snapshots
        self._budget = math.inf
        self._batches = 0  # bytes of those that are kept
        self._form = ""  # of a batch: "batch", "ids" or "checksums"; empty before the first one

    def __getstate__(self) -> dict[str, Any]:
        names = ("steps", "max_memory", "max_disk", "seconds", "most")
        return vars(Recorder(**{name: getattr(self, name) for name in names}))

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
                f"snapshots for a capsule take about {size_text(size)} of host memory on each rank; the limit for "
                f"snapshots and batches is {size_text(self._budget)}"
            )
        else:
            rank_zero_warn(
                f"a capsule will hold no snapshots of the run's state: they would take about {size_text(size)} of host "
                f"memory on each rank, and the recorder may take {size_text(self._budget)}; pass "
                f"Recorder(max_memory={size:.2g}) if there is as much"
            )

    def batch_told(self, batch: Any) -> None:
        """A plain loop tells the micro-batch whose loss it tells next."""
        self._next_batch = batch

    def batch_begins(self, run: Run, batch: Any, batch_idx: int) -> MicroBatch | None:
        """A micro-batch is about to be trained on.

        Returns:
            what is kept of it, which :meth:`judged` takes; None if nothing is.
        """
        if self._root is None:
            return None
        if batch is None:
            batch, self._next_batch = self._next_batch, None
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
        written = self._write(run, folder, {"kind": "divergence", **about, "remade": remade}, PATIENCE)
        if any(of_all_ranks(written, run)):
            self._written.append(folder)
            if len(self._written) > self.most:
                shutil.rmtree(self._written.pop(1), ignore_errors=True)
            return folder
        if rank_and_ranks()[0] == 0:
            shutil.rmtree(folder, ignore_errors=True)  # the records
        return None

    def interrupted(self, run: Run, error: BaseException) -> Path | None:
        """Write the capsule of a run that an error or a signal cuts short; this rank alone, and not for Ctrl-C."""
        if self._root is None or not self._frames or isinstance(error, KeyboardInterrupt):
            return None
        folder = self._root / f"{next(self._serial):03d}_interrupted"
        by_signal = ("SIGTERMException", "Interrupted")  # of Lightning, and of the command normzoo
        signalled = type(error).__name__ in by_signal
        text = ": ".join(filter(None, [type(error).__name__, str(error)]))
        rank, ranks = rank_and_ranks()
        where = f" on rank {rank}" if ranks > 1 else ""
        sentence = f"the run failed at step {run.step}{where}: {' '.join(text.split())}"
        if signalled:
            sentence = f"the run was ended by a signal at step {run.step}"
        about = {
            "kind": "signal" if signalled else "exception",
            "step": run.step,
            "rank": rank,
            "sentence": sentence,
            "error": text,
            "remade": {"why_not": "the run was cut short"},  # and other ranks may be gone
        }
        if not self._write(run, folder, about, 0.0):  # ranks that end later add themselves
            return None
        rank_zero_info(f"{sentence}; normzoo report shows the last steps, normzoo replay looks for the cause: {folder}")
        return folder

    def end(self) -> None:
        """Training has ended: let go of everything."""
        self._reset()

    # What is kept

    def _begin_frame(self, run: Run) -> None:
        sizes = [[len(group["params"]) for group in optimizer.param_groups] for optimizer in run.optimizers]
        frame = Frame(run.step, [hyperparameters(optimizer) for optimizer in run.optimizers], sizes)
        saved = [f for f in self._frames if f.saved is not None]
        due = not saved or len(self._frames) - self._frames.index(saved[-1]) >= self.steps
        due = due or frame.group_sizes != self._frames[-1].group_sizes  # steps are not made again across such a change
        if self._memory and due and is_complete(run):
            if len(saved) > 1:  # the steps before the newer one go with the older one
                while self._frames[0] is not saved[1]:
                    dropped = self._frames.popleft().saved
                    self._free = dropped.copies if dropped is not None else self._free
            frame.saved = SavedState(run, self._free)
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
        if not self._form:
            self._form = self._choose(run, batch, micro)
        if self._form == "batch":
            micro.keep(host_copy(batch), sum(map(nbytes, leaves(batch))), run.device)
            self._batches += micro.nbytes
            if self._memory + self._batches > self._budget:
                self._form = self._say_instead(micro, *self._too_large(self._batches))
                for kept in (micro for frame in self._frames for micro in frame.micro_batches):
                    kept.batch = None
        if self._form != "batch" or micro.batch is None:
            micro.checksums = batch_checksums(batch)

    def _choose(self, run: Run, batch: Any, micro: MicroBatch) -> str:
        """What is kept of batches, decided at the first one, and said if it is not the batches themselves."""
        if host_copy(batch) is None:
            return self._say_instead(micro, "hold objects of classes that cannot be copied")
        size = sum(map(nbytes, leaves(batch))) * 2 * self.steps * run.most_accumulation
        return "batch" if self._memory + size <= self._budget else self._say_instead(micro, *self._too_large(size))

    def _too_large(self, size: float) -> tuple[str, str]:
        why = f"would take {size_text(size)} of host memory beside {size_text(self._memory)} of snapshots"
        more = f"; give Recorder fewer steps than {self.steps} or more than {size_text(self._budget)} as max_memory"
        return why, more

    def _say_instead(self, micro: MicroBatch, why: str, advice: str = "") -> str:
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
        elif not why_not and any(frame.count > MOST_OF_A_STEP for frame in frames):
            why_not = f"the run has gone on for more than {MOST_OF_A_STEP} micro-batches without counting a step"
        elif not why_not and (iterators := [name for f in frames if f.saved for name in f.saved.all.iterators]):
            why_not = f"the module holds an iterator, a {iterators[0]}, and what is drawn from it cannot be put back"
        passed = (frames[-1].began - frames[0].began) / max(len(frames) - 1, 1)
        said = list(of_all_ranks((why_not, steps, passed), run))
        why_not = next((why for why, *_ in said if why), "")
        starts = sorted(set.intersection(*(set(steps) for _, steps, _ in said)))
        if why_not or not starts:
            return {"why_not": why_not or "no snapshot of the run's state was kept"}
        assert self.seconds is not None
        # An older snapshot shows more; but the steps have to fit into the time
        passed = max(passed for *_, passed in said)
        counts = {start: sum(start <= frame.step for frame in frames) for start in starts}
        first = next((start for start in starts if counts[start] * passed <= self.seconds / 2), starts[-1])
        of_steps = [f for f in frames if first <= f.step <= until]
        return Rerun(run, folder, of_steps, self.seconds, self.asked_by).make()

    def _write(self, run: Run, folder: Path, about: Mapping[str, Any], wait: float) -> bool:
        rank, ranks = rank_and_ranks()
        settings = {**torch_settings(run.device), **module_settings(run.module), "compiled": run.compiled}
        now = {
            **about,
            "ranks": ranks,
            "strategy": run.strategy,
            "settings": {**settings, **run.settings()},
            "time": time.time(),
        }
        try:
            for frame in self._frames:
                frame.wait()
            tree: dict[str, Any] = {
                "frames": [frame.tree() for frame in self._frames],
                "snapshots": [frame.saved.tree() for frame in self._frames if frame.saved is not None],
            }
            if about["kind"] == "divergence":  # after an error a GPU may not answer any more
                tensors = module_tensors(run)
                tree["now"] = {"step": run.step, "module": tensors, "checksums": checksums(tensors)}
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
