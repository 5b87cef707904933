"""Question 5 of a replay: what would have held? Changes are tried on the same steps, and on some more beyond them.

Facts, under ``trials``; each trial has what :meth:`normzoo.replaying.trial.Trials.make` returns, and is None if it
was not made:
    ``control``: nothing is changed. If it holds, the run would have gone on, and nothing else is tried.
    ``without_batch``: the onset's batch (``step``) is left out for a quiet one (``instead``).
    ``without_batches``: if that does not hold, those of all ``steps`` from the onset on.
    ``clip``: the gradient is clipped (``at``): at twice the quiet norm, or where no step alone is out of line, at the
        quiet norm.
    ``float32``: passes are in float32, if the run's are in half precision.
    ``eps``: that of the first normalization layer told with dead channels (``module``) is larger (``eps``): 1000 times,
        and at least a tenth of the variance that the channel had at the quiet step; if that does not hold, 0.001 and
        1e-5, where they are above the layer's own. What is told is the first that holds, or else the last.
    ``rates``: learning rates times 1/2 to 1/1024 (``rate``); ``largest_rate``, the largest that was tried and holds,
        and ``lr``, the recorded learning rate at the alarm times it.
    ``warm_up``: the learning rate rises linearly over the steps, and over more on quiet batches if they are fewer than
        32 (``steps`` in all), and is full then; tried if the first step is one of the first 100 of the run, or of the
        first 1000 at a rate that had not risen.
    ``frozen``: the most suspicious parameter, or the parameters of a module (``name``), stay as they were first.
    ``seconds``: that all of them took, and ``passes``.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from normzoo.causes.observations.batch import bad_by_weights
from normzoo.causes.view import View
from normzoo.records.schema import Column, Figure, Schema
from normzoo.replaying.stage import Stage
from normzoo.replaying.suspect import suspicious_parameter
from normzoo.replaying.trial import Trials, attribute, largest_that_holds

TRIALS = Schema(
    "replay_trials",
    "one step of a trial",
    (
        Column("trial", "text", "what is changed"),
        Column("loss", "float", "loss before the update, mean over micro-batches and ranks"),
    ),
    (Figure("Loss in each trial", "line", x="step", y="loss", lines=("trial",), y_scale="log", y_label="loss"),),
)
NAMES = ("control", "without_batch", "without_batches", "clip", "float32", "eps", "warm_up", "frozen")
_HALF = ("16", "bf16")
_EPS = 1000  # times eps, and
_OF_QUIET = (
    0.1  # of the variance that a channel had, at least: an eps that still changes little where variances are usual
)
_USUAL_EPS = (1e-3, 1e-5)
_EARLY, _RATHER_EARLY = 100, 1000  # steps of a run
_LEAST_WARM_UP = 32  # steps; a ring may have few, as a run without a warm-up diverges soon


def ask(stage: Stage, evidence: dict[str, Any]) -> list[tuple[Schema, list[dict[str, Any]]]]:
    """Make the trials; see the module's docstring.

    Returns:
        the record ``replay_trials``.
    """
    facts: dict[str, Any] = {**dict.fromkeys(NAMES), "rates": [], "largest_rate": None, "lr": None}
    evidence["trials"] = facts
    kind = stage.capsule.about["kind"]
    if kind != "divergence":
        what = "an error" if kind == "exception" else "a signal"
        stage.notes.append(f"Nothing was tried on the steps, as {what} and no divergence ended the run.")
        return [(TRIALS, [])]
    before, began = stage.passes.copy(), time.monotonic()
    trials = Trials(stage, evidence["course"], bad_by_weights(View(evidence)) is True)
    facts["control"] = trials.make("nothing changed", _train(stage), start=stage.steps[-1] + 1)
    if facts["control"] and facts["control"]["holds"]:
        stage.notes.append("Nothing was tried on the steps, as the run goes on without a change.")
    else:
        _try_all(trials, evidence, facts)
    if trials.left_out:
        stage.notes.append(
            f"Not tried, as trials take at most ten times the time of the steps: {', '.join(trials.left_out)}."
        )
    facts |= {"seconds": time.monotonic() - began, "passes": dict(stage.passes - before)}
    rows = [
        {"step": stage.steps[0] + place, "trial": name, "loss": loss}
        for name, losses in trials.losses.items()
        for place, loss in enumerate(losses)
    ]
    return [(TRIALS, rows)]


def _try_all(trials: Trials, evidence: Mapping[str, Any], facts: dict[str, Any]) -> None:
    """Those that take the least time or tell the most come first, since there may be no time for all."""
    stage = trials.stage
    _leave_out(trials, facts)
    facts["clip"] = _clip(trials)
    facts["float32"] = _float32(trials, evidence)
    facts["eps"] = _raise_eps(trials, evidence)
    suspect, is_likely = suspicious_parameter(evidence)
    if is_likely:
        facts["frozen"] = _freeze(trials, suspect)

    def holds(rate: float) -> bool | None:
        found = trials.make(f"learning rate / {1 / rate:g}", _train(stage, rate=rate))
        if found is None:
            return None
        facts["rates"].append({"rate": rate, **found})
        return bool(found["holds"])

    facts["largest_rate"] = largest_that_holds(holds)
    at_alarm = stage.frame(max(step for step in stage.steps if step <= max(stage.alarm, stage.steps[0]))).lr
    if facts["largest_rate"] is not None and at_alarm is not None:
        facts["lr"] = facts["largest_rate"] * at_alarm
    facts["warm_up"] = _warm_up(trials)
    if not is_likely:
        facts["frozen"] = _freeze(trials, suspect)


def _train(stage: Stage, **options: Any) -> Any:
    def make(place: int, step: int, batch_of: int | None) -> float:
        return stage.train(step, batch_of=batch_of, **options)

    return make


def _leave_out(trials: Trials, facts: dict[str, Any]) -> None:
    stage, instead = trials.stage, trials.quiet_step()
    if instead is None:
        stage.notes.append("The onset's batch could not be left out, as there is no quiet one to take its place.")
        return

    def without(steps: Mapping[int, int | None]) -> Any:
        return lambda place, step, batch_of: stage.train(
            step, batch_of=steps.get(step) if batch_of is None else batch_of
        )

    onset = trials.onset
    found = trials.make(f"without the batch of step {onset}", without({onset: instead}), start=onset)
    facts["without_batch"] = found and {"step": onset, "instead": instead, **found}
    left = [step for step in stage.steps if onset <= step]
    if found and not found["holds"] and len(left) > 1:
        others = {step: trials.quiet_step(number) for number, step in enumerate(left)}
        found = trials.make(f"without the batches of steps {left[0]} to {left[-1]}", without(others), start=onset)
        facts["without_batches"] = found and {"steps": left, **found}


def _clip(trials: Trials) -> dict[str, Any] | None:
    """Clip at twice the quiet norm, in a steady rise at the quiet norm, from the first step on that this changes."""
    stage, course = trials.stage, trials.course
    if not (stage.run.automatic and course["median_norm"]):
        return None
    at = course["median_norm"] * (1 if course["onset_by"] == "alarm" else 2)
    own = stage.trainer.gradient_clip_val
    at = min(at, own / 4) if own else at
    norms = zip(stage.steps, course["norm"], strict=False)
    start = next((step for step, norm in norms if norm is not None and not norm <= at), None)
    if start is None:  # nothing would be clipped
        return None
    found = trials.make(f"gradient clipped at {at:.3g}", _train(stage, clip=at), start=start)
    return found and {"at": at, **found}


def _float32(trials: Trials, evidence: Mapping[str, Any]) -> dict[str, Any] | None:
    stage = trials.stage
    half = str((evidence.get("about") or {}).get("precision") or stage.trainer.precision).startswith(_HALF)
    if not half and "float16" not in str((evidence.get("first_bad") or {}).get("dtype")):
        return None
    try:
        return trials.make("passes in float32", _train(stage), within=lambda: _in_float32(stage))
    except RuntimeError as error:  # of a module that mixes dtypes by itself
        stage.notes.append(f"The passes could not be made in float32: {str(error).splitlines()[0]}.")
        return None


@contextmanager
def _in_float32(stage: Stage) -> Iterator[None]:
    """Inside, passes are in float32, and the optimizers' states, which steps change in place."""
    with stage.float32():
        for optimizer in stage.run.optimizers:
            for state in optimizer.state.values():
                halves = {k: v for k, v in state.items() if getattr(v, "dtype", None) in (torch.half, torch.bfloat16)}
                state.update({k: v.float() for k, v in halves.items()})
        yield


