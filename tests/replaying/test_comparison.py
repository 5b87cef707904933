"""Losses compared bit for bit, and which element stands out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from normzoo.replaying.comparison import difference_of_losses, differs, relative_difference, standing_out

floats = st.floats(width=32)


@given(floats, floats)
def test_losses_differ_in_a_bit_or_not(a: float, b: float) -> None:
    same = np.float32(a).tobytes() == np.float32(b).tobytes() or (math.isnan(a) and math.isnan(b))
    assert differs(a, b) is not same
    assert relative_difference(a, b) == relative_difference(b, a) >= 0


def test_a_single_bit_is_a_difference_unless_it_is_tolerated() -> None:
    next_one = float(np.nextafter(np.float32(1), np.float32(2)))
    assert differs(1.0, next_one)
    assert not differs(1.0, next_one, tolerance=1e-3)
    assert differs(1.0, 1.1, tolerance=1e-3)
    assert not differs(1.0, 1.0 + 1e-12)  # the same float32


def test_the_largest_difference_of_a_step_is_told_and_unknown_losses_are_not_compared() -> None:
    assert difference_of_losses([[1.0, 2.0], [3.0, 4.0]], [[1.0, 2.0], [3.0, 4.0]]) is None
    assert difference_of_losses([[1.0, 2.0], [4.0, 4.0]], [[1.0, 2.0], [3.0, 2.0]]) == 0.5
    assert difference_of_losses([[None, 2.0]], [[1.0, 2.0]]) is None
    assert difference_of_losses([], [[1.0]]) is None
    assert difference_of_losses([[math.nan]], [[1.0]]) == math.inf
    assert difference_of_losses([[math.nan]], [[math.nan]]) is None
    assert difference_of_losses([[math.inf]], [[math.inf]]) is None


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (20, 30), "a.bias": (20,), "b.weight": (3, 20), "b.bias": (3,), "scale": ()}
    found = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {**found, "count": torch.tensor(3)}


def moved(by: float, seed: int = 7) -> dict[str, torch.Tensor]:
    """The tensors after updates that differ a little everywhere."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: t + by * torch.randn(t.shape, generator=generator) if t.is_floating_point() else t
        for name, t in tensors().items()
    }


@pytest.mark.parametrize("by", [0.0, 1e-7, 1e-3])
@pytest.mark.parametrize(("name", "element"), [("a.weight", [4, 7]), ("a.bias", [19]), ("b.bias", [1]), ("scale", [])])
def test_a_changed_element_stands_out_though_all_differ_a_little(by: float, name: str, element: list[int]) -> None:
    recorded, replayed = moved(by), tensors()
    recorded[name][tuple(element)] += 0.5
    found = standing_out(recorded, replayed)
    assert found is not None
    assert (found["name"], found["element"]) == (name, element)
    assert found["times"] > 50
    assert found["recorded"] == float(recorded[name][tuple(element)])
    assert found["replayed"] == float(replayed[name][tuple(element)])


def test_without_one_the_largest_deviation_is_no_more_than_a_few_times_the_others() -> None:
    assert standing_out(tensors(), tensors()) is None
    found = standing_out(moved(1e-3), tensors())
    assert found is not None
    assert found["times"] < 20


def test_a_flipped_bit_is_found_after_sparse_updates() -> None:
    """Of an embedding the rows that were not looked up do not move at all."""
    recorded, replayed = moved(1e-3), tensors()
    recorded["table"], replayed["table"] = torch.zeros(500, 4), torch.zeros(500, 4)
    recorded["table"][:20] += 1e-3 * torch.randn(20, 4)
    recorded["b.weight"][2, 3] = 2.0**90
    found = standing_out(recorded, replayed)
    assert found is not None
    assert (found["name"], found["element"]) == ("b.weight", [2, 3])


def test_values_that_are_not_finite_stand_out_only_if_they_are_few() -> None:
    recorded, replayed = moved(1e-3), tensors()
    recorded["a.weight"][1, 2] = math.nan
    found = standing_out(recorded, replayed)
    assert found is not None
    assert (found["name"], found["element"], found["times"]) == ("a.weight", [1, 2], math.inf)
    assert math.isnan(found["recorded"])
    lost = {name: t * math.nan if t.is_floating_point() else t for name, t in recorded.items()}
    assert standing_out(lost, replayed) is None


def test_tensors_without_a_counterpart_are_passed_over() -> None:
    recorded, replayed = tensors(), tensors()
    recorded["other"], replayed["a.bias"] = torch.ones(3), torch.ones(2)
    replayed["count"] = torch.tensor(8)
    assert standing_out(recorded, replayed) is None
    assert standing_out({}, replayed) is None
