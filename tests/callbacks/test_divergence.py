"""Divergence: what it judges and when, the step it names, what it does then, and the checkpoint."""

from __future__ import annotations

import copy
import json
import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from callbacks_small import SmallNet, TwoOptimizers, images, loader, trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from watch_small import assert_equal, batch_loss, sgd, small_net, train

from normzoo import load_run, watch
from normzoo.callbacks import (
    Action,
    ActivationsAbove,
    Alarm,
    Divergence,
    DivergenceError,
    DivergenceExit,
    Every,
    Flag,
    GradientNorm,
    GradientSpike,
    LossAbove,
    LossSpike,
    Raise,
    Record,
    Recorder,
    Rule,
    Run,
    Seen,
    SkippedSteps,
    Stop,
)
from normzoo.callbacks._run.lightning import LightningRun
from normzoo.callbacks._run.loop import LoopRun


class Scripted(SmallNet):
    """Returns a given loss at each batch."""

    def __init__(self, losses: dict[int, float]) -> None:
        super().__init__(lr=0.0)
        self.losses = losses

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        wanted = self.losses.get(batch_idx, 1.0)
        return self.net(batch[0]).sum() * 0 + wanted


def run(
    folder: Path,
    callback: Divergence,
    losses: dict[int, float],
    net: Any = None,
    data: Any = None,
    others: Any = (),
    **options: Any,
) -> Any:
    t = trainer(str(folder), callbacks=[callback, *others], **options)
    t.fit(net or Scripted(losses), data or loader())
    return t


@pytest.mark.parametrize(
    ("loss", "rule"),
    [(1000.5, "threshold"), *((float(v), "not finite") for v in ("nan", "inf", "-inf"))],
)
def test_the_step_and_the_rule(tmp_path: Path, loss: float, rule: str) -> None:
    callback = Divergence()
    assert run(tmp_path, callback, {6: loss, 9: 1e9}).global_step == 20
    assert callback.step == 6
    [row] = load_run(tmp_path / "log")["divergence"].to_dict("records")
    assert row["loss"] == (loss if loss == 1000.5 else float("inf"))
    assert (row["step"], row["rule"], row["stopped"]) == (6, rule, False)


def test_a_loss_at_the_threshold_has_not_diverged(tmp_path: Path) -> None:
    callback = Divergence()
    run(tmp_path, callback, {3: 1000.0})
    assert callback.step is None


def test_stop_ends_training_one_step_later(tmp_path: Path) -> None:
    callback = Divergence(action=Stop(None))
    assert run(tmp_path, callback, {6: 2e3}).global_step == 8
    assert callback.step == 6


def test_the_last_step_is_judged_too(tmp_path: Path) -> None:
    callback = Divergence()
    run(tmp_path, callback, {19: 2e3})
    assert callback.step == 19


def test_a_spike_over_the_running_median(tmp_path: Path) -> None:
    callback = Divergence(rules=[LossAbove(), LossSpike(5.0, window=4)])
    run(tmp_path, callback, {2: 5.5, 10: 5.5})
    assert callback.step == 10  # at step 2 the window was not full


def test_a_drop_is_recorded_with_its_loss(tmp_path: Path) -> None:
    callback = Divergence(rules=[LossAbove(), LossSpike(5.0, window=4, two_sided=True)])
    run(tmp_path, callback, {8: -9.0})
    [row] = load_run(tmp_path / "log")["divergence"].to_dict("records")
    assert (row["step"], row["loss"], row["rule"]) == (8, -9.0, "drop")


@pytest.mark.filterwarnings("ignore:.*`training_step` returned `None`")
def test_a_step_without_a_loss_is_not_judged(tmp_path: Path) -> None:
    class Skips(Scripted):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx % 3 == 1 else super().training_step(batch, batch_idx)

    callback = Divergence(rules=[LossAbove(), LossSpike(5.0, window=4)])
    fitted = trainer(str(tmp_path), callbacks=[callback], max_steps=10)
    fitted.fit(Skips({i: -14.0 + 0.01 * (i % 5) for i in range(20)}), loader())
    assert callback.step is None
    assert max(callback.state_dict()["recent"]) < -13


def test_accumulation_counts_optimizer_steps_and_undoes_the_division(tmp_path: Path) -> None:
    callback = Divergence(rules=[LossAbove(90.0)])
    run(tmp_path, callback, {7: 100.0}, accumulate_grad_batches=4, max_steps=5)
    assert callback.step == 1
    assert callback.loss == pytest.approx(100.0)


def test_manual_optimization_without_a_loss_is_refused(tmp_path: Path) -> None:
    class Manual(SmallNet):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.optimizers().step()

    with pytest.raises(ValueError, match="return\\s+{'loss': loss}"):
        trainer(str(tmp_path), callbacks=[Divergence()]).fit(Manual(), loader())


