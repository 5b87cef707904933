"""A layer and the statistics of all that went through it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer

from normzoo.recognition import is_a

# What makes a layer's training output plain normalization by the batch, wherever its schedule stands.
_PLAIN: dict[str, dict[str, Any]] = {
    "normzoo.layers.renorm.BatchRenorm": {"r_max": ((0.0, 1.0),), "d_max": ((0.0, 0.0),)},
    "normzoo.layers.power.PowerNorm": {"warmup": 2**62},
}
_STREAM = "normzoo.layers.online.OnlineNorm"
_READABLE = ("torch", "timm", "normzoo")
_MARK = 2.0**-10  # what buffers hold before a layer writes: small, exact in every dtype, and not 0 or 1


@dataclass
class Tally:
    """A layer and the statistics of all that went through it.

    Attributes:
        name: its dotted name.
        layer: the layer.
        start: what its running buffers hold before each call.
        averages: of each running buffer over the calls so far.
        between: sum over calls of the weighted squared deviation of means; None for a layer without mean and variance.
        weight: number of elements that went in; per channel or not is a common factor.
    """

    name: str
    layer: Any
    start: dict[str, Tensor]
    averages: dict[str, Tensor]
    between: Tensor | None
    weight: float = 0.0
    targets: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, layer: nn.Module) -> Tally:
        held = running_buffers(layer)
        if any(isinstance(b, UninitializedBuffer) for b in held.values()):
            raise ValueError(f"{name} does not know its channels yet; run the model on one batch first")
        if "momentum" not in vars(layer) or isinstance(getattr(layer, "aux_bn", None), nn.ModuleList):
            why = "has no momentum to set to 1"
            if "momentum" in vars(layer):
                why = "splits batches between several layers; convert it to 'batch' first"
            raise ValueError(
                f"statistics of single batches cannot be read from {name} ({type(layer).__name__}): it {why}"
            )
        mean, var = held.get("running_mean"), held.get("running_var")
        averages = {n: torch.zeros_like(b, dtype=_wide(b)) for n, b in held.items()}
        both = mean is not None and var is not None and mean.shape == var.shape
        # a layer that is not known may use its old statistics when training: they stay near to what they were
        known = _is_known(layer)
        start = {n: torch.full_like(b, _MARK) if known else b * (1 + _MARK) + _MARK for n, b in held.items()}
        return cls(
            name, layer, start, averages, torch.zeros_like(averages["running_mean"]) if both else None, 0.0, held
        )

    def merge(self, weight: float, averages: dict[str, Tensor], between: Tensor | None = None) -> None:
        """Add what others counted, without a difference of large numbers (Chan, Golub & LeVeque 1983)."""
        if not weight:
            return
        total = self.weight + weight
        share = weight / total
        if self.between is not None:
            gap = averages["running_mean"] - self.averages["running_mean"]
            self.between += gap.square() * (self.weight * share)
            if between is not None:
                self.between += between
        for name, average in self.averages.items():
            average += (averages[name] - average) * share
        self.weight = total

    def before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook before a call: start values, or the statistics themselves where the layer is not to write them."""
        if isinstance(layer, nn.SyncBatchNorm):
            x = _first_tensor(args, kwargs)
            if x is not None and x.numel():
                self.merge(x.numel(), _unbiased_moments(x, self.averages["running_mean"].dtype))
            return
        for name, value in self.start.items():
            getattr(layer, name).copy_(value)

    def after(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        """Hook after a call: count what the layer wrote."""
        x = _first_tensor(args, kwargs)
        if x is not None and not isinstance(layer, nn.SyncBatchNorm):
            self.merge(x.numel(), {n: getattr(layer, n).to(a.dtype) for n, a in self.averages.items()})

    def check(self) -> None:
        """Raise a ValueError for statistics that were not written, or are not finite."""
        if all(torch.equal(average, self.start[name].to(average.dtype)) for name, average in self.averages.items()):
            raise ValueError(
                f"{self.name} ({type(self.layer).__name__}) did not write its statistics when called in training mode "
                "with a momentum of 1; does it track them, and is its momentum the rate of update?"
            )
        if not all(bool(value.isfinite().all()) for value in self.result().values()):
            raise ValueError(f"the statistics of {self.name} ({type(self.layer).__name__}) are not finite")

    def result(self) -> dict[str, Tensor]:
        """The statistics of all."""
        if self.between is None:
            return self.averages
        return {**self.averages, "running_var": self.averages["running_var"] + self.between / self.weight}

    def write(self) -> None:
        """Put them into the layer."""
        with torch.no_grad():
            for name, value in self.result().items():
                self.targets[name].copy_(value)

    def packed(self) -> list[Tensor]:
        """All of it, for other ranks."""
        parts = [*self.averages.values(), *([] if self.between is None else [self.between])]
        return [parts[0].new_tensor([self.weight]), *(p.flatten() for p in parts)]

    def merge_packed(self, weight: float, parts: list[Tensor]) -> None:
        """Add those of another rank."""
        averages = {n: p.view_as(a) for (n, a), p in zip(self.averages.items(), parts, strict=False)}
        self.merge(weight, averages, None if self.between is None else parts[-1].view_as(self.between))

    @property
    def device(self) -> torch.device:
        """Where the tallies are."""
        return next(iter(self.averages.values())).device

    def clear(self) -> None:
        """Start from nothing."""
        self.weight = 0.0
        for tensor in [*self.averages.values(), *([] if self.between is None else [self.between])]:
            tensor.zero_()


def running_buffers(layer: nn.Module) -> dict[str, Tensor]:
    return {n: b for n, b in layer._buffers.items() if n.startswith("running_") and b is not None}


def _plain_options(layer: nn.Module) -> dict[str, Any]:
    """Options, of those that the layer has, with which it writes each batch's statistics and uses no others."""
    wanted: dict[str, Any] = {"momentum": 1.0, "sync": False}
    for name, options in _PLAIN.items():
        wanted |= options if is_a(layer, name) else {}
    return {name: value for name, value in wanted.items() if name in vars(layer)}


@contextlib.contextmanager
def by_batch(layer: nn.Module) -> Iterator[None]:
    """Inside, a layer normalizes by its batch alone and writes its statistics; then it is as it was."""
    state, training = _state(layer), layer.training
    _normalize_by_batch(layer)
    try:
        yield
    finally:
        _put_back(layer, *state)
        layer.training = training


def is_stream(layer: nn.Module) -> bool:
    """Whether a layer's statistics are of a stream of samples and not of batches."""
    return is_a(layer, _STREAM)


def _normalize_by_batch(layer: nn.Module) -> None:
    vars(layer).update(_plain_options(layer))
    if isinstance(layer, nn.SyncBatchNorm):  # in training mode it waits for other ranks; so it takes the batch's too
        layer._buffers.update(running_mean=None, running_var=None)
    else:
        layer.training = True


def _state(layer: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor | None], dict[str, Tensor]]:
    """Options, buffers and what these hold."""
    options = {name: vars(layer)[name] for name in _plain_options(layer)}
    return options, dict(layer._buffers), {n: b.clone() for n, b in layer._buffers.items() if b is not None}


def _put_back(
    layer: nn.Module, options: dict[str, Any], buffers: dict[str, Tensor | None], values: dict[str, Tensor]
) -> None:
    vars(layer).update(options)
    layer._buffers.update(buffers)
    for name, value in values.items():
        layer._buffers[name].copy_(value)  # type: ignore[union-attr]


def _is_known(layer: nn.Module) -> bool:
    """Whether all that the layer computes is of torch, timm or the zoo."""
    methods = [getattr(type(layer), n) for n in ("forward", "normalize") if hasattr(type(layer), n)]
    return all(method.__module__.partition(".")[0] in _READABLE for method in methods)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    return next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)


def _unbiased_moments(x: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """What SyncBatchNorm writes on one rank."""
    count = x.numel() // x.shape[1]
    wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    var, mean = torch.var_mean(wide, [0, *range(2, x.ndim)], correction=0)
    return {"running_mean": mean.to(dtype), "running_var": var.to(dtype) * (count / max(count - 1, 1))}
