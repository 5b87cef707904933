"""The tensors of a suspicious batch beside those of other steps, against loops over single values."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stages_small import Classifier, SmallStage, blobs
from torch import Tensor, nn

from normzoo.replaying.inputs import Range, inputs


def stage_of(batches: list[Any], **options: Any) -> SmallStage:
    return SmallStage(Classifier(nn.Linear(1, 1)), [[batch] for batch in batches], **options)


def facts(batches: list[Any], step: int | None = None) -> dict[str, dict[str, Any]]:
    found = inputs(stage_of(batches), len(batches) - 1 if step is None else step)
    return {fact["path"]: fact for fact in found}


values = st.one_of(st.floats(-100, 100, width=32), st.sampled_from([math.nan, math.inf, -math.inf]))
rows_of_floats = st.lists(st.lists(values, min_size=2, max_size=2), min_size=1, max_size=4)


@given(batches=st.lists(rows_of_floats, min_size=2, max_size=5), half=st.booleans())
def test_numbers_against_loops(batches: list[Any], half: bool) -> None:
    dtype = torch.bfloat16 if half else torch.float32
    tensors = [torch.tensor(batch, dtype=dtype) for batch in batches]
    numbers = [[v for row in x.tolist() for v in row] for x in tensors]
    fact = facts(tensors)["batch"]
    own, others = numbers[-1], [v for of_batch in numbers[:-1] for v in of_batch]
    assert fact["max"] == max((abs(v) for v in own if math.isfinite(v)), default=None)
    assert fact["others_max"] == max((abs(v) for v in others if math.isfinite(v)), default=None)
    assert fact["nonfinite"] == sum(not math.isfinite(v) for v in own)
    assert fact["others_nonfinite"] == max(sum(not math.isfinite(v) for v in of) for of in numbers[:-1])
    assert fact["constant"] == (all(map(math.isfinite, own)) and len(set(own)) == 1)
    assert (fact["range"], fact["outside"], fact["far"]) == (None, 0, 0)
    if fact["nonfinite"] > fact["others_nonfinite"]:
        assert set(fact["rows"]) <= {i for i, row in enumerate(batches[-1]) if not all(map(math.isfinite, row))}
        assert fact["rows"]


whole = st.lists(st.integers(-5, 300), min_size=1, max_size=6)
dtypes = st.sampled_from([torch.int64, torch.int16, torch.int32])


@given(batches=st.lists(whole, min_size=2, max_size=5), dtype=dtypes)
def test_whole_numbers_against_loops(batches: list[list[int]], dtype: torch.dtype) -> None:
    fact = facts([torch.tensor(batch, dtype=dtype) for batch in batches])["batch"]
    own, others = batches[-1], [v for of_batch in batches[:-1] for v in of_batch]
    low, high = min(others), max(others)
    outside = [v for v in own if not low <= v <= high]
    most = max(len(set(of_batch)) for of_batch in batches[:-1])
    far = [v for v in outside if max(low - v, v - high) > most or (v < 0 <= low)]
    assert fact["range"] == [low, high]
    assert (fact["lowest"], fact["highest"]) == (min(own), max(own))
    assert (fact["distinct"], fact["outside"], fact["far"]) == (most, len(outside), len(far))
    assert set(fact["rows"]) <= set(range(len(own)))
    if far:
        assert {own[row] for row in fact["rows"]} <= set(far)


def planted(change: Any, step: int = 5) -> dict[str, dict[str, Any]]:
    batches = [list(blobs(16, seed)) for seed in range(8)]
    change(batches[step])
    return facts(batches, step)


def test_a_sample_of_another_scale_stands_out() -> None:
    def change(batch: list[Tensor]) -> None:
        batch[0][3] *= 1e4
        batch[0][9] *= 1e3

    found = planted(change)
    assert list(found) == ["batch[0]", "batch[1]"]
    assert found["batch[0]"]["max"] > 100 * found["batch[0]"]["others_max"]
    assert found["batch[0]"]["rows"] == [3, 9]
    assert (found["batch[1]"]["far"], found["batch[1]"]["rows"]) == (0, [])


def test_values_that_are_not_finite_stand_out_unless_other_batches_have_them() -> None:
    def change(batch: list[Tensor]) -> None:
        batch[0][7, 2:] = math.nan
        batch[0][2, 0] = -math.inf

    fact = planted(change)["batch[0]"]
    assert (fact["nonfinite"], fact["others_nonfinite"], fact["rows"]) == (5, 0, [7, 2])
    masks = [torch.tensor([[0.0, -math.inf], [0.0, 0.0]])] * 4
    assert facts(masks)["batch"]["rows"] == []


@pytest.mark.parametrize(("label", "far"), [(3, 0), (-1, 1), (1000, 1), (-100, 0)])
def test_a_label_outside_is_far_if_negative_or_well_beyond_the_range(label: int, far: int) -> None:
    def change(batch: list[Tensor]) -> None:
        batch[1][4] = label

    fact = planted(change)["batch[1]"]
    assert (fact["range"], fact["outside"], fact["far"]) == ([0, 2], 1, far)
    assert fact["rows"] == ([4] if far or abs(label) > 4 else [])


def test_a_label_that_other_batches_ignore_is_not_far() -> None:
    batches = [torch.tensor([0, 1, -100])] * 3 + [torch.tensor([-100, -100, 2])]
    fact = facts(batches)["batch"]
    assert (fact["outside"], fact["far"]) == (1, 0)


def test_a_batch_of_one_value_is_constant() -> None:
    def change(batch: list[Tensor]) -> None:
        batch[0].fill_(0.5)

    fact = planted(change)["batch[0]"]
    assert (fact["constant"], fact["others_constant"]) == (True, False)


def test_the_first_step_is_compared_with_later_ones_and_a_single_one_with_none() -> None:
    batches = [torch.full((2,), 9.0), torch.ones(2), torch.ones(2)]
    assert facts(batches, 0)["batch"]["others_max"] == 1.0
    alone = facts(batches[:1])["batch"]
    assert (alone["others_max"], alone["range"], alone["rows"], alone["max"]) == (None, None, [], 9.0)


def test_a_poisoned_batch_does_not_widen_what_earlier_ones_are_judged_by() -> None:
    batches = [torch.ones(2)] * 3 + [torch.full((2,), 50.0), torch.full((2,), 99.0)]
    assert facts(batches, 3)["batch"]["others_max"] == 1.0


def test_the_stranger_of_several_micro_batches_has_the_rows() -> None:
    quiet, poisoned = torch.ones(4), torch.tensor([1.0, 1.0, 70.0, 1.0])
    stage = SmallStage(
        Classifier(nn.Linear(1, 1)), [[quiet] * 4, [quiet, poisoned, quiet, quiet]], rank_of=[0, 1, 0, 1]
    )
    [fact] = inputs(stage, 1)
    assert (fact["rank"], fact["micro_batch"], fact["rows"], fact["max"]) == (1, 0, [2], 70.0)


def test_lists_of_samples_are_compared_as_one_tensor() -> None:
    def batch(seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        images = [torch.rand(3, 4 + i, 4, generator=generator) for i in range(6)]
        targets = [{"boxes": torch.ones(i, 4), "labels": torch.arange(i)} for i in (1, 2, 5, 1, 4, 3)]
        return images, targets

    poisoned = batch(9)
    poisoned[0][4][1] *= 100
    poisoned[0][2][0] *= 1000
    poisoned[1][3]["labels"] += 70
    found = facts([batch(seed) for seed in range(4)] + [poisoned])
    assert found.keys() == {"batch[0][i]", 'batch[1][i]["boxes"]', 'batch[1][i]["labels"]'}
    assert found["batch[0][i]"]["rows"] == [2, 4]
    assert found["batch[0][i]"]["others_max"] <= 1
    assert found['batch[1][i]["labels"]']["rows"] == [3]
    assert found['batch[1][i]["labels"]']["range"] == [0, 4]
    assert found['batch[1][i]["boxes"]']["rows"] == []


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(0, 3),
        torch.tensor(4),
        torch.zeros(3, dtype=torch.bool),
        torch.zeros(3, dtype=torch.complex64),
        torch.tensor([2**63 - 1, -(2**63)]),
        torch.zeros(3, dtype=torch.uint16),
        torch.zeros(3, dtype=torch.uint8),
        torch.zeros(2, dtype=torch.float8_e4m3fn),
    ],
)
def test_odd_tensors_are_taken(x: Tensor) -> None:
    [fact] = inputs(stage_of([x, x]), 1)
    assert (fact["outside"], fact["far"], fact["nonfinite"]) == (0, 0, 0)
    assert Range.of(x).joined(Range()) == Range.of(x)


def test_extremes_of_whole_numbers_do_not_overflow() -> None:
    fact = facts([torch.tensor([-(2**62)])] * 3 + [torch.tensor([2**63 - 1])])["batch"]
    assert (fact["outside"], fact["far"]) == (1, 1)
