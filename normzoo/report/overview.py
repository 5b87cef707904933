"""The table of runs: a row for those that differ only in their seed, failed and diverged ones on top."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from normzoo.report.comparison import Comparison, outcome
from normzoo.report.independent import Axis
from normzoo.report.metric_names import better, is_accuracy, main_metric
from normzoo.report.run import Run
from normzoo.report.seeds import Group
from normzoo.report.settings import column_name, settings_of, short_key, text_of_setting

_MOST_SETTINGS = 4  # columns of settings
_NAME, _SHORT_NAME = 24, 12  # characters of a run's name that there is to be room for
_ROUNDING = 1e-12  # of a mean, below which a spread is that of its rounding
_MOST_ALONG = 1  # settings beside one that they move along with
_LONGEST_LIST = 3  # steps of alarms in a cell
_MEASURED = ("kurtosis", "headroom", "low headroom")
_FIXED = {"run", "n", "state", "diverged at", "ended by", *_MEASURED, "seconds"}
_NUMBERED = re.compile(r"(\d+)-.*=")  # the name of a point of a sweep
_RANKS = {"failed": 0, "diverged": 1, "unfinished": 2}  # of what goes on top


@dataclass(frozen=True)
class Overview:
    """A table of text.

    Attributes:
        rows: with the same columns.
        troubled: for each row, whether one of its runs has failed or diverged.
        notes: sentences on the table, on what is left out too.
        optional: columns that may be left out where there is no room, the first ones first.
        groups: for each row, its runs.
    """

    rows: list[dict[str, str]]
    troubled: list[bool]
    notes: list[str] = field(default_factory=list)
    optional: list[str] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)


def overview(
    comparison: Comparison,
    summaries: Sequence[Mapping[str, str]],
    metrics: Sequence[str] = (),
    most: int | None = None,
) -> Overview:
    """The table of runs.

    Args:
        comparison: of the runs.
        summaries: a row of text for each run, in the order of the comparison's, for rows of single runs.
        metrics: for the columns; by default that which stands for a run, and the loss if there is room.
        most: rows that are shown: those with trouble, then the best by the first metric; None for all.

    Raises:
        UnknownNameError: if no run has logged a metric.
    """
    groups = comparison.groups
    seeds = any(len(group.runs) > 1 for group in groups)
    measured = [] if seeds else [c for c in _MEASURED if any(row.get(c, "–") != "–" for row in summaries)]
    chosen = [*metrics] or _main_metrics(comparison, room=not measured)
    ends = {metric: comparison.ends(metric) for metric in chosen}
    by_run = {id(run): row for run, row in zip(comparison.runs, summaries, strict=True)}
    axes, left_out = _setting_columns(comparison)
    numbered = bool(axes) and not left_out and all(_NUMBERED.match(_own_name(run)) for run in comparison.runs)
    rows = []
    for place, group in enumerate(groups):
        row = {"run": _numbers(group) if numbered else _label(group)}
        row |= {column_name(axis.label, _FIXED): _text_of_axis(axis, group, comparison.settings) for axis in axes}
        first = next(iter(ends.values()), None)
        n = 0 if first is None else int(first["n"][place])
        row |= {"n": str(n) if n == len(group.runs) else f"{n} of {len(group.runs)}"} if seeds else {}
        row |= {
            f"{m} at the end" if m in {*row, *_FIXED} else m: _text_of_end(m, t, place, group) for m, t in ends.items()
        }
        row |= {"state": _states(group), "diverged at": diverged_at_text(group.runs)}
        row |= {"ended by": ", ".join(dict.fromkeys(run.ended_by for run in group.runs if run.ended_by)) or "–"}
        row |= {column: by_run[id(group.runs[0])].get(column, "–") for column in measured}
        rows.append({**row, "seconds": _seconds(group.runs)})
    order = sorted(range(len(rows)), key=lambda place: (_rank(groups[place]), place))
    notes = _notes(seeds, left_out)
    if most is not None and len(order) > most:
        order = sorted(order, key=lambda place: (_rank(groups[place]), _goodness(ends, place), place))
        how = "the failed and diverged first"
        if ends and better(chosen[0]):
            how += f", then the best by {chosen[0]}"
        notes.append(f"{len(order) - most} of {len(order)} rows are left out ({how}); --all prints all")
        order = order[:most]
    shown = [rows[place] for place in order]
    if all(row["state"] == "finished" for row in shown):
        shown = [{column: text for column, text in row.items() if column != "state"} for row in shown]
    optional = ["seconds", *([] if metrics else reversed(chosen[1:])), *reversed(measured)]
    troubled = [_rank(groups[place]) < 2 for place in order]
    return Overview(filled(shown), troubled, notes, optional, [groups[place] for place in order])


def fitted(table: Overview, width: int) -> Overview:
    """The table with as many of its optional columns as there is room for, and a note on those that are left out.

    Args:
        table: of text.
        width: characters in a line.
    """
    columns, left_out = [*table.rows[0]], []
    for column in (column for column in table.optional if column in table.rows[0]):
        if _width(table.rows, columns, _SHORT_NAME if column in _MEASURED else _NAME) <= width:
            break
        columns.remove(column)
        left_out.append(column)
    if not left_out:
        return table
    note = f"columns without room in {width} characters: {', '.join(left_out)}; report.html and --csv have all"
    return replace(table, rows=[{c: row[c] for c in columns} for row in table.rows], notes=[*table.notes, note])


def _width(rows: Sequence[Mapping[str, str]], columns: Sequence[str], longest_name: int) -> int:
    """Characters of a line, with two beside each column; names of runs may take several lines."""
    words = {column: max(map(len, column.split(" "))) for column in columns}
    cells = {column: max(len(row[column]) for row in rows) for column in columns}
    cells["run"] = min(cells["run"], longest_name)
    return sum(max(words[column], cells[column]) + 3 for column in columns) - 1


def _main_metrics(comparison: Comparison, room: bool) -> list[str]:
    main = main_metric(comparison.metrics)
    losses = [run.loss for run in comparison.runs if run.loss is not None]
    return [*dict.fromkeys(metric for metric in (main, *losses[: int(room)]) if metric is not None)]


def _setting_columns(comparison: Comparison) -> tuple[list[Axis], list[str]]:
    """The settings that are columns, axes first; and those that there is no room for."""
    along = {key for axis in comparison.axes for key in axis.along}
    known = {axis.key for axis in comparison.axes} | along
    columns = [*comparison.axes, *(comparison.axis(key) for key in comparison.settings if key not in known)]
    return columns[:_MOST_SETTINGS], [axis.key for axis in columns[_MOST_SETTINGS:]]


def _text_of_axis(axis: Axis, group: Group, keys: Sequence[str]) -> str:
    """The value of a setting, with those that move along with it."""
    settings = settings_of(group.runs[0])
    value = text_of_setting(settings[axis.key]) if axis.key in settings else "–"
    along = [f"{short_key(key, keys)}={text_of_setting(settings[key])}" for key in axis.along if key in settings]
    rest = [f"{len(along) - _MOST_ALONG} more"] if len(along) > _MOST_ALONG else []
    return ", ".join([value, *along[:_MOST_ALONG], *rest])


def _own_name(run: Run) -> str:
    return run.name.rpartition("/")[2]


def _numbers(group: Group) -> str:
    """The numbers of the points of a sweep, such as ``01-03`` or ``01, 04, 07``."""
    numbers = []
    for run in group.runs:
        folder, slash, name = run.name.rpartition("/")
        numbers.append((f"{folder}{slash}", _NUMBERED.match(name)[1]))  # type: ignore[index]
    (first_folder, first), (_, last) = numbers[0], numbers[-1]
    following = [(first_folder, int(first) + place) for place in range(len(numbers))]
    if len(numbers) > 2 and [(folder, int(number)) for folder, number in numbers] == following:
        return f"{first_folder}{first}-{last}"
    return _few([folder + number for folder, number in numbers])


def _label(group: Group) -> str:
    """The label of a group; of names that differ in their last number alone, ``version_0 to 2``."""
    first, last = group.runs[0].name, group.runs[-1].name
    stem = first.rstrip("0123456789")
    if group.label == f"{first} to {last}" and all(r.name.rstrip("0123456789") == stem for r in group.runs):
        return f"{first} to {last.removeprefix(stem)}"
    return group.label


def _few(texts: Sequence[str]) -> str:
    rest = len(texts) - _LONGEST_LIST
    return ", ".join(texts[:_LONGEST_LIST]) + (f" and {rest} more" if rest > 0 else "")


def _text_of_end(metric: str, table: Any, place: int, group: Group) -> str:
    """Mean and spread of the runs that count; of a single run its last value, whatever became of it."""
    n, mean, spread = (table[column][place] for column in ("n", "mean", "spread"))
    if not n and len(group.runs) == 1 and metric in group.runs[0].logged:
        n, mean = 1, group.runs[0].logged[metric]["value"].iloc[-1]
    if not n:
        return "–"
    if is_accuracy(metric) and table["low"].min() >= 0 and table["high"].max() <= 1:
        return f"{mean:.1%}" + (f" ± {spread:.1%}" if n > 1 else "")
    spread = 0.0 if spread < _ROUNDING * abs(mean) else spread
    return f"{mean:.4g}" + (f" ± {spread:.2g}" if n > 1 else "")


def _states(group: Group) -> str:
    """The state of all runs, or how many have which other than finished."""
    states = [run.state for run in group.runs]
    counts = {state: states.count(state) for state in dict.fromkeys(states)}
    if len(counts) == 1:
        return states[0]
    return ", ".join(f"{number} {state}" for state, number in counts.items() if state != "finished")


def diverged_at_text(runs: Sequence[Run]) -> str:
    """The steps at which runs have diverged; else "no", or "not watched" if no run looked for divergence."""
    steps = [run.diverged_at if run.diverged_at is not None else run.not_finite_at for run in runs if run.has_diverged]
    if steps:
        return _few(["–" if step is None else str(step) for step in steps])
    return "no" if any(run.watched for run in runs) else "not watched"


def _seconds(runs: Sequence[Run]) -> str:
    seconds = [run.status["seconds"] for run in runs if run.status.get("seconds")]
    return f"{sum(seconds) / len(seconds):.0f}" if seconds else "–"


def _rank(group: Group) -> int:
    return min(_RANKS.get(outcome(run, None) or "", 3) for run in group.runs)


def _goodness(ends: Mapping[str, Any], place: int) -> float:
    """Smaller for better values of the first metric, whose name tells what is better; NaN goes last."""
    for metric, table in ends.items():
        mean, direction = float(table["mean"][place]), better(metric)
        if direction is not None and not math.isnan(mean):
            return -mean if direction == "higher" else mean
        return math.inf
    return math.inf


def _notes(seeds: bool, left_out: Collection[str]) -> list[str]:
    notes = []
    if seeds:
        notes.append("values: mean ± standard deviation over the n seeds that finished and did not diverge")
    if left_out:
        names = ", ".join([*left_out][:_LONGEST_LIST]) + (", …" if len(left_out) > _LONGEST_LIST else "")
        notes.append(f"{len(left_out)} more settings differ: {names}; report.html and --csv have all")
    return notes


def filled(rows: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """The rows without the columns in which no row has a value."""
    nothing = {"–", "not watched"}
    empty = {column for column in rows[0] if all(row[column] in nothing for row in rows)} - {"run"}
    return [{column: text for column, text in row.items() if column not in empty} for row in rows]