def test_an_unsupported_strategy_is_refused_at_setup(tmp_path: Path) -> None:

    class FSDPStrategy: ...

    with pytest.raises(ValueError, match="supports one device, DDP and ModelParallelStrategy; under FSDPStrategy"):
        Divergence().admit(LightningRun(SimpleNamespace(strategy=FSDPStrategy()), SmallNet()))  # type: ignore[arg-type]


def record(folder: Path) -> list[dict[str, Any]]:
    return load_run(folder)["divergence"].to_dict("records")


# One alarm for one divergence


class Marked(Rule):
    """Flags losses above 0, and remembers the others."""

    def __init__(self) -> None:
        self.passed_steps: list[int] = []

    def judge(self, seen: Seen) -> Flag | None:
        return Flag("marked", seen.losses[0] or 0) if (seen.losses[0] or 0) > 0 else None

    def passed(self, seen: Seen) -> None:
        self.passed_steps.append(seen.step)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 70), max_size=12), st.lists(st.booleans(), min_size=12, max_size=12))
def test_an_alarm_comes_after_fifty_quiet_steps(distances: list[int], marks: list[bool]) -> None:
    steps = [sum(distances[: i + 1]) for i in range(len(distances))]
    callback = Divergence(rules=[Marked()])
    for step, mark in zip(steps, marks, strict=False):
        callback._ask(Seen(step, losses=[float(mark)]))
    marked = [step for step, mark in zip(steps, marks, strict=False) if mark]
    first = [s for i, s in enumerate(marked) if i == 0 or s - marked[i - 1] > 50]
    assert [alarm.step for alarm, _ in callback._alarms] == first
    assert callback.step == (first[0] if first else None)
    [rule] = callback.rules
    assert rule.passed_steps == [s for s, mark in zip(steps, marks, strict=False) if not mark]  # type: ignore[attr-defined]


def test_two_divergences_have_a_row_each(tmp_path: Path) -> None:
    callback = Divergence(recorder=False)
    run(tmp_path, callback, {3: 2e3, 9: 3e3, 70: 4e3}, max_steps=80, data=loader(800))
    assert [row["step"] for row in record(tmp_path / "log")] == [3, 70]
    assert (callback.step, callback.loss) == (3, 2e3)


def test_what_one_rule_flags_enters_no_window() -> None:
    callback = Divergence(rules=[LossAbove(1e3), LossSpike(5.0, window=5)])
    found = []
    for step, loss in enumerate([2e3, 1.0, 1.1, 0.9, 1.05, 60.0, 50.0]):
        callback._ask(Seen(100 * step, losses=[loss]))
        found.append(callback._alarms.pop()[0].rule if callback._alarms else None)
    assert found == ["threshold", None, None, None, None, None, "spike"]  # the window is full at 60


def test_what_is_said_to_people() -> None:
    callback = Divergence()
    for step, losses in enumerate([[1.0, 2.0], [1.0, 3.0], [1.0, None], [5e3, 2.0]]):
        callback._ask(Seen(step, losses=losses))
    [(alarm, loss)] = callback._alarms
    assert loss == 5e3
    assert alarm.sentence == (
        "the run has diverged at step 3: the loss 5000 is above 1000 on rank 0; the median of the losses before it is 2"
    )


# Norms of gradients


class Kicked(SmallNet):
    """Has a gradient a million times as large at a step."""

    def __init__(self, at: int, factor: float = 1e6) -> None:
        super().__init__()
        self.at, self.factor = at, factor

    def on_after_backward(self) -> None:
        if self.global_step == self.at:
            for p in self.parameters():
                p.grad *= self.factor  # type: ignore[operator]


@pytest.mark.parametrize("accumulated", [1, 3])
@pytest.mark.parametrize("factor", [1e6, math.nan])
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_a_gradient_is_judged_by_the_norms_of_gradient_norm(
    tmp_path: Path, accumulated: int, factor: float, first: bool
) -> None:
    norm, callback = GradientNorm(layers=None), Divergence(recorder=False)
    both: list[Any] = [norm, callback] if first else [callback, norm]
    options: dict[str, Any] = {"max_steps": 16, "accumulate_grad_batches": accumulated, "gradient_clip_val": 1.0}
    trainer(str(tmp_path), callbacks=both, **options).fit(Kicked(14, factor), loader(8 * 16 * accumulated))
    [row] = record(tmp_path / "log")
    norms = load_run(tmp_path / "log")["gradient_norm"]
    assert row["step"] == callback.step == 14
    assert row["rule"] == ("gradient spike" if factor == 1e6 else "gradient not finite")
    assert repr(row["value"]) == repr(float(norms["norm"][14]))
    assert callback.loss is None
    assert math.isnan(row["loss"])
    assert math.isnan(row["rank"])


