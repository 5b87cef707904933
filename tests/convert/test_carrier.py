"""Layers that a fold cannot try: each question is answered by the reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor, nn

from normzoo.convert._carrier import Carrier

QUESTIONS: dict[str, Callable[[Carrier], str]] = {
    "scales_outputs": Carrier.scales_outputs,
    "scales_inputs": lambda carrier: carrier.scales_inputs(with_shift=False),
    "scales_inputs with a shift": lambda carrier: carrier.scales_inputs(with_shift=True),
    "absorbs": lambda carrier: carrier.absorbs("norm"),
}


class WithNorm(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 4)
        self.norm = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class Raises(WithNorm):
    def forward(self, x: Tensor) -> Tensor:
        raise ArithmeticError("of the layer")


class RaisesLater(WithNorm):
    """Only on large values, which are tried after small ones."""

    def forward(self, x: Tensor) -> Tensor:
        if x.abs().amax() > 1e6:
            raise ArithmeticError("of the layer")
        return super().forward(x)


class ReturnsTwo(WithNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x), x  # type: ignore[return-value]


class CannotBeCopied(WithNorm):
    def __init__(self) -> None:
        super().__init__()
        self.generators = (i for i in range(3))


def carrier_of(layer: nn.Linear) -> Carrier:
    return Carrier(layer.eval(), (5, 3), transposed=False)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Raises, "it cannot be tried: ArithmeticError: of the layer"),
        (RaisesLater, "it cannot be tried: ArithmeticError: of the layer"),
        (ReturnsTwo, "it cannot be tried: TypeError: it returns a tuple"),
    ],
)
@pytest.mark.parametrize("question", QUESTIONS)
def test_what_the_layer_raises_is_the_reason(question: str, kind: type[WithNorm], reason: str) -> None:
    carrier = carrier_of(kind())
    norm = carrier.copy.norm
    assert QUESTIONS[question](carrier) == reason
    assert carrier.copy.norm is norm


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_layer_without_a_copy_has_the_reason_of_that(question: str) -> None:
    carrier = carrier_of(CannotBeCopied())
    assert carrier.copy is None
    assert QUESTIONS[question](carrier) == carrier.failure != ""


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_linear_layer_has_no_reason(question: str) -> None:
    assert QUESTIONS[question](carrier_of(WithNorm())) == ""
