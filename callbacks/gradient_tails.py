"""How heavy the tails of the gradients are, layer by layer."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from normzoo.callbacks._run.facts import loss_factor, plain_name, rank_and_ranks
from normzoo.callbacks._run.gradients import (
    GradientVersions,
    check_several_gradients,
    gradients,
    trainable_parameters,
    unscales_itself,
)
from normzoo.callbacks._run.ranks import SharedHistograms, is_sharded, own_parts
from normzoo.callbacks.measurement import Column, Figure, Measurement, Run, Sample, Step
from normzoo.callbacks.schedule import Schedule, is_whole
from normzoo.functional.buckets import Layout
from normzoo.functional.central_moments import SQUARES, euclidean_norm, kurtosis, largest_magnitude
from normzoo.functional.histogram_and_moments import (
    histogram_and_moments,
    merged,
    prepare,
    sampled_histogram_and_moments,
)
from normzoo.functional.tail_statistics import prepare as prepare_statistics
from normzoo.functional.tail_statistics import tail_statistics

_SOURCES = ("gradient", "update", "noise")


class GradientTails(Measurement):
    """Records the distribution of each layer's gradient as the optimizer is about to use it.

    That is after reduction over ranks and unscaling, before clipping. A row of the record ``gradient_tails`` for each
    sampled step and layer holds: ``max`` |g|, ``l2``, excess ``kurtosis`` (exact); quantiles ``q50``, ``q99``,
    ``q999`` of |g|, ``tail_ratio`` q999/q50, ``alpha`` (Hill, over the top ``tail_fraction``), from the histogram;
    counts of ``zeros`` and ``nonfinite``; and the histogram as pairs (bucket, count). Logged under
    ``gradient_tails/gradient/STAT/LAYER``, and ``update`` and ``noise`` likewise; a TensorBoard logger gets the
    histograms.

    Under DDP the ranks, which all hold the same gradients, share the layers out by size, so that each measures less the
    more there are; with DTensor parameters (FSDP2, tensor parallelism) each rank measures its shard. One reduction for
    each sampled step puts the results together; nothing waits for it.

    Args:
        every_n_steps: sample when the number of steps that the optimizer has made is a multiple of this; or a schedule.
        parameters: names to follow, with ``*`` as in a shell, or several such patterns; all trainable parameters by
            default.
        by: what a layer is: each ``"parameter"``; each ``"module"``, its parameters together; or a number of parts of
            the name, so that 1 takes together what is inside each of the model's outermost modules.
        of: ``"gradient"``; ``"update"``, what the optimizer's step adds to the parameters, with its momentum, learning
            rate and clipping; ``"noise"``, the deviation of the gradient of each rank's last micro-batch from the mean
            over all micro-batches and ranks; or several of these. The variance of ``"noise"`` from K gradients is
            (K-1)/K times that of a gradient. ``"update"`` keeps a copy of the parameters for the length of a sampled
            step.
        budget: values of each parameter that the histogram is made of, in larger ones spread evenly, others at each
            sampled step; None for all. ``max`` and ``l2`` are of all values nonetheless.
        tail_fraction: share of the largest magnitudes that alpha is estimated from.
        mantissa_bits: of the histogram's buckets; quantiles are off by at most 2^-(m+1).
        dirpath: folder of the record; by default that of the Trainer's first logger, else a new one.
        label: sets the callback apart from others of its class: the record goes to a folder of this name in that one,
            and log keys begin with it.

    Raises:
        ValueError: for arguments out of range; at setup for unsupported strategies; when training starts if no
            parameter matches, or if ``"noise"`` has nothing to compare.

    Source: heavy tails as in Bjorck et al. 2018, arXiv 1806.02375; of the noise as in Simsekli et al. 2019, arXiv
    1901.06053.
    """

    name = "gradient_tails"
    row = "one sampled step, quantity `of`, and layer"
    columns = (
        Column("of", "text", "`gradient`, `update` or `noise`"),
        Column("layer", "text", "name of the parameter, or of what `by` takes together"),
        Column("size", "int", "number of values; of `noise` those of all ranks"),
        Column("counted", "int", "how many of them the histogram holds: all, unless there is a `budget`"),
        Column("max", "float", "largest magnitude, exact", logged=True),
        Column("l2", "float", "Euclidean norm, exact", logged=True),
        Column("kurtosis", "float", "biased excess kurtosis, exact to about 1e-4; 0 for a Gaussian", logged=True),
        Column("q50", "float", "median of the magnitude, off by at most 2^-(mantissa_bits+1) of itself"),
        Column("q99", "float", "99 % quantile of the magnitude, off by at most 2^-(mantissa_bits+1) of itself"),
        Column("q999", "float", "99.9 % quantile of the magnitude, off by at most 2^-(mantissa_bits+1) of itself"),
        Column("tail_ratio", "float", "q999/q50; null if the median is 0", logged=True),
        Column(
            "alpha",
            "float",
            "Hill's tail index over the largest `tail_fraction` of the magnitudes; small for heavy tails",
            logged=True,
        ),
        Column("zeros", "int", "number of values that are 0, of those counted"),
        Column("nonfinite", "int", "number of values that are NaN or infinite, of those counted"),
        Column("mantissa_bits", "int32", "leading bits of the mantissa that a bucket keeps"),
        Column("histogram", "histogram", "the filled buckets, as `normzoo.functional.buckets` numbers them"),
    )
    figures = (
        Figure(
            "Gradient histogram",
            "histogram",
            x="layer",
            y="histogram",
            facet="layer",
            lines=("of",),
            x_scale="log",
            y_scale="log",
            x_label="|gradient|",
            y_label="density of log10 |gradient|",
            note="kurtosis",
        ),
        Figure(
            "Gradient values",
            "signed histogram",
            x="layer",
            y="histogram",
            facet="layer",
            lines=("of",),
            y_scale="log",
            x_label="gradient",
            y_label="share of the values",
            note="kurtosis",
        ),
    )
    key = "{of}/{stat}/{layer}"
    earlier_key = "{of}/{stat}/{layer}"
    shards = by_default = True

    def __init__(
        self,
        every_n_steps: int | Schedule = 50,
        *,
        parameters: str | Sequence[str] = "*",
        by: str | int = "parameter",
        of: str | Sequence[str] = "gradient",
        budget: int | None = None,
        tail_fraction: float = 0.01,
        mantissa_bits: int = 3,
        dirpath: str | None = None,
        label: str | None = None,
    ) -> None:
        if not 0 < tail_fraction < 1:
            raise ValueError(f"tail_fraction must be between 0 and 1, not {tail_fraction}")
        if budget is not None and not (is_whole(budget) and budget >= 16):
            raise ValueError(f"budget must be a whole number of at least 16 values, or None for all, not {budget!r}")
        if by not in ("parameter", "module") and not (is_whole(by) and int(by) >= 1):
            raise ValueError(f"by must be 'parameter', 'module' or a number of parts of the name, not {by!r}")
        if budget is not None and by != "parameter":
            raise ValueError("a budget takes as much of a small parameter as of a large one, which by= cannot add up")
        if not is_whole(mantissa_bits):
            raise ValueError(f"mantissa_bits must be a whole number, not {mantissa_bits!r}")
        Layout(mantissa_bits)  # checks its range
        self.patterns = [parameters] if isinstance(parameters, str) else list(parameters)
        if not self.patterns:
            raise ValueError("parameters must be one or more patterns of names")
        self._followed = re.compile("|".join(map(fnmatch.translate, self.patterns)))
        self.of = [of] if isinstance(of, str) else list(of)
        if not self.of or not set(self.of) <= {*_SOURCES}:
            raise ValueError(f"of must be one or more of {', '.join(_SOURCES)}, not {of!r}")
        needed = {"gradient": "gradients", "update": "update", "noise": "backward"}
        self.needs = {needed[source] for source in self.of}
        self.by, self.budget, self.tail_fraction, self.mantissa_bits = by, budget, tail_fraction, mantissa_bits
        self._pass: _Pass | None = None  # the last one over the gradients
        super().__init__(every_n_steps, dirpath=dirpath, label=label)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_pass": None}  # which knows gradients by weak references

    def start(self, run: Run) -> None:
        """Refuse what the module, which now is whole, has not; load what measuring it needs."""
        self._pass = None
        names = [plain_name(name) for name, _ in run.module.named_parameters()]
        for pattern in self.patterns:
            if not fnmatch.filter(names, pattern):
                raise ValueError(f"no parameter matches {pattern!r}; there are {', '.join(names)}")
        if "noise" in self.of:
            if not run.automatic:
                raise ValueError(
                    "GradientTails cannot know how manual optimization weighs the losses of a step's backward passes; "
                    'of="noise" supports automatic optimization only'
                )
            check_several_gradients(run, 'GradientTails(of="noise")')
            if any(is_sharded(p) for p in run.module.parameters()):
                raise ValueError(
                    'GradientTails(of="noise") needs whole gradients of each rank; sharded parameters have none'
                )
        prepare([p for p in run.module.parameters() if p.requires_grad])
        prepare_statistics()

    def parameters(self, run: Run, optimizer: Optimizer) -> dict[Any, Tensor]:
        """The parameters of the optimizer whose names match."""
        return {name: p for name, p in trainable_parameters(run, optimizer).items() if self._followed.match(name)}

    def gradient(self, step: Step, name: Any, g: Tensor) -> None:
        """Keep the gradient that the last backward pass brings on this rank, before accumulation and reduction."""
        if step.memory.get("pass") != step.passes:
            step.memory["pass"], step.memory["last"] = step.passes, {}
        last = step.memory["last"]
        last[name] = last[name] + g.detach() if name in last else g.detach().clone()

    def measure(self, step: Step) -> None:
        """Measure the gradients, and their noise."""
        if "gradient" in self.of:
            self._send(step, "gradient", self._gradients(step))
        if "noise" in self.of and step.run.ranks * step.passes > 1:  # an epoch's last step may be of one micro-batch
            self._send(step, "noise", self._count(step, self._noise(step), every_rank=True))

    def measure_update(self, step: Step) -> None:
        """Measure what the step has changed."""
        self._send(step, "update", self._count(step, step.update()))

    def squared_norms(self, step: Step) -> dict[int, Tensor]:
        """Squared norms of this step's gradients, by the ids of their parameters; empty if they are not measured.

        From the pass that :meth:`measure` makes, for other measurements that read the gradients of the same step. They
        are of what this rank has measured, 0 for what other ranks have, so that their sum over ranks is right.
        """
        run = step.run
        if "gradient" not in self.of or self.budget is not None or len(run.optimizers) > 1:
            return {}
        if not self.samples(run, step.index, run.step):
            return {}
        own = step.of(step.optimizer, step.index)
        own.parameters = self.parameters(run, step.optimizer)
        counted = self._gradients(own)
        if counted is None:
            return {}
        none = torch.zeros((), dtype=torch.float64, device=counted.device)
        squares = dict.fromkeys(range(len(counted.names)), none)
        if counted.found is not None:
            squares |= dict(zip(counted.mine, counted.found[1][:, SQUARES].unbind(), strict=True))
        return {id(own.parameters[counted.names[i]]): square for i, square in squares.items()}

    def histograms(self, tensors: Sequence[Tensor], step: int) -> tuple[Tensor, Tensor]:
        """Histograms, (tensors, buckets) int64, and moments, (tensors, 8) float64, on the tensors' device."""
        if self.budget is None:
            return histogram_and_moments(tensors, self.mantissa_bits)
        return sampled_histogram_and_moments(tensors, self.budget, step, self.mantissa_bits)

    def rows(self, sample: Sample, values: tuple[Tensor, Tensor]) -> list[dict[str, Any]]:
        """A row for each layer, from histograms, (parameters, buckets) int64, and moments, (parameters, 8) float64."""
        if not self.writes:
            return []
        number: dict[str, int] = {}
        group = [number.setdefault(self._layer(name), len(number)) for name in sample.about["names"]]
        layers, sizes = list(number), [0] * len(number)
        for g, size in zip(group, sample.about["sizes"], strict=True):
            sizes[g] += size
        counts, moments = merged(*values, group)
        found = tail_statistics(counts, self.mantissa_bits, self.tail_fraction)
        q50, q99, q999 = found.quantiles.T.tolist()
        columns: dict[str, Sequence[Any]] = {
            "of": [sample.about["of"]] * len(layers),
            "layer": layers,
            "size": sizes,
            "counted": found.sizes.tolist(),
            "max": largest_magnitude(moments).tolist(),
            "l2": euclidean_norm(moments).tolist(),
            "kurtosis": kurtosis(moments).tolist(),
            "q50": q50,
            "q99": q99,
            "q999": q999,
            "tail_ratio": [high / low if low else None for low, high in zip(q50, q999, strict=True)],
            "alpha": found.alpha.tolist(),
            "zeros": found.zeros.tolist(),
            "nonfinite": found.nonfinite.tolist(),
            "mantissa_bits": [self.mantissa_bits] * len(layers),
            "histogram": found.pairs,
        }
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def _gradients(self, step: Step) -> _Counted | None:
        """The counted gradients of a step, in one pass however often they are asked for."""
        params = list(step.parameters.values())
        if not (self._pass and self._pass.step == step.run.step and self._pass.versions.are_those_of(params)):
            self._pass = _Pass(step.run.step, GradientVersions(params), self._count(step, step.gradients()))
        return self._pass.counted

    def _count(self, step: Step, found: Mapping[str, Tensor], every_rank: bool = False) -> _Counted | None:
        """Histograms and moments of what this rank has of tensors by name; None without any."""
        # Of complex numbers the real and the imaginary parts
        tensors = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in found.values()]
        if not tensors:
            return None
        parts = own_parts(tensors, every_rank=every_rank)
        mine = [i for i, part in enumerate(parts) if part is not None]
        measured = self.histograms([part for part in parts if part is not None], step.number) if mine else None
        sizes = [t.numel() * (rank_and_ranks()[1] if every_rank else 1) for t in tensors]
        several = every_rank or any(map(is_sharded, tensors))
        return _Counted(list(found), mine, measured, sizes, several, tensors[0].device)

    def _send(self, step: Step, of: str, counted: _Counted | None) -> None:
        if counted is not None:
            names, mine, found, sizes, several, device = counted
            shared = SharedHistograms(found, mine, sizes, self.mantissa_bits, several, device)
            self.send(step, shared, of=of, names=names, sizes=sizes)

    def _noise(self, step: Step) -> dict[str, Tensor]:
        """The deviation of the last micro-batch's gradient from the mean of the step's, both of the plain loss."""
        last = step.memory["last"] if step.memory.get("pass") == step.passes - 1 else {}
        found: dict[str, Tensor] = {}
        for name, mean in gradients(step.parameters.items()).items():
            wide = mean.to(torch.promote_types(mean.dtype, torch.float32))
            scaled = unscales_itself(step.optimizer)  # else .grad has been unscaled
            found[name] = -wide / (step.passes * loss_factor(step.run, wide, scaled))
            if name in last:  # else the last pass, or this rank, did not use it
                own = last[name].to_dense() if last[name].is_sparse else last[name]
                found[name] += own.to(wide.dtype) / loss_factor(step.run, wide)
        return found

    def _layer(self, name: str) -> str:
        if self.by == "parameter":
            return name
        parts = name.split(".")[:-1]  # of the module
        return ".".join(parts if self.by == "module" else parts[: int(self.by)])


class _Counted(NamedTuple):
    """What one pass over named tensors has found."""

    names: list[str]
    mine: list[int]  # places of the tensors of which this rank has measured something
    found: tuple[Tensor, Tensor] | None  # histograms, (mine, buckets), and moments, (mine, 8)
    sizes: list[int]  # values of each tensor, on all ranks
    several: bool  # whether several ranks may have measured the same tensor
    device: torch.device


class _Pass(NamedTuple):
    """One pass over the gradients of a step."""

    step: int
    versions: GradientVersions
    counted: _Counted | None