def test_without_a_gradient_norm_usual_rules_are_silent_and_others_refused(tmp_path: Path) -> None:
    callback = Divergence(recorder=False)
    trainer(str(tmp_path), callbacks=[callback], max_steps=13).fit(Kicked(11, 1e2), loader())
    assert callback.step is None
    for norms in ([], [GradientNorm(2)], [GradientNorm(lambda step: True)]):
        message = "^Divergence has the rule GradientSpike, which judges .*; add GradientNorm\\(\\) to the callbacks, or"
        made = trainer(
            str(tmp_path), callbacks=[Divergence(rules=[LossAbove(), GradientSpike()]), *norms], logger=False
        )
        with pytest.raises(ValueError, match=message):
            made.fit(SmallNet(), loader())
    model = small_net()
    watching = watch(model, sgd(model), Divergence(rules=[GradientSpike()]), dirpath=tmp_path / "loop")
    with pytest.raises(ValueError, match="^Divergence has the rule GradientSpike, which judges "), watching:
        pass


def test_each_optimizer_has_norms_of_its_own(tmp_path: Path) -> None:
    class Two(TwoOptimizers):
        def training_step(self, batch: Any, batch_idx: int) -> Any:  # type: ignore[override]
            for i, optimizer in enumerate(self.optimizers()):
                optimizer.zero_grad()
                loss = self.net(batch[0]).square().mean()
                self.manual_backward(loss * (1e5 if (i, batch_idx) == (1, 12) else 1.0))
                optimizer.step()
            return {"loss": loss}

    callback = Divergence(recorder=False)
    fitted = trainer(str(tmp_path), callbacks=[GradientNorm(), callback], max_steps=28)
    fitted.fit(Two(), loader())
    [row] = record(tmp_path / "log")
    assert (row["step"], row["rule"]) == (25, "gradient spike")  # the second of two optimizers, at the 13th batch


def test_norms_are_judged_on_the_schedule(tmp_path: Path) -> None:
    callback = Divergence(every_n_steps=2, recorder=False)
    trainer(str(tmp_path), callbacks=[GradientNorm(), callback], max_steps=26).fit(Kicked(23, math.nan), loader())
    assert callback.step == 24  # the weights are NaN since
    rules = [rule for rule in callback.rules if isinstance(rule, GradientSpike)]
    assert rules[0].state_dict()["recent"][0][1] == (
        load_run(tmp_path / "log")["gradient_norm"].query("of == ''")["norm"][:23:2].tolist()
    )


# A GradScaler


def scaled(**options: Any) -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", **options))


class Overflows(SmallNet):
    """Has a loss that is not finite at some batches."""

    def __init__(self, *batches: int) -> None:
        super().__init__()
        self.batches = batches

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * math.inf if batch_idx in self.batches else loss


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(("batches", "step"), [((3, 4, 9), None), (tuple(range(4, 20)), 11)])
def test_a_step_that_a_scaler_skips_is_no_divergence_and_eight_in_a_row_are(
    tmp_path: Path, batches: tuple[int, ...], step: int | None, strict: bool
) -> None:
    callback = Divergence(strict=strict, recorder=False)
    options: dict[str, Any] = {"plugins": [scaled(init_scale=2.0**10)], "max_steps": 20}
    trainer(str(tmp_path), callbacks=[GradientNorm(), callback], **options).fit(Overflows(*batches), loader())
    rows = record(tmp_path / "log")
    assert [(row["step"], row["rule"], row["value"]) for row in rows] == (
        [] if step is None else [(11, "skipped steps", 8)]
    )


def test_a_scale_below_one_is_a_divergence(tmp_path: Path) -> None:
    callback = Divergence(rules=[SkippedSteps(100)], recorder=False)
    options: dict[str, Any] = {"plugins": [scaled(init_scale=4.0)], "max_steps": 8}
    trainer(str(tmp_path), callbacks=[callback], **options).fit(Overflows(*range(20)), loader())
    [row] = record(tmp_path / "log")
    assert (row["step"], row["rule"], row["value"]) == (2, "scale", 0.5)


def test_a_scaler_that_is_not_enabled_skips_nothing(tmp_path: Path) -> None:
    callback = Divergence(recorder=False)
    options: dict[str, Any] = {"plugins": [scaled(enabled=False)], "max_steps": 8}
    trainer(str(tmp_path), callbacks=[callback], **options).fit(Overflows(5), loader())
    assert (callback.step, callback._judge.rule) == (5, "not finite")


# Activations


def test_activations_are_judged_in_a_fit_and_in_a_loop(tmp_path: Path) -> None:
    rules = [ActivationsAbove(50.0, "*.0", "output"), ActivationsAbove(1e3, "*.1", "input")]
    data = images()
    data.tensors[0][32:40] *= 1e3
    large = DataLoader(data, batch_size=8)
    options: dict[str, Any] = {"max_steps": 12, "accumulate_grad_batches": 2, "data": large}
    callback = Divergence(rules=rules, recorder=False)
    run(tmp_path, callback, {}, net=SmallNet(), **options)
    [row] = record(tmp_path / "log")
    assert (row["step"], row["rule"], row["rank"]) == (2, "activations of net.0", 0)
    net, model = SmallNet(), small_net()
    net.net.load_state_dict(model.state_dict())
    callback = Divergence(rules=[ActivationsAbove(50.0, "0")], recorder=False)
    with watch(model, sgd(model), callback, dirpath=tmp_path / "loop") as watching:
        for x, y in large:
            loss = batch_loss(model, (x, y))
            watching.loss(loss)
            largest = model[0](x).detach().abs().max().item()
            if largest > 50:
                break
            loss.backward()
            watching._run.optimizers[0].step()
    [row] = record(tmp_path / "loop")
    assert (row["step"], row["value"]) == (4, largest)
    assert not model[0]._forward_hooks


