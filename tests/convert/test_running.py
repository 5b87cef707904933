"""Batches of all kinds reach a model as its forward takes them."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from normzoo.convert._running import run_batch, run_example

X, META = torch.ones(2, 3), torch.full((2, 4), 2.0)


class One(nn.Module):
    def forward(self, x, scale=1):
        return ("one", x, scale)


class Two(nn.Module):
    def forward(self, image, meta):
        return ("two", image, meta)


class Listed(nn.Module):
    def forward(self, images: list[Tensor], targets=None):
        return ("listed", images, targets)


class Evaluated(Listed):
    def forward(self, images, targets=None):
        return ("listed", images, None)

    forward.__annotations__["images"] = list[Tensor]  # as without `from __future__ import annotations`


class Commented(Listed):
    def forward(self, images, targets=None):
        # type: (list[Tensor], Optional[list[dict[str, Tensor]]]) -> tuple
        return ("listed", images, targets)


class Keyword(nn.Module):
    def forward(self, *, image, meta=None):
        return ("keyword", image, meta)


class Pair(NamedTuple):
    image: Tensor
    meta: Tensor


def same(got, want):
    assert type(got) is type(want)
    if isinstance(want, Tensor):
        assert torch.equal(got, want)
    elif isinstance(want, tuple | list):
        assert len(got) == len(want)
        for g, w in zip(got, want, strict=True):
            same(g, w)
    elif isinstance(want, dict):
        same(list(got), list(want))
        same(list(got.values()), list(want.values()))
    else:
        assert got == want


@pytest.mark.parametrize(
    ("model", "batch", "want"),
    [
        (One(), X, ("one", X, 1)),
        (One(), (X, META), ("one", X, 1)),  # (input, target)
        (One(), [X, META], ("one", X, 1)),
        (One(), ([X, META], META), ("one", [X, META], 1)),
        (One(), {"x": X, "scale": 3}, ("one", X, 3)),
        (One(), {"image": X}, ("one", {"image": X}, 1)),  # a model of one dict
        (One(), ({"image": X}, META), ("one", {"image": X}, 1)),
        (Two(), (X, META), ("two", X, META)),
        (Two(), [X, META, X], ("two", X, META)),
        (Two(), Pair(X, META), ("two", X, META)),
        (Two(), {"meta": META, "image": X}, ("two", X, META)),
        (Listed(), [X, X], ("listed", [X, X], None)),
        (Evaluated(), [X], ("listed", [X], None)),
        (Commented(), [X, X], ("listed", [X, X], None)),
        (Two(), {"meta": META, "image": X, "label": 1}, ("two", X, META)),  # with targets
        (Keyword(), {"image": X, "label": META}, ("keyword", X, None)),
        (Listed(), ([X], [{"boxes": META}]), ("listed", [X], None)),
        (Listed(), [[X], [{"boxes": META}]], ("listed", [X], None)),
        (Keyword(), {"image": X}, ("keyword", X, None)),
    ],
)
def test_batches(model, batch, want):
    same(run_batch(model, batch, 0), want)


def test_forward_takes_the_batch_as_it_is():
    batch = [{"a": [X]}, "text"]
    assert run_batch(One(), batch, 0, forward=lambda model, given: given is batch and isinstance(model, One))


def test_an_example_that_is_a_tuple_is_all_arguments():
    same(run_example(One(), (X, 5)), ("one", X, 5))
    same(run_example(Listed(), ([X, X],)), ("listed", [X, X], None))
    same(run_example(Two(), {"meta": META, "image": X}), ("two", X, META))
    same(run_example(One(), {"image": X}), ("one", {"image": X}, 1))


def test_a_compiled_model_is_asked_what_its_original_takes():
    model = torch.compile(Two(), backend="eager")
    same(run_batch(model, (X, META), 0), ("two", X, META))


@pytest.mark.parametrize(
    ("model", "batch", "message"),
    [
        (One(), "text", r"batch 4 is a str without tensors; give forward=lambda model, batch: \.\.\."),
        (One(), [], "batch 4 is a list without tensors; give forward="),
        (Two(), (X,), r"batch 4 has 1 inputs and Two.forward requires 2 \(image, meta\): give forward="),
        (Two(), {"image": X}, "batch 4 could not be run: TypeError: .*'meta'.*; forward=.* takes batches of any kind"),
        (nn.Linear(2, 2), X, "batch 4 could not be run: RuntimeError: .*mat1[^;]*$"),
    ],
)
def test_what_cannot_be_run_is_said(model, batch, message):
    with pytest.raises(ValueError, match=message) as caught:
        run_batch(model, batch, 4)
    assert "\n" not in str(caught.value)


def test_an_error_of_forward_names_the_batch():
    with pytest.raises(ValueError, match="^batch 1 could not be run: KeyError: 'x'$"):
        run_batch(One(), {}, 1, forward=lambda model, batch: batch["x"])


def test_tensors_go_to_the_models_device():
    model = One()
    model.register_buffer("b", torch.empty(1, device="meta"))
    _, x, _ = run_batch(model, {"x": X}, 0)
    assert x.device.type == "meta"
