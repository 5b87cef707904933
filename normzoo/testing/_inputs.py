"""Inputs for layers, one step of a layer, and what it holds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from normzoo.testing._compare import BrokenError, describe

MANY = 60  # samples, for statistics that hardly depend on them; a multiple of any small size of a virtual batch
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
MODES = (True, False)
Tensors = dict[str, Tensor | None]


def shape_of_rank(rank: int, channels: int) -> tuple[int, ...]:
    """A small input of 2 to 5 dimensions."""
    batch, *space = {2: (5,), 3: (3, 4), 4: (3, 4, 3), 5: (2, 2, 3, 2)}[rank]
    return batch, channels, *space


def small_shapes(channels: int) -> list[tuple[int, ...]]:
    """Shapes with one sample, one pixel or both."""
    one_value = [(1, channels, *[1] * space) for space in range(4)]
    return [*one_value, (4, channels, 1, 1), (1, channels, 4, 3)]


def sample(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal values in which each channel (dimension 1) has a mean and a spread of its own."""
    noise = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    if len(shape) < 2:
        return noise.to(dtype)
    along = [-1, *[1] * (len(shape) - 2)]
    spread = torch.linspace(0.5, 2.0, shape[1], dtype=torch.float64).view(along)
    mean = torch.linspace(1.5, -0.5, shape[1], dtype=torch.float64).view(along)
    return (noise * spread + mean).to(dtype)


def where(training: bool, x: Tensor) -> str:
    """Mode and input, for messages."""
    return f"{'training' if training else 'evaluation'}, input {describe(x)}"


def upstream(x: Tensor, seed: int = 100) -> Tensor:
    """A gradient for an output like ``x``, in its memory format."""
    dy = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.empty_like(x).copy_(dy)


def step(layer: nn.Module, x: Tensor, *, call: Callable[[Tensor], Tensor] | None = None, seed: int = 100) -> Tensors:
    """Output and all gradients of one forward and backward pass.

    Args:
        layer: whose parameters receive gradients.
        x: the input; it is left alone.
        call: what is called instead of the layer.
        seed: of the gradient that the output receives.
    """
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    layer.zero_grad(set_to_none=True)
    y = layer(x) if call is None else call(x)
    if y.shape != x.shape:
        raise BrokenError(f"the output has shape {tuple(y.shape)}, the input {describe(x)}")
    if not y.requires_grad:
        raise BrokenError(f"no gradient flows through the output, input {describe(x)}")
    y.backward(upstream(x, seed).to(y.dtype))
    of_parameters = {f"gradient of {k}": p.grad for k, p in layer.named_parameters()}
    return {"output": y.detach(), "gradient of the input": x.grad, **of_parameters}


def state(layer: nn.Module) -> dict[str, Tensor]:
    """A copy of what the layer holds, by name."""
    held = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    return {k: v.detach().clone() for k, v in held.items()}
