"""One trial: steps made with a change, and some more on quiet batches, until the loss holds or is lost."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from normzoo.replaying.levels import Level, level_of
from normzoo.replaying.stage import Stage

MOST_MORE = 8  # steps on quiet batches beyond the last recorded one
_TIMES = 10.0  # the time of the steps of the ring that course and trials may take together
_LEAST = 16  # steps of a ring that the time is reckoned by
_LOST = 100.0  # times the quiet loss, at which a trial ends
_HIGH_NORM = 10.0  # times the quiet norm: a norm at the alarm that is no noise

Make = Callable[[int, int, int | None], float]  # makes a step: its place, step, and whose batch; returns the loss


class Trials:
    """Makes trials on the steps of a stage, and judges whether each holds.

    A trial holds if its losses are finite and at the end, in the second half of the steps on quiet batches, their
    median is at most twice the level that the trial's own losses had before the onset; and, if the norm of the gradient
    had left the line, if its median is nearer to the quiet norm than to the largest one, on a log scale. So a smaller
    learning rate, by which the loss falls less, is not taken for a divergence. A trial ends at a loss that is not
    finite, or is a hundred times the quiet one and a hundred times the largest that the run had up to that step.
    Where the run's own losses passed a hundred times the quiet one, and by its weights, as other batches are high too
    or the onset's batch is not at the first weights, it was lost even if it comes back later: then, from the onset on,
    no loss of a trial that holds is a hundred times the quiet one.
    Under a GradScaler, which skips steps, only losses on quiet batches have to be finite.

    Args:
        stage: on which trials are made.
        course: the facts of that name, of :func:`normzoo.replaying.course.ask`.
        by_weights: whether the onset's batch is out of line at the onset's weights only.

    Attributes:
        quiet: steps before the onset, whose batches the further steps take; without any, those after it.
        onset: the step of that name, and ``place``, its index.
        losses: of each trial by its name, from the first step on.
    """

    def __init__(self, stage: Stage, course: Mapping[str, Any], by_weights: bool = False) -> None:
        self.stage, self.course = stage, course
        self.steps = stage.steps
        self.onset = course["onset"]
        self.place = self.steps.index(self.onset)
        later = [step for step in self.steps if step > max(stage.alarm, self.onset)]
        self.quiet = self.steps[: self.place][-MOST_MORE:] or later
        self.more = min(MOST_MORE, max(3, len(self.steps) // 3))
        known = course["median_loss"]
        self.level = None if known is None else Level(known, course["spread_loss"] or 0.0)
        self.highest_norm = _highest_norm(course, self.place)
        by_weights = by_weights or bool(course.get("others_high"))
        self.was_lost = by_weights and self._was_lost()
        self.losses: dict[str, list[float]] = {}
        self._micro_batches = sum(len(stage.frame(step).micro_batches) for step in self.steps) / len(self.steps)
        self._before = _cost(stage.passes) - _cost(course["passes"])
        self.left_out: list[str] = []

    def make(
        self,
        name: str,
        make: Make,
        *,
        start: int | None = None,
        within: Callable[[], AbstractContextManager[Any]] = nullcontext,
        beyond: int = 0,
    ) -> dict[str, Any] | None:
        """Make a trial.

        Args:
            name: of the trial, for people.
            make: makes a step, given its place among the steps, the step, and the step whose batch is taken, if
                another one; returns the loss before the update.
            start: the first step that the trial changes; by default the first of all. Those before it are as in the
                course. Behind the last one, only the further steps are made.
            within: entered once the state is that before ``start``.
            beyond: how many steps on quiet batches are made in addition, before those by which the trial is judged.

        Returns:
            ``holds``; ``losses`` from the first step on; ``from``, the first step that was made; ``more``, how many of
            the last losses are of steps on quiet batches beyond the last recorded step; ``norm``, the median norm of
            the gradient at their end; and ``why`` it does not hold, ``"nonfinite"``, ``"loss"``, ``"norm"`` or ``""``.
            None if there was no time for it.
        """
        start = self.steps[0] if start is None else start
        places = [place for place, step in enumerate(self.steps) if step >= start]
        if self._spent() + (len(places) + beyond + self.more) * self._micro_batches > self._most():
            self.left_out.append(name)
            return None
        losses = [math.nan if x is None else x for x in self.course["loss"][: len(self.steps) - len(places)]]
        norms: list[float] = []
        self.stage.go_to(start)
        why, more = "", 0
        with within():
            for place in places:
                losses.append(make(place, self.steps[place], None))
                if why := self._lost(losses[-1], place):
                    break
            while not why and more < beyond + self.more:
                losses.append(make(len(self.steps), self.steps[-1], self.quiet_step(more)))
                norms.append(self.stage.last_norm)
                more += 1
                why = self._lost(losses[-1], None)
        end = norms[-((self.more + 1) // 2) :]
        norm = statistics.median(end) if end else None
        passed = [i for i in range(len(losses) - more) if i >= self.place and self._has_passed(losses[i])]
        why = why or ("loss" if self.was_lost and passed else self._judged(losses, norm))
        self.losses[name] = losses
        return {"holds": not why, "losses": losses, "from": start, "more": more, "norm": norm, "why": why}

    def quiet_step(self, number: int = 0) -> int | None:
        """A step with a quiet batch, the last one before the onset first; None if there is none."""
        return self.quiet[-1 - number % len(self.quiet)] if self.quiet else None

    def _judged(self, losses: list[float], norm: float | None) -> str:
        """Why a trial whose losses are finite does not hold."""
        own = level_of(losses[: self.place]) or self.level
        end = statistics.median(losses[-((self.more + 1) // 2) :])
        if own is not None and end > own.times(2):
            return "loss"
        if self.highest_norm is not None and norm is not None and not norm <= self.highest_norm:
            return "norm"
        return ""

    def _lost(self, loss: float, place: int | None) -> str:
        """Why a trial ends at a loss, which is compared with those of the run up to its place as well."""
        step = self.steps[-1 if place is None else place]
        if not math.isfinite(loss):
            passed_over = place is not None and self.stage.frame(step).scale is not None
            return "" if passed_over else "nonfinite"
        # A run may begin with losses far above its quiet ones
        known = [x for x in self.course["loss"][: 0 if place is None else place + 1] if x is not None]
        had = max((x for x in known if math.isfinite(x)), default=None)
        usual = [level.times(_LOST) for level in (self.level, level_of([had])) if level is not None]
        return "loss" if self.level is not None and loss > max(usual) else ""

    def _was_lost(self) -> bool:
        """Whether a loss of the run itself has passed a hundred times the quiet one, from the onset to the alarm."""
        until = [x for step, x in zip(self.steps, self.course["loss"], strict=False) if step <= self.stage.alarm]
        return any(map(self._has_passed, until[self.place :]))

    def _has_passed(self, loss: float | None) -> bool:
        """Whether a finite loss is a hundred times the quiet one."""
        return self.level is not None and loss is not None and math.isfinite(loss) and loss > self.level.times(_LOST)

    def _spent(self) -> float:
        return _cost(self.stage.passes) - self._before

    def _most(self) -> float:
        return _TIMES * max(len(self.steps), _LEAST) * self._micro_batches


def _highest_norm(course: Mapping[str, Any], onset: int) -> float | None:
    """The norm of the gradient midway on a log scale from the quiet one to the largest; None if it did not rise.

    If none of those from the onset on is finite, a hundred times the quiet one.
    """
    quiet = course["median_norm"]
    risen = [x for x in course["norm"][onset:] if x is not None]
    if not quiet or not risen:
        return None
    finite = [x for x in risen if math.isfinite(x)]
    largest = max(finite, default=math.inf)
    if not math.isfinite(largest):
        return _LOST * float(quiet)
    if largest <= _HIGH_NORM * quiet and course["onset_by"] != "norm":
        return None
    return float(max(math.sqrt(quiet) * math.sqrt(largest), 2 * quiet))


def _cost(passes: Mapping[str, int]) -> float:
    """Passes in micro-batches of steps: a forward pass takes about a third of the time of one."""
    return passes.get("steps", 0) + passes.get("backward", 0) + passes.get("forward", 0) / 3


def largest_that_holds(holds: Callable[[float], bool | None]) -> float | None:
    """The largest of 1/2, 1/4, ... 1/1024 that holds, by bisection; where it is likeliest, at 1/8, it begins.

    Args:
        holds: tries one of them; None if it was not tried, which ends the search.

    Returns:
        the largest that was tried and holds; None if none did.

    Example:
        >>> tried = []
        >>> largest_that_holds(lambda rate: tried.append(1 / rate) or rate <= 1 / 30), tried
        (0.03125, [8.0, 128.0, 32.0, 16.0])
    """
    fails, held, exponent = 0, 11, 3
    while held - fails > 1:
        answer = holds(0.5**exponent)
        if answer is None:
            break
        fails, held = (fails, exponent) if answer else (exponent, held)
        exponent = (fails + held) // 2
    return 0.5**held if held <= 10 else None


@contextmanager
def attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, an attribute has another value."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
