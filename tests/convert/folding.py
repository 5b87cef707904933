"""Models whose norms are folded, and what a fold should leave."""

from __future__ import annotations

import contextlib

import torch
from torch import nn

from normzoo.convert._kinds import kind_of
from normzoo.fold import fold_norms

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def trained(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in evaluation, every norm with parameters and statistics as after some training."""
    rng = torch.Generator().manual_seed(seed)
    for module in model.modules():
        with contextlib.suppress(ValueError):
            if kind_of(module) is None:
                continue
        for name, t in [*module._parameters.items(), *module._buffers.items()]:
            if t is not None and t.is_floating_point():
                drawn = torch.rand(t.shape, generator=rng) + 0.5
                if name not in ("weight", "alpha", "running_var", "running_phi"):
                    drawn = torch.randn(t.shape, generator=rng) * 0.7
                t.data.copy_(drawn)
    return model.eval()


def run(model: nn.Module, x) -> list[torch.Tensor]:
    with torch.no_grad():
        y = model(*x) if isinstance(x, tuple) else model(x)
    return [t.clone() for t in (y if isinstance(y, tuple) else (y,))]


def assert_folds(model: nn.Module, x, count: int, example=None, others=()) -> nn.Module:
    """Fold, compare outputs on an input that the folding did not see, and return the model."""
    inputs = [x, *others]
    before = [run(model, x) for x in inputs]
    fresh = example is None and not isinstance(x, tuple)
    assert len(fold_norms(model, torch.randn_like(x) if fresh else example or x)) == count
    for x, expected in zip(inputs, before, strict=True):
        for y, want in zip(run(model, x), expected, strict=True):
            assert y.dtype == want.dtype
            torch.testing.assert_close(y, want, rtol=0, atol=TOLERANCE[y.dtype] * max(1.0, want.abs().max().item()))
    assert not any(m.training for m in model.modules())
    return model


def norms_in(model: nn.Module) -> int:
    return sum(kind_of(m) is not None for m in model.modules())


def snapshot(model: nn.Module):
    """What a failed fold has to leave: the very modules and parameters, and their values."""
    return (
        dict(model.named_modules()),
        {n: (id(t), t.clone()) for n, t in model.state_dict(keep_vars=True).items()},
        {n: (len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for n, m in model.named_modules()},
    )


def assert_untouched(model: nn.Module, before) -> None:
    modules, tensors, hooks = snapshot(model)
    assert list(modules) == list(before[0])
    assert all(modules[n] is m for n, m in before[0].items())
    assert list(tensors) == list(before[1])
    for name, (identity, value) in before[1].items():
        assert tensors[name][0] == identity
        assert torch.equal(tensors[name][1], value)
    assert hooks == before[2]


class Net(nn.Module):
    """conv, bn, conv2 and bn2, with a path of its own."""

    def __init__(self, path, make=lambda net: None):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        make(self)
        self.path = [path]

    def forward(self, x):
        return self.path[0](self, x)
