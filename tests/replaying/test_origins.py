"""Values that are not finite are followed to the operation, weight or input that they come from."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from normzoo.replaying.origins import INFINITE, NAN, Origin, Origins

INF, ONE = torch.inf, torch.tensor([1.0, 2.0])


def of_result(function: Callable[[Origins], Tensor]) -> list[Origin]:
    """The origins of what a function returns."""
    origins = Origins(lambda: ("here", False))
    origins.active = True
    with origins:
        result = function(origins)
    return [origins.origins[i] for i in sorted(origins.of([result]))]


def half_overflow(origins: Origins) -> Tensor:
    x = (ONE.half() * 300).mul_(400)
    return (x - x).sum() + 1


def in_place_on_a_part(origins: Origins) -> Tensor:
    cache = torch.zeros(3, 2)
    cache[1].copy_(ONE / 0)
    cache[2].copy_(ONE)
    return cache.sum()


def of_a_list(origins: Origins) -> Tensor:
    return torch.stack([ONE, torch.cat([ONE, ONE.log() - INF])[2:]]).mean()  # infinity as a scalar is given


@pytest.mark.parametrize(
    ("function", "name", "largest"),
    [
        (lambda _: (ONE * 3e38 * 2).sum(), "aten.mul", 6e38),
        (lambda _: (ONE - 1).log().exp().add(1).log() * 0 + (ONE - 3).sqrt().sum(), "aten.sqrt", 2.0),
        (half_overflow, "aten.mul_", 600.0),
        (in_place_on_a_part, "aten.div", 2.0),
        (lambda _: torch.full((2, 2), -INF).softmax(-1).sum(), "aten._softmax", INF),
        (lambda _: (ONE.expand(3, 2) / 0).t()[0].view(3)[1:].clone(), "aten.div", 2.0),
    ],
)
def test_the_operation_is_found(function: Callable[[Origins], Tensor], name: str, largest: float) -> None:
    (origin,) = of_result(function)
    assert (origin.kind, origin.name, origin.module, origin.backward) == ("operation", name, "here", False)
    assert origin.input_max == pytest.approx(largest) or name == "aten.mul"


@pytest.mark.parametrize(
    "function",
    [
        lambda _: torch.tensor([[-INF, 0.0], [0.0, 1.0]]).softmax(-1).sum(),  # a mask
        lambda _: ONE.masked_fill(ONE > 1, -INF).exp().sum(),
        lambda _: torch.where(ONE < 2, ONE, (ONE - 1).log()).sum(),  # selected away
        lambda _: torch.empty(2).fill_(INF).zero_().add_(1),
        lambda _: torch.empty(100, 100),  # whatever was in memory
        of_a_list,
    ],
)
def test_infinities_that_are_meant_or_lost_have_no_origin(function: Callable[[Origins], Tensor]) -> None:
    assert of_result(function) == []


def test_memory_that_is_used_again_has_no_earlier_origin() -> None:
    def function(origins: Origins) -> Tensor:
        for _ in range(20):
            bad = ONE / 0
            del bad
            good = ONE * 1
        return torch.stack([good, torch.full((2,), INF)])

    assert of_result(function) == []


def test_weights_and_inputs_are_origins_but_masks_are_not() -> None:
    given = {"nan": torch.tensor([torch.nan]), "inf": torch.tensor([INF, -INF]), "mask": torch.tensor([-INF, 0.0])}
    (origin,) = of_result(lambda o: (o.mark("weight", given), given["inf"].relu().sum())[1])
    assert (origin.kind, origin.name, origin.result) == ("weight", "inf", INFINITE)
    (origin,) = of_result(lambda o: (o.mark("input", given), given["nan"] * 2)[1])
    assert (origin.kind, origin.name, origin.result) == ("input", "nan", NAN)
    assert of_result(lambda o: (o.mark("weight", given), given["mask"] * 2)[1]) == []
    (origin,) = of_result(lambda o: (o.mark("weight", given, masks=False), given["mask"] * 2)[1])
    assert origin.name == "mask"


def test_several_origins_come_in_the_order_of_their_operations() -> None:
    found = of_result(lambda _: torch.stack([(ONE * -1).log().sum(), (ONE / 0).sum()]).sum())
    assert [origin.name for origin in found] == ["aten.log", "aten.div"]


def test_operations_of_a_backward_pass_are_found() -> None:
    def function(_: Origins) -> Tensor:
        x = torch.zeros(2, requires_grad=True)
        x.sqrt().mul(0).sum().backward()
        assert x.grad is not None
        return x.grad

    (origin,) = of_result(function)
    assert (origin.name, origin.result) == ("aten.div", NAN)


def test_nothing_is_followed_while_it_is_paused_or_not_active() -> None:
    def function(origins: Origins) -> Tensor:
        with origins.paused():
            return ONE / 0

    assert of_result(function) == []
    with Origins(lambda: ("", False)) as origins:
        assert not origins.of([ONE / 0])
