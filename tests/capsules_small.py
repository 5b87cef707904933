"""Small capsules made by hand."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from normzoo.capsules.folder import seal, write_shard
from normzoo.records.seals import UNSEALED, sealed

SENTENCE = "The loss of rank 1 was not finite at step 31."
ABOUT = {
    "kind": "divergence",
    "step": 31,
    "rule": "not finite",
    "value": math.nan,
    "rank": 1,
    "sentence": SENTENCE,
    "versions": {"torch": torch.__version__},
}


def micro_batch(index: int, losses: list[float], batch: Any, rank: int = 0) -> dict[str, Any]:
    return {
        "batch_idx": index,
        "losses": losses,
        "batch": batch,
        "ids": [rank, index],
        "hash": f"{rank}-{index}",
        "random": {
            "torch": torch.Generator().manual_seed(index).get_state(),
            "cuda": None,
            "numpy": np.random.default_rng(index).bit_generator.state,
            "python": random.Random(index).getstate(),
        },
    }


def make_tree(
    rank: int = 0, ranks: int = 2, steps: range = range(28, 32), snapshots: tuple[int, ...] = (28, 30)
) -> Any:
    """Frames of two micro-batches each, of which the last loss of the last rank is NaN, and snapshots."""
    last = (steps[-1], 1, ranks - 1)
    frames = [
        {
            "step": step,
            "epoch": 0,
            "hyperparameters": [[{"lr": torch.tensor(0.1), "momentum": 0.9}, {"lr": 0.2}]],
            "norms": [
                {"step": step, "optimizer": 0, "of": "group_0", "norm": 0.25, "applied": 0.25},
                {"step": step, "optimizer": 0, "of": "", "norm": 1.0 + step, "applied": np.float64(1.0)},
            ],
            "scale": None,
            "micro_batches": [
                micro_batch(
                    2 * step + i,
                    [math.nan if (step, i, r) == last else step + i / 2 + r / 4 for r in range(ranks)],
                    (torch.full((2, 3), float(step + i)), {"label": torch.tensor([rank, i])}),
                    rank,
                )
                for i in range(2)
            ],
        }
        for step in steps
    ]
    made = [make_snapshot(step) for step in snapshots]
    now = {"step": steps[-1] + 1, "module": {"weight": torch.full((4, 5), math.nan)}, "checksums": {"weight": "4567"}}
    return {"frames": frames, "snapshots": made, "now": now}


def make_snapshot(step: int) -> dict[str, Any]:
    weight = torch.full((4, 5), float(step), requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    weight.sum().backward()
    optimizer.step()
    return {
        "step": step,
        "epoch": 0,
        "module": {"weight": weight, "tied": weight},
        "optimizers": [optimizer.state_dict()],
        "checksums": {"weight": "0123"},
        "trainer": {"loops": {"step": step}, "scheduler": len},
    }


def make_capsule(folder: Path, ranks: int = 2, missing: tuple[int, ...] = (), **about: Any) -> Path:
    for rank in range(ranks):
        if rank not in missing:
            write_shard(folder, rank, ABOUT, make_tree(rank, ranks))
    assert seal(folder, {**ABOUT, **about}, ranks, wait=0.0) == list(missing)
    return folder


def rewrite(path: Path, **content: Any) -> None:
    """Change a JSON file of a capsule, and make its checksum right."""
    whole = {**json.loads(path.read_text()), "check": UNSEALED, **content}
    path.write_bytes(sealed(json.dumps(whole).encode()))
