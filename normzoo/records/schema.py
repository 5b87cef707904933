"""What a record says of itself: columns with their meaning, and figures, as plain data that stands in its files."""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import pyarrow as pa

QUANTITY, VERSION, START_STEP, MEANING = "normzoo.quantity", "normzoo.version", "normzoo.start_step", "meaning"
FIGURES = "normzoo.figures"
TYPES: dict[str, pa.DataType] = {
    "int": pa.int64(),
    "int32": pa.int32(),
    "float": pa.float64(),
    "text": pa.string(),
    "bool": pa.bool_(),
    "curve": pa.list_(pa.field("item", pa.float64())),
    "histogram": pa.list_(pa.field("item", pa.struct([("bucket", pa.int32()), ("count", pa.int64())]))),
}
LOGGED = ("int", "int32", "float", "bool")
KINDS = ("line", "profile", "curve", "histogram", "signed histogram", "heat map")
SCALES = ("linear", "log", "signed log")
COLOR_SCALES = (*SCALES, "diverging")
_OF_LINES = ("lines", "x_unit", "level", "y_range", "note")  # options that a heat map does not have
_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class Column:
    """One column of a record.

    Args:
        name: its name.
        kind: what its values are: ``"int"``, ``"int32"``, ``"float"``, ``"text"``, ``"bool"``; ``"curve"``, a list of
            numbers; or ``"histogram"``, rows of (bucket, count) as :class:`normzoo.metrics.LogHistogram` numbers them.
        meaning: what a value means, with its unit.
        logged: whether its values, which must be numbers, go to the loggers as well; or the statistic's name in the log
            key, if another one. Histograms go to TensorBoard in any case.

    Raises:
        ValueError: for a kind that there is not, a name that is no lower-case identifier, or logged text or lists.
    """

    name: str
    kind: str
    meaning: str
    logged: bool | str = False

    def __post_init__(self) -> None:
        if self.kind not in TYPES:
            raise ValueError(f"column {self.name!r} must be one of {', '.join(TYPES)}, not {self.kind!r}")
        if self.logged and self.kind not in LOGGED:
            raise ValueError(
                f"column {self.name!r} cannot be logged, as loggers take numbers ({', '.join(LOGGED)}) and it is "
                f"{self.kind!r}; leave out logged"
            )
        _check_name("column", self.name)

    @property
    def type(self) -> pa.DataType:
        """Its Arrow type."""
        return TYPES[self.kind]

    @property
    def statistic(self) -> str:
        """Its part of the log key; empty if it is not logged."""
        return self.logged if isinstance(self.logged, str) else self.name if self.logged else ""


