"""The answers to the five questions of a replay, in sentences that hold whatever the cause."""

from __future__ import annotations

import math

from normzoo.causes.data import samples_of
from normzoo.causes.observations import Seen
from normzoo.causes.observations.batch import odd_input, raising
from normzoo.causes.view import View, listed, short


def facts_of(view: View, seen: Seen) -> list[str]:
    """The sentences, of each question one or two; none for a question that was not answered."""
    of = (_same(view), _course(view), _along_the_update(view), _batch_or_weights(view), _odd(view), _parameters(view))
    return [fact for fact in (*of, _first_bad(view), _norm_layers(view), _trials(view), _cost(view)) if fact]


def _cost(view: View) -> str:
    """What the replay took."""
    passes = [view.number("passes", name) for name in ("steps", "forward", "backward")]
    seconds, once = view.number("seconds", "replay"), view.number("seconds", "steps")
    if None in passes or seconds is None or not once:
        return ""
    steps, forward, backward = (f"{number:.0f}" for number in passes if number is not None)
    return (
        f"The replay took {short(seconds)} s, and the steps once {short(once)} s: {steps} mini-batches were trained "
        f"on, {forward} passed forward and {backward} forward and backward."
    )


def _same(view: View) -> str:
    first, last, difference = (view.of("same", key) for key in ("from", "to", "first_difference"))
    if first is None:
        return ""
    steps = f"Steps {first} to {last} were made again"
    repeats = {True: " A step repeats bit for bit.", False: _noise(view), None: ""}[view.truth("same", "repeatable")]
    if difference is None:
        return f"{steps}, with the losses of the run.{repeats}"
    by = view.number("same", "relative_difference")
    what = view.of("same", "first_difference_of") or "loss"
    again = {True: ", and diverge again", False: ", and do not diverge", None: ""}
    size = f" by {short(by, 2)} of itself" if by else ""
    return (
        f"{steps}{again[view.truth('same', 'diverges_again')]}; the {what} of step {difference} is the first that "
        f"differs from the run's{size}.{repeats}"
    )


def _noise(view: View) -> str:
    deterministic = {True: "; with deterministic algorithms it does", False: "; nor with deterministic algorithms"}
    known = view.truth("same", "deterministic")
    more = "" if known is None else deterministic[known]
    return f" A step does not repeat: its loss varies by {short(view.number('same', 'noise'), 2)} of itself{more}."


def _course(view: View) -> str:
    if view.onset is None:
        return ""
    by = {"loss": "its loss", "norm": "the norm of its gradient", "nonfinite": "a value that is not finite"}
    reason = by.get(str(view.of("course", "onset_by")))
    loss = view.series("loss").get(view.onset)
    level = view.number("course", "median_loss")
    of = f" (loss {short(loss)}{f', quiet {short(level)}' if level is not None else ''})" if loss is not None else ""
    if reason is None and view.of("about", "kind") != "divergence":
        return ""
    if reason is None:
        return f"No step before the alarm at step {view.onset}{of} is out of line with those before it."
    return f"Step {view.onset} is the first out of line, by {reason}{of}."


def _along_the_update(view: View) -> str:
    step, losses = view.of("fractions", "step"), view.numbers("fractions", "loss")
    holds = view.number("fractions", "largest_that_holds")
    if step is None or not losses:
        return ""
    sentence = (
        f"Along the update of step {step} the loss of its batch goes from {short(losses[0])} to {short(losses[-1])}"
    )
    if holds is None:
        return f"{sentence}."
    return f"{sentence}; {f'up to {holds:.0%} of the update it does not rise' if holds else 'it rises at once'}."


def _batch_or_weights(view: View) -> str:
    pairs = [[view.number("data_or_state", "loss", i, j) for j in (0, 1)] for i in (0, 1)]
    if pairs[0][0] is None:
        return ""
    batch, other = view.of("data_or_state", "batch"), view.of("data_or_state", "other")
    now, first = (view.of("data_or_state", "weights", place) for place in (0, 1))
    values = [" and ".join(short(x) for x in (pair if now != first else pair[:1])) for pair in pairs]
    at = f"at the weights of steps {now} and {first}" if now != first else f"at the weights of step {now}"
    quiet = f"; that of step {other}, {values[1]}" if pairs[1][0] is not None else ""
    after = view.number("data_or_state", "other_after")
    more = f"; after the update with the former, {short(after)}" if after is not None and quiet else ""
    return f"The batch of step {batch} has the loss {values[0]} {at}{quiet}{more}."