def test_an_output_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    class Pair(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x, x

    class Net(SmallNet):
        def __init__(self) -> None:
            super().__init__()
            self.pair = Pair()

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.pair(batch[0])
            return super().training_step(batch, batch_idx)

    with pytest.raises(
        ValueError, match="^Divergence judges .*, and the output of pair is a tuple; choose other sites"
    ):
        run(tmp_path, Divergence(rules=[ActivationsAbove(1.0, "pair")]), {}, net=Net())


# What is done


class Noted(Action):
    """Notes the step at which it acts, and that training has ended."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def act(self, run: Run, alarm: Alarm) -> None:
        self.seen.append((run.step, alarm))

    def ended(self, run: Run) -> None:
        self.seen.append("ended")


def test_an_action_of_ones_own_is_asked_when_the_row_is_there(tmp_path: Path) -> None:
    action = Noted()
    run(tmp_path, Divergence(action=action, recorder=False), {6: 2e3})
    (step, alarm), ended = action.seen
    assert (step, alarm.step, alarm.rule, alarm.value, alarm.rank, alarm.folder) == (
        8,
        6,
        "threshold",
        2e3,
        0,
        tmp_path / "log",
    )
    assert ended == "ended"


def test_stop_saves_and_exits(tmp_path: Path) -> None:
    callback = Divergence(action=Stop(), recorder=False)
    with pytest.raises(DivergenceExit) as caught:
        run(tmp_path, callback, {6: 2e3})
    assert (caught.value.code, caught.value.alarm.step) == (79, 6)
    [row] = record(tmp_path / "log")
    assert (row["step"], row["stopped"]) == (6, True)
    saved = torch.load(tmp_path / "log" / "diverged.ckpt", weights_only=False)
    assert (saved["global_step"], saved["callbacks"]["Divergence"]["step"]) == (8, 6)


def test_raise_raises_one_step_later(tmp_path: Path) -> None:
    net = Scripted({6: math.nan})
    fitted = trainer(str(tmp_path), callbacks=[Divergence(action=Raise(), recorder=False)])
    with pytest.raises(
        DivergenceError, match="^the run has diverged at step 6: the loss is nan; the median of the losses bef"
    ):
        fitted.fit(net, loader())
    assert fitted.global_step == 8
    [row] = record(tmp_path / "log")
    assert (row["step"], row["rule"], row["stopped"]) == (6, "not finite", True)
    with pytest.raises(DivergenceError):  # of the last step
        run(tmp_path / "last", Divergence(action=Raise(), recorder=False), {19: math.nan})


def test_a_loop_is_stopped_or_raised_in(tmp_path: Path) -> None:
    def loop(action: Action, steps: int = 9) -> int:
        model = small_net()
        optimizer = sgd(model)
        with watch(model, optimizer, Divergence(action=action, recorder=False), dirpath=tmp_path) as watching:
            for step in range(steps):
                train(model, optimizer, watching, steps=1, losses={0: 2e3 if step == 4 else 1.0})
                if watching.should_stop:
                    break
        return watching.step

    with pytest.raises(DivergenceExit) as caught:
        loop(Stop(3))
    assert caught.value.code == 3
    assert torch.load(tmp_path / "diverged.ckpt")["step"] == 6
    assert loop(Stop(None)) == 6
    with pytest.raises(DivergenceError, match="at step 4"):
        loop(Raise())
    with pytest.raises(DivergenceError, match="at step 4"):  # on leaving
        loop(Raise(), steps=5)


# Before the step


class Watched(Callback):
    """Keeps the weights as they are before each step."""

    def __init__(self) -> None:
        self.before: dict[int, Any] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.before[trainer.global_step] = copy.deepcopy(pl_module.state_dict())


class Plain(SmallNet):
    """Without layers whose forward pass changes something."""

    def __init__(self, losses: dict[int, float], optimizer: str = "sgd", manual: bool = False) -> None:
        super().__init__(optimizer)
        self.net[1] = nn.Identity()
        self.losses, self.automatic_optimization = losses, not manual

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = batch_loss(self.net, batch)
        loss = loss * self.losses.get(batch_idx, 1.0)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer_name == "fused":
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1, fused=True)
        return super().configure_optimizers()


WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "automatic": ({}, {}),
    "clipped": ({}, {"gradient_clip_val": 0.5}),
    "accumulated": ({}, {"accumulate_grad_batches": 2}),
    "adamw": ({"optimizer": "adamw"}, {}),
    "manual": ({"manual": True}, {}),
    "scaler": ({}, {"scaled": True}),
    "scaler, fused": ({"optimizer": "fused"}, {"scaled": True}),
    "fused": ({"optimizer": "fused"}, {}),
}


def strictly(
    tmp_path: Path, way: str, action: Action, strict: bool = True, recorder: Any = None, **more: Any
) -> tuple[Any, Plain, Watched]:
    """A fit whose loss at batch 12 is a million times as large."""
    of_net, options = WAYS[way]
    options = dict(options)
    if options.pop("scaled", False):
        options["plugins"] = [scaled(init_scale=8.0)]
    torch.manual_seed(0)
    net, kept = Plain({12: 1e6}, **of_net), Watched()
    callbacks = [kept, GradientNorm(layers=None), Divergence(strict=strict, action=action, recorder=recorder)]
    fitted = trainer(str(tmp_path), callbacks=callbacks, **{"max_steps": 10, **options, **more})
    error = None
    try:
        fitted.fit(net, loader())
    except (DivergenceError, DivergenceExit) as raised:
        error = raised
    return error, net, kept


@pytest.mark.parametrize("way", WAYS)
def test_strictly_the_weights_are_as_before_the_step(tmp_path: Path, way: str) -> None:
    step = 6 if way == "accumulated" else 12
    error, net, kept = strictly(tmp_path / "stop", way, Stop(), max_steps=16)
    assert isinstance(error, DivergenceExit)
    [row] = record(tmp_path / "stop" / "log")
    assert (row["step"], row["rule"]) == (step, "threshold")
    assert_equal(dict(net.state_dict()), dict(kept.before[step]))
    saved = torch.load(tmp_path / "stop" / "log" / "diverged.ckpt", weights_only=False)
    assert_equal(dict(saved["state_dict"]), dict(kept.before[step]))
    assert saved["global_step"] == step + (way != "accumulated")  # known at the first micro-batch of the step
    error, net, kept = strictly(tmp_path / "raise", way, Raise(), max_steps=16)
    assert isinstance(error, DivergenceError)
    assert_equal(dict(net.state_dict()), dict(kept.before[step]))
    assert max(kept.before) == step


@pytest.mark.parametrize("way", WAYS)
def test_strictly_the_verdict_is_the_same_and_the_run_as_well(tmp_path: Path, way: str) -> None:
    _, plain, _ = strictly(tmp_path / "later", way, Record(), strict=False, recorder=False, max_steps=16)
    _, net, _ = strictly(tmp_path / "before", way, Record(), max_steps=16)
    assert_equal(dict(net.state_dict()), dict(plain.state_dict()))
    later, before = (load_run(tmp_path / name / "log") for name in ("later", "before"))
    assert_equal(later["divergence"].to_dict("list")["step"], before["divergence"].to_dict("list")["step"])
    [a], [b] = later["divergence"].to_dict("records"), before["divergence"].to_dict("records")
    assert (a["rule"], a["loss"], a["value"], a["rank"]) == (b["rule"], b["loss"], b["value"], b["rank"])
    assert later["gradient_norm"].equals(before["gradient_norm"])  # `applied` is not lost
    assert b["capsule"] == f"capsules/000_step_{a['step']:08d}"


@pytest.mark.parametrize("action", [Raise(), Stop(None)])
def test_strictly_a_gradient_is_judged_before_its_step(tmp_path: Path, action: Action) -> None:
    kept, callback = Watched(), Divergence(strict=True, action=action, recorder=False)
    net = Kicked(14)
    net.net[1] = nn.Identity()
    fitted = trainer(str(tmp_path), callbacks=[kept, GradientNorm(), callback], max_steps=20)
    with pytest.raises(DivergenceError, match="at step 14") if isinstance(action, Raise) else nullcontext():
        fitted.fit(net, loader())
    assert fitted.global_step == (14 if isinstance(action, Raise) else 15)
    assert (callback.step, callback._judge.rule) == (14, "gradient spike")
    assert_equal(dict(net.state_dict()), dict(kept.before[14]))
    assert len(record(tmp_path / "log")) == 1


def test_strictly_gradient_norm_comes_first(tmp_path: Path) -> None:
    made = trainer(str(tmp_path), callbacks=[Divergence(strict=True), GradientNorm()], logger=False)
    with pytest.raises(
        ValueError, match="^Divergence\\(strict=True\\) has the rule GradientNotFinite, .* in the list of callbacks$"
    ):
        made.fit(SmallNet(), loader())
    callbacks = [Divergence(strict=True, rules=[LossAbove()], recorder=False), GradientNorm()]
    trainer(str(tmp_path), callbacks=callbacks, logger=False, max_steps=2).fit(SmallNet(), loader())


@pytest.mark.parametrize("told", ["before", "after"])
def test_strictly_a_loop_keeps_its_weights(tmp_path: Path, told: str) -> None:
    model = small_net()
    model[1] = nn.Identity()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    callbacks = [GradientNorm(), Divergence(strict=True, action=Stop(None), recorder=False)]
    with watch(model, optimizer, *callbacks, dirpath=tmp_path) as watching:
        for step, batch in enumerate(loader()):
            optimizer.zero_grad()
            loss = batch_loss(model, batch) * (1e9 if step == 12 else 1)
            if told == "before":
                watching.loss(loss)
            loss.backward()
            if told == "after":
                watching.loss(loss)
            before = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
            optimizer.step()
            if watching.should_stop:
                break
    assert (step, watching.step) == (12, 13)
    assert_equal([model.state_dict(), optimizer.state_dict()], before)
    assert [row["step"] for row in record(tmp_path)] == [12]


def test_strictly_both_optimizers_keep_their_weights(tmp_path: Path) -> None:
    class Two(TwoOptimizers):
        def training_step(self, batch: Any, batch_idx: int) -> Any:  # type: ignore[override]
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                loss = (self.net[6](self.net[5](self.net[4](self.net[0](batch[0]))))).square().mean()
                self.manual_backward(loss * (1e9 if batch_idx == 5 else 1.0))
                optimizer.step()
            return {"loss": loss}

    net, kept = Two(), Watched()
    callbacks = [kept, GradientNorm(), Divergence(strict=True, action=Stop(None), recorder=False)]
    fitted = trainer(str(tmp_path), callbacks=callbacks, max_steps=40)
    fitted.fit(net, loader())
    assert fitted.global_step == 12
    assert_equal(dict(net.state_dict()), dict(kept.before[10]))


# The recorder


class Spied(Recorder):
    """Notes what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def start(self, run: Run, folder: Path | None) -> None:
        self.calls.append(("start", folder))

    def batch_told(self, batch: Any) -> None:
        self.calls.append(("told", len(batch)))

    def batch_begins(self, run: Run, batch: Any, batch_idx: int) -> Any:
        self.calls.append(("begins", run.step, None if batch is None else batch_idx))
        return run.step, batch_idx

    def judged(self, micro: Any, losses: Any, scale: float | None) -> None:
        self.calls.append(("judged", micro, losses, scale))

    def norms(self, rows: Any) -> None:
        self.calls.append(("norms", rows[0]["step"]))

    def capsule(self, run: Run, about: Any) -> Path | None:
        self.calls.append(("capsule", run.step, about["step"], about["kind"], about["rule"]))
        assert repr(json.loads(json.dumps(about))) == repr(about)
        return self.calls[0][1] / "capsules" / "here"

    def interrupted(self, run: Run, error: BaseException) -> Path | None:
        self.calls.append(("interrupted", type(error).__name__))
        return self.calls[0][1] / "capsules" / "cut"

    def end(self) -> None:
        self.calls.append(("end",))

    def named(self, name: str) -> list[tuple[Any, ...]]:
        return [call[1:] for call in self.calls if call[0] == name]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("every", [1, 4])
def test_the_recorder_takes_in_each_step(tmp_path: Path, every: int, strict: bool) -> None:
    spied = Spied()
    callback = Divergence(every_n_steps=every, recorder=spied, strict=strict)
    made = trainer(str(tmp_path), callbacks=[GradientNorm(), callback], max_steps=6)
    made.fit(Scripted({4: 2e3}), loader())
    assert spied.named("start") == [(tmp_path / "log",)]
    assert spied.named("begins") == [(i, i) for i in range(6)]
    losses = [[2e3 if i == 4 else 1.0] for i in range(6)]
    assert spied.named("judged") == [((i, i), loss, None) for i, loss in enumerate(losses)]
    assert spied.named("norms") == [(i,) for i in range(6)]
    assert spied.named("capsule") == [(5 if strict else 6, 4, "divergence", "threshold")]
    assert spied.calls[-1] == ("end",)
    assert [row["capsule"] for row in record(tmp_path / "log")] == ["capsules/here"]


def test_the_recorder_of_a_manual_step_has_the_loss_that_is_returned(tmp_path: Path) -> None:
    spied = Spied()
    callback = Divergence(recorder=spied, strict=True)
    run(tmp_path, callback, {}, net=Plain({}, manual=True), max_steps=3)
    assert [micro for micro, *_ in spied.named("judged")].count(None) == 3  # losses of backward passes
    assert [micro for micro, *_ in spied.named("judged") if micro is not None] == [(0, 0), (1, 1), (2, 2)]


def test_the_recorder_of_a_loop_is_told_its_batches(tmp_path: Path) -> None:
    spied, model = Spied(), small_net()
    optimizer = sgd(model)
    with watch(model, optimizer, Divergence(recorder=spied), GradientNorm(), dirpath=tmp_path) as watching:
        train(model, optimizer, watching, steps=3, losses={1: math.nan})
    assert [call[0] for call in spied.calls[:4]] == ["start", "told", "begins", "told"]
    assert [math.isnan(losses[0]) for _, losses, _ in spied.named("judged")] == [False, True, False]
    assert [row["capsule"] for row in record(tmp_path)] == ["capsules/here"]


class FailsAt(Callback):
    def __init__(self, batch: int, error: BaseException) -> None:
        self.batch, self.error = batch, error

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch:
            raise self.error


def test_a_run_that_is_cut_short_has_one_capsule(tmp_path: Path) -> None:
    spied = Spied()
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, Divergence(recorder=spied), {4: 2e3}, others=[FailsAt(5, ZeroDivisionError())])
    assert spied.named("interrupted") == [("ZeroDivisionError",)]
    assert spied.named("capsule") == []  # steps cannot be made again any more
    assert [(row["step"], row["capsule"]) for row in record(tmp_path / "log")] == [(4, "capsules/cut")]
    assert spied.calls[-1] == ("end",)
    spied = Spied()
    with pytest.raises(DivergenceError):
        run(tmp_path / "raised", Divergence(recorder=spied, action=Raise()), {4: 2e3})
    assert (spied.named("interrupted"), len(spied.named("capsule"))) == ([], 1)


