"""Evidence of replays, made by hand, that answers each question of a replay."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

from normzoo.causes import Finding, Findings, titles, write_evidence
from normzoo.records.schema import Column, Figure, Schema

SENTENCE = "The learning rate was too large: 0.0186, an eighth of it, holds over the same batches."
REFUTED = "Refuted if the loss leaves at 0.0186 as well."
SUGGESTION = "Divide the learning rate by 8, or warm it up for longer."
STEPS = list(range(32, 49))

EVIDENCE: dict[str, Any] = {
    "about": {"kind": "divergence", "step": 48, "recorded_ranks": 1, "ranks": 1, "precision": "32-true"},
    "same": {
        "from": 32,
        "to": 48,
        "first_difference": 47,
        "first_difference_of": "loss",
        "relative_difference": 1.5e-7,
        "repeatable": False,
        "noise": 2e-8,
        "deterministic": True,
        "diverges_again": True,
        "tensor": {"name": "fc.weight", "element": [3, 7], "recorded": 1e30, "replayed": 0.5, "times": 4e6},
    },
    "course": {"steps": STEPS, "loss": [float(step) for step in STEPS], "onset": 40, "onset_by": "loss", "fatal": 39},
    "data_or_state": {
        "batch": 40,
        "other": 33,
        "weights": [40, 32],
        "loss": [[19.1, 4.2], [18.5, 4.1]],
        "norm": [[30.7, 1.5], [29.0, math.inf]],
        "other_after": 21.0,
        "others": [18.0, 19.0],
        "others_first": [4.3, 4.4],
        "raises": None,
    },
    "inputs": [
        {
            "path": "batch[0]",
            "dtype": "float32",
            "max": 1e6,
            "others_max": 3.5,
            "nonfinite": 2,
            "range": None,
            "outside": 0,
            "constant": False,
            "rows": [5, 7],
        },
        {
            "path": "batch[1]",
            "dtype": "int64",
            "max": 9,
            "others_max": 9,
            "range": [0, 9],
            "outside": 1,
            "far": 1,
            "rows": [],
        },
    ],
    "samples": {
        "possible": True,
        "held": ["norm1"],
        "statistics_of": 40,
        "check": 1e-6,
        "worst": [
            {"row": 5, "rank": 0, "micro_batch": 0, "id": "img_005", "loss": 900.0, "share": 0.95, "hash": "ab12"},
            {"row": 7, "rank": 0, "micro_batch": 0, "id": None, "loss": math.nan, "share": None, "hash": "cd34"},
        ],
        "median": 0.7,
        "alone": {"statistics_of": 33, "worst": [{"row": 5, "loss": 1e4}], "median": 0.6},
        "raising": [{"row": 7, "rank": 0, "micro_batch": 0, "id": None}],
        "error": "IndexError: index 10 is out of bounds",
    },
    "parameters": {
        "steps": [32, 40],
        "at": 40,
        "growth": [
            {"name": "fc.weight", "from": 3.0, "to": 30.0, "share": 0.8, "straightness": 0.97, "gradient_share": 0.4}
        ],
        "largest": [{"name": "fc.weight", "rms": 2.0, "kind": "matrix", "kind_median": 0.1, "count": 640}],
        "put_back": [
            {"name": "fc", "loss": [4.4, 5.0], "only": [17.0, 18.0]},
            {"name": "fc.bias", "loss": [18.0, 19.0], "only": [4.1, 4.2]},
        ],
        "loss_before": [18.5, 19.1],
        "loss_all_back": [4.1, 4.2],
        "nonfinite": ["norm1.running_var"],
    },
    "fractions": {
        "step": 39,
        "at": [0.0, 0.5, 1.0],
        "loss": [4.0, 3.9, 19.0],
        "largest_that_holds": 0.55,
        "rise_at": 0.6,
        "update_by_layer": [{"layer": "fc.weight", "relative_update": 0.5}],
        "moments_rise": {"norm1": 2.5},
    },
    "first_bad": {
        "step": 40,
        "direction": "forward",
        "kind": "nonfinite",
        "module": "block.attn",
        "class": "Attention",
        "op": "aten.bmm",
        "dtype": "float16",
        "input_max": 700.0,
        "limit": 65504.0,
        "input_nonfinite": False,
        "weight_nonfinite": ["norm1.weight"],
        "times": 80.0,
        "depth": 12,
        "float32_finite": True,
    },
    "norm_layers": [
        {
            "module": "norm1",
            "class": "BatchNorm2d",
            "eps": 1e-5,
            "unit": "channel",
            "channels": 64,
            "dead": 1,
            "channel": 17,
            "variance": 1e-12,
            "variance_quiet": 0.3,
            "gradient": 0.9,
        }
    ],
    "trials": {
        "control": {"holds": False, "losses": [4.0, 19.0, 95.0, math.nan], "why": "nonfinite"},
        "rates": [{"rate": 0.25, "holds": False, "losses": [4.0, 9.0], "why": "loss"}, {"rate": 0.125, "holds": True}],
        "largest_rate": 0.125,
        "lr": 0.0186,
        "clip": {"at": 2.8, "holds": False, "losses": [4.0, 8.0]},
        "without_batch": {"step": 40, "holds": False, "losses": [4.0, 18.0]},
        "without_batches": {"steps": [40, 41, 42], "holds": False, "losses": [math.inf]},
        "warm_up": {"steps": 17, "holds": True, "losses": [4.0, 3.5]},
        "frozen": None,
        "float32": None,
        "eps": {"module": "norm1", "eps": 0.01, "holds": True, "losses": [4.0]},
    },
    "passes": {"steps": 170, "forward": 400, "backward": 200},
    "seconds": {"step": 0.05, "steps": 0.8, "replay": 9.5},
}


def schema(name: str, title: str, y: str, **more: Any) -> Schema:
    columns = (Column("step", "int", "step"), Column("x", "float", "x"), Column(y, "float", "a value"))
    return Schema(name, "a row", columns, (Figure(title, "line", x="x", y=y, **more),))


RECORDS: list[tuple[Schema, list[dict[str, Any]]]] = [
    (
        Schema(
            "replay_losses",
            "a step",
            (Column("when", "text", "when"), Column("loss", "float", "loss")),
            (Figure("Loss before and after each update", "line", x="step", y="loss", lines=("when",), y_scale="log"),),
        ),
        [
            {"step": step, "when": when, "loss": 1.1 ** (step + 2 * (when == "after"))}
            for step in STEPS
            for when in ("before", "after")
        ],
    ),
    *(
        (schema(name, title, "y"), [{"step": 39, "x": float(x), "y": 1.0 + x} for x in range(5)])
        for name, title in (
            ("replay_course", "Gradient norm"),
            ("replay_samples", titles.SAMPLES),
            ("replay_parameters", "Weight norm by parameter"),
            ("replay_fractions", titles.FRACTIONS),
            ("replay_depth", titles.DEPTH),
            ("replay_modules", titles.MODULES),
            ("replay_trials", "Loss in each trial"),
            ("replay_other", "Of a later version"),
        )
    ),
    (
        Schema(
            "replay_channels",
            "a channel at a site",
            (
                Column("site", "text", "site"),
                Column("fraction", "float", "part of the update"),
                Column("channel", "int", "channel"),
                Column("variance", "float", "variance"),
            ),
            (
                Figure(
                    titles.CHANNELS,
                    "heat map",
                    x="fraction",
                    y="channel",
                    z="variance",
                    facet="site",
                    z_scale="log",
                    x_label="part of the update",
                ),
            ),
        ),
        [
            {
                "step": 39,
                "site": site,
                "fraction": part / 20,
                "channel": channel,
                "variance": 10.0 ** (part * grows / 10),
            }
            for grows, site in enumerate(("norm1", "norm2", "norm3"))
            for part in range(21)
            for channel in range(16)
        ],
    ),
]


def make_findings(*named: str, **more: Any) -> Findings:
    """Findings with a cause for each title."""
    causes = [
        Finding(
            **{
                "cause": "learning_rate" if place == 0 else "parameter",
                "confidence": "low" if place else "high",
                "sentence": SENTENCE if place == 0 else f"Cause {place}.",
                "refuted_by": REFUTED,
                "figure": title,
                "suggestion": SUGGESTION,
                "score": 5.0 - place,
                **more,
            }
        )
        for place, title in enumerate(named or (titles.COURSE, titles.PARAMETERS))
    ]
    return Findings(causes, ["Steps 32 to 48 were made again."], ["With one rank of two, losses are not compared."])


def make_replay(
    capsule: Path, findings: Findings | None = None, *, records: Any = RECORDS[:1], **evidence: Any
) -> Path:
    """A replay in the folder of a capsule, with all evidence but for what is given."""
    folder = capsule / "replay"
    write_evidence(folder, {**copy.deepcopy(EVIDENCE), **evidence}, records, findings or make_findings())
    return folder
