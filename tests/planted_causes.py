"""Evidence by hand, as replays of runs with one planted cause each give it."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

NAN, INF = math.nan, math.inf
FIRST, ONSET, ALARM = 32, 46, 48  # the ring's first step, the first out of line, the alarm
STEPS = list(range(FIRST, ALARM + 1))


def evidence(**changes: Any) -> dict[str, Any]:
    """Evidence of a ring of quiet steps, with changes: a dictionary changes single facts of a question."""
    quiet = [0.5 + 0.02 * (step % 3) for step in STEPS]
    whole: dict[str, Any] = {
        "about": {
            "capsule": "capsules/000",
            "kind": "divergence",
            "step": ALARM,
            "rule": "threshold",
            "value": 2000.0,
            "sentence": "alarm at step 48: the loss 2000 is above 1000; the median of the losses before it is 0.51",
            "recorded_ranks": 1,
            "ranks": 1,
            "precision": "32-true",
            "optimizer": "SGD",
            "notes": [],
            "parameters": 1000,
            "steps": [FIRST, ALARM],
        },
        "same": {
            "from": FIRST,
            "to": ALARM,
            "first_difference": None,
            "first_difference_of": None,
            "relative_difference": 0.0,
            "repeatable": True,
            "noise": 0.0,
            "deterministic": None,
            "diverges_again": True,
            "tensor": None,
            "raises": None,
        },
        "course": {
            "steps": STEPS,
            "loss": quiet,
            "after": [0.98 * loss for loss in quiet],
            "norm": [1.0] * len(STEPS),
            "lr": [0.1] * len(STEPS),
            "relative_update": [0.003] * len(STEPS),
            "median_loss": 0.51,
            "spread_loss": 0.02,
            "median_norm": 1.0,
            "onset": ONSET,
            "onset_by": "loss",
            "others_high": False,
            "fatal": ONSET - 1,
            "accelerating": False,
        },
        "data_or_state": {
            "batch": ONSET,
            "other": 38,
            "weights": [ONSET, FIRST],
            "loss": [[0.52, 0.53], [0.5, 0.51]],
            "norm": [[1.0, 1.0], [1.0, 1.0]],
            "other_after": 0.5,
            "others": [0.5, 0.52, 0.49],
            "others_first": [0.51, 0.53, 0.5],
        },
        "inputs": [
            {
                "path": "batch[0]",
                "dtype": "float32",
                "max": 4.0,
                "others_max": 4.2,
                "nonfinite": 0,
                "others_nonfinite": 0,
                "range": None,
                "outside": 0,
                "far": 0,
                "constant": False,
                "others_constant": False,
                "rows": [],
            },
            {
                "path": "batch[1]",
                "dtype": "int64",
                "max": 9.0,
                "others_max": 9.0,
                "nonfinite": 0,
                "others_nonfinite": 0,
                "range": [0, 9],
                "lowest": 0,
                "highest": 9,
                "distinct": 10,
                "outside": 0,
                "far": 0,
                "constant": False,
                "others_constant": False,
                "rows": [],
            },
        ],
        "samples": {
            "possible": True,
            "why_not": "",
            "held": [],
            "batch_loss": 0.52,
            "check": 1e-6,
            "samples": 32,
            "worst": [
                {"row": i, "rank": 0, "micro_batch": 0, "id": None, "loss": 1.0, "share": 0.06} for i in range(5)
            ],
            "median": 0.5,
            "error": None,
            "raising": [],
        },
        "parameters": {
            "steps": [FIRST, ONSET],
            "growth": [
                {"name": "first.weight", "from": 5.0, "to": 5.1, "share": 0.5, "straightness": 0.4},
                {"name": "head.weight", "from": 2.0, "to": 2.1, "share": 0.4, "straightness": 0.4},
            ],
            "at": ONSET,
            "loss_first": [0.51, 0.53],
            "loss_before": [0.5, 0.52],
            "loss_all_back": [0.51, 0.53],
            "put_back": [],
        },
        "fractions": {"step": ONSET - 1, "at": [0.0, 0.5, 1.0], "loss": [0.5, 0.5, 0.5], "largest_that_holds": 1.0},
        "first_bad": None,
        "norm_layers": [],
        "trials": {"control": {"holds": False, "losses": [NAN]}},
        "passes": {"steps": 100, "forward": 300, "backward": 100},
        "seconds": {"step": 0.01, "steps": 0.2, "replay": 1.5},
    }
    for key, change in changes.items():
        both = isinstance(whole[key], dict) and isinstance(change, dict)
        whole[key] = {**whole[key], **change} if both else change
    return deepcopy(whole)


def trials(control: bool = False, **held: bool | None) -> dict[str, Any]:
    """Trials by whether they hold; those that are None were not made."""
    given: dict[str, bool | None] = {
        "rate": control,
        "clip": control,
        "without_batch": control,
        "warm_up": None,
        **held,
    }
    rate = given.pop("rate")
    made: dict[str, Any] = {"control": {"holds": control, "losses": [0.5 if control else 2000.0]}}
    made["rates"] = [{"rate": x, "holds": bool(rate) and x <= 0.25, "losses": [0.5]} for x in (0.5, 0.25)]
    made["largest_rate"], made["lr"] = (0.25, 0.025) if rate else (None, None)
    more = {
        "clip": {"at": 1.0},
        "without_batch": {"step": ONSET},
        "warm_up": {"steps": 16},
        "frozen": {"name": "scale"},
        "eps": {"module": "norm", "eps": 1e-2},
    }
    for name, holds in given.items():
        made[name] = None if holds is None else {**more.get(name, {}), "holds": holds, "losses": [0.5]}
    return made


def rising(factor: float = 3.0, quiet: float = 0.5) -> dict[str, Any]:
    """A course whose losses rise from the step before the onset on."""
    loss = [quiet * factor ** max(step - ONSET + 2, 0) for step in STEPS]
    after = [x * (factor if step >= ONSET - 1 else 0.98) for step, x in zip(STEPS, loss, strict=True)]
    norm = [2 * x for x in loss]
    update = [0.01 * factor ** max(step - ONSET + 3, 0) for step in STEPS]
    return {"loss": loss, "after": after, "norm": norm, "relative_update": update, "others_high": True}


BAD_WEIGHTS = {
    "loss": [[4.5, 0.53], [4.0, 0.51]],
    "norm": [[9.0, 1.0], [8.0, 1.0]],
    "other_after": 14.0,
    "others": [4.1, 4.2, 3.9],
}
BAD_BATCH = {"loss": [[90.0, 80.0], [0.5, 0.51]], "norm": [[200.0, 180.0], [1.0, 1.0]], "other_after": 30.0}
CARRIED = {
    "worst": [
        {"row": 3, "rank": 0, "micro_batch": 0, "id": 1234, "loss": 2000.0, "share": 0.8},
        {"row": 7, "rank": 0, "micro_batch": 0, "id": 99, "loss": 400.0, "share": 0.19},
        {"row": 8, "rank": 0, "micro_batch": 0, "id": 5, "loss": 0.7, "share": 0.0},
    ]
}
HUGE = {
    "path": "batch[0]",
    "dtype": "float32",
    "max": 4e6,
    "others_max": 4.2,
    "nonfinite": 0,
    "range": None,
    "rows": [3, 7],
}
OVERFLOW = {
    "step": ONSET,
    "kind": "nonfinite",
    "direction": "forward",
    "module": "head",
    "class": "Linear",
    "op": "aten.addmm",
    "dtype": "float16",
    "input_max": 6e4,
    "limit": 65504.0,
    "input_nonfinite": False,
    "weight_nonfinite": [],
    "float32_finite": True,
}
QUIET_LOSSES = {"loss": [[0.52, 0.53], [0.5, 0.51]]}


def put_back(
    name: str,
    others: tuple[str, ...] = ("first.weight", "head.weight"),
    only: float = 4.0,
    share: float = 0.01,
    to: float = 40.0,
) -> dict[str, Any]:
    """Parameters of which one restores the loss: it makes up ``share`` of updates and alone makes the loss ``only``.

    Its norm goes from 2 to ``to``.
    """
    rows = [{"name": name, "parameters": [name], "loss": [0.52, 0.55], "only": [only, only]}]
    rows += [{"name": other, "parameters": [other], "loss": [3.9, 4.2], "only": [0.52, 0.55]} for other in others]
    growth = [{"name": name, "kind": "scalar", "from": 2.0, "to": to, "share": share, "straightness": 0.99}]
    growth += [{"name": other, "from": 5.0, "to": 5.2, "share": 0.4, "straightness": 0.3} for other in others]
    return {"put_back": rows, "growth": growth, "loss_before": [4.0, 4.5], "loss_all_back": [0.51, 0.53]}


SEVERAL = {
    "put_back": [
        {"name": name, "parameters": [name], "loss": [3.0, 3.1], "only": [0.6, 0.6]}
        for name in ("first.weight", "head.weight")
    ]
}
DEAD = {
    "module": "norm",
    "class": "BatchNorm1d",
    "eps": 1e-12,
    "channels": 8,
    "dead": 1,
    "channel": 3,
    "variance": 1e-14,
    "variance_quiet": 0.3,
    "gradient": 0.97,
}


RUNS_AWAY = {
    **SEVERAL,
    "loss_before": [4.0, 4.5],
    "loss_all_back": [0.51, 0.53],
    "largest": [{"name": "token.weight", "rms": 12.0, "kind_median": 0.1}],
    "growth": [
        {"name": "token.weight", "kind": "matrix", "from": 4.0, "to": 90.0, "share": 0.99, "straightness": 0.99},
        {"name": "head.weight", "kind": "matrix", "from": 2.0, "to": 40.0, "share": 0.01, "straightness": 0.4},
    ],
}


PLANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "an embedding that runs away, with which others go": (
        "parameter",
        evidence(course=rising(), data_or_state=BAD_WEIGHTS, parameters=RUNS_AWAY, trials=trials(rate=True)),
    ),
    "samples 10^6 times too large, SGD": (
        "data",
        evidence(
            data_or_state=BAD_BATCH,
            inputs=[HUGE],
            samples=CARRIED,
            trials=trials(rate=True, clip=True, without_batch=True),
            course={"relative_update": [0.003] * 14 + [2.0, 3.0, 5.0]},
        ),
    ),
    "samples 10^6 times too large, before a batch norm, which shields the loss": (
        "data",
        evidence(
            data_or_state={
                **QUIET_LOSSES,
                "loss": [[0.7, 0.75], [0.5, 0.51]],
                "norm": [[40.0, 44.0], [1.0, 1.0]],
                "other_after": 0.51,
            },
            inputs=[HUGE],
            trials=trials(control=True),
            course={"onset": ONSET, "onset_by": "norm"},
        ),
    ),
    "samples too large, AdamW, whose second moments make the update harmless": (
        "data",
        evidence(
            data_or_state={**BAD_BATCH, "other_after": 0.51},
            inputs=[HUGE],
            samples=CARRIED,
            trials=trials(control=True),
        ),
    ),
    "labels shuffled in one batch, with harm": (
        "data",
        evidence(
            data_or_state={"loss": [[5.5, 5.2], [0.1, 0.12]], "other_after": 2.0, "others": [0.1, 0.11]},
            samples={"median": 5.0},
            trials=trials(rate=True, clip=True, without_batch=True),
            course={"median_loss": 0.12},
        ),
    ),
    "labels shuffled in one batch, from which training recovers": (
        "data",
        evidence(
            data_or_state={"loss": [[5.5, 5.2], [0.1, 0.12]], "other_after": 0.12, "others": [0.1, 0.11]},
            samples={"median": 5.0},
            trials=trials(control=True),
            course={"median_loss": 0.12},
        ),
    ),
    "a NaN in one sample": (
        "data",
        evidence(
            about={"value": NAN},
            course={"onset_by": "nonfinite"},
            data_or_state={"loss": [[NAN, NAN], [0.5, 0.51]], "norm": [[NAN, NAN], [1.0, 1.0]], "other_after": NAN},
            inputs=[{**HUGE, "max": 4.0, "nonfinite": 1, "others_nonfinite": 0, "rows": [3]}],
            samples={"worst": [{"row": 3, "rank": 0, "micro_batch": 0, "id": None, "loss": NAN, "share": NAN}]},
            trials=trials(without_batch=True),
        ),
    ),
    "a loss that is finite, of a batch whose gradient is not": (
        "data",
        evidence(
            about={"value": NAN},
            course={"onset_by": "nonfinite"},
            data_or_state={"norm": [[NAN, NAN], [1.0, 1.0]], "other_after": NAN},
            trials=trials(without_batch=True),
        ),
    ),
    "samples too large in float16": (
        "data",
        evidence(
            about={"precision": "16-mixed", "value": NAN},
            course={"onset_by": "nonfinite"},
            data_or_state={"loss": [[INF, INF], [0.5, 0.51]], "norm": [[NAN, NAN], [1.0, 1.0]], "other_after": NAN},
            inputs=[HUGE],
            samples=CARRIED,
            first_bad={**OVERFLOW, "input_max": 4e6},
            trials=trials(without_batch=True, float32=True),
        ),
    ),
    "a label out of range, which raises an error": (
        "data",
        evidence(
            about={"kind": "exception", "step": ONSET, "value": None, "rule": None, "error": "IndexError: Target 77"},
            same={"raises": "IndexError: Target 77 is out of bounds."},
            course={"onset": ONSET, "onset_by": "alarm"},
            data_or_state={
                "loss": [[None, None], [0.5, 0.51]],
                "norm": [[None, None], [1.0, 1.0]],
                "other_after": None,
            },
            inputs=[
                {
                    "path": "batch[1]",
                    "max": 77.0,
                    "others_max": 9.0,
                    "range": [0, 9],
                    "highest": 77,
                    "lowest": 0,
                    "outside": 1,
                    "far": 1,
                    "rows": [5],
                }
            ],
            samples={"possible": False, "worst": [], "error": "IndexError: Target 77", "raising": [5], "median": None},
            trials=None,
        ),
    ),
    "learning rate too large, SGD": (
        "learning_rate",
        evidence(course=rising(), data_or_state=BAD_WEIGHTS, trials=trials(rate=True)),
    ),
    "learning rate too large, and clipping only delays it; the head put back restores": (
        "learning_rate",
        evidence(
            course=rising(),
            data_or_state=BAD_WEIGHTS,
            parameters=put_back("head.weight", ("first.weight",), only=0.6, to=3.0),
            trials=trials(rate=True, frozen=True),
        ),
    ),
    "learning rate too large, with channels that have been dead all along": (
        "learning_rate",
        evidence(
            course=rising(),
            data_or_state=BAD_WEIGHTS,
            parameters={**put_back("first.weight"), **SEVERAL},
            norm_layers=[{**DEAD, "variance_quiet": 0.0, "gradient": 0.0}],
            trials=trials(rate=True, warm_up=False, frozen=False, eps=False),
        ),
    ),
    "learning rate that makes the loss creep, small updates": (
        "learning_rate",
        evidence(
            course={**rising(1.2), "relative_update": [0.02] * len(STEPS), "accelerating": True},
            data_or_state=BAD_WEIGHTS,
            trials=trials(rate=True),
        ),
    ),
    "learning rate that jumps": (
        "learning_rate",
        evidence(
            course={**rising(), "lr": [0.01] * 13 + [10.0] * 4}, data_or_state=BAD_WEIGHTS, trials=trials(rate=True)
        ),
    ),
    "learning rate too large in float16, until numbers overflow": (
        "learning_rate",
        evidence(
            about={"precision": "16-mixed"},
            course=rising(),
            data_or_state=BAD_WEIGHTS,
            first_bad={**OVERFLOW, "dtype": "float32", "float32_finite": False},
            trials=trials(rate=True, float32=False),
        ),
    ),
    "no warm-up": (
        "warm_up",
        evidence(
            about={"step": 12, "steps": [0, 12]},
            same={"from": 0, "to": 12},
            course={
                **{key: value[-13:] for key, value in rising().items() if key != "others_high"},
                "steps": list(range(13)),
                "lr": [0.1] * 13,
                "onset": 10,
                "fatal": 9,
            },
            data_or_state={**BAD_WEIGHTS, "batch": 10, "weights": [10, 0]},
            trials=trials(rate=True, warm_up=True),
        ),
    ),
    "learning rate too large from the first step, with or without a warm-up": (
        "learning_rate",
        evidence(
            about={"step": 12, "steps": [0, 12]},
            same={"from": 0, "to": 12},
            course={
                **{key: value[-13:] for key, value in rising().items() if key != "others_high"},
                "steps": list(range(13)),
                "lr": [0.1] * 13,
                "onset": 10,
                "fatal": 9,
            },
            data_or_state={**BAD_WEIGHTS, "batch": 10, "weights": [10, 0]},
            trials=trials(rate=True, warm_up=False),
        ),
    ),
    "a channel without variance, where eps is small": (
        "normalization",
        evidence(
            course={"onset_by": "norm"},
            data_or_state={"norm": [[900.0, 850.0], [1.0, 1.0]], "other_after": 9.0},
            norm_layers=[DEAD],
            trials=trials(rate=True, clip=True, without_batch=True, eps=True),
        ),
    ),
    "an overflow in float16": (
        "precision",
        evidence(
            about={"precision": "16-mixed", "value": NAN, "rule": "not finite"},
            course={"onset_by": "nonfinite"},
            data_or_state={"loss": [[NAN, 0.53], [INF, 0.51]], "norm": [[NAN, 1.0], [NAN, 1.0]], "others": [NAN, INF]},
            first_bad=OVERFLOW,
            trials=trials(rate=True, float32=True),
        ),
    ),
    "moments of Adam that underflow in float16": (
        "precision",
        evidence(
            about={"precision": "16-true", "value": NAN},
            course={"onset_by": "nonfinite"},
            data_or_state={"loss": [[NAN, 0.53], [NAN, 0.51]], "norm": [[NAN, 1.0], [NAN, 1.0]], "others": [NAN, NAN]},
            first_bad={**OVERFLOW, "weight_nonfinite": ["first.weight"], "float32_finite": None},
            trials=trials(float32=True),
        ),
    ),
    "a scalar that explodes": (
        "parameter",
        evidence(
            course={**rising(), "relative_update": [0.003] * len(STEPS)},
            data_or_state=BAD_WEIGHTS,
            parameters={**put_back("scale"), "largest": [{"name": "scale", "rms": 40.0, "kind_median": None}]},
            trials=trials(rate=True, frozen=True),
        ),
    ),
    "a scalar whose updates are too long, until the others' are": (
        "parameter",
        evidence(
            course=rising(),
            data_or_state=BAD_WEIGHTS,
            parameters={**put_back("scale", share=0.999), "largest": [{"name": "scale", "rms": 40.0}]},
            trials=trials(rate=True, frozen=True),
        ),
    ),
    "a flipped bit in a weight": (
        "hardware",
        evidence(
            about={"value": NAN},
            same={
                "first_difference": 47,
                "first_difference_of": "loss",
                "relative_difference": INF,
                "diverges_again": False,
                "tensor": {"name": "first.weight", "element": [0, 3], "recorded": 1e37, "replayed": 0.05, "times": INF},
            },
            course={"onset_by": "nonfinite"},
            trials=trials(control=True),
        ),
    ),
    "code beside the step that changes gradients a little, until it diverges": (
        "hardware",
        evidence(
            same={
                "first_difference": 40,
                "first_difference_of": "loss",
                "relative_difference": 0.3,
                "diverges_again": False,
            },
            trials=trials(control=True),
        ),
    ),
    "a kernel that does not repeat": (
        "hardware",
        evidence(
            same={
                "first_difference": 33,
                "first_difference_of": "loss",
                "relative_difference": 0.1,
                "repeatable": False,
                "noise": 0.2,
                "deterministic": True,
                "diverges_again": False,
            },
            trials=trials(control=True),
        ),
    ),
    "a batch that is nothing special, long before the alarm": (
        "undetermined",
        evidence(course={"onset": 38}, data_or_state=BAD_BATCH, trials=trials(without_batch=False)),
    ),
    "a sample whose label may be wrong, in a batch from which training recovers": (
        "innocent",
        evidence(
            about={"rule": "spike"},
            data_or_state={"loss": [[1.6, 1.7], [0.5, 0.51]], "norm": [[4.0, 4.0], [1.0, 1.0]], "other_after": 0.51},
            samples={"worst": [{"row": 9, "rank": 0, "micro_batch": 0, "id": None, "loss": 40.0, "share": 0.8}]},
            trials=trials(control=True),
        ),
    ),
    "a hard batch": (
        "innocent",
        evidence(
            about={"rule": "spike"},
            data_or_state={"loss": [[1.6, 1.7], [0.5, 0.51]], "norm": [[4.0, 4.0], [1.0, 1.0]], "other_after": 0.51},
            trials=trials(control=True),
        ),
    ),
    "a hard batch, by the norm of its gradient": (
        "innocent",
        evidence(
            about={"rule": "gradient spike"},
            course={"onset_by": "norm"},
            data_or_state={"norm": [[15.0, 14.0], [1.0, 1.0]], "other_after": 0.5},
            trials=trials(control=True),
        ),
    ),
    "an error in the code": (
        "error",
        evidence(
            about={"kind": "exception", "step": ONSET, "value": None, "error": "RuntimeError: shapes"},
            same={"raises": "RuntimeError: shapes"},
            data_or_state={
                "loss": [[None, None], [0.5, 0.51]],
                "norm": [[None, None], [1.0, 1.0]],
                "other_after": None,
            },
            samples={"possible": False, "worst": [], "raising": [], "median": None},
            trials=None,
        ),
    ),
    "an error that does not come again": (
        "error",
        evidence(about={"kind": "exception", "step": ONSET, "value": None}, same={"raises": None}, trials=None),
    ),
    "a signal": ("undetermined", evidence(about={"kind": "signal", "value": None}, trials=None)),
    "a ring that starts after the damage": (
        "undetermined",
        evidence(
            course={"median_loss": 700.0, "spread_loss": 20.0, "onset_by": "alarm", "onset": ALARM},
            data_or_state={"loss": [[1000.0, 720.0], [900.0, 700.0]], "others": [910.0], "other_after": 905.0},
            trials=trials(control=True),
        ),
    ),
    "weights that are not finite from the first step on": (
        "undetermined",
        evidence(
            about={"value": NAN},
            course={"median_loss": None, "onset": FIRST, "onset_by": "nonfinite"},
            data_or_state={
                "weights": [FIRST, FIRST],
                "loss": [[NAN, NAN], [NAN, NAN]],
                "norm": [[NAN, NAN], [NAN, NAN]],
                "others": [NAN],
                "other_after": NAN,
            },
            trials=trials(),
        ),
    ),
    "another module than that of the run": (
        "undetermined",
        evidence(
            same={"first_difference": FIRST, "relative_difference": 0.5, "diverges_again": False},
            trials=trials(control=True),
        ),
    ),
    "nothing that was asked": ("undetermined", {}),
}
"""What was planted: the cause, and the evidence."""
