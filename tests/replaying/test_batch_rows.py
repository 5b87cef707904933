"""Batches divided into samples, whatever they are made of."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

from normzoo.replaying.batch_rows import division, tensor_leaves

Pair = namedtuple("Pair", "x y")


@dataclasses.dataclass
class Item:
    image: Tensor
    names: list[str]
    scale: float = 2.0


def batches(samples: int) -> st.SearchStrategy[Any]:
    """Nested containers of tensors, arrays and lists with a place for each sample, and of what belongs to all."""
    tensors = st.sampled_from([(samples,), (samples, 3), (samples, 2, 2)]).map(
        lambda shape: torch.arange(float(np.prod(shape))).reshape(shape)
    )
    shared = st.sampled_from([None, 1.5, "text", torch.tensor(3.0)])
    lists = st.just([f"sample {i}" for i in range(samples)])
    leaves = st.one_of(tensors, tensors.map(Tensor.numpy), shared, lists)
    return st.recursive(
        leaves,
        lambda inside: st.one_of(
            st.lists(inside, min_size=1, max_size=3),
            st.tuples(inside, inside),
            st.dictionaries(st.sampled_from("abc"), inside, max_size=3),
            st.builds(Pair, inside, inside),
            st.builds(lambda x: OrderedDict(only=x), inside),
        ),
        max_leaves=5,
    )


@given(samples=st.integers(4, 7), data=st.data())
@settings(max_examples=40)
def test_the_parts_of_a_batch_put_together_are_the_batch(samples: int, data: st.DataObject) -> None:
    batch = (torch.arange(samples), data.draw(batches(samples)))
    divided = division(batch)
    assert (divided.samples, divided.why_not) == (samples, "")
    cut = data.draw(st.integers(1, samples - 1))
    first, second = divided.part(batch, 0, cut), divided.part(batch, cut, samples)
    whole = dict(tensor_leaves(batch))
    halves = [dict(tensor_leaves(part)) for part in (first, second)]
    assert halves[0].keys() == halves[1].keys() == whole.keys()
    for path, x in whole.items():
        if x.ndim:
            assert torch.equal(torch.cat([half[path] for half in halves]), x)


@pytest.mark.parametrize(
    ("batch", "samples", "in_lists"),
    [
        (torch.zeros(5, 2), 5, False),
        ([torch.zeros(2, 3), torch.zeros(2)], 2, False),
        ((torch.zeros(1, 3), torch.zeros(1)), 1, False),
        ({"x": torch.zeros(3, 4), "none": None, "weight": torch.tensor(0.5), "id": ["a", "b", "c"]}, 3, False),
        (Item(torch.zeros(3, 4), ["a", "b", "c"]), 3, False),
        (np.zeros((6, 2)), 6, False),
        (([torch.zeros(3, 8, 8), torch.zeros(3, 6, 6)], [{"boxes": torch.zeros(i, 4)} for i in (1, 5)]), 2, True),
        (([torch.zeros(3, 8, 8)] * 4, torch.zeros(4)), 4, True),
        ([{"boxes": torch.zeros(i, 4), "label": torch.zeros(i)} for i in (2, 3, 5)], 3, True),
    ],
)
def test_the_number_of_samples(batch: Any, samples: int, in_lists: bool) -> None:
    divided = division(batch)
    assert (divided.samples, divided.why_not, divided.in_lists) == (samples, "", in_lists)
    for i in range(samples):
        assert all(len(x) == 1 or in_lists for _, x in tensor_leaves(divided.part(batch, i, i + 1)) if x.ndim)


@pytest.mark.parametrize(
    ("batch", "why_not"),
    [
        ((torch.zeros(4, 3), torch.zeros(5)), r"a tensor of shape (5,) in a batch of 4 samples does not have a row"),
        (torch.tensor(3.0), "no tensor with a dimension of samples"),
        ({"name": "a"}, "no tensor with a dimension of samples"),
        ((torch.zeros(0, 3), torch.zeros(0)), "the batch is empty"),
        (pack_sequence([torch.zeros(3, 2), torch.zeros(2, 2)]), "does not have a row for each sample"),
        ((torch.zeros(2, 3), object()), "a object does not have a row for each sample"),
    ],
)
def test_why_a_batch_is_not_divided(batch: Any, why_not: str) -> None:
    assert why_not in division(batch).why_not
    assert not division(batch).samples


def test_paths() -> None:
    batch = {"x": (torch.zeros(2), [np.zeros(2, ">f4")]), "item": Item(torch.zeros(2), ["a", "b"]), 3: torch.zeros(2)}
    paths = ['batch["x"][0]', 'batch["x"][1][0]', 'batch["item"].image', "batch[3]"]
    assert [path for path, _ in tensor_leaves(batch)] == paths
    assert not list(tensor_leaves((torch.zeros(2).to_sparse(), np.array(["a"]), np.zeros(2, object))))
