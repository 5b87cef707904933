"""What each record holds: the one table that the files' schemas, their metadata and the documentation come from."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass

import pyarrow as pa

QUANTITY, VERSION, START_STEP, MEANING = "normzoo.quantity", "normzoo.version", "normzoo.start_step", "meaning"


@dataclass(frozen=True)
class Column:
    """One column: its name, its Arrow type, and what its values mean, with their unit."""

    name: str
    type: pa.DataType
    meaning: str


@dataclass(frozen=True)
class Quantity:
    """One record: its name, what a row is, and its columns, the first of which is ``step``."""

    name: str
    row: str
    columns: tuple[Column, ...]

    def schema(self, start_step: int = 0) -> pa.Schema:
        """The Arrow schema of a stream written by a run that starts, or goes on, at ``start_step``."""
        about = {
            QUANTITY: self.name,
            "normzoo.row": self.row,
            VERSION: importlib.metadata.version("normzoo"),
            START_STEP: str(start_step),
        }
        return pa.schema([pa.field(c.name, c.type, metadata={MEANING: c.meaning}) for c in self.columns], about)

    def markdown(self) -> str:
        """The table of the columns, as the documentation holds it."""
        lines = ["| column | type | meaning |", "|---|---|---|"]
        return "\n".join([*lines, *(f"| `{c.name}` | `{c.type}` | {c.meaning} |" for c in self.columns)])


_INT, _FLOAT, _TEXT = pa.int64(), pa.float64(), pa.string()
_CURVE = pa.list_(pa.field("item", _FLOAT))
_HISTOGRAM = pa.list_(pa.field("item", pa.struct([("bucket", pa.int32()), ("count", _INT)])))
_STEP = Column("step", _INT, "optimizer steps made before the sample was taken")

QUANTITIES = {
    quantity.name: quantity
    for quantity in (
        Quantity(
            "gradient_tails",
            "one sampled step and parameter",
            (
                _STEP,
                Column("layer", _TEXT, "name of the parameter"),
                Column("size", _INT, "number of values in its gradient"),
                Column("max", _FLOAT, "largest magnitude, exact"),
                Column("l2", _FLOAT, "Euclidean norm, exact"),
                Column("kurtosis", _FLOAT, "biased excess kurtosis, exact; 0 for a Gaussian"),
                Column("q50", _FLOAT, "median of the magnitude, off by at most 2^-(mantissa_bits+1) of itself"),
                Column("q99", _FLOAT, "99 % quantile of the magnitude, likewise"),
                Column("q999", _FLOAT, "99.9 % quantile of the magnitude, likewise"),
                Column("tail_ratio", _FLOAT, "q999/q50; null if the median is 0"),
                Column("alpha", _FLOAT, "Hill's index over the top `tail_fraction` of the magnitudes; small is heavy"),
                Column("zeros", _INT, "number of values that are 0"),
                Column("nonfinite", _INT, "number of values that are NaN or infinite"),
                Column("mantissa_bits", pa.int32(), "leading bits of the mantissa that a bucket keeps"),
                Column("histogram", _HISTOGRAM, "the filled buckets, as `normzoo.functional.buckets` numbers them"),
            ),
        ),
        Quantity(
            "relative_loss",
            "one sampled step",
            (
                _STEP,
                Column("lr", _FLOAT, "learning rate of the first parameter group"),
                Column("loss", _FLOAT, "loss of the mini-batch before the step, the denominator"),
                Column("multiples", _CURVE, "s, multiples of the step"),
                Column("relative", _CURVE, "loss after s times the step over `loss`, for each of `multiples`"),
                Column("headroom", _FLOAT, "largest s up to which the relative loss stays at or below 1"),
            ),
        ),
        Quantity(
            "divergence",
            "the first divergence; no row if there was none",
            (
                _STEP,
                Column("loss", _FLOAT, "loss of the mini-batch that diverged, the largest over ranks; NaN is infinite"),
                Column("rule", _TEXT, "`threshold`, `not finite` or `spike`"),
                Column("stopped", pa.bool_(), "whether the callback ended training"),
            ),
        ),
    )
}
