"""Normalization layers of which the statistics of a whole batch hold while parts of it pass."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normzoo.callbacks._run.facts import plain_name
from normzoo.recognition import INPLACE_ABN, channel_dim, is_a, known_class
from normzoo.registry import list_norms, norm_info

_BUFFERS = ("running_mean", "running_var")


@dataclass(frozen=True)
class Call:
    """What one call of a layer has computed on the whole batch.

    Attributes:
        mean: (C,) of the layer's input; None for a layer that keeps the output instead.
        var: (C,), biased.
        output: of a layer that is no scale and shift of channels by mean and variance.
        shares: (samples,) of the variance of the layer's input, the mean over channels of what each sample adds to it;
            None where the input has no rows for the samples.
    """

    mean: Tensor | None = None
    var: Tensor | None = None
    output: Tensor | None = None
    shares: Tensor | None = None

    @property
    def finite(self) -> bool:
        """Whether all values are."""
        return all(bool(x.isfinite().all()) for x in (self.mean, self.var, self.output) if x is not None)


@dataclass
class Statistics:
    """What the layers have computed in one pass of a whole batch.

    Attributes:
        samples: of the batch.
        calls: for each layer, by name, its calls in their order.
    """

    samples: int
    calls: dict[str, list[Call]] = field(default_factory=dict)

    @property
    def finite(self) -> bool:
        """Whether all values are."""
        return all(call.finite for calls in self.calls.values() for call in calls)

    def moving(self) -> dict[int, tuple[float, str]]:
        """For each sample the largest share of the variance of a layer's input that is due to it, and the layer."""
        found: dict[int, tuple[float, str]] = {}
        for name, calls in self.calls.items():
            for shares in (call.shares for call in calls if call.shares is not None):
                for row, share in enumerate(shares.tolist()):
                    found[row] = max(found.get(row, (0.0, "")), (share, name))
        return found

    @property
    def of_channels(self) -> bool:
        """Whether another batch can be normalized by them: only means and variances are held, no outputs."""
        return all(call.output is None for calls in self.calls.values() for call in calls)


