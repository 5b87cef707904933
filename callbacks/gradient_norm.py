"""The norm of the gradient, before and after clipping, and how large gradient and step are beside the weights."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from normzoo.callbacks._run.facts import plain_name
from normzoo.callbacks._run.gradients import local_values
from normzoo.callbacks._run.ranks import NamedReading, is_sharded, own_parts
from normzoo.callbacks.gradient_tails import GradientTails
from normzoo.callbacks.measurement import Column, Figure, Measurement, Run, Sample, Step
from normzoo.callbacks.schedule import Schedule, as_schedule, is_whole
from normzoo.functional.spikes import modified_z_score
from normzoo.functional.unit_norms import UNIT_EPS, largest_unit_ratio

_CLIPPED = 1 - 1e-5  # a norm below this share of the one before clipping is not rounding
Key = tuple[int, int]  # of a parameter: its group, and its place in the group


class GradientNorm(Measurement):
    """Records the norm of the gradient at each step, before clipping and as the optimizer applies it.

    A row of the record ``gradient_norm`` for each sampled step, and for each parameter group if the optimizer has
    several, holds ``norm``, the Euclidean norm after reduction over ranks and unscaling and before clipping;
    ``applied``, the norm of what the optimizer applies; whether they differ (``clipped``) and by which ``factor``; and
    for each of the two norms its robust z-score against those before it. Logged under ``gradient_norm/STAT``, and
    ``gradient_norm/STAT/group_N``.

    At the steps of ``layers`` there is a row for each parameter as well: ``unit_ratio``, the largest ratio of the norms
    of gradient and weights of a unit (:func:`normzoo.functional.unit_norms.largest_unit_ratio`), and
    ``relative_update``, the norm of what the step adds to the parameter, relative to the norm of the parameter.

    Norms are accumulated in float32, as those by which torch clips: above about 1e19 they are infinite. Under DDP the
    ranks share the parameters out by size; of DTensor parameters each rank measures its shard. One reduction of a
    number for each group puts the results together; nothing waits for it.

    Under manual optimization what ``training_step`` clips by itself is clipped when ``norm`` is measured; so it is in a
    plain loop, unless ``watching.before_clipping()`` is called before clipping; of several optimizers with the one that
    steps next.

    Args:
        every_n_steps: sample when the number of steps that the optimizer has made is a multiple of this; or a schedule.
        layers: record a row for each parameter when the number of steps that the optimizer has made is a multiple of
            this; or a schedule; None for never.
        window: number of preceding norms that a norm's score compares it with, without norms that are not finite; there
            is no score until there are as many.
        dirpath: folder of the record; by default that of the Trainer's first logger, else a new one.
        label: sets the callback apart from others of its class: the record goes to a folder of this name in that one,
            and log keys begin with it.

    Raises:
        ValueError: for arguments out of range; at setup for unsupported strategies.

    Source: ratios of units by Brock et al. 2021, arXiv 2102.06171; score by Iglewicz & Hoaglin 1993.
    """

    name = "gradient_norm"
    row = "one sampled step and what `of` names"
    columns = (
        Column("optimizer", "int", "index of the optimizer"),
        Column("of", "text", "empty for all parameters of the optimizer, `group_N`, or the name of a parameter"),
        Column("depth", "int", "place of the parameter among those of the optimizer; null for several parameters"),
        Column(
            "norm",
            "float",
            "Euclidean norm of the gradient, reduced, unscaled, before clipping; null for single parameters",
            logged=True,
        ),
        Column(
            "applied",
            "float",
            "norm as the optimizer applies it, clipped; null for single parameters and steps that a GradScaler skips",
            logged=True,
        ),
        Column("clipped", "bool", "whether `applied` is below `norm`, by more than rounding"),
        Column("factor", "float", "`applied`/`norm`: what clipping has left of it", logged=True),
        Column("score", "float", "robust z-score of `norm` against the last `window` ones", logged=True),
        Column("applied_score", "float", "robust z-score of `applied` against the last `window` ones", logged=True),
        Column(
            "unit_ratio",
            "float",
            "largest ratio, over the units of the parameter, of the norm of the gradient to that of the weights",
            logged=True,
        ),
        Column(
            "relative_update",
            "float",
            "norm of what the step adds to the parameter, relative to the norm of the parameter before it",
            logged=True,
        ),
    )
    figures = (
        Figure(
            "Gradient norm", "line", x="step", y="norm", lines=("of",), y_scale="log", y_label="norm of the gradient"
        ),
        Figure(
            "Clipped gradient norm", "line", x="step", y="applied", lines=("of",), y_scale="log", y_label="norm applied"
        ),
        Figure(
            "Relative update over depth",
            "profile",
            x="depth",
            y="relative_update",
            y_scale="log",
            x_label="depth (parameters)",
            y_label="|update| / |parameter|",
        ),
        Figure(
            "Unit-wise gradient over depth",
            "profile",
            x="depth",
            y="unit_ratio",
            y_scale="log",
            x_label="depth (parameters)",
            y_label="largest |g| / |w| of a unit",
        ),
    )
    key = "{stat}/{of}"
    needs = frozenset({"gradients", "applied"})
    shards = by_default = True

    def __init__(
        self,
        every_n_steps: int | Schedule = 1,
        *,
        layers: int | Schedule | None = 50,
        window: int = 50,
        dirpath: str | None = None,
        label: str | None = None,
    ) -> None:
        if not (is_whole(window) and window > 0):
            raise ValueError(f"window must be a whole number of norms above 0, not {window!r}")
        self.layers = None if layers is None else as_schedule(layers, "layers")
        self.window = window
        self._layers_due = self._several = False
        self.forget()
        super().__init__(every_n_steps, dirpath=dirpath, label=label)

    def reschedule(self, schedule: Schedule) -> None:
        """Sample by another schedule from now on, single parameters too."""
        super().reschedule(schedule)
        self.layers = schedule

    def samples(self, run: Run, index: int, made: int) -> bool:
        """Whether to sample a step, for its norms or for those of each parameter."""
        self._layers_due = self.layers is not None and self.layers(made)
        return self.schedule(made) or self._layers_due

    def start(self, run: Run) -> None:
        """Log keys tell several optimizers apart."""
        self._several = len(run.optimizers) > 1

    def parameters(self, run: Run, optimizer: Optimizer) -> dict[Any, Tensor]:
        """All parameters that the optimizer may move, by group and place: one that is frozen, if it has a gradient."""
        groups = enumerate(group["params"] for group in optimizer.param_groups)
        both = ((g, i, p) for g, params in groups for i, p in enumerate(params))
        return {(g, i): p for g, i, p in both if p.requires_grad or p.grad is not None}

    def measure(self, step: Step) -> None:
        """Send the norms of the groups; and now and then those of each parameter, and of its weights."""
        gradients = step.gradients()
        late: dict[str, Any] = {}
        step.memory |= {"late": late, "groups": len(step.optimizer.param_groups)}
        if self._layers_due:
            self._measure_layers(step, gradients, late)
        tails = self._others(step.run, GradientTails)
        known = next(filter(None, (m.squared_norms(step) for m in tails)), {})
        self.send(step, self._of_groups(step, gradients, known), late=late)

    def measure_applied(self, step: Step) -> None:
        """Send the norms once more if the gradients may have changed, and whether the optimizer skips its step."""
        values = self._of_groups(step, step.gradients()) if step.may_be_clipped else {}
        skips = getattr(step.optimizer, "found_inf", None)  # set by a GradScaler for optimizers that skip by themselves
        if isinstance(skips, Tensor):
            values["skipped"] = local_values(skips).double().flatten()
        step.memory["late"]["applied"] = NamedReading(values, self.reduce) if values else None

    def measure_update(self, step: Step) -> None:
        """Send the norm of what the step has added to each parameter."""
        update = step.update()
        squares = _squares([update[key] for key in step.memory["keys"]], step.run.device)
        step.memory["late"]["update"] = NamedReading({"update": squares}, self.reduce)

    def rows(self, sample: Sample, values: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """A row for all parameters, for each group of several, and for each parameter that was measured."""
        late = sample.about["late"]
        squares = values["squares"].tolist()
        found = late["applied"].read() if late.get("applied") is not None else {}
        made = "applied" in late and not ("skipped" in found and found["skipped"].any())
        applied = found["squares"].tolist() if "squares" in found else squares
        names = ["", *(f"group_{i}" for i in range(len(squares)) if len(squares) > 1)]
        pairs = [(sum(squares), sum(applied)), *zip(squares, applied, strict=True)]
        rows = [
            self._norm_row(sample.optimizer, name, before**0.5, after**0.5 if made else None)
            for name, (before, after) in zip(names, pairs, strict=False)
        ]
        return rows + (self._layer_rows(sample.optimizer, late, made) if "layers" in late else [])

    def newest(self, before: float) -> dict[tuple[int, int], float]:
        """Norms that are not in the record yet, of steps before this one, by (step, optimizer); waits for them."""
        return {
            (sample.step, sample.optimizer): reading.read()["squares"].sum().item() ** 0.5
            for sample, reading in self._pending
            if sample.step < before
        }

    def suffix(self, row: Mapping[str, Any]) -> str:
        """The optimizer, if there are several."""
        return f"/optimizer_{row['optimizer']}" if self._several else ""

    def state_dict(self) -> dict[str, Any]:
        """The last norms, by which new ones are judged, and the steps that each optimizer has made."""
        return {**super().state_dict(), "recent": [[*key, list(norms)] for key, norms in self._recent.items()]}

    def restore(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        super().restore(state_dict)
        self._recent.clear()
        for *key, norms in state_dict["recent"]:
            self._recent[tuple(key)].extend(norms)

    def forget(self) -> None:
        """Drop the norms of another run."""
        super().forget()
        self._recent: dict[tuple[Any, ...], deque[float]] = defaultdict(partial(deque, maxlen=self.window))

    def score(self, norm: float | None, optimizer: int = 0, of: str = "", which: str = "norm") -> float | None:
        """The robust z-score of a norm against those before it, which it joins; None while there are too few.

        Args:
            norm: the norm; None and what is not finite have no score, and are not remembered.
            optimizer: its index.
            of: empty for all parameters, or the name of a group.
            which: ``"norm"`` or ``"applied"``.
        """
        if norm is None or not math.isfinite(norm):
            return None
        recent = self._recent[optimizer, of, which]
        score = modified_z_score(norm, recent) if len(recent) == self.window else None
        recent.append(norm)
        return score

    def _norm_row(self, optimizer: int, of: str, norm: float, applied: float | None) -> dict[str, Any]:
        compared = applied is not None and math.isfinite(norm) and norm > 0
        return {
            **dict.fromkeys(column.name for column in self.columns),
            "optimizer": optimizer,
            "of": of,
            "norm": norm,
            "applied": applied,
            "clipped": applied < _CLIPPED * norm if applied is not None else None,
            "factor": applied / norm if compared else None,  # type: ignore[operator]
            "score": self.score(norm, optimizer, of),
            "applied_score": self.score(applied, optimizer, of, "applied"),
        }

    def _layer_rows(self, optimizer: int, late: Mapping[str, Any], made: bool) -> list[dict[str, Any]]:
        sums, ratios = late["sums"].read(), late["ratios"].read()["ratio"].tolist()
        of_gradient, of_weight = (sums[name].sqrt().tolist() for name in ("gradient", "weight"))
        undefined = sums["undefined"].tolist()
        updates: Sequence[float | None] = [None] * len(of_weight)  # of a step that was skipped
        if made and "update" in late:
            updates = late["update"].read()["update"].sqrt().tolist()
        found = []
        for i, layer in enumerate(late["layers"]):
            unit_ratio = of_gradient[i] / max(of_weight[i], UNIT_EPS) if layer.is_one_unit else ratios[i]
            unit_ratio = math.nan if undefined[i] else unit_ratio
            update = updates[i]
            found.append(
                {
                    **dict.fromkeys(column.name for column in self.columns),
                    "optimizer": optimizer,
                    "of": layer.name,
                    "depth": layer.depth,
                    "unit_ratio": unit_ratio if layer.has_whole_units else None,
                    "relative_update": update / of_weight[i] if update is not None and of_weight[i] else None,
                }
            )
        return found

    def _measure_layers(self, step: Step, gradients: Mapping[Key, Tensor], late: dict[str, Any]) -> None:
        """Send the squared norms of each gradient and of its parameter, and the largest ratio over its units."""
        names = {id(p): plain_name(name) for name, p in step.run.module.named_parameters()}
        sizes = [len(group["params"]) for group in step.optimizer.param_groups]
        starts = list(accumulate(sizes, initial=0))
        params = [step.parameters[key] for key in gradients]
        late["layers"] = [
            Layer(names.get(id(p), f"parameter {i} of group {g}"), starts[g] + i, p.ndim < 2, _whole_units(p))
            for (g, i), p in zip(gradients, params, strict=True)
        ]
        weights, of_gradients = [p.detach() for p in params], list(gradients.values())
        pairs = zip(own_parts(of_gradients), own_parts(weights), strict=True)
        none = torch.zeros((), dtype=torch.float64, device=step.run.device)
        ratios = [none if g is None or w is None else largest_unit_ratio(g, w).double() for g, w in pairs]
        ratio = torch.stack(ratios) if ratios else none[None][:0]
        sums = {"gradient": _squares(of_gradients, step.run.device), "weight": _squares(weights, step.run.device)}
        sums["undefined"] = ratio.isnan().double()  # a maximum over ranks may lose a NaN
        late["sums"] = NamedReading(sums, "sum")
        late["ratios"] = NamedReading({"ratio": ratio}, "max")
        step.memory["keys"], step.wants_update = list(gradients), True

    def _of_groups(
        self, step: Step, gradients: Mapping[Key, Tensor], known: Mapping[int, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The squared norm of the gradient of each parameter group, of what this rank has of it."""
        sizes = [0] * step.memory["groups"]  # others may have been added since
        for group, _ in gradients:
            sizes[group] += 1
        keys = [id(step.parameters[key]) for key in gradients]
        of_groups = _squares(list(gradients.values()), step.run.device, known, keys).split(sizes)
        return {"squares": torch.stack([squares.sum() for squares in of_groups])}


