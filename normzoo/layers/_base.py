"""What all layers share: parameters for each channel, the check of the input, activation, running statistics."""

# No annotation here is a string: torch.fx of torch 2.12 cannot pickle a model whose forward has such annotations.
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from normzoo._shapes import channels_back, channels_first, check_channel_dim, check_input, parameter_dtype, scalar_dtype
from normzoo.functional._recomputation import in_backward
from normzoo.layers._leaf import Leaf

Activation = Callable[[], nn.Module]
_SHOWN_IF_CHANGED = ("channel_dim", "act_layer", "sync")
_NOT_SHOWN = ("num_features", "device", "dtype")


def own_activation(act_layer: Activation | str | None, own: str) -> Activation | None:
    """What the base class makes of ``act_layer`` in a layer that has an activation of its own, called ``own``.

    Raises:
        ValueError: for another name.
    """
    if isinstance(act_layer, str):
        if act_layer != own:
            raise ValueError(f"act_layer must be {own!r}, None or what makes an activation, not {act_layer!r}")
        return None
    return act_layer


class NormLayer(Leaf):
    """Base of the zoo's layers: parameters of shape (C,), float32 or wider, or None without ``affine``.

    Subclasses implement :meth:`normalize`, which sees channels-first input that has been checked and is not empty.
    """

    weight: Tensor | None
    bias: Tensor | None
    act_layer: Activation | str | None

    def __init__(
        self,
        num_features: int,
        *,
        eps: float | None = None,
        affine: bool = True,
        act_layer: Activation | None = None,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not that of torch's _BatchNorm, which a plain batch norm is too
        if num_features < 1:
            raise ValueError(f"num_features must be at least 1, not {num_features}")
        check_channel_dim(channel_dim)
        if eps is not None:
            if not eps >= 0:
                raise ValueError(f"eps must not be negative, got {eps}")
            self.eps = eps
        self.num_features = num_features
        self.affine = affine
        self.channel_dim = channel_dim
        self.act_layer = act_layer
        self.act = act_layer() if act_layer is not None else None
        self._placement: dict[str, Any] = {"device": device, "dtype": parameter_dtype(dtype)}
        self._initial: dict[str, float] = {}
        self.add_parameter("weight", 1.0 if affine else None)
        self.add_parameter("bias", 0.0 if affine else None)

    def add_parameter(self, name: str, value: float | None, size: int | None = None) -> None:
        """Make a parameter of ``size`` (by default C) equal values; None registers that there is none."""
        param = None
        self._initial.pop(name, None)
        if value is not None:
            param = nn.Parameter(torch.full((size or self.num_features,), value, **self._placement))
            self._initial[name] = value
        self.register_parameter(name, param)

    def reset_parameters(self) -> None:
        """Set every parameter to its initial value."""
        for name, value in self._initial.items():
            nn.init.constant_(getattr(self, name), value)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x``: (N, C, ...) or, with ``channel_dim=-1``, (N, ..., C); shape and dtype are kept."""
        if isinstance(x, Proxy):
            return self.recorded(x.tracer, (x,))
        check_input(x, self.num_features, self.channel_dim, type(self).__name__)
        first = channels_first(x, self.channel_dim)
        y = self.normalize(first) if first.numel() or self.takes_part_when_empty else self._of_nothing(first)
        return channels_back(y if self.act is None else self.act(y), self.channel_dim)

    def normalize(self, x: Tensor) -> Tensor:
        """The layer's formula, on checked input of shape (N, C, ...)."""
        raise TypeError(f"{type(self).__name__} does not define normalize(x)")

    @property
    def takes_part_when_empty(self) -> bool:
        """Whether an empty batch goes through the formula, because other ranks wait for this one's statistics."""
        return False

    def _of_nothing(self, x: Tensor) -> Tensor:
        """Empty output through which every parameter receives a gradient of zero, as DistributedDataParallel needs."""
        for param in self.parameters(recurse=False):
            x = x + 0 * param.sum().to(x.dtype)
        return x

    def extra_repr(self) -> str:
        """What ``print(layer)`` shows: the options, those of rare use only where they differ from their defaults."""
        parameters = inspect.signature(type(self)).parameters
        shown = {n: getattr(self, n, p.default) for n, p in parameters.items() if n not in _NOT_SHOWN}
        for name in shown.keys() & self._parameters.keys():
            shown[name] = self._parameters[name] is not None
        changed = {n: v for n, v in shown.items() if n not in _SHOWN_IF_CHANGED or v != parameters[n].default}
        order = sorted(changed, key=lambda n: n not in ("eps", "affine"))
        return ", ".join([str(self.num_features), *(f"{n}={changed[n]!r}" for n in order)])


class RunningStatsLayer(NormLayer):
    """A layer with ``running_mean``, ``running_var`` and ``num_batches_tracked`` as in BatchNorm2d."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        sync: bool = False,
        affine: bool = True,
        act_layer: Activation | None = None,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features,
            eps=eps,
            affine=affine,
            act_layer=act_layer,
            channel_dim=channel_dim,
            device=device,
            dtype=dtype,
        )
        if momentum is not None and not 0 <= momentum <= 1:
            raise ValueError(
                f"momentum is the update rate, from 0 to 1, or None for a cumulative average, not {momentum}"
            )
        self.momentum = momentum
        self.sync = sync
        self.register_buffer("running_mean", torch.zeros(num_features, **self._placement))
        self.register_buffer("running_var", torch.ones(num_features, **self._placement))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long, device=device))

    def reset_running_stats(self) -> None:
        """Set the running mean to 0, the running variance to 1 and the count of batches to 0."""
        for name, value in (("running_mean", 0), ("running_var", 1), ("num_batches_tracked", 0)):
            if (buffer := self._buffers[name]) is not None:
                buffer.fill_(value)

    def reset_parameters(self) -> None:
        """Reset running statistics and every parameter."""
        super().reset_parameters()
        self.reset_running_stats()

    @property
    def takes_part_when_empty(self) -> bool:
        """True in training with ``sync`` in a job of several ranks."""
        return self.sync and self.training and torch.distributed.is_initialized()

    def count_batch(self) -> None:
        """Count the batch that was normalized, when training; not one that is recomputed inside a backward pass."""
        if self.training and self.num_batches_tracked is not None and not in_backward():
            self.num_batches_tracked.add_(1)

    def update_rate(self) -> float | Tensor:
        """The rate for the coming batch: ``momentum``, or 1/n (a 0-d tensor) for a cumulative average over n."""
        if self.momentum is not None:
            return float(self.momentum)
        return (self.num_batches_tracked + 1).to(scalar_dtype(self.num_batches_tracked.device)).reciprocal()