@dataclass(frozen=True)
class Figure:
    """One figure of a record: what is drawn against what. Report, TensorBoard and files draw it alike.

    Args:
        title: the heading, and the last part of its tag in TensorBoard, which has ``_`` for spaces.
        kind: ``"line"``, ``y`` of all rows over ``x`` in which both are defined; ``"profile"``, the same of the first
            and of the last sample, each a panel; ``"curve"``, of list columns the median over samples, and their range;
            ``"histogram"``, the density of magnitudes of the first sample, of a ``"histogram"`` column ``y`` beside a
            column ``mantissa_bits``; ``"signed histogram"``, the share of its values in bins of one width around 0,
            with a panel and axes for each run; ``"heat map"``, the colour of ``z`` at each pair of values of ``x`` and
            ``y``, of several rows the last.
        x: a column.
        y: a column; of a heat map it may hold text, and then has the first value at the top.
        lines: columns of whose values each has a line of its own; of more than twelve the legend has the six that end
            highest (of curves and profiles the first, the middle and the last), and the others are thin and coloured
            from first to last.
        facet: a column of whose values each has a panel of its own; of more than four the middle one has, of steps
            and in a heat map four from first to last.
        x_scale: ``"linear"``, ``"log"``, or ``"signed log"``, which is linear around 0.
        y_scale: likewise.
        x_unit: a column that ``x`` is multiplied by.
        level: what a horizontal line marks: a number, or a column, whose median it is.
        y_range: from where to where ``y`` is drawn; values beyond are drawn at the ends, NaN at the upper one.
        note: a column whose value at the first sample stands in the legend, of several seeds their mean.
        x_label: by default the name of the column.
        y_label: by default the name of the column.
        samples: whether single samples are sent to TensorBoard.
        z: the column that a heat map has for the colour.
        z_scale: as ``x_scale``, of the colour; at or below 0 a logarithmic one has the lowest colour. Or
            ``"diverging"``: linear and symmetric about 0, with one colour for each sign.
        z_label: by default the name of the column.

    Raises:
        ValueError: for a kind or scale that there is not, for a heat map without ``z`` or with an option that it does
            not have, and for ``z`` of another kind.
    """

    title: str
    kind: str
    x: str
    y: str
    lines: tuple[str, ...] = ()
    facet: str = ""
    x_scale: str = "linear"
    y_scale: str = "linear"
    x_unit: str = ""
    level: float | str | None = None
    y_range: tuple[float, float] | None = None
    note: str = ""
    x_label: str = ""
    y_label: str = ""
    samples: bool = False
    z: str = ""
    z_scale: str = "linear"
    z_label: str = ""

    def __post_init__(self) -> None:
        for what, value, accepted in (
            ("kind", self.kind, KINDS),
            ("x_scale", self.x_scale, SCALES),
            ("y_scale", self.y_scale, SCALES),
            ("z_scale", self.z_scale, COLOR_SCALES),
        ):
            if value not in accepted:
                raise ValueError(f"{what} of figure {self.title!r} must be one of {', '.join(accepted)}, not {value!r}")
        if (self.kind == "heat map") != bool(self.z):
            raise ValueError(
                f"figure {self.title!r} is a {self.kind} {f'with z={self.z!r}' if self.z else 'without z'}; a heat map "
                "must have z, the column of its colour, and no other kind has one"
            )
        unused = [name for name in _OF_LINES if self.kind == "heat map" and getattr(self, name) not in ((), "", None)]
        if unused:
            raise ValueError(
                f"figure {self.title!r} is a heat map, which has no {', '.join(unused)}; leave out what is for lines"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> Figure:
        """Itself, as it does not change: pandas copies what frames say of themselves in nearly every operation."""
        return self

    @property
    def columns(self) -> set[str]:
        """The columns that it is drawn from."""
        named = {self.x, self.y, self.z, *self.lines, self.facet, self.x_unit, self.note}
        return named - {""} | ({self.level} if isinstance(self.level, str) else set())


@dataclass(frozen=True)
class Schema:
    """One record: its name, what a row is, its columns, the first of which is ``step``, and its figures.

    Raises:
        ValueError: for a name that is no lower-case identifier, columns of one name, a histogram without a column
            ``mantissa_bits``, or a figure of a column that there is not.
    """

    name: str
    row: str
    columns: tuple[Column, ...]
    figures: tuple[Figure, ...] = ()

    def __post_init__(self) -> None:
        _check_name("record", self.name)
        step = Column("step", "int", "optimizer steps made before the sample was taken")
        if all(c.name != "step" for c in self.columns):
            object.__setattr__(self, "columns", (step, *self.columns))
        names = [c.name for c in self.columns]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"the record {self.name!r} has several columns of the name {', '.join(sorted(twice))}")
        histograms = [c.name for c in self.columns if c.kind == "histogram"]
        if histograms and "mantissa_bits" not in names:
            raise ValueError(
                f"the record {self.name!r} has the histogram {histograms[0]!r}, and no column 'mantissa_bits' that "
                "says how many leading bits of the mantissa its buckets keep; add one of kind 'int32'"
            )
        for figure in self.figures:
            if missing := figure.columns - {*names}:
                raise ValueError(
                    f"figure {figure.title!r} of the record {self.name!r} is drawn from {', '.join(sorted(missing))}, "
                    f"and the columns are {', '.join(names)}"
                )

    def arrow(self, start_step: int = 0) -> pa.Schema:
        """The Arrow schema of a stream written by a run that starts, or goes on, at ``start_step``."""
        about = {
            QUANTITY: self.name,
            "normzoo.row": self.row,
            VERSION: importlib.metadata.version("normzoo"),
            START_STEP: str(start_step),
            FIGURES: json.dumps([_written(figure) for figure in self.figures]),
        }
        return pa.schema([pa.field(c.name, c.type, metadata={MEANING: c.meaning}) for c in self.columns], about)

    def markdown(self) -> str:
        """The table of the columns, as the documentation holds it."""
        lines = ["| column | type | meaning |", "|---|---|---|"]
        return "\n".join([*lines, *(f"| `{c.name}` | `{c.type}` | {c.meaning} |" for c in self.columns)])


def read_figures(metadata: Mapping[str, str]) -> list[Figure]:
    """The figures in the metadata of a stream's schema, without those that only a later version can draw."""
    given: Any = json.loads(metadata.get(FIGURES, "[]"))
    return [Figure(**_with_tuples(figure)) for figure in given if _is_drawable(figure)]


def _is_drawable(figure: Mapping[str, Any]) -> bool:
    """Whether this version has the kind, the options and the scales of a figure."""
    options = {field.name for field in fields(Figure)}
    scales = all(figure.get(f"{axis}_scale", "linear") in SCALES for axis in "xy")
    colors = figure.get("z_scale", "linear") in COLOR_SCALES
    return figure.get("kind") in KINDS and set(figure) <= options and scales and colors


def _written(figure: Figure) -> dict[str, Any]:
    """What is given of a figure, without defaults: an earlier version lacks some options, and draws it all the same."""
    by_default = {field.name: field.default for field in fields(figure)}
    return {name: value for name, value in asdict(figure).items() if value != by_default[name]}


def _with_tuples(figure: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in figure.items()}


def _check_name(what: str, name: object) -> None:
    if not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise ValueError(
            f"the name of a {what} must be of lower-case letters, digits and '_', such as 'l2', not {name!r}"
        )
