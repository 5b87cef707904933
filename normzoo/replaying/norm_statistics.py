"""Variances by which normalization layers divide, and the gradients that pass through, by channel, group or sample."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from normzoo.callbacks._run.facts import Run
from normzoo.callbacks._run.modules import find_modules, scripted_modules
from normzoo.functional._recomputation import in_backward
from normzoo.recognition import INPLACE_ABN, channel_dim, is_a, known_class
from normzoo.replaying.calls import dense, floating

_GROUPED = ("group", "evonorm_s0", "proxy")
_BY_MAP = ("instance", "filter_response", "batch_instance")
_BY_POSITION = ("layer_channel", "rms", "positional", "simple norm")
_MEAN_SQUARE = ("rms", "filter_response", "power", "simple norm")  # whose mean is not taken away
_NO_STATISTICS = ("affine", "none", "derf", "dynamic_tanh", "divisive", "local_response")
LARGE = 1e3  # a change of a variance that is worth telling
MOST = 10  # layers that are told


@dataclass
class Statistics:
    """Of one layer, over the micro-batches of a pass.

    Attributes:
        unit: what the layer takes a variance of: ``"channel"``, over the batch; ``"group"`` or ``"channel of a
            sample"``, of each sample; ``"sample"``, at each position.
        variance: (U,) by unit, the least over samples or positions and over calls; samples of several calls stand one
            behind the other.
        gradient: (U,) sums of squares of the input's gradient.
        shared: whether ranks share the statistics.
    """

    unit: str
    variance: list[float]
    gradient: list[float] = field(default_factory=list)
    shared: bool = False


class NormStatistics:
    """Takes the statistics of all normalization layers of a run while passes are made inside of the context.

    A layer in evaluation mode with running statistics divides by these.

    Attributes:
        found: by the layers' names.
    """

    def __init__(self, run: Run, aside: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
        self._aside = aside
        scripted = scripted_modules(run.module)
        self.layers = {n: m for n, m in find_modules(run.module, "norms").items() if m not in scripted}
        self.found: dict[str, Statistics] = {}
        self._variances: dict[str, tuple[str, list[Tensor]]] = {}
        self._gradients: dict[str, list[Tensor]] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> NormStatistics:
        for name, module in self.layers.items():
            hook = functools.partial(self._enter, name)
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *raised: object) -> None:
        for handle in self._handles:
            handle.remove()
        for name, (unit, variances) in self._variances.items():
            merged, gradient = _over_calls(unit, variances), _over_calls(unit, self._gradients.get(name, []), torch.add)
            shared = unit == "channel" and _is_synchronized(self.layers[name])
            self.found[name] = Statistics(unit, merged, gradient if len(gradient) == len(merged) else [], shared)

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        x = next((t for t in floating(args, kwargs) if t.is_floating_point()), None)
        if x is None:
            return None
        with self._aside(), torch.no_grad():
            laid_out = units(module, dense(x))
            if laid_out is None:
                return None
            unit, values = laid_out
            if not in_backward():
                self._variances.setdefault(name, (unit, []))[1].append(_variance(module, unit, values))
        if not (x.requires_grad and torch.is_grad_enabled()) or is_a(module, INPLACE_ABN):
            return None
        with self._aside():
            view = x.view_as(x)  # whose gradient is that of this layer alone, whatever else takes x
            self._handles.append(view.register_hook(functools.partial(self._add_gradient, name, module)))
        swap = functools.partial(_swapped, x, view)
        return tuple(map(swap, args)), {key: swap(value) for key, value in kwargs.items()}

    def _add_gradient(self, name: str, module: nn.Module, g: Tensor) -> None:
        with self._aside(), torch.no_grad():
            laid_out = units(module, dense(g))
            if laid_out is not None:
                squares = laid_out[1].double().square().sum((0, 2))
                self._gradients.setdefault(name, []).append(squares)


def units(module: nn.Module, x: Tensor) -> tuple[str, Tensor] | None:
    """The values of which a layer takes each variance: what a unit is, and (S, U, V), S variances of each of U units.

    None for layers without statistics, or of a kind that is not known.
    """
    kind = _kind(module)
    if kind in _NO_STATISTICS or x.ndim < 2 or not x.numel():
        return None
    groups = getattr(module, "num_groups", getattr(module, "groups", 1))
    spanned = getattr(module, "normalized_shape", None)
    dim = channel_dim(module, 1)
    if kind in _BY_POSITION or (not kind and spanned is not None):
        last = len(spanned) if isinstance(spanned, tuple | list) and dim < 0 else 1
        x = x if dim < 0 else x.movedim(dim, -1)
        return (
            ("sample", x.reshape(x.shape[0], -1, math.prod(x.shape[-last:])).movedim(1, 0)) if x.ndim > last else None
        )
    x = x.movedim(dim, 1)
    if kind in _GROUPED and groups > 1 and x.shape[1] % groups == 0:
        return "group", x.reshape(len(x), groups, -1)
    if kind in _GROUPED or kind == "layer":
        return "sample", x.reshape(1, len(x), -1)
    if kind in _BY_MAP:
        return "channel of a sample", x.reshape(*x.shape[:2], -1)
    if kind or isinstance(getattr(module, "running_var", None), Tensor):
        return "channel", x.transpose(0, 1).reshape(1, x.shape[1], -1)
    return None


def layers_with_news(
    layers: Mapping[str, nn.Module], bad: Mapping[str, Statistics], quiet: Mapping[str, Statistics]
) -> list[dict[str, Any]]:
    """What is to tell of layers with dead units, or variances 1000 times larger or smaller than in a quiet step.

    Each is a dictionary: ``module``, ``class``, ``eps``; ``unit``, what a variance is of (:class:`Statistics`);
    ``channels``, how many there are; ``dead``, of how many eps is larger than the variance, and ``dead_quiet``, of how
    many it is in the quiet step; ``channel``, a number from 0: of those that are dead, if possible now and not in the
    quiet step, the one with the most gradient, else the one whose variance, with eps added as the layer does, has
    changed most; its ``variance`` and ``variance_quiet`` (of samples, which are others in another step, the median of
    all); ``gradient``, its share of the squared norm of the gradient at the layer's input, None if that is not finite;
    ``gradient_of_dead``, the share of all that are dead now and not in the quiet step.
    """
    rows = [_row(name, layers[name], own, quiet.get(name)) for name, own in bad.items()]
    told = sorted(filter(None, rows), key=lambda pair: pair[0], reverse=True)
    return [row for _, row in told[:MOST]]


def _row(name: str, module: nn.Module, own: Statistics, quiet: Statistics | None) -> Any:
    """A sort key, larger for worse, and what is to tell; None if nothing is."""
    variance = torch.tensor(own.variance, dtype=torch.float64)
    before = torch.full_like(variance, torch.nan)
    eps = _eps(module)
    if quiet is not None and quiet.unit == own.unit and own.unit == "sample":
        before[:] = torch.tensor(quiet.variance, dtype=torch.float64).nanmedian()
    elif quiet is not None and len(quiet.variance) == len(variance):
        before = torch.tensor(quiet.variance, dtype=torch.float64)
    dead = int((variance < eps).sum())
    dead_quiet = None if quiet is None else sum(v < eps for v in quiet.variance)
    floor = max(eps, torch.finfo(torch.float32).tiny)
    change = ((variance + floor) / (before + floor)).log10().nan_to_num(0.0)
    if not dead and not (change.abs() > math.log10(LARGE)).any():
        return None
    gradient = torch.tensor(own.gradient, dtype=torch.float64)
    gradient = gradient if len(gradient) == len(variance) else torch.full_like(variance, torch.nan)
    died = (variance < eps) & ~(before < eps)
    worst = gradient.nan_to_num(0.0) if dead else change.abs()
    among = died if died.any() else variance < eps if dead else torch.ones_like(died)
    unit = max(among.nonzero().flatten().tolist(), key=lambda i: (worst[i].item(), change[i].abs().item()))
    shares = [(gradient[units].sum() / gradient.sum()).item() for units in (unit, died)]
    share, of_dead = (value if math.isfinite(value) else None for value in shares)
    row = {
        "module": name,
        "class": type(module).__name__,
        "eps": eps,
        "unit": own.unit,
        "channels": len(variance),
        "dead": dead,
        "dead_quiet": dead_quiet,
        "channel": unit,
        "variance": variance[unit].item(),
        "variance_quiet": None if before[unit].isnan() else before[unit].item(),
        "gradient": share,
        "gradient_of_dead": of_dead,
    }
    return (dead > (dead_quiet or 0), change.abs().max().item()), row


def over_ranks(ranks: list[dict[str, Statistics]]) -> dict[str, Statistics]:
    """The statistics of all ranks; where ranks share a variance, the mean of those within ranks, which is no larger."""
    merged: dict[str, Statistics] = {}
    for name in dict.fromkeys(name for rank in ranks for name in rank):
        own = [rank[name] for rank in ranks if name in rank]
        unit, shared = own[0].unit, own[0].shared
        variances, gradients = (
            [torch.tensor(values, dtype=torch.float64) for values in parts]
            for parts in ([s.variance for s in own], [s.gradient for s in own])
        )
        variance = torch.stack(variances).mean(0).tolist() if shared else _over_calls(unit, variances)
        merged[name] = Statistics(unit, variance, _over_calls(unit, gradients, torch.add), shared)
    return merged


def _variance(module: nn.Module, unit: str, values: Tensor) -> Tensor:
    """(U,) float64: the least over the S variances of each unit; NaN if a value is not finite."""
    running = getattr(module, "running_var", None)
    if unit == "channel" and isinstance(running, Tensor) and (not module.training or _kind(module) == "frozen_batch"):
        return running.detach().double()
    values = values.float() if values.dtype != torch.float64 else values
    size = values.abs().nan_to_num(0.0, 0.0, 0.0).amax((0, 2), keepdim=True)
    size = torch.ldexp(torch.ones_like(size), size.frexp().exponent - 1)  # so that squares do not overflow; exact
    values = values / size
    spread = values.square().mean(-1) if _kind(module) in _MEAN_SQUARE else values.var(-1, unbiased=False)
    return (spread.double() * size.squeeze(-1).double().square()).amin(0)


def _over_calls(unit: str, parts: list[Tensor], merge: Any = torch.minimum) -> list[float]:
    if not parts:
        return []
    if unit == "sample":
        return torch.cat(parts).tolist()
    return functools.reduce(merge, parts).tolist()


def _kind(module: nn.Module) -> str:
    known = known_class(module)
    return known.kind.name if known is not None else ""


def _eps(module: nn.Module) -> float:
    eps = getattr(module, "eps", 0.0)
    if eps is None:  # of torch.nn.RMSNorm: that of the input's dtype
        return torch.finfo(torch.float32).eps
    return float(eps) if isinstance(eps, int | float) else 0.0


def _is_synchronized(module: nn.Module) -> bool:
    return bool(getattr(module, "sync", False)) or any("SyncBatchNorm" in c.__name__ for c in type(module).__mro__)


def _swapped(old: Tensor, new: Tensor, value: Any) -> Any:
    return new if value is old else value
