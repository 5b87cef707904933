"""Calls of modules are followed: each once, in order, with the moments of what goes in and out."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_stage import FakeRun, Task
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from normzoo.functional.finite_moments import finite_moments
from normzoo.replaying.calls import OUTSIDE, Call, Watch


def followed(net: nn.Module, batches: list[Any], loss: Callable[[Any, Any], Tensor] | None = None) -> list[Call]:
    task = Task(net, loss)
    with Watch(FakeRun(task)) as watch:
        for i, batch in enumerate(batches):
            task.training_step(batch, i).backward()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in task.modules())
    assert "training_step" not in vars(task)
    return watch.calls


def check(call: Call, side: str, expected: Tensor) -> None:
    torch.testing.assert_close(call.moments[side], finite_moments(expected))


def named(calls: list[Call]) -> dict[tuple[int, str, int], Call]:
    return {(c.micro_batch, c.name.removeprefix("net").lstrip("."), c.number): c for c in calls}


def test_moments_are_those_of_inputs_outputs_and_their_gradients() -> None:
    net, x = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), torch.randn(4, 3, requires_grad=True)
    values = [x]
    for module in net:
        values.append(module(values[-1]))
        values[-1].retain_grad()
    values[-1].square().mean().backward()
    calls = named(followed(net, [x.detach(), x.detach().requires_grad_()]))
    for micro_batch in (0, 1):
        for i in range(3):
            call = calls[micro_batch, str(i), 0]
            assert (call.depth, call.leaf, call.module) == (i, True, net[i])
            check(call, "input", values[i])
            check(call, "output", values[i + 1])
            check(call, "gradient", values[i + 1].grad)
            if i or micro_batch:
                check(call, "input gradient", values[i].grad)
        whole = calls[micro_batch, "", 0]
        assert (whole.depth, whole.leaf) == (3, False)
        check(whole, "gradient", values[-1].grad)
    assert "input gradient" not in calls[0, "0", 0].moments


class Odd(nn.Module):
    """A shared module, one that is not called, keywords, mappings, operations in place on views, an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.unused = nn.Linear(4, 4), nn.Linear(2, 2)
        self.act, self.rnn = nn.ReLU(inplace=True), nn.LSTM(4, 3, batch_first=True)
        self.head = nn.Linear(3, 3)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> dict[str, Any]:
        a, b = self.shared(self.shared(input=x)).chunk(2, -1)
        y = torch.cat([self.act(a * 1), b], -1)
        y, _ = self.attention(y, key=y, value=y)
        out, (h, _) = self.rnn(y)
        out = self.head(out)
        out += 10
        return {"out": self.act(out), "states": (h, None)}


def test_odd_modules_are_followed() -> None:
    calls = named(followed(Odd(), [torch.randn(2, 5, 4)], lambda output, _: output["out"].mean()))
    names = ["shared", "shared", "act", "attention", "rnn", "head", "act", ""]
    assert [c.name.removeprefix("net").lstrip(".") for c in calls.values()] == names
    assert [c.depth for c in calls.values()] == list(range(8))
    assert calls[0, "shared", 1].number == 1
    assert all({"input", "output"} <= c.moments.keys() for c in calls.values())
    assert all("gradient" in c.moments for c in calls.values())
    assert calls[0, "rnn", 0].moments["output"][0] == 2 * 5 * 3 + 2 * 2 * 3
    assert calls[0, "act", 1].moments["input"][1] > 5  # ten was added in place after the head had returned
    assert calls[0, "head", 0].moments["output"][2] < 5


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_a_checkpoint_computes_again_is_no_further_call(reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
            self.block = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU(inplace=True))
            self.again = True

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            x = checkpoint(self.block, x, use_reentrant=reentrant) if self.again else self.block(x)
            return self.last(x)

    net, x = Checkpointed(), torch.randn(3, 4)
    again = named(followed(net, [x]))
    net.again = False
    plain = named(followed(net, [x]))
    assert again.keys() == plain.keys()
    for key, call in plain.items():
        assert again[key].depth == call.depth
        assert again[key].moments.keys() == call.moments.keys()
        for side, moments in call.moments.items():
            torch.testing.assert_close(again[key].moments[side], moments)


def test_compiled_modules_are_followed() -> None:
    compiled = torch.compile(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        calls = named(followed(nn.Sequential(compiled, nn.Linear(4, 1)), [torch.randn(2, 4)]))
    assert [name for _, name, _ in calls] == ["0.0", "0.1", "0", "1", ""]


def test_an_error_that_is_caught_leaves_the_order_right_and_one_that_is_not_says_where() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wrong, self.right = nn.Sequential(nn.Linear(3, 3)), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            try:
                self.wrong(x)
            except RuntimeError:
                return self.right(x)
            return x

    net = Fails()
    assert [name for _, name, _ in named(followed(net, [torch.randn(2, 4)]))] == ["right", ""]
    task = Task(net.wrong)
    with Watch(FakeRun(task)) as watch, pytest.raises(RuntimeError, match="shapes"):
        task.training_step(torch.randn(2, 4), 0)
    assert watch.module == "net.0"


def test_the_module_that_runs_is_known_in_both_directions() -> None:
    seen = []

    class Seen(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            seen.append(("forward", watch.module))
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            seen.append(("backward", watch.module))
            return g.clone()

    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Seen.apply(x).mul(2)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: Tensor) -> Tensor:
            return Seen.apply(self.inner(Seen.apply(x)))

    task = Task(nn.Sequential(nn.Linear(2, 2), Outer()), lambda output, _: Seen.apply(output).sum())
    with Watch(FakeRun(task)) as watch:
        task.training_step(torch.randn(1, 2), 0).backward()
    modules = ["net.1", "net.1.inner", "net.1", OUTSIDE]
    assert seen == [("forward", m) for m in modules] + [("backward", m) for m in reversed(modules)]