class Layer(NamedTuple):
    """A parameter, as the rows of single parameters name it."""

    name: str
    depth: int
    is_one_unit: bool
    has_whole_units: bool  # on each rank


def _squares(
    tensors: Sequence[Tensor],
    device: torch.device,
    known: Mapping[int, Tensor] | None = None,
    keys: Sequence[int] = (),
) -> Tensor:
    """The squared norm of each tensor, of what this rank has of it, (tensors,) float64.

    Args:
        tensors: the same on all ranks, or shards.
        device: of the result.
        known: squared norms that another measurement has found, by key: the same keys on all ranks.
        keys: of the tensors.
    """
    none = torch.zeros((), dtype=torch.float64, device=device)
    if not tensors:
        return none[None][:0]
    if known:
        rest = [t for t, key in zip(tensors, keys, strict=True) if key not in known]
        others = iter(_squares(rest, device).unbind())
        return torch.stack([known[key] if key in known else next(others) for key in keys])
    parts = own_parts(tensors)
    norms = iter(_norms([part for part in parts if part is not None]))
    return torch.stack([none if part is None else next(norms) for part in parts]).double().square()


def _norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The norm of each tensor, 0-d in float32 or wider, by one call for those of a dtype: most are small.

    On a CPU a contiguous tensor's is the root of its dot product with itself, which reads memory with all threads and
    sums in more parts: in about half the time, and closer to the norm in float64, than `torch.linalg.vector_norm`.
    """
    norms: dict[int, Tensor] = {}
    flat = {i: g for i, t in enumerate(tensors) if (g := _flat_on_cpu(t)) is not None}
    for alike in _by_dtype(flat):
        norms |= zip(alike, torch.stack([torch.dot(g, g) for g in alike.values()]).sqrt().unbind(), strict=True)
    for alike in _by_dtype({i: t for i, t in enumerate(tensors) if i not in flat}):
        wide = torch.promote_types(next(iter(alike.values())).dtype, torch.float32)
        norms |= zip(alike, torch._foreach_norm([*alike.values()], 2, dtype=wide), strict=True)
    return [norms[i] for i in range(len(tensors))]


def _by_dtype(tensors: Mapping[int, Tensor]) -> Iterable[dict[int, Tensor]]:
    """The numbered tensors, those of each dtype apart."""
    dtypes: dict[torch.dtype, dict[int, Tensor]] = {}
    for i, t in tensors.items():
        dtypes.setdefault(t.dtype, {})[i] = t
    return dtypes.values()


def _flat_on_cpu(t: Tensor) -> Tensor | None:
    """A view of it with one dimension, complex numbers as pairs; None if BLAS has no dot product for it."""
    if not t.is_cpu or not t.is_contiguous():
        return None
    if t.requires_grad:
        t = t.detach()
    if t.is_complex():
        t = torch.view_as_real(t.resolve_conj())
    if t.dtype not in (torch.float32, torch.float64):
        return None
    return t if t.ndim == 1 else t.view(-1)


def _whole_units(p: Tensor) -> bool:
    """Whether no unit of a parameter is cut by sharding; a vector, which is one unit, is put together from sums."""
    return p.ndim < 2 or not is_sharded(p) or not any(q.is_shard() and q.dim != 0 for q in p.placements)  # type: ignore[attr-defined]
