"""What is done once a run has diverged: it is recorded, it ends, or an error is raised; or an action of one's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn  # type: ignore[attr-defined]

from normzoo.callbacks._run.facts import Run
from normzoo.callbacks.schedule import is_whole

_CERTAIN = ("threshold", "not finite")  # rules by whose alarm a run has diverged; after others it may recover


@dataclass(frozen=True)
class Alarm:
    """A divergence, the same on all ranks.

    Attributes:
        step: optimizer steps made before the value that has diverged.
        rule: which one has flagged it, as in the column ``rule``.
        value: that has diverged.
        rank: that had it; None for a value that all ranks share.
        capsule: folder of what is known of the steps before; None if there is none.
        why: the rule and the value in words.
        folder: of the record; None for a run that writes nothing.
    """

    step: int
    rule: str
    value: float
    rank: int | None = None
    capsule: Path | None = None
    why: str = ""
    folder: Path | None = None

    @property
    def sentence(self) -> str:
        """The alarm for people: that the run has diverged, if the loss is above a threshold or not finite.

        Example:
            >>> Alarm(31, "threshold", 2e3, why="the loss 2000 is above 1000").sentence
            'the run has diverged at step 31: the loss 2000 is above 1000'
            >>> Alarm(31, "spike", 9.0, why="the loss 9 is 20 deviations above the median").sentence
            'alarm at step 31: the loss 9 is 20 deviations above the median'
        """
        capsule = ""
        if self.capsule is not None:
            capsule = f"; normzoo report shows the last steps, normzoo replay looks for the cause: {self.capsule}"
        event = "the run has diverged" if self.rule in _CERTAIN else "alarm"
        return f"{event} at step {self.step}: {self.why or f'{self.rule}, {self.value:.6g}'}{capsule}"


class DivergenceError(RuntimeError):
    """A run has diverged.

    Attributes:
        alarm: which says when and why.
    """

    def __init__(self, alarm: Alarm) -> None:
        super().__init__(alarm)
        self.alarm = alarm

    def __str__(self) -> str:
        return self.alarm.sentence


class DivergenceExit(SystemExit):
    """A run that has diverged has ended, and the process ends with the code of :class:`Stop`.

    Attributes:
        alarm: which says when and why.
    """

    def __init__(self, code: int, alarm: Alarm) -> None:
        super().__init__(code)
        self.alarm = alarm

    def __reduce__(self) -> tuple[type[DivergenceExit], tuple[int, Alarm]]:
        return DivergenceExit, (self.code, self.alarm)  # type: ignore[return-value]


class Action:
    """Base of what :class:`Divergence` does at an alarm; a subclass of one's own defines :meth:`act`.

    Attributes:
        stops: whether it ends training, as the column ``stopped`` says; with ``strict=True`` no update is made from the
            alarm on.
        raises: whether it ends training by an error; with ``strict=True`` it is asked before the step, and others once
            the step has been made.

    Example:
        >>> class Shout(Action):
        ...     def act(self, run, alarm):
        ...         if run.writes:
        ...             print(alarm.sentence.upper())
    """

    stops: ClassVar[bool] = False
    raises: ClassVar[bool] = False

    def act(self, run: Run, alarm: Alarm) -> None:
        """Called on all ranks alike, one step after the divergence, when its row and its capsule have been written."""
        raise NotImplementedError

    def ended(self, run: Run) -> None:
        """Called on all ranks when training has ended without an error, whether or not there was an alarm."""


class Record(Action):
    """Goes on: the record and the capsule are all that there is of a divergence."""

    def act(self, run: Run, alarm: Alarm) -> None:
        """Do nothing more."""


class Raise(Action):
    """Raises a :class:`DivergenceError` on all ranks."""

    stops = raises = True

    def act(self, run: Run, alarm: Alarm) -> None:
        """Raise the error.

        Raises:
            DivergenceError: always.
        """
        raise DivergenceError(alarm)


class Stop(Action):
    """Ends training as if its last step had been made, saves ``diverged.ckpt`` beside the record, and exits.

    Under a Trainer the process exits when callbacks have been torn down, in the place of returning from ``fit``: code
    after ``fit`` is not run, unless it catches :class:`DivergenceExit`, which is a ``SystemExit``. In a plain loop
    ``watching.should_stop`` turns, and leaving the ``with`` block exits.

    Args:
        exit_code: by which the scheduler of a job can tell a run that has diverged from one that has failed; None to
            return from ``fit`` as usual.

    Raises:
        ValueError: for a code that is not from 1 to 255.
    """

    stops = True

    def __init__(self, exit_code: int | None = 79) -> None:
        if exit_code is not None and not (is_whole(exit_code) and 0 < exit_code < 256):
            raise ValueError(
                f"exit_code must be a whole number from 1 to 255, or None to return as usual, not {exit_code!r}"
            )
        self.exit_code = exit_code
        self._alarm: Alarm | None = None

    def act(self, run: Run, alarm: Alarm) -> None:
        """End training after this step."""
        self._alarm = self._alarm or alarm
        run.stop()

    def ended(self, run: Run) -> None:
        """Save a checkpoint, say that the run was stopped, and exit once all is done."""
        alarm, self._alarm = self._alarm, None
        if alarm is None:
            return
        outcome = [f"Divergence has stopped the run after step {run.step - 1}"]
        if alarm.folder is not None:
            try:
                run.save_checkpoint(alarm.folder / "diverged.ckpt")
                outcome.append(f"its weights are in {alarm.folder / 'diverged.ckpt'}")
            except OSError as error:
                rank_zero_warn(f"{alarm.folder / 'diverged.ckpt'} could not be saved: {error.strerror or error}")
        if self.exit_code is not None:
            outcome.append(f"the exit code is {self.exit_code}")
        rank_zero_info("; ".join(outcome))
        if self.exit_code is not None:
            run.exit(DivergenceExit(self.exit_code, alarm))
