"""The layer under test: how it is made, what it takes, and as it is after some training."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normzoo import registry
from normzoo.testing._compare import BrokenError, NotApplicableError
from normzoo.testing._inputs import sample, shape_of_rank

Factory = Callable[..., nn.Module]
Reference = Callable[[nn.Module, Tensor], Tensor | tuple[Tensor, Mapping[str, Tensor]]]
# The buffers of torch's BatchNorm, some of which no step of training moves where they are fixed
_FIXED = ("weight", "bias", "running_mean", "running_var")


class Subject:
    """A factory of layers and what is known of it.

    Args:
        factory: a registered name, or a callable ``factory(num_features, *, ..., device=None, dtype=None)``.
        num_features: channels of the layers that are made.
        reference: see :func:`normzoo.testing.check_norm`.
        batch_statistics: whether training output depends on the other samples; None for what the registry says of
            the layer, or nothing.
    """

    def __init__(
        self,
        factory: str | Factory,
        num_features: int = 6,
        reference: Reference | None = None,
        batch_statistics: bool | None = None,
    ) -> None:
        if isinstance(factory, nn.Module) or not (isinstance(factory, str) or callable(factory)):
            raise TypeError(f"factory must be a registered name, a class or a function, not {factory!r}")
        if num_features < 2:
            raise ValueError(f"num_features must be at least 2, for channels to differ, not {num_features}")
        self.info = registry.norm_info(factory) if isinstance(factory, str) else _known(factory)
        self.factory = _by_name(factory, num_features) if isinstance(factory, str) else factory
        self.num_features, self.reference = num_features, reference
        declared = self.info.batch_statistics if self.info else None
        self.batch_statistics = declared if batch_statistics is None else batch_statistics

    def __str__(self) -> str:
        inner: Any = self.factory
        options: dict[str, Any] = {}
        while isinstance(inner, functools.partial):
            inner, options = inner.func, {**inner.keywords, **options}
        name = getattr(inner, "__name__", type(inner).__name__)
        return f"{name}({', '.join([str(self.num_features), *(f'{k}={v!r}' for k, v in options.items())])})"

    @functools.cached_property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """The factory's signature; empty if it cannot be told."""
        try:
            return inspect.signature(self.factory).parameters
        except (TypeError, ValueError):
            return {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "reference": None}  # often a local function, and of no use to other processes

    def need_option(self, name: str) -> None:
        """The check does not apply to layers without this option."""
        if name not in self.parameters:
            raise NotApplicableError(f"it has no option {name!r}")

    def make(self, num_features: int | None = None, **options: Any) -> nn.Module:
        """A new layer, channels first unless asked otherwise.

        What of ``device`` and ``dtype`` the factory does not take is done to the finished layer.
        """
        if "channel_dim" in self.parameters and self.parameters["channel_dim"].default != 1:
            options.setdefault("channel_dim", 1)
        after = {k: options.pop(k) for k in ("device", "dtype") if k in options and k not in self.parameters}
        layer = self.factory(num_features or self.num_features, **options)
        if not isinstance(layer, nn.Module):
            raise BrokenError(f"the factory returned {layer!r}, not a torch.nn.Module")
        return layer.to(**after) if after else layer

    def made(self, **options: Any) -> nn.Module:
        """A layer with parameters and running statistics as after some training, the same for every dtype."""
        layer = self.make(**options)
        held = self._trained
        with torch.no_grad():
            for name, value in layer.state_dict().items():
                if isinstance(value, Tensor) and name in held and held[name].shape == value.shape:
                    value.copy_(held[name])
        return layer

    @functools.cached_property
    def _trained(self) -> dict[str, Tensor]:
        """Parameters moved off their initial values, towards 0 where they were not; statistics of a few steps.

        Fixed statistics, which the steps leave alone, are moved as parameters are.
        """
        layer, generator = self.make(dtype=torch.float64), torch.Generator().manual_seed(1)

        def move(value: Tensor) -> None:
            factor = 0.5 + 0.45 * torch.rand(value.shape, dtype=torch.float64, generator=generator)
            offset = 0.3 * torch.randn(value.shape, dtype=torch.float64, generator=generator)
            with torch.no_grad():
                value.copy_(torch.where(value == 0, offset, value * factor))

        for p in layer.parameters():
            move(p)
        initial = {k: v.clone() for k, v in layer.named_buffers() if k in _FIXED}
        for rank in (4, 3, 2, 5):
            try:
                for i in range(3):
                    x = sample(shape_of_rank(rank, self.num_features), torch.float64, seed=20 + i).requires_grad_()
                    layer(x).square().sum().backward()
                break
            except Exception:
                continue
        for name, value in layer.named_buffers():
            if name in initial and torch.equal(value, initial[name]):
                move(value)
        return {k: v.detach().clone() for k, v in layer.state_dict().items() if isinstance(v, Tensor)}

    @functools.cached_property
    def shapes(self) -> list[tuple[int, ...]]:
        """The inputs of 2 to 5 dimensions that the layer takes, in training and in evaluation.

        Whether it refuses the others in the right way is for the check of ranks alone to say.
        """
        taken, refusals = [], []
        for rank in (4, 2, 3, 5):
            shape = shape_of_rank(rank, self.num_features)
            try:
                for training in (True, False):
                    self.made().train(training)(sample(shape))
                taken.append(shape)
            except Exception as error:
                refusals.append(f"{shape}: {type(error).__name__}: {error}")
        if not taken:
            raise BrokenError("the layer takes no input of 2, 3, 4 or 5 dimensions: " + "; ".join(refusals))
        return taken

    @property
    def shape(self) -> tuple[int, ...]:
        """An image if the layer takes images, else what it takes."""
        return self.shapes[0]

    def of_ranks(self, *ranks: int) -> list[tuple[int, ...]]:
        """Those of the shapes that have so many dimensions; the check does not apply if there is none."""
        found = [shape for shape in self.shapes if len(shape) in ranks]
        if not found:
            raise NotApplicableError(f"it takes no input of {' or '.join(map(str, ranks))} dimensions")
        return found


def _by_name(name: str, num_features: int) -> Factory:
    """The registered layer; with as few groups above one as divide the channels, if its own number does not."""
    factory, options = registry.get_norm(name), registry.norm_info(name).options
    groups = options.get("groups")
    if isinstance(groups, int) and num_features % groups:
        fitting = next(g for g in range(2, num_features + 1) if num_features % g == 0)
        return registry.get_norm(name, groups=fitting)
    return factory


def _known(factory: Factory) -> registry.NormInfo | None:
    """What the registry says of a layer's class, given as such or with options bound."""
    while isinstance(factory, functools.partial):
        factory = factory.func
    name = registry.norm_name(factory) if isinstance(factory, type) else None
    return None if name is None else registry.norm_info(name)