# State


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable")
def test_windows_go_on_without_a_seam(tmp_path: Path) -> None:
    """A run that is saved in the middle of a step and resumed judges as one that is not."""

    def callbacks(folder: Path) -> list[Any]:
        rules = [LossAbove(1e4), LossSpike(8.0, window=6), GradientSpike(least=5, window=8)]
        return [GradientNorm(dirpath=str(folder)), Divergence(rules=rules, dirpath=str(folder), recorder=False)]

    class Saves(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 15 and trainer.ckpt_path is None:
                trainer.save_checkpoint(tmp_path / "saved.ckpt")

    class Net(SmallNet):
        def __init__(self) -> None:
            super().__init__()
            self.net[3] = nn.Identity()

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = batch_loss(self.net, batch) * (1 + 0.1 * (batch_idx % 3))
            return loss * 50 if batch_idx == 17 else loss

    def fit(folder: Path, saves: bool = False, **options: Any) -> Any:
        torch.manual_seed(1)
        made = callbacks(folder)
        others = [Saves()] if saves else []
        more: dict[str, Any] = {"max_steps": 10, "accumulate_grad_batches": 2, "logger": False}
        same = [part[:8].repeat(20, *[1] * (part.ndim - 1)) for part in images().tensors]  # in each batch
        data = DataLoader(TensorDataset(*same), batch_size=8)
        trainer(str(tmp_path), callbacks=[*made, *others], **more).fit(Net(), data, **options)
        return made[1]

    whole = fit(tmp_path / "whole")
    fit(tmp_path / "resumed", saves=True)
    saved = torch.load(tmp_path / "saved.ckpt", weights_only=False)["callbacks"]["Divergence"]
    assert [step for step, *_ in saved["norms"]] == [7]  # told, and not judged before the step after it
    assert json.loads(json.dumps(saved)) == saved
    resumed = fit(tmp_path / "resumed", ckpt_path=tmp_path / "saved.ckpt", weights_only=False)
    assert resumed.state_dict() == whole.state_dict()
    assert_equal(*(str(record(tmp_path / name)) for name in ("whole", "resumed")))
    assert whole.step == 8


def test_the_state_of_an_earlier_version_is_read() -> None:
    earlier = {"step": None, "loss": None, "rule": None}
    callback = Divergence(rules=[LossSpike(2.0, window=3, two_sided=True)])
    callback.load_state_dict({**earlier, "recent": [1.0, math.inf, 2.0, 3.0]})  # of the version before that one, too
    verdicts = [callback.rules[0].judge(Seen(0, losses=[loss])) for loss in (4.9, 5.0, -1.0)]
    assert [verdict and verdict.rule for verdict in verdicts] == [None, "spike", "drop"]  # 1.4826 is the unit
    callback.load_state_dict({"step": 4, "loss": 5.0, "rule": "spike", "recent": [1.0], "smallest": [1.0]})
    assert (callback.step, callback.loss) == (4, 5.0)
    callback._ask(Seen(20, losses=[math.nan]))
    assert callback._alarms == []  # it is the same divergence
    other = Divergence(rules=[LossAbove(), LossSpike(2.0, window=3)])
    other.load_state_dict(callback.state_dict())
    assert other.state_dict()["rules"][1][1] == callback.state_dict()["rules"][0][1]
    assert {k: v for k, v in other.state_dict().items() if k != "rules"} == {
        k: v for k, v in callback.state_dict().items() if k != "rules"
    }


def test_another_run_starts_afresh() -> None:
    given = LossSpike(2.0, window=3)
    callbacks = [Divergence(rules=[given]), Divergence(rules=[given])]
    for step in range(5):
        callbacks[0]._ask(Seen(step, losses=[float(step)]))
    assert given.state_dict() == callbacks[1].rules[0].state_dict() == LossSpike(2.0, window=3).state_dict()
    fresh = Divergence(rules=[given]).state_dict()
    assert callbacks[0].state_dict() != fresh
    callbacks[0].forget()
    assert callbacks[0].state_dict() == fresh


def test_a_rank_that_saves_alone_neither_acts_nor_writes_a_capsule(tmp_path: Path) -> None:
    class OfTwo(LoopRun):
        ranks = 2  # type: ignore[assignment]

    spied, action = Spied(), Noted()
    callback = Divergence(recorder=spied, action=action, dirpath=str(tmp_path))
    model = small_net()
    loop = OfTwo(model, [sgd(model)], [], 0)
    loop.measurements, loop.dirpath = [callback], tmp_path
    callback.adopt(loop, goes_on=False)
    callback.prepare(loop)
    callback.begin(loop)
    callback.hold_loss(loop, torch.tensor(2e3))
    callback.batch_ended(loop, torch.tensor(2e3))
    callback.flush_alone(loop)
    assert (callback.state_dict()["step"], spied.named("capsule"), action.seen) == (0, [], [])
    assert record(tmp_path) == []
    callback.hold_loss(loop, torch.tensor(1.0))
    callback.batch_ended(loop, torch.tensor(1.0))
    assert (len(spied.named("capsule")), len(action.seen), len(record(tmp_path))) == (1, 1, 1)


# Arguments


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rules": []}, TypeError, "rules must be a list of at least one rule, such as .*, not \\[\\]"),
        ({"rules": LossAbove()}, TypeError, "rules must be a list"),
        ({"rules": [LossAbove]}, TypeError, "rules must be a list"),
        ({"action": Stop}, TypeError, "action must be Record\\(\\), Stop\\(\\), Raise\\(\\) or one of your own, not"),
        (
            {"recorder": True},
            TypeError,
            "recorder must be a Recorder\\(\\), None for the usual one, or False, not True",
        ),
        ({"threshold": 3.0, "rules": [LossAbove()]}, ValueError, "stand for rules; give rules alone"),
        ({"stop": True, "action": Stop()}, ValueError, "stop stands for an action; give the action alone"),
        ({"two_sided": True}, ValueError, "two_sided=True is about the rule spike; pass rules="),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Divergence(**options)


def test_a_rule_has_to_need_what_there_is() -> None:
    class Odd(Rule):
        needs = frozenset({"losses"})

    with pytest.raises(
        ValueError, match="^Odd needs 'losses'; a rule can need 'loss', 'gradient_norm', 'scale', 'acti"
    ):
        Divergence(rules=[Odd()])


@pytest.mark.filterwarnings("ignore:Divergence")
@pytest.mark.parametrize(
    "options", [{"threshold": 0.0}, {"spike": -1.0}, {"spike": "5"}, {"spike": True}, {"window": 2.5}, {"window": 0}]
)
def test_earlier_arguments_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must be a (number above 0|whole number of at least 1), not"):
        Divergence(**options)


@pytest.mark.parametrize(
    ("options", "new", "rules", "action"),
    [
        ({"threshold": 5.0}, r"rules=\[LossAbove\(5.0\)\]", [5.0, None], Record),
        ({"spike": 8.0}, r"rules=\[LossSpike\(8.0\)\]", [1e3, (8.0, 50, False)], Record),
        ({"spike": 8.0, "window": 5, "two_sided": True}, "LossSpike", [1e3, (8.0, 5, True)], Record),
        ({"stop": True}, r"action=Stop\(exit_code=None\)", [1e3, None], Stop),
        ({"stop": False}, r"action=Record\(\), or leave it out", [1e3, None], Record),
    ],
)
def test_earlier_arguments_work_for_one_more_version(
    options: dict[str, Any], new: str, rules: list[Any], action: type[Action]
) -> None:
    with pytest.warns(UserWarning, match=new) as warned:
        callback = Divergence(**options)
    assert len(warned) == len(options)
    above = [rule.threshold for rule in callback.rules if isinstance(rule, LossAbove)]
    spikes = [(r.deviations, r.window, r.two_sided) for r in callback.rules if isinstance(r, LossSpike)]
    assert [*above, *(spikes or [None])] == rules
    assert len(callback.rules) == 4 + len(spikes)
    assert type(callback.action) is action
    assert getattr(callback.action, "exit_code", None) is None


def test_a_number_without_a_name_is_the_threshold_for_one_more_version() -> None:
    with pytest.warns(
        UserWarning, match=r"Divergence\(500\) is read as its threshold .* rules=\[LossAbove\(500\)\], or every"
    ):
        callback = Divergence(500)
    assert [rule.threshold for rule in callback.rules if isinstance(rule, LossAbove)] == [500]
    assert callback.schedule == Every(1)
    assert Divergence(Every(3)).schedule == Divergence(every_n_steps=3).schedule == Every(3)
    with pytest.raises(TypeError, match="one argument without a name, a schedule, not 2"):
        Divergence(Every(2), 5.0)
    with pytest.raises(TypeError, match="every_n_steps must be a whole number or a schedule"):
        Divergence("2")  # type: ignore[arg-type]
