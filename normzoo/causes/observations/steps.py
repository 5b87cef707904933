"""What is observed of the steps made again: losses, updates, learning rates, and whether they are those of the run."""

from __future__ import annotations

import itertools
import math

from normzoo.causes.view import View, is_broken

LARGE_UPDATE, COMMON_UPDATE = 0.05, 0.015  # times the norm of a weight matrix: beyond what is common, and within
JUMP = 3.0  # times the learning rate of the step before
AT_ONCE = 5  # steps
EARLY = 100  # steps from the start of a run
ROUNDING = 1e-5  # relative difference of losses that another order of sums brings about


def losses_rise(view: View) -> bool | None:
    """Most of the last five losses up to the alarm are out of line with quiet ones."""
    alarm = view.number("about", "step")
    last = [x for step, x in view.series("loss").items() if alarm is None or step <= alarm][-5:]
    high = [view.is_high(loss, view.quiet_loss) for loss in last]
    return None if len(last) < 3 or None in high else 2 * sum(map(bool, high)) > len(high)


def accelerates(view: View) -> bool | None:
    """Losses or norms of gradients rise over several steps up to the alarm, by ever more."""
    return view.truth("course", "accelerating")


def alarm_at_once(view: View) -> bool | None:
    """The alarm comes within five steps of the onset, as what a single batch does comes at once."""
    alarm = view.number("about", "step")
    return None if alarm is None or view.onset is None else alarm - view.onset <= AT_ONCE


def own_loss_rises(view: View) -> bool | None:
    """An update of the last three before the onset has raised the loss of its own batch by a tenth and more."""
    losses, after = view.series("loss"), view.series("after")
    before = [step for step in losses if view.onset is not None and step < view.onset and step in after][-3:]
    if not before:
        return None
    return any(not after[step] <= losses[step] + 0.1 * abs(losses[step]) for step in before)


def updates_large(view: View) -> bool | None:
    """An update before the onset has moved the median weight matrix by more than 0.05 times its norm."""
    updates = [x for step, x in view.series("relative_update").items() if view.onset is None or step < view.onset]
    if not updates:
        return None
    largest = max(math.inf if math.isnan(x) else x for x in updates)
    return True if largest > LARGE_UPDATE else False if largest < COMMON_UPDATE else None


def rate_jumps(view: View) -> bool | None:
    """The learning rate of a step up to the onset is three times that of the step before and more."""
    return jump_of_rate(view) is not None if len(view.series("lr")) > 1 else None


def jump_of_rate(view: View) -> int | None:
    """The step at which the learning rate jumps."""
    rates = list(view.series("lr").items())
    steps = [b for (_, x), (b, y) in itertools.pairwise(rates) if x > 0 and y >= JUMP * x]
    return next((step for step in steps if view.onset is None or step <= view.onset), None)


def first_steps(view: View) -> bool | None:
    """The onset is within the run's first hundred steps, and the learning rate has been full since the first known."""
    rates = view.series("lr")
    if view.onset is None or not rates:
        return None
    return view.onset < EARLY and rates[min(rates)] >= 0.9 * max(rates.values())


def not_finite(view: View) -> bool | None:
    """A loss or gradient up to the alarm is not finite."""
    value, by = view.number("about", "value"), view.of("course", "onset_by")
    if value is None and by is None:
        return None
    return by == "nonfinite" or is_broken(value)


def damaged_first(view: View) -> bool | None:
    """At the first weights that are known losses are high already."""
    first, before = view.loss_at(1, 1), view.median_before
    if is_broken(first):
        return True
    return None if before is None or view.quiet_loss is None else view.is_high(view.quiet_loss, 2 * before)


def differs(view: View) -> bool | None:
    """A step made again differs from the run's by more than rounding, although the steps before it did not."""
    if view.of("same") is None:
        return None
    first, difference = view.of("same", "first_difference"), view.number("same", "relative_difference")
    later = first is not None and first != view.of("same", "from")
    return later and (difference is None or not difference <= ROUNDING or view.of("same", "tensor") is not None)


def differs_at_once(view: View) -> bool | None:
    """The first step made again differs from the run's already."""
    first = view.of("same", "first_difference")
    return None if view.of("same") is None else first is not None and first == view.of("same", "from")


def quiet_again(view: View) -> bool | None:
    """The steps made again do not diverge."""
    again = view.truth("same", "diverges_again")
    return None if again is None else not again


def element_stands_out(view: View) -> bool | None:
    """One element of a tensor deviates from the replay's by more than a thousand times what others do."""
    times = view.number("same", "tensor", "times")
    return None if times is None else not times <= 1e3


def unrepeatable(view: View) -> bool | None:
    """A step made again from the same state comes out differently, by more than rounding."""
    repeats, noise = view.truth("same", "repeatable"), view.number("same", "noise")
    return None if repeats is None else not repeats and (noise is None or not noise <= ROUNDING)


def ended_by_error(view: View) -> bool | None:
    """The run has ended by an error."""
    kind = view.of("about", "kind")
    return None if kind is None else kind == "exception"


def raises_again(view: View) -> bool | None:
    """The step that raised the error raises one again."""
    if not ended_by_error(view):
        return None
    return None if view.of("same") is None else view.of("same", "raises") is not None


OBSERVATIONS = (
    losses_rise,
    accelerates,
    alarm_at_once,
    own_loss_rises,
    updates_large,
    rate_jumps,
    first_steps,
    not_finite,
    damaged_first,
    differs,
    differs_at_once,
    quiet_again,
    element_stands_out,
    unrepeatable,
    ended_by_error,
    raises_again,
)
