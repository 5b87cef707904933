"""When a run diverges, what is kept of it, and what is done then."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.optim import Optimizer

from normzoo._errors import shown
from normzoo.callbacks._run.earlier_arguments import earlier_action, earlier_rules
from normzoo.callbacks._run.gradients import local_values, runs_step_hooks, withhold_gradients
from normzoo.callbacks._run.modules import Site
from normzoo.callbacks._run.ranks import Reading
from normzoo.callbacks.actions import Action, Alarm, DivergenceError, Record
from normzoo.callbacks.gradient_norm import GradientNorm
from normzoo.callbacks.judging import Judge
from normzoo.callbacks.measurement import Column, Measurement, Run, Sample, Step
from normzoo.callbacks.recorder import Recorder
from normzoo.callbacks.rules import KINDS, GradientNotFinite, GradientSpike, LossAbove, Rule, Seen, SkippedSteps
from normzoo.callbacks.schedule import Every, Schedule, is_number


class Divergence(Measurement):
    """Says when a run diverges, keeps what explains it, and on request ends the run.

    Rules judge what the run shows: the loss of each mini-batch, the norm of the gradient at each step, the scale of a
    GradScaler, activations. A divergence holds for the job if it holds on any rank, and all ranks decide alike, at the
    same step: values travel in one small reduction and are read one step late. At an alarm a row goes to the record
    ``divergence``, a capsule of the last steps is written, and the action is done. One divergence is one alarm: the
    next one comes once 50 steps have passed without a value that a rule flags. Logged as ``divergence/loss`` at the
    step where it happened.

    By default the rules are ``LossAbove(1e3)``, ``GradientNotFinite()``, ``GradientSpike()`` and ``SkippedSteps()``.
    Those about gradients judge the norms of a :class:`GradientNorm` among the callbacks that samples each step, and are
    silent without one.

    Args:
        *when: a schedule; or a number, which is read as the threshold for one more version, with a warning.
        every_n_steps: judge when the number of optimizer steps made is a multiple of this; or a schedule. The recorder
            takes in each step.
        rules: what counts as a divergence, of :mod:`normzoo.callbacks.rules` or your own; it judges by copies of them.
        action: what is done at an alarm: :class:`Record` by default, which goes on; :class:`Stop`, :class:`Raise`, or
            your own.
        recorder: of the last steps, for the capsule; None for a :class:`Recorder` of its own, False for none.
        strict: know the verdict before the optimizer's step, and leave the weights as they are if the action ends the
            run. It waits for the device once a micro-batch. Under manual optimization the losses of all backward passes
            are judged in the place of the one that ``training_step`` returns.
        dirpath: folder of the record; by default that of the Trainer's first logger, else a new one.
        label: sets the callback apart from others of its class: the record goes to a folder of this name in that one,
            and log keys begin with it.
        threshold: of the version before: ``rules=[LossAbove(threshold)]``.
        spike: of the version before: ``rules=[LossAbove(), LossSpike(spike)]``.
        window: of the version before: ``LossSpike(spike, window=window)``.
        two_sided: of the version before: ``LossSpike(spike, two_sided=True)``.
        stop: of the version before: ``action=Stop(exit_code=None)``.

    Raises:
        TypeError: for rules, an action or a recorder that are none.
        ValueError: at setup for unsupported strategies; for rules about gradients, if they were asked for, without a
            ``GradientNorm`` that samples each step, with ``strict=True`` also if it comes later; at the first step if
            ``training_step`` returns no loss under manual optimization.

    Source: threshold from Bjorck et al. 2018, arXiv 1806.02375, their experiments on divergence.
    """

    name = "divergence"
    row = "one divergence; no row if there was none"
    columns = (
        Column(
            "loss",
            "float",
            "loss of the mini-batch that diverged, largest over ranks, smallest for the rule `drop`; NaN counts as "
            "infinite; null if the rule judges a norm",
            logged=True,
        ),
        Column("rule", "text", "which rule says so: `threshold`, `not finite`, `spike`, `drop`, or another one's"),
        Column("stopped", "bool", "whether the callback ended training"),
        Column("rank", "int", "rank whose value has diverged; null for a value that all ranks share"),
        Column("value", "float", "value that has diverged: a loss, a norm, a scale, a magnitude"),
        Column("capsule", "text", "folder of the capsule, from that of the record; null if there is none"),
    )
    needs = frozenset({"loss", "activations"})  # the latter if a rule does
    unit = "micro-batch"
    reduce = "gather"
    shards = True
    steps_again = False

    def __init__(
        self,
        *when: float | Schedule,
        every_n_steps: int | Schedule = 1,
        rules: Sequence[Rule] | None = None,
        action: Action | None = None,
        recorder: Recorder | bool | None = None,
        strict: bool = False,
        dirpath: str | None = None,
        label: str | None = None,
        threshold: float | None = None,
        spike: float | None = None,
        window: int | None = None,
        two_sided: bool | None = None,
        stop: bool | None = None,
    ) -> None:
        if len(when) > 1:
            raise TypeError(f"Divergence takes one argument without a name, a schedule, not {len(when)}")
        for first in when:
            if is_number(first):
                threshold = first
            else:
                every_n_steps = first  # type: ignore[assignment]
        self._rules_given = rules is not None  # then a GradientNorm has to be there if one needs it
        if any(value is not None for value in (threshold, spike, window, two_sided)):
            if rules is not None:
                raise ValueError("threshold, spike, window and two_sided stand for rules; give rules alone")
            rules = [*earlier_rules(bool(when), threshold, spike, window, two_sided), *_usual_rules()[1:]]
        if stop is not None:
            if action is not None:
                raise ValueError("stop stands for an action; give the action alone, such as Stop()")
            action = earlier_action(stop)
        self.action = _checked_action(Record() if action is None else action)
        self.recorder = _checked_recorder(recorder)
        self.strict = strict
        self._judge = Judge(_checked_rules(_usual_rules() if rules is None else rules))
        self.needs = frozenset({"loss"}).union(*(rule.needs & {"activations"} for rule in self.rules))
        self._gradient_norm: GradientNorm | None = None
        self._judges_norms = False  # whether a rule needs them, and they are measured at each step
        self._told_before = 0.0  # GradientNorm has told of the steps before this one
        self._alarms: list[tuple[Alarm, float | None]] = []  # that are not written yet, with their losses
        self._written: list[Alarm] = []  # that are not acted on yet
        self._withholds = False  # whether no update is to be made
        self._early = False  # whether the loss of the micro-batch was sent before its backward pass
        self._last: int | None = None  # the step of the micro-batch before
        self._micro: Any = None  # what the recorder keeps of the micro-batch
        self._capsule: Path | None = None  # of what cut the run short
        self._interrupted = self._scales = False
        super().__init__(every_n_steps, dirpath=dirpath, label=label)
        self.forget()

    @property
    def rules(self) -> list[Rule]:
        """What counts as a divergence."""
        return self._judge.rules

    @property
    def step(self) -> int | None:
        """Optimizer steps taken when the first value diverged, or None."""
        return self._judge.step

    @property
    def loss(self) -> float | None:
        """The loss of the mini-batch in which the first value diverged, or None."""
        return self._judge.loss

    # The run begins

    def sites(self, run: Run) -> dict[Site, nn.Module]:
        """The modules that rules follow."""
        return {site: module for rule in self.rules for site, module in rule.sites(run).items()}

    def prepare(self, run: Run) -> None:
        """Refuse what cannot be judged, and find out whose norms of gradients are."""
        super().prepare(run)
        sharing = [m for m in run.measurements if isinstance(m, Divergence) and m.recorder is self.recorder]
        if self.recorder is not None and len(sharing) > 1:
            raise ValueError("two Divergence were given the same Recorder; give each a Recorder() of its own")
        measuring = self._others(run, GradientNorm)
        self._gradient_norm = next((m for m in measuring if m.schedule == Every(1)), next(iter(measuring), None))
        judging = next((type(rule).__name__ for rule in self.rules if "gradient_norm" in rule.needs), None)
        each_step = self._gradient_norm is not None and self._gradient_norm.schedule == Every(1)
        self._judges_norms = judging is not None and each_step
        if judging and self._rules_given and not self._judges_norms:
            raise ValueError(
                f"Divergence has the rule {judging}, which judges norms measured by GradientNorm at each step, and no "
                "GradientNorm does that; add GradientNorm() to the callbacks, or leave the rule out"
            )
        if self._judges_norms and self.strict:
            order = [m for m in run.measurements if m is self or m is self._gradient_norm]
            if order[0] is self:
                raise ValueError(
                    f"Divergence(strict=True) has the rule {judging}, and GradientNorm measures after it; put "
                    "GradientNorm before Divergence in the list of callbacks"
                )

    def begin(self, run: Run) -> None:
        """Continue the record; a divergence between two optimizer steps may be older than a checkpoint at its step."""
        super().begin(run)
        self._alarms, self._written = [], []
        self._judged_early.clear()
        self._told_before, self._scales = run.step, _skips_steps(run)
        self._withholds = self._early = self._interrupted = False
        self._micro = self._capsule = self._last = None
        if self._row is not None and self._row["step"] >= run.step and self._record is not None:
            self._record.append([self._row])
        if self.recorder is not None:
            self.recorder.asked_by = self.asked_by
            self.recorder.start(run, self.folder)

    # A step

    def batch_begins(self, run: Run, batch: Any, batch_idx: int) -> None:
        """A micro-batch is about to be trained on."""
        super().batch_begins(run, batch, batch_idx)
        self._early = False
        if self.recorder is not None:
            self._micro = self.recorder.batch_begins(run, batch, batch_idx)
        if self.strict and self.action.stops:
            self._applied_hooks = run.before_update(self._events.applies)

    def batch_told(self, run: Run, batch: Any) -> None:
        """A plain loop tells the micro-batch that it trains on."""
        super().batch_told(run, batch)
        if self.recorder is not None:
            self.recorder.batch_told(batch)

    def hold_loss(self, run: Run, loss: Tensor) -> None:
        """A plain loop tells the loss of a micro-batch."""
        super().hold_loss(run, loss)
        if self.recorder is not None:
            self._micro = self.recorder.batch_begins(run, None, 0)

    def backward_begins(self, run: Run, loss: Tensor) -> None:
        """With ``strict=True``, send the loss early enough to be read before the step."""
        super().backward_begins(run, loss)
        step = self._step
        if not self.strict or step is None or (self._early and run.automatic):  # LBFGS makes several passes
            return
        scale = run.scaler.scale(torch.ones((), device=loss.device)) if run.scaler is not None else 1
        step.loss = loss.detach() / scale * (run.accumulation if run.automatic else 1)
        self._keep_heard(step)
        self._send(step, self.schedule(step.number), self._micro if run.automatic else None, self._last)
        self._early, self._last = True, step.number

    def step_begins(self, run: Run, optimizer: Optimizer) -> None:
        """With ``strict=True``, judge all that there is of the step before the optimizer makes it."""
        super().step_begins(run, optimizer)
        self._told_before = run.step
        if not (self.strict and self.schedule(run.step)):
            return
        super().flush(run)
        self._judge_norms(math.inf)
        self._withholds |= bool(self._alarms) and self.action.stops
        if self.action.raises or run.why_not_again():  # steps made again now would disturb the one that is being made
            self._write_alarms(run)
            self._act(run)
        if not runs_step_hooks(optimizer):
            self.applies(optimizer)

    def applies(self, optimizer: Optimizer) -> None:
        """With ``strict=True``, leave the weights as they are once the run is to end."""
        super().applies(optimizer)
        if self._withholds:
            withhold_gradients(optimizer)

    def activation(self, step: Step, site: Site, module: nn.Module, x: Any) -> Tensor:
        """The largest magnitude."""
        if not isinstance(x, Tensor):
            raise ValueError(
                f"Divergence judges the magnitude of tensors, and the {site[1]} of {site[0]} is a {type(x).__name__}; "
                "choose other sites for ActivationsAbove"
            )
        x = local_values(x)  # ranks are put together when they are judged
        x = x if x.is_floating_point() or x.is_complex() else x.float()
        return torch.linalg.vector_norm(x, math.inf).float() if x.numel() else x.new_full((), -1.0).float()

    def measure(self, step: Step) -> None:
        """Send the loss, the scale and the activations; a rank whose step returned no loss takes part as well."""
        judged = self.schedule(step.number) and not self._early
        if judged or (self.recorder is not None and not (self._early and step.run.automatic)):
            self._send(step, judged, self._micro, step.number)
        self._early = False

    def batch_ended(self, run: Run, loss: Tensor | None = None, divided: int = 1) -> None:
        """A micro-batch has been trained on: act on what is known of the one before."""
        super().batch_ended(run, loss, divided)
        self._micro = None
        self._act(run)

    # A step later

    def rows(self, sample: Sample, values: Tensor) -> list[dict[str, Any]]:
        """Judge a micro-batch, (ranks, values); the row of an alarm is made once its capsule has been written."""
        of_ranks = values.tolist()
        losses = [loss if there_is_one else None for there_is_one, loss, *_ in of_ranks]
        scale = of_ranks[0][2] if self._scales else None
        if self.recorder is not None:
            self.recorder.judged(sample.about["micro"], losses, scale)
        if sample.about["judged"]:
            first = 3 if self._scales else 2
            activations = {
                site: [None if of_rank[i] < 0 else of_rank[i] for of_rank in of_ranks]
                for i, site in enumerate(sample.about["sites"], first)
            }
            self._judge_norms(sample.step)  # which came before the loss did
            scale_of = sample.about["scale_of"]
            if scale is not None and scale_of != sample.step:
                if scale_of is not None:
                    self._ask(Seen(scale_of, scale=scale, scaler=True))
                scale = None
            self._ask(Seen(sample.step, losses, {}, scale, activations, self._scales))
        return []

    def told(self, run: Run, measurement: Measurement, sample: Sample, rows: Sequence[Mapping[str, Any]]) -> None:
        """GradientNorm has made its rows of a step, whose norms are judged with the next micro-batch."""
        if measurement is not self._gradient_norm:
            return
        if self.recorder is not None:
            self.recorder.norms(rows)
        for row in rows if self._judges_norms else ():
            key = row["step"], row["optimizer"]
            if not row["of"] and row["norm"] is not None and key not in self._judged_early:
                self._norms[key] = row["norm"]
        self._judged_early -= {(row["step"], row["optimizer"]) for row in rows}

    def flush(self, run: Run) -> None:
        """Judge what has come, and write the rows and capsules of alarms; all ranks together."""
        super().flush(run)
        self._judge_norms(self._told_before)
        self._write_alarms(run)

    def flush_alone(self, run: Run) -> None:
        """Judge what has come; of several ranks one may do so alone, so that capsules come later."""
        if run.ranks == 1:
            self.flush(run)
        else:
            super().flush(run)

    def end(self, run: Run) -> None:
        """Training has ended: judge what came last, and end as the action asks for."""
        if self._gradient_norm is not None:
            self._gradient_norm.flush(run)
        self._told_before = math.inf
        super().end(run)
        self._act(run)
        if self.recorder is not None:
            self.recorder.end()
        self.action.ended(run)

    def interrupted(self, run: Run, error: BaseException) -> None:
        """Training was cut short: write the capsule, unless a divergence that has one is the cause."""
        if self.recorder is not None and not isinstance(error, DivergenceError):
            self._capsule = self.recorder.interrupted(run, error)
        self._interrupted, self._micro = True, None
        super().interrupted(run, error)
        if self.recorder is not None:
            self.recorder.end()

    # State

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        norms = [[*key, norm] for key, norm in self._norms.items()]
        return {**self._judge.state_dict(), "row": self._row, "norms": norms}

    def forget(self) -> None:
        """Drop the verdict, and what the rules remember, of another run."""
        super().forget()
        self._judge.reset()
        self._row: dict[str, Any] | None = None  # of the last alarm
        self._norms: dict[tuple[int, int], float] = {}  # by (step, optimizer), not judged yet
        self._judged_early: set[tuple[int, int]] = set()  # of these before their rows were made

    def restore(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned, in this version or the one before."""
        self.forget()
        self._judge.load_state_dict(state_dict)
        earlier = None if self.step is None else self._row_of(Alarm(self.step, state_dict["rule"], math.nan), self.loss)
        self._row = state_dict.get("row", earlier)
        self._norms = {(step, optimizer): norm for step, optimizer, norm in state_dict.get("norms", [])}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_gradient_norm": None, "_judges_norms": False, "_micro": None}

    # Sending, judging, acting

    def _samples_batch(self, run: Run) -> bool:
        """The recorder takes in each micro-batch, whichever are judged."""
        return self.recorder is not None or super()._samples_batch(run)

    def _send(self, step: Step, judged: bool, micro: Any, scale_of: int | None) -> None:
        """Send what there is of a micro-batch, and the scale as the step ``scale_of`` has left it.

        That is in float32, in one tensor: whether there is a loss, the loss, the scale if steps may be skipped, and the
        largest magnitude at each site, negative where the module was not called.
        """
        if step.loss is None:
            values = [*torch.zeros(2, dtype=torch.float32, device=step.run.device)]
        else:
            loss = local_values(step.loss)  # mostly one number in float32, which needs no conversion
            loss = loss if loss.dtype == torch.float32 else loss.float()
            values = [_one(loss.device), loss.reshape(()) if loss.ndim else loss]
        one = _one(values[0].device)
        if self._scales:
            values.append(step.run.scaler.scale(one))
        values += [torch.stack(calls).amax() if calls else -one for calls in step.seen.values()]
        reading = Reading(torch.stack(values), self.reduce)
        self.send(step, reading, judged=judged, micro=micro, scale_of=scale_of, sites=[*step.seen])

    def _ask(self, seen: Seen) -> None:
        """Have values judged, in the order in which they came."""
        verdict = self._judge.judge(seen)
        if verdict is not None:
            self._alarms.append(verdict)

    def _judge_norms(self, before: float) -> None:
        """Judge the norms of steps before this one, step by step, also those that are not in the record yet."""
        if self._judges_norms:
            assert self._gradient_norm is not None
            newest = self._gradient_norm.newest(before)
            self._norms |= {key: norm for key, norm in newest.items() if key not in self._judged_early}
            self._judged_early |= newest.keys()
        if not self._norms:
            return
        for number in sorted({step for step, _ in self._norms if step < before}):
            keys = [key for key in self._norms if key[0] == number]
            norms = {optimizer: self._norms.pop((step, optimizer)) for step, optimizer in keys}
            if self.schedule(number):
                self._ask(Seen(number, norms=norms, scaler=self._scales))

    def _write_alarms(self, run: Run) -> None:
        """Write the capsule and the row of each alarm; all ranks together, unless the run was cut short."""
        alarms, self._alarms = self._alarms, []
        for alarm, loss in alarms:
            capsule = self._capsule
            if self.recorder is not None and not self._interrupted:
                of_alarm = {"kind": "divergence", "step": alarm.step, "rule": alarm.rule, "value": alarm.value}
                capsule = self.recorder.capsule(run, {**of_alarm, "rank": alarm.rank, "sentence": alarm.sentence})
            alarm = replace(alarm, capsule=capsule, folder=self.folder)
            rank_zero_info(alarm.sentence)
            self._row = self._row_of(alarm, loss)
            row = {name: value for name, value in self._row.items() if name != "step"}
            self._hand_out(run, Sample(Step(run, alarm.step), {}), [row])
            self._written.append(alarm)

    def _row_of(self, alarm: Alarm, loss: float | None) -> dict[str, Any]:
        capsule = alarm.capsule and alarm.folder and os.path.relpath(alarm.capsule, alarm.folder)
        told = {"step": alarm.step, "loss": loss, "rule": alarm.rule, "stopped": self.action.stops}
        return {**told, "rank": alarm.rank, "value": alarm.value, "capsule": capsule}

    def _act(self, run: Run) -> None:
        """Do what is to be done at the alarms that have been written; all ranks together."""
        alarms, self._written = self._written, []
        for alarm in alarms:
            self._withholds |= self.strict and self.action.stops
            try:
                self.action.act(run, alarm)
            except Exception as error:
                self.ends_the_run_by = error if self.action.raises else None
                raise


