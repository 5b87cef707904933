"""Capsules as objects and data frames. Torch is imported for snapshots and batches only."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from normzoo.capsules.folder import MANIFEST, capsule_folders, listed_ranks, read_manifest
from normzoo.capsules.sealed import CapsuleError
from normzoo.capsules.shard import Shard
from normzoo.records.reading import read_records

COLUMNS = {
    "step": "optimizer steps made before the step that the mini-batch is of",
    "rank": "the rank that the mini-batch was on",
    "micro_batch": "place of the micro-batch among those of the step, from 0",
    "epoch": "epoch, from 0; None where it is not known",
    "loss": "loss of the micro-batch on the rank; NaN where it is not known",
    "lr": "learning rate of the first parameter group of the first optimizer",
    "scale": "loss scale of the GradScaler; NaN without one",
    "norm": "norm of the gradient of the first optimizer before clipping, as GradientNorm measures it",
    "applied": "norm of the gradient as the first optimizer applies it",
    "ids": "what identifies the samples of the micro-batch, a list; None if that is not known, or the rank is missing",
    "hash": "hash of the micro-batch; None where there is none, or the rank is missing",
}
_NUMBERS = ("loss", "lr", "scale", "norm", "applied")


def load_capsule(path: str | os.PathLike[str]) -> Capsule:
    """A capsule, or the only one of a run.

    Args:
        path: a capsule's folder, ``RUN/capsules/step_N``, or a run's folder with one capsule.

    Raises:
        FileNotFoundError: if there is no such folder, or no capsule in it.
        CapsuleError: (a ValueError) if the capsule is unfinished or damaged, or if the run has several, which it names.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is {'a file' if folder.exists() else 'not there'}; give a capsule's folder")
    if os.path.lexists(folder / MANIFEST):
        return Capsule(folder, read_manifest(folder))
    folders = capsule_folders(folder)
    finished = [path for path in folders if os.path.lexists(path / MANIFEST)]
    if len(finished) > 1:
        raise CapsuleError(f"{folder} has several capsules; give one of {', '.join(map(str, finished))}")
    if finished:
        return load_capsule(finished[0])
    if folders or folder.parent.name == "capsules" or any(folder.glob("rank_*")):
        unfinished = folders[0] if folders else folder
        raise CapsuleError(f"{unfinished} is an unfinished capsule: it has no {MANIFEST}, which is written last")
    raise FileNotFoundError(f"no capsule in {folder}: it has no {MANIFEST}, and no folder capsules")


