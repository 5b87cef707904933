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
            "one sampled step, quantity `of`, and layer",
            (
                _STEP,
                Column("of", _TEXT, "`gradient`, `update` or `noise`"),
                Column("layer", _TEXT, "name of the parameter, or of what `by` takes together"),
                Column("size", _INT, "number of values; of `noise` those of all ranks"),
                Column("counted", _INT, "how many of them the histogram holds: all, unless there is a `budget`"),
                Column("max", _FLOAT, "largest magnitude, exact"),
                Column("l2", _FLOAT, "Euclidean norm, exact"),
                Column("kurtosis", _FLOAT, "biased excess kurtosis, exact to about 1e-4; 0 for a Gaussian"),
                Column("q50", _FLOAT, "median of the magnitude, off by at most 2^-(mantissa_bits+1) of itself"),
                Column("q99", _FLOAT, "99 % quantile of the magnitude, likewise"),
                Column("q999", _FLOAT, "99.9 % quantile of the magnitude, likewise"),
                Column("tail_ratio", _FLOAT, "q999/q50; null if the median is 0"),
                Column("alpha", _FLOAT, "Hill's index over the top `tail_fraction` of the magnitudes; small is heavy"),
                Column("zeros", _INT, "number of values that are 0, of those counted"),
                Column("nonfinite", _INT, "number of values that are NaN or infinite, of those counted"),
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
                Column("relative", _CURVE, "loss at s times the step over `loss`, for each of `multiples`; 1 at 0"),
                Column(
                    "headroom",
                    _FLOAT,
                    "largest s up to which the loss stays at or below where it started, as `headroom_bound` says; null "
                    "if `loss` is 0 or not finite",
                ),
                Column("along", _TEXT, "the step: `gradient`, the learning rate times it; or `update`, the one made"),
                Column("optimizer", _INT, "index of the optimizer whose step it is; 0 if there is one"),
                Column(
                    "headroom_bound",
                    _TEXT,
                    "`below`: less than `headroom`, the smallest of `multiples` above 0; `above`: at least `headroom`, "
                    "the largest; null: it is `headroom`, interpolated",
                ),
                Column(
                    "headroom_low",
                    _FLOAT,
                    "`quantile` (10 %) of the headroom over the last `window` (20) samples of this optimizer, this one "
                    "included; one of their values",
                ),
                Column("headroom_low_bound", _TEXT, "of `headroom_low`, as `headroom_bound`"),
            ),
        ),
        Quantity(
            "divergence",
            "the first divergence; no row if there was none",
            (
                _STEP,
                Column(
                    "loss",
                    _FLOAT,
                    "loss of the mini-batch that diverged, the largest over ranks, of a `drop` the smallest; NaN is "
                    "infinite",
                ),
                Column("rule", _TEXT, "`threshold`, `not finite`, `spike` or, with `two_sided`, `drop`"),
                Column("stopped", pa.bool_(), "whether the callback ended training"),
            ),
        ),
        Quantity(
            "channel_moments",
            "one sampled step, module, and `input` or `output`",
            (
                _STEP,
                Column("layer", _TEXT, "name of the module"),
                Column("where", _TEXT, "`input` or `output` of the module"),
                Column("depth", _INT, "place among the modules followed, in the order of their definition, from 0"),
                Column("channels", _INT, "number of channels"),
                Column("count", _INT, "values of each channel: batch times space, of all micro-batches and ranks"),
                Column("mean", _FLOAT, "mean over the channels of the magnitude of their means"),
                Column("variance", _FLOAT, "mean over the channels of their (biased) variances"),
                Column("variance_max", _FLOAT, "largest variance of a channel"),
                Column("dead", _INT, "channels whose variance is at most `dead_below` times the median channel's"),
                Column(
                    "mean_drift",
                    _FLOAT,
                    "mean over the channels of the distance from `running_mean`, as it was before the step, in running "
                    "standard deviations; null without running statistics and for outputs",
                ),
                Column(
                    "std_drift",
                    _FLOAT,
                    "mean over the channels of the distance of the standard deviation from the running one, likewise",
                ),
            ),
        ),
        Quantity(
            "gradient_noise",
            "one sampled step",
            (
                _STEP,
                Column(
                    "gradients",
                    _INT,
                    "backward passes compared, or with `split` parts of batches, on all ranks",
                ),
                Column("small_batch", _FLOAT, "samples in a small batch; the harmonic mean if they differ"),
                Column(
                    "big_batch",
                    _FLOAT,
                    "samples behind a big gradient: the optimizer's, with `split` a micro-batch's",
                ),
                Column("small_sq", _FLOAT, "squared norm of a small batch's gradient, mean over all"),
                Column("big_sq", _FLOAT, "squared norm of the mean of a big batch's small ones' gradients, likewise"),
                Column("gradient_sq", _FLOAT, "estimate of abs(G)^2, unbiased; may be negative where noise is large"),
                Column("trace", _FLOAT, "estimate of tr(Sigma) = C, samples' gradients' summed variance, unbiased"),
                Column("scale", _FLOAT, "`trace` over `gradient_sq`, in samples: B_simple of this step alone, noisy"),
                Column("mean_gradient_sq", _FLOAT, "running mean of `gradient_sq` over sampled steps"),
                Column("mean_trace", _FLOAT, "running mean of `trace` over sampled steps"),
                Column("mean_scale", _FLOAT, "`mean_trace` over `mean_gradient_sq`: B_simple, the critical batch size"),
                Column("lr", _FLOAT, "alpha, the learning rate of the first parameter group"),
                Column("bound", _FLOAT, "alpha^2 C / b times `factor`, of this step's `trace` and the whole batch b"),
                Column("factor", _TEXT, "the finite-population factor: `(N-b)/N`, `(N-b)/(N-1)`, or `1` for N unknown"),
            ),
        ),
    )
}
