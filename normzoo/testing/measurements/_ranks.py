"""The promises about several ranks, in real processes over gloo."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from normzoo.callbacks.measurement import Measurement
from normzoo.records.reading import read_records
from normzoo.testing._compare import BrokenError, NotApplicableError
from normzoo.testing._processes import in_ranks
from normzoo.testing._promises import promise
from normzoo.testing._running import where
from normzoo.testing.measurements._fits import Fit, Subject, fit
from normzoo.testing.measurements._rows import same_rows
from normzoo.testing.measurements._snapshot import difference_text
from normzoo.testing.measurements._task import Setting, Task

DEADLINE = 180.0  # seconds for the processes of one job
RANKS = 2
DOUBLE = Setting(dtype=torch.float64)  # so that values on the border of two buckets stay where they are
ROUNDING = 1e-5  # figures are computed in float32, some of them
WAYS = ("DDP", "fully_shard")


@promise()
def ranks(subject: Subject) -> None:
    """Under DDP two ranks record what one rank does on the union of their data; rank zero alone writes."""
    _check(subject, "DDP")


@promise()
def sharded_gradients(subject: Subject) -> None:
    """With DTensor gradients (fully_shard) figures are those of one rank, or it is refused by one clear line."""
    _check(subject, "fully_shard")


@promise()
def perturbation_on_ranks(subject: Subject) -> None:
    """On each of two ranks, under DDP and under fully_shard, a run ends bit for bit as without it."""
    _union(subject)  # what fails on one rank as well is told so
    refusals = []
    for way in WAYS:
        try:
            outcomes = _outcomes(subject, way)
        except NotApplicableError as refusal:
            refusals.append(str(refusal))
            continue
        for rank, outcome in enumerate(outcomes):
            if outcome["differences"]:
                raise BrokenError(f"{RANKS} ranks under {way}: rank {rank}: {outcome['differences']}")
    if len(refusals) == len(WAYS):
        raise NotApplicableError(refusals[0])


def _check(subject: Subject, way: str) -> None:
    union = _union(subject)  # first, so that what fails on one rank as well is told so
    outcomes = _outcomes(subject, way)
    written = [outcome["files"] for outcome in outcomes]
    if written != [1, *[0] * (RANKS - 1)]:
        raise BrokenError(f"{RANKS} ranks under {way}: the ranks have written {written} files, not 1 and 0")
    same_rows(f"{RANKS} ranks under {way}", outcomes[0]["rows"], union, ROUNDING)


def _outcomes(subject: Subject, way: str) -> list[dict[str, Any]]:
    """What has come of a fit on each rank.

    Raises:
        NotApplicableError: if the measurement has refused it.
        BrokenError: if it failed.
    """
    of_ranks = subject.once("ranks", lambda: in_ranks(_of_rank, subject, RANKS, DEADLINE))
    outcomes = [of_rank[way] for of_rank in of_ranks]
    for rank, outcome in enumerate(outcomes):
        if outcome["refusal"]:
            subject.refused(outcome["refusal"])
        if outcome["error"]:
            raise BrokenError(f"{RANKS} ranks under {way}: rank {rank}: {outcome['error']}")
    return outcomes


def _union(subject: Subject) -> pd.DataFrame:
    """The rows of one rank, whose batches are as large as those of the ranks together, or as many more."""

    def make() -> pd.DataFrame:
        settings = {
            "batch": replace(DOUBLE, batch=RANKS * DOUBLE.batch),
            "micro-batches": replace(DOUBLE, accumulation=RANKS * DOUBLE.accumulation),
        }
        return subject.rows(subject.fit(subject.make(), setting=settings[subject.union], epochs=1))

    return subject.once("union", make)


def _of_rank(subject: Subject, rank: int, world: int, note: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """What has come of a fit on one rank in each way."""
    environment = Started(rank, world)
    strategies = {
        "DDP": lambda: DDPStrategy(process_group_backend="gloo", cluster_environment=environment),
        "fully_shard": lambda: _sharding(environment, world),
    }
    outcomes: dict[str, dict[str, Any]] = {}
    for way in WAYS:

        def fitted(folder: str, *measurements: Measurement, way: str = way) -> Fit:
            options: dict[str, Any] = {"strategy": strategies[way](), "devices": world}
            module = _module(subject, sharded=way == "fully_shard")
            return fit(
                subject.net,
                measurements,
                Path(folder),
                DOUBLE,
                epochs=1,
                rank=rank,
                world=world,
                module=module,
                **options,
            )

        note(f"under {way}")
        with tempfile.TemporaryDirectory() as folder:
            measured = fitted(folder, subject.make())
            outcomes[way] = outcome = _outcome(subject, measured)
        if not outcome["error"]:
            note(f"under {way}, without it")
            with tempfile.TemporaryDirectory() as folder:
                outcome["differences"] = difference_text(fitted(folder).left, measured.left)
    return outcomes


def _outcome(subject: Subject, fitted: Fit) -> dict[str, Any]:
    refused = isinstance(fitted.error, ValueError) and not fitted.began
    return {
        "refusal": str(fitted.error) if refused else "",
        "error": where(fitted.error) if fitted.error is not None else "",
        "rows": read_records(fitted.folder).get(subject.name),
        "files": len(list(fitted.folder.glob("*.arrows"))),
        "differences": "",
    }


def _sharding(environment: ClusterEnvironment, world: int) -> ModelParallelStrategy:
    strategy = ModelParallelStrategy(world, 1, process_group_backend="gloo")
    strategy.cluster_environment = environment
    return strategy


def _module(subject: Subject, sharded: bool) -> Task:
    torch.manual_seed(3)
    return ShardedTask(subject.net, DOUBLE) if sharded else Task(subject.net, DOUBLE)


class ShardedTask(Task):
    """The task with parameters of which each rank holds a part."""

    def configure_model(self) -> None:
        """Distribute the parameters."""
        if not any(hasattr(p, "device_mesh") for p in self.parameters()):
            assert self.device_mesh is not None
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


class Started(ClusterEnvironment):
    """Ranks whose processes have been started and know each other."""

    main_address, main_port, creates_processes_externally = "127.0.0.1", 0, True

    def __init__(self, rank: int, world: int) -> None:
        super().__init__()
        self._rank, self._world = rank, world

    @staticmethod
    def detect() -> bool:
        """It is given, not looked for."""
        return False

    def world_size(self) -> int:
        """The number of ranks."""
        return self._world

    def set_world_size(self, size: int) -> None:
        """It is known."""

    def global_rank(self) -> int:
        """Of this process."""
        return self._rank

    def set_global_rank(self, rank: int) -> None:
        """It is known."""

    def local_rank(self) -> int:
        """Of this process, on the only node."""
        return self._rank

    def node_rank(self) -> int:
        """Of the only node."""
        return 0
