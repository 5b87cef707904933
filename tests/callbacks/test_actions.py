"""What is done at an alarm, without a run around it."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from callbacks_small import SmallNet, loader, trainer
from lightning.pytorch import Callback
from torch import nn
from watch_small import assert_equal

from normzoo import watch
from normzoo.callbacks import Action, Alarm, DivergenceError, DivergenceExit, Raise, Record, Run, Stop
from normzoo.callbacks._run.lightning import LightningRun

ALARM = Alarm(31, "threshold", 2e3, rank=1, why="the loss 2000 is above 1000")


class Told(Run):
    """Keeps what it is asked for."""

    step = 33

    def __init__(self, full: bool = False) -> None:
        self.full, self.asked = full, list[Any]()

    def stop(self) -> None:
        self.asked.append("stop")

    def save_checkpoint(self, path: Path) -> None:
        if self.full:
            raise OSError(28, "No space left on device")
        self.asked.append(path)

    def exit(self, error: SystemExit) -> None:
        self.asked.append(error)


def test_an_alarm_is_a_sentence() -> None:
    assert ALARM.sentence == "the run has diverged at step 31: the loss 2000 is above 1000"
    assert Alarm(3, "mine", 2.5).sentence == "alarm at step 3: mine, 2.5"
    assert Alarm(3, "mine", 2.5, capsule=Path("a/b")).sentence.endswith(
        "; normzoo report shows the last steps, normzoo replay looks for the cause: a/b"
    )


def test_record_goes_on() -> None:
    run = Told()
    Record().act(run, ALARM)
    Record().ended(run)
    assert run.asked == []
    assert not Record.stops


def test_an_error_is_raised_and_survives_another_process() -> None:
    with pytest.raises(DivergenceError, match="^the run has diverged at step 31: the loss 2000") as caught:
        Raise().act(Told(), ALARM)
    for error in (caught.value, DivergenceExit(79, ALARM)):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), again.alarm, str(again)) == (type(error), ALARM, str(error))
    assert pickle.loads(pickle.dumps(DivergenceExit(79, ALARM))).code == 79


@pytest.mark.parametrize("code", [79, None])
@pytest.mark.parametrize("folder", [Path("log"), None])
def test_stop_saves_and_exits_once_training_has_ended(
    code: int | None, folder: Path | None, caplog: pytest.LogCaptureFixture
) -> None:
    run, action = Told(), Stop(code)
    action.ended(run)
    assert run.asked == []  # without an alarm
    alarm = Alarm(31, "threshold", 2e3, folder=folder)
    action.act(run, alarm)
    assert run.asked == ["stop"]
    with caplog.at_level(logging.INFO):
        action.ended(run)
    weights = "; its weights are in log/diverged.ckpt" if folder else ""
    exit_code = "; the exit code is 79" if code else ""
    assert caplog.messages == [f"Divergence has stopped the run after step 32{weights}{exit_code}"]
    saved, exits = run.asked[1 : len(run.asked) - (code is not None)], run.asked[-1:] if code else []
    assert saved == ([Path("log/diverged.ckpt")] if folder else [])
    assert [(type(e), e.code, e.alarm) for e in exits] == ([(DivergenceExit, 79, alarm)] if code else [])
    action.ended(run)
    assert len(run.asked) == 1 + len(saved) + len(exits)  # another fit has nothing to do with it


def test_a_full_disk_does_not_change_the_exit() -> None:
    run, action = Told(full=True), Stop()
    action.act(run, Alarm(31, "threshold", 2e3, folder=Path("log")))
    with pytest.warns(UserWarning, match=r"^log/diverged.ckpt could not be saved: No space left on device$"):
        action.ended(run)
    assert [type(e) for e in run.asked] == [str, DivergenceExit]


@pytest.mark.parametrize("code", [0, 256, -1, True, "79", 1.5])
def test_an_exit_code_is_one_that_processes_have(code: Any) -> None:
    with pytest.raises(ValueError, match="exit_code must be a whole number from 1 to 255, or None .*, not "):
        Stop(code)


def test_an_action_has_to_act() -> None:
    with pytest.raises(NotImplementedError):
        Action().act(Told(), ALARM)


# Exits of real runs


class Exits(Callback):
    """Asks for the exit when training ends."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        LightningRun(trainer, pl_module).exit(DivergenceExit(79, ALARM))


class Ends(Callback):
    """Notes how a fit ended."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append("train end")

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append("fit end")

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.seen.append("teardown")


def test_a_trainer_exits_when_all_callbacks_are_torn_down(tmp_path: Path) -> None:
    ends = Ends()
    fitted = trainer(str(tmp_path), callbacks=[Exits(), ends], max_steps=2)
    with pytest.raises(DivergenceExit) as caught:
        fitted.fit(SmallNet(), loader())
    assert (caught.value.code, caught.value.alarm, fitted.global_step) == (79, ALARM, 2)
    assert ends.seen == ["train end", "fit end", "teardown"]
    assert [type(c) for c in fitted.callbacks if type(c).__name__ == "_Exit"] == []  # type: ignore[attr-defined]


def test_a_loop_exits_when_it_is_left(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    watching = watch(model, optimizer, dirpath=tmp_path / "log")

    def loop(error: type[Exception] | None = None) -> None:
        with watching:
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            watching._run.save_checkpoint(tmp_path / "saved.ckpt")
            watching._run.exit(DivergenceExit(79, ALARM))
            if error is not None:
                raise error

    with pytest.raises(DivergenceExit):
        loop()
    saved = torch.load(tmp_path / "saved.ckpt")
    assert_equal(saved, {"model": model.state_dict(), "optimizers": [optimizer.state_dict()], "step": 1})
    with pytest.raises(KeyError):  # an error of the loop's own is the one to see
        loop(KeyError)
    with watching:  # entered again, it ends as usual
        pass