def _odd(view: View) -> str:
    found = [f"{row.text('path')} has {why}" for row in view.rows("inputs") if (why := odd_input(row))]
    if named := samples_of(view):
        one = " and " not in named
        verb, what = ("raise", "the error") if raising(view) else ("carrie" if one else "carry", "its loss")
        found.append(f"{named} {verb}{'s' * one} {what}")
    elif view.truth("samples", "possible") and (median := view.number("samples", "median")) is not None:
        found.append(f"no few samples carry its loss, of which the median is {short(median)}")
    elif why := view.of("samples", "why_not"):
        found.append(f"single samples could not be judged ({why})")
    return f"Of the batch, {listed(found)}." if found else ""


def _parameters(view: View) -> str:
    rows = view.rows("parameters", "put_back")
    before, back = (view.number("parameters", key, 0) for key in ("loss_before", "loss_all_back"))
    if not rows or before is None or back is None or (math.isfinite(before) and before < 1.5 * back):
        return ""
    told = [f"{short(row.number('loss', 0))} with {row.text('name')}" for row in sorted(rows, key=_order)[:2]]
    return (
        f"The loss of a quiet batch is {short(before)} at step {view.of('parameters', 'at')}; it is {short(back)} with "
        f"all parameters put back to their first values, {listed(told)} alone put back."
    )


def _order(row: View) -> float:
    loss = row.number("loss", 0)
    return math.inf if loss is None or math.isnan(loss) else loss


def _first_bad(view: View) -> str:
    module, kind = view.of("first_bad", "module"), view.of("first_bad", "kind")
    if module is None or kind is None:
        return ""
    direction, kind_of_module = view.of("first_bad", "direction"), view.of("first_bad", "class")
    which = f"The first bad module in the {direction} pass is {module} ({kind_of_module})"
    if kind == "jump":
        return f"{which}: its values are {short(view.number('first_bad', 'times'))} times those of a quiet step."
    op, dtype = view.of("first_bad", "op"), view.of("first_bad", "dtype")
    if not op:
        return f"{which}: its values are not finite."
    largest = short(view.number("first_bad", "input_max"))
    return f"{which}: {op} in {dtype}, of inputs up to {largest}, gives values that are not finite."


def _norm_layers(view: View) -> str:
    rows = view.rows("norm_layers")
    if not rows:
        return ""
    row = rows[0]
    variance, quiet, eps = (short(row.number(key)) for key in ("variance", "variance_quiet", "eps"))
    return (
        f"In {row.text('module')} ({row.text('class')}) the variance of channel {row.text('channel')} is {variance}; "
        f"at the quiet step it is {quiet}, and eps is {eps}."
    )


def _trials(view: View) -> str:
    control = view.truth("trials", "control", "holds")
    if control is None:
        return ""
    tried: list[tuple[bool | None, str]] = []
    rates = view.rows("trials", "rates")
    if rates:
        rate = view.number("trials", "largest_rate")
        smallest = min((row.number("rate") or 1.0 for row in rates), default=1.0)
        tried.append((rate is not None, f"{short(rate or smallest, 2)} times the learning rate"))
    clip = short(view.number("trials", "clip", "at"))
    batch, steps = view.of("trials", "without_batch", "step"), view.of("trials", "warm_up", "steps")
    eps, name = short(view.number("trials", "eps", "eps")), view.of("trials", "eps", "module")
    for key, text in (
        ("clip", f"gradients clipped at {clip}"),
        ("without_batch", f"another batch at step {batch}"),
        ("without_batches", f"other batches from step {batch} on"),
        ("warm_up", f"a warm-up over {steps} steps"),
        ("frozen", f"{view.of('trials', 'frozen', 'name')} frozen"),
        ("float32", "float32"),
        ("eps", f"eps = {eps} in {name}"),
    ):
        tried.append((view.truth("trials", key, "holds"), text))
    held, failed = ([text for holds, text in tried if holds is wanted] for wanted in (True, False))
    unchanged = f"Made again unchanged, the steps {'hold' if control else 'do not hold'}"
    with_ = [f"they hold with {listed(held)}"] * bool(held) + [f"they do not hold with {listed(failed)}"] * bool(failed)
    return f"{unchanged}{'; ' + '; '.join(with_) if with_ else ''}."