@cache
def _one(device: torch.device) -> Tensor:
    """The number 1 in float32, made once: making it takes a tenth of the time in which a loss is judged."""
    return torch.ones((), dtype=torch.float32, device=device)


def _skips_steps(run: Run) -> bool:
    """Whether a GradScaler skips steps whose gradients are not finite."""
    return run.scaler is not None and getattr(run.scaler, "is_enabled", lambda: True)()


def _usual_rules() -> list[Rule]:
    return [LossAbove(), GradientNotFinite(), GradientSpike(), SkippedSteps()]


def _checked_rules(rules: Sequence[Rule]) -> list[Rule]:
    if not isinstance(rules, list | tuple) or not rules or not all(isinstance(rule, Rule) for rule in rules):
        raise TypeError(f"rules must be a list of at least one rule, such as [LossAbove(1e3)], not {shown(rules)}")
    for rule in rules:
        if not rule.needs or not rule.needs <= {*KINDS}:
            needs = ", ".join(map(repr, sorted(rule.needs))) or "nothing"
            raise ValueError(f"{type(rule).__name__} needs {needs}; a rule can need {', '.join(map(repr, KINDS))}")
    return [*rules]


def _checked_action(action: Action) -> Action:
    if not isinstance(action, Action):
        raise TypeError(f"action must be Record(), Stop(), Raise() or one of your own, not {shown(action)}")
    return action


def _checked_recorder(recorder: Recorder | bool | None) -> Recorder | None:
    if recorder is None:
        return Recorder()
    if recorder is False:
        return None
    if not isinstance(recorder, Recorder):
        raise TypeError(f"recorder must be a Recorder(), None for the usual one, or False, not {shown(recorder)}")
    return recorder
