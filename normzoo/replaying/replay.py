"""The questions that a replay asks, in order, and what it writes of the answers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule

from normzoo.capsules import Capsule, load_capsule
from normzoo.causes import Findings, findings_of, read_findings, write_evidence
from normzoo.replaying import course, data_or_state, fractions, module_frames, samples, trials
from normzoo.replaying.fit import in_a_fit
from normzoo.replaying.stage import Stage

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy

    from normzoo.records.schema import Schema

_QUESTIONS: dict[Any, str] = {  # and what is said while each is asked
    course: "making the steps again",
    data_or_state: "trying batches and weights",
    samples: "trying single samples",
    fractions: "applying the fatal update in fractions",
    module_frames: "comparing modules with those of a quiet step",
    trials: "trying what would have held",
}


def replay(
    capsule: Capsule | str | Path,
    module: LightningModule,
    *,
    callbacks: Sequence[Callback] = (),
    batches: Callable[[list[Any]], Any] | None = None,
    datamodule: LightningDataModule | None = None,
    sites: str | Sequence[str] | None = None,
    strategy: str | Strategy | None = None,
    write: bool = True,
    progress: Callable[[str], Any] | None = None,
) -> Findings:
    """Make the steps before a divergence again, try things on them, and name the cause.

    The steps from the capsule's first snapshot on are made by a Trainer's own loop, in this process. A capsule of R
    ranks is replayed by R processes if each of them calls this function, as under ``torchrun --nproc-per-node R``
    (``normzoo replay`` starts them); in one process the batches of all ranks are accumulated, and losses are
    not those of the run bit for bit.

    Args:
        capsule: to replay, or its folder, or that of a run with a single capsule.
        module: of the class and with the arguments of the run; weights and optimizers come from the capsule. Its own
            weights are as before afterwards.
        callbacks: those of the run that act between loss and update.
        batches: makes a batch from a list of ids of samples, for a capsule that holds these in its place.
        datamodule: for a module that asks ``trainer.datamodule``; it is set up as for a fit, and gives no batch.
        sites: names of modules, or patterns, whose channels are followed along the update; by default three at about
            7, 40 and 73 % of the depth.
        strategy: of the Trainer, for one whose arguments a capsule does not have; by default that of the run.
        write: whether evidence and findings go to ``replay`` in the capsule, where ``normzoo report`` finds them.
        progress: told what is done next, in rank 0.

    Returns:
        what was found, likeliest cause first; ``str()`` of it is a paragraph.

    Raises:
        ReplayError: if the capsule has no snapshot or no batches, or the module does not fit it.
        CapsuleError: if there is no capsule, or a file of it is damaged.
    """
    capsule = capsule if isinstance(capsule, Capsule) else load_capsule(capsule)
    started = time.monotonic()

    def ask(stage: Stage) -> tuple[dict[str, Any], list[tuple[Schema, list[dict[str, Any]]]]]:
        evidence: dict[str, Any] = {"about": _about(stage)}
        records = []
        for question, said in _QUESTIONS.items():
            if progress is not None and stage.rank == 0:
                progress(said)
            options = {"sites": sites} if question is fractions else {}
            records += question.ask(stage, evidence, **options)
        evidence["about"]["notes"] = stage.notes
        evidence["passes"] = dict(stage.passes)
        evidence.setdefault("seconds", {})["replay"] = time.monotonic() - started
        return evidence, records

    evidence, records = in_a_fit(
        capsule, module, ask, callbacks=callbacks, batches=batches, datamodule=datamodule, strategy=strategy
    )
    findings = findings_of(evidence)
    if write and evidence["about"]["rank"] == 0:
        folder = capsule.path / "replay"
        write_evidence(folder, evidence, records, findings)
        findings = read_findings(folder)
    return findings


def _about(stage: Stage) -> dict[str, Any]:
    about, settings = stage.capsule.about, stage.capsule.about.get("settings") or {}
    return {
        "capsule": stage.capsule.path.name,
        "kind": about.get("kind"),
        "step": stage.alarm,
        "rule": about.get("rule"),
        "value": about.get("value", math.nan),
        "sentence": about.get("sentence"),
        "recorded_ranks": stage.recorded_ranks,
        "ranks": stage.ranks,
        "rank": stage.rank,
        "precision": settings.get("precision"),
        "optimizer": type(stage.run.optimizers[0]).__name__,
        "parameters": sum(p.numel() for p in stage.run.module.parameters()),
        "steps": [stage.steps[0], stage.steps[-1]],
    }
