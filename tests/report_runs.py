"""Run folders made by hand."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from schemas import SCHEMAS

from normzoo.functional.buckets import bucket_counts
from normzoo.records.segments import Segment

WATCHED = "callbacks: [{name: divergence}]\nmodel: {norm: batch}\n"


def tail(step: int, layer: str, x: np.ndarray, **more: Any) -> dict[str, Any]:
    counts = bucket_counts(torch.from_numpy(x), 3)
    filled = counts.nonzero().flatten()
    pairs = torch.stack([filled, counts[filled]], 1).numpy()
    return {"step": step, "layer": layer, "kurtosis": 2.5, "mantissa_bits": 3, "histogram": pairs, **more}


def record(folder: Path, quantity: str, *rows: dict[str, Any], start: int = 0) -> Path:
    """A segment with a sample for each row; what a row lacks is null."""
    names = [c.name for c in SCHEMAS[quantity].columns]
    segment = Segment(folder / "metrics", SCHEMAS[quantity], start)
    for row in rows:
        segment.append([{**dict.fromkeys(names), **row}])
    return segment.path


def make_run(folder: Path, *, recipe: str = WATCHED, diverged: int | None = None, tails: bool = True) -> Path:
    (folder / "metrics").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(recipe)
    (folder / "status.json").write_text(json.dumps({"state": "finished", "seconds": 12.4, "error": ""}))
    rows = ["epoch,step,train/loss,train/accuracy,test/accuracy,name"]
    rows += [f"0,{s},{2.0 - s / 10},{s / 10},," for s in range(5)] + ["0,4,,,0.75,x", "0,9,nan,inf,0.5,"]
    (folder / "metrics" / "metrics.csv").write_text("\n".join([*rows, ""]))
    if tails:
        x = np.random.default_rng(0).standard_normal(500).astype(np.float32)
        records = [tail(0, layer, x) for layer in ("conv1.weight", "l.conv2.weight", "l.conv3.weight", "fc.weight")]
        path = record(folder, "gradient_tails", *records, tail(3, "fc.weight", x))
        os.truncate(path, path.stat().st_size - 3)
    curve = {"lr": 0.1, "multiples": [0.0, 0.5, 1.0], "relative": [1.0, 0.9, np.nan], "headroom": 0.5, "loss": 2.0}
    record(folder, "relative_loss", {"step": 0, **curve})
    if diverged is not None:
        row = {"step": diverged, "loss": np.inf, "rule": "not finite", "stopped": True}
        record(folder, "divergence", row)
    return folder