def _raise_eps(trials: Trials, evidence: Mapping[str, Any]) -> dict[str, Any] | None:
    layer = next((layer for layer in evidence.get("norm_layers") or [] if layer.get("dead")), None)
    if layer is None:
        return None
    name = layer["module"]
    module = trials.stage.run.named_modules().get(name)
    before = getattr(module, "eps", None)
    if not isinstance(before, float):
        return None
    largest = max(_EPS * before, _OF_QUIET * (layer.get("variance_quiet") or 0.0))
    facts = None
    for eps in (largest, *(usual for usual in _USUAL_EPS if before < usual < largest / 3)):
        larger = functools.partial(attribute, module, "eps", eps)
        found = trials.make(f"eps of {name} {eps:g}", _train(trials.stage), within=larger)
        facts = {"module": name, "eps": eps, **found} if found else facts
        if found is None or found["holds"]:
            break
    return facts


def _warm_up(trials: Trials) -> dict[str, Any] | None:
    stage, count = trials.stage, max(len(trials.steps), _LEAST_WARM_UP)
    rates = [lr for lr in (stage.frame(step).lr for step in stage.steps) if lr is not None]
    has_risen = bool(rates) and rates[-1] > rates[0]
    if stage.steps[0] >= (_EARLY if has_risen else _RATHER_EARLY):
        return None

    made = itertools.count(1)

    def make(place: int, step: int, batch_of: int | None) -> float:
        return stage.train(step, rate=min(next(made) / count, 1.0), batch_of=batch_of)

    found = trials.make(f"warm-up over {count} steps", make, beyond=count - len(trials.steps))
    return found and {"steps": count, **found}


def _freeze(trials: Trials, suspect: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if suspect is None:
        return None
    stage, names = trials.stage, suspect.get("parameters") or [suspect["name"]]
    first: dict[str, torch.Tensor] = {}

    @contextmanager
    def remembered() -> Iterator[None]:
        first.update({name: p for name, p in stage.parameters().items() if name in names})
        yield

    def make(place: int, step: int, batch_of: int | None) -> float:
        loss = stage.train(step, batch_of=batch_of)
        stage.set_parameters(first)
        return loss

    found = trials.make(f"{suspect['name']} frozen", make, within=remembered)
    return found and {"name": suspect["name"], **found}