@dataclass(frozen=True)
class Capsule:
    """What a run has kept of a divergence, an exception or a signal.

    Attributes:
        path: its folder.
        about: what its manifest says: ``kind``, ``step``, ``sentence``, ``ranks``, ``missing`` and others.
    """

    path: Path
    about: dict[str, Any] = field(repr=False)

    @cached_property
    def frames(self) -> pd.DataFrame:
        """A row for each micro-batch of the last steps and each rank; ``frame.attrs["meaning"]`` says what columns are.

        Of a rank whose shard is missing there are the losses that the other ranks know. Torch is not imported.

        Raises:
            CapsuleError: if a file is damaged.
        """
        frame = pd.DataFrame(self.rows, columns=[*COLUMNS]).astype(dict.fromkeys(_NUMBERS, float))
        frame.attrs["meaning"] = COLUMNS
        return frame

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of ``frames``, in which None says that a number is not known, and NaN that it is NaN."""
        rows: dict[tuple[int, int, int], dict[str, Any]] = {}
        for rank in self.ranks:
            for row in _rows(self._shard(rank)):
                key = (row["step"], row["micro_batch"], row["rank"])
                if key not in rows or row["rank"] == rank:
                    rows[key] = row
        return [rows[key] for key in sorted(rows)]

    @cached_property
    def records(self) -> dict[str, pd.DataFrame]:
        """The records of the measurements at the remade steps, as :func:`normzoo.load_run` gives them; often none.

        Raises:
            RecordError: if a file of theirs is damaged.
        """
        folder = self.path / "records"
        return read_records(folder) if folder.is_dir() else {}

    @property
    def ranks(self) -> list[int]:
        """The ranks whose shards are there."""
        missing = set(self.about["missing"])
        return [rank for rank in range(self.about["ranks"]) if rank not in missing]

    def state(self, rank: int = 0, step: int | None = None) -> dict[str, Any]:
        """A snapshot: ``step``, ``epoch``, ``module``, ``optimizers``, ``checksums``, ``trainer``; tensors on the CPU.

        Args:
            rank: whose; of a sharded model each rank has its own part.
            step: of which step; by default the last snapshot.

        Raises:
            CapsuleError: if there is no such snapshot, or a file is damaged.
        """
        shard = self._shard(rank)
        steps = shard.steps("snapshots")
        if not steps or (step is not None and step not in steps):
            raise CapsuleError(
                f"{self.path} has no snapshot of {'any step' if step is None else f'step {step}'} on rank {rank}; "
                f"there are those of {_steps(steps)}"
            )
        snapshot: dict[str, Any] = shard.tree("snapshots", len(steps) - 1 if step is None else steps.index(step))
        return snapshot

    def now(self, rank: int = 0) -> dict[str, Any] | None:
        """The module when the capsule of an alarm was written: ``step``, ``module``, ``checksums``; tensors on the CPU.

        Args:
            rank: whose; of a sharded model each rank has its own part.

        Returns:
            None after an error or a signal, and of capsules of earlier versions, which have the checksums alone.

        Raises:
            CapsuleError: if a file is damaged.
        """
        shard = self._shard(rank)
        if not shard.has("now", "step"):
            return None
        now: dict[str, Any] = shard.tree("now")
        return now

    def batches(self, step: int, rank: int = 0) -> list[Any]:
        """The mini-batches of a step, one for each micro-batch; None, or a LeftOut with the reason, where not kept.

        Raises:
            CapsuleError: if the step is not among those kept, or a file is damaged.
        """
        shard = self._shard(rank)
        steps = shard.steps("frames")
        if step not in steps:
            raise CapsuleError(f"{self.path} has no batches of step {step}; there are those of {_steps(steps)}")
        places = [("frames", place, "micro_batches") for place, other in enumerate(steps) if other == step]
        return [shard.tree(*place, i, "batch") for place in places for i in range(shard.count(*place))]

    def tree(self, rank: int = 0) -> dict[str, Any]:
        """All that a rank has written: ``frames``, with batches and states of random generators, and ``snapshots``.

        Raises:
            CapsuleError: if the rank is missing, or a file is damaged.
        """
        whole: dict[str, Any] = self._shard(rank).tree()
        return whole

    def _shard(self, rank: int) -> Shard:
        if rank not in self.ranks:
            raise CapsuleError(f"{self.path} has nothing of rank {rank}; there are {listed_ranks(self.ranks)}")
        return Shard(self.path, rank)


def _rows(shard: Shard) -> list[dict[str, Any]]:
    """The rows of the frames of one rank; also of other ranks, whose losses it knows."""
    frames = shard.frames()
    try:
        return list(_rows_of(frames, shard.rank))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CapsuleError(f"{shard.path} is not a file of a capsule: its frames are none that are written") from error


def _rows_of(frames: list[dict[str, Any]], own_rank: int) -> Iterator[dict[str, Any]]:
    for frame in frames:
        [[group, *_], *_] = frame.get("hyperparameters") or [[{}]]
        norms: dict[str, Any] = next(
            (row for row in frame.get("norms") or [] if not row.get("of") and not row.get("optimizer")), {}
        )
        of_frame = {
            "step": operator.index(frame["step"]),
            "epoch": _kept(frame.get("epoch"), int),
            "lr": _number(group.get("lr")),
            "scale": _number(frame.get("scale")),
            "norm": _number(norms.get("norm")),
            "applied": _number(norms.get("applied")),
        }
        for place, micro_batch in enumerate(frame["micro_batches"]):
            losses = dict(enumerate(micro_batch["losses"]))
            for rank in {*losses, own_rank}:
                own = rank == own_rank
                yield {
                    **of_frame,
                    "rank": rank,
                    "micro_batch": place,
                    "loss": _number(losses.get(rank)),
                    "ids": _kept(micro_batch.get("ids"), list) if own else None,
                    "hash": _kept(micro_batch.get("hash"), str) if own else None,
                }


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float | np.number) else None


def _kept(value: Any, kind: type) -> Any:
    return value if isinstance(value, kind) else None


def _steps(steps: list[int]) -> str:
    return f"step{'s' * (len(steps) > 1)} {', '.join(map(str, steps))}" if steps else "no step"