class BatchStatisticsLayers:
    """The layers of a module whose output in training depends on the other samples of the batch.

    A batch norm of torch, timm or the zoo is held by the mean and (biased) variance of its input,
    ``y = (x - mean) / sqrt(var + eps) * weight + bias``; any other of these layers by its output on the whole batch, of
    which a part of the batch gets its rows.

    Args:
        module: in which they are looked for.
        gather: of the values of all ranks, for layers that normalize over ranks; None for a single rank.
    """

    def __init__(self, module: nn.Module, gather: Callable[[Any], list[Any]] | None = None) -> None:
        self._gather = gather
        self.layers: dict[str, nn.Module] = {}
        for full, layer in module.named_modules():
            name = plain_name(full)
            inside = any(name.startswith(f"{outer}.") for outer in self.layers)
            if not inside and not hasattr(layer, "_orig_mod") and uses_batch_statistics(layer):
                self.layers[name] = layer

    @property
    def synchronized(self) -> bool:
        """Whether one of them normalizes over ranks, which then wait for each other."""
        return any(map(_is_synchronized, self.layers.values()))

    @contextmanager
    def captured(self, samples: int) -> Iterator[Statistics]:
        """Inside, a pass of the whole batch fills the statistics."""
        statistics = Statistics(samples)
        with ExitStack() as stack:
            for name, layer in self.layers.items():
                calls = statistics.calls.setdefault(name, [])
                capture = partial(self._capture, layer, layer.forward, _is_batch_norm(layer), samples, calls)
                stack.enter_context(_forward(layer, capture))
            yield statistics

    @contextmanager
    def held(self, statistics: Statistics, start: int, stop: int) -> Iterator[None]:
        """Inside, a pass of the samples from ``start`` to before ``stop`` is normalized by the whole batch."""
        with ExitStack() as stack:
            for name, layer in self.layers.items():
                if not (calls := statistics.calls.get(name)):
                    continue
                # What a checkpoint computes again is the last call
                following = itertools.chain(calls, itertools.repeat(calls[-1]))
                if calls[0].output is None:
                    stack.enter_context(_forward(layer, partial(_by_moments, layer, layer.forward, following)))
                else:
                    rows = partial(_rows, following, statistics.samples, start, stop)
                    stack.enter_context(_forward(layer, rows))
            yield

    def _capture(
        self,
        layer: nn.Module,
        forward: Callable[..., Any],
        by_moments: bool,
        samples: int,
        calls: list[Call],
        x: Tensor,
        *more: Any,
    ) -> Any:
        if not (layer.training or (by_moments and getattr(layer, "running_mean", None) is None)):
            return forward(x, *more)  # it is frozen
        mean, var, shares = self._moments(layer, x.detach().double(), samples)
        output = forward(x, *more)
        if by_moments:
            calls.append(Call(mean, var, None, shares))
        elif isinstance(output, Tensor):
            calls.append(Call(None, None, output.detach().clone(), shares))  # an activation may overwrite it
        return output

    def _moments(self, layer: nn.Module, x: Tensor, samples: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Mean and biased variance of each channel, (C,), over ranks too, and :attr:`Call.shares`."""
        channel = channel_dim(layer, 1) % x.dim()
        dims = [d for d in range(x.dim()) if d != channel]
        var, mean = torch.var_mean(x, dims, correction=0)
        count = float(x.numel() // max(mean.numel(), 1))
        if self._gather is not None and _is_synchronized(layer):
            mean, var, count = _of_all(self._gather((count, mean.cpu(), var.cpu())), mean.device)
        if channel == 0 or not samples or len(x) % samples:
            return mean, var, None
        by_channel = x.movedim(channel, -1)
        squares = (by_channel - mean).square().reshape(samples, -1, len(mean)).sum(1)
        return mean, var, (squares / (count * var).clamp_min(1e-300)).mean(1)


def uses_batch_statistics(layer: nn.Module) -> bool:
    """Whether a layer's output in training depends on the other samples of the batch, by its class."""
    known = known_class(layer)
    if known is None:
        return False
    name = known.kind.name
    return name == "split batch norm" or (name in list_norms() and norm_info(name).batch_statistics)


def _is_batch_norm(layer: nn.Module) -> bool:
    """Whether it is a scale and shift of channels by mean and variance of the batch."""
    known = known_class(layer)
    return known is not None and known.kind.name == "batch" and not known.overridden and not is_a(layer, INPLACE_ABN)


def _is_synchronized(layer: nn.Module) -> bool:
    return bool(getattr(layer, "sync", False)) or is_a(layer, "torch.nn.modules.batchnorm.SyncBatchNorm")


def _of_all(parts: list[tuple[float, Tensor, Tensor]], device: torch.device) -> tuple[Tensor, Tensor, float]:
    """Mean and biased variance of the values of all ranks, and their number for each channel."""
    total = sum(count for count, _, _ in parts)
    mean = sum((count / total * m for count, m, _ in parts), torch.zeros_like(parts[0][1]))
    var = sum((count / total * (v + (m - mean).square()) for count, m, v in parts), torch.zeros_like(mean))
    return mean.to(device), var.to(device), total


@contextmanager
def _forward(layer: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, a layer has another forward; no hook is registered, which a snapshot of the module might drop."""
    own = vars(layer).get("forward")
    vars(layer)["forward"] = forward
    try:
        yield
    finally:
        vars(layer).pop("forward", None)
        if own is not None:
            vars(layer)["forward"] = own


def _by_moments(layer: nn.Module, forward: Callable[..., Any], calls: Iterator[Call], x: Tensor) -> Any:
    """A batch norm's output, evaluated by the moments of the whole batch."""
    call, training = next(calls), layer.training
    before = {name: layer._buffers.get(name) for name in _BUFFERS}
    dtype = _dtype_of_statistics(layer, x)
    assert call.mean is not None
    assert call.var is not None
    layer.training = False
    layer._buffers.update(zip(_BUFFERS, (call.mean.to(dtype), call.var.to(dtype)), strict=True))
    try:
        return forward(x)
    finally:
        layer.training = training
        layer._buffers.update(before)


def _rows(calls: Iterator[Call], samples: int, start: int, stop: int, *_: Any) -> Tensor:
    """The rows of a layer's output on the whole batch, of (samples * positions, ...) some for each sample."""
    whole = next(calls).output
    assert whole is not None
    each = len(whole) // samples
    return whole[start * each : stop * each].clone()


def _dtype_of_statistics(layer: nn.Module, x: Tensor) -> torch.dtype:
    """The dtype in which the layer can take statistics."""
    kept = [layer._buffers.get("running_mean"), layer._parameters.get("weight")]
    dtypes = [t.dtype for t in kept if t is not None]
    return dtypes[0] if dtypes else torch.promote_types(x.dtype, torch.float32)
