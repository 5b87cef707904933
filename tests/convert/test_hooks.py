"""Hooks of a converted layer, and the handles that were got for them, go on with the new layer."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import normzoo


def all_kinds(norm, calls):
    """{kind: handle} of a hook of every kind, which note their kind and the class of their module."""

    def note(kind):
        return lambda module, *_: calls.append((kind, type(module).__name__))

    def named(kind):
        def hook(module, args, kwargs, *output):
            assert isinstance(kwargs, dict)
            calls.append((kind, type(module).__name__))

        return hook

    def state(kind):
        return lambda module, *_: calls.append((kind, type(module).__name__))

    return {
        "pre": norm.register_forward_pre_hook(note("pre")),
        "pre, kwargs": norm.register_forward_pre_hook(named("pre, kwargs"), with_kwargs=True),
        "pre, first": norm.register_forward_pre_hook(note("pre, first"), prepend=True),
        "forward": norm.register_forward_hook(note("forward")),
        "forward, kwargs": norm.register_forward_hook(named("forward, kwargs"), with_kwargs=True),
        "always": norm.register_forward_hook(note("always"), always_call=True),
        "always, kwargs": norm.register_forward_hook(named("always, kwargs"), with_kwargs=True, always_call=True),
        "forward, first": norm.register_forward_hook(note("forward, first"), prepend=True),
        "backward pre": norm.register_full_backward_pre_hook(note("backward pre")),
        "backward": norm.register_full_backward_hook(note("backward")),
        "state dict": norm.register_state_dict_post_hook(state("state dict")),
        "state dict pre": norm.register_state_dict_pre_hook(state("state dict pre")),
        "load pre": norm.register_load_state_dict_pre_hook(state("load pre")),
        "load post": norm.register_load_state_dict_post_hook(state("load post")),
    }


def used(model):
    """One step, and a state dict there and back."""
    model(torch.randn(2, 4, 3, 3, requires_grad=True)).sum().backward()
    model.load_state_dict(model.state_dict())


@pytest.mark.parametrize(("to", "name"), [("group", "GroupNorm"), (lambda c: nn.GroupNorm(2, c), "GroupNorm")])
def test_hooks_of_every_kind_go_on_in_their_order(to, name):
    calls: list[tuple[str, str]] = []
    norm = nn.BatchNorm2d(4)
    handles = all_kinds(norm, calls)
    model = nn.Sequential(norm)
    used(model)
    before = [kind for kind, _ in calls]
    assert set(before) == set(handles)
    del norm
    normzoo.convert_norms(model, to)
    calls.clear()
    used(model)
    assert calls == [(kind, name) for kind in before]
    for kind, handle in handles.items():
        calls.clear()
        handle.remove()
        used(model)
        assert kind not in [k for k, _ in calls], kind
    assert calls == []


def test_hooks_that_are_always_called_are_called_when_the_layer_raises():
    calls = []
    model = nn.Sequential(nn.BatchNorm2d(4))
    handles = all_kinds(model[0], calls)
    normzoo.convert_norms(model, "layer")
    with pytest.raises(ValueError, match="4 channels"):
        model(torch.randn(2, 5, 3, 3))
    assert [kind for kind, _ in calls if "always" in kind] == ["always", "always, kwargs"]
    assert handles.keys() >= {"always"}


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook")
def test_hooks_of_the_old_kind_of_backward():
    calls = []
    model = nn.Sequential(nn.BatchNorm2d(4))
    handle = model[0].register_backward_hook(lambda *_: calls.append(1))
    normzoo.convert_norms(model, "affine")
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    model(x).sum().backward()
    assert calls == [1]
    handle.remove()
    model(x).sum().backward()
    assert calls == [1]


def test_an_error_leaves_hooks_with_the_original():
    calls = []
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(3))
    handles = all_kinds(model[0], calls)
    with pytest.raises(ValueError, match="cannot become"):
        normzoo.convert_norms(model, lambda c: nn.GroupNorm(4, c))
    model = nn.Sequential(model[0])
    used(model)
    assert len(calls) == len(handles)
    assert {name for _, name in calls} == {"BatchNorm2d"}


class Hooked(nn.GroupNorm):
    """Made with a hook of its own."""

    def __init__(self, channels):
        super().__init__(2, channels)
        self.seen = []
        self.register_forward_hook(lambda m, *_: m.seen.append("own"))


def test_hooks_of_the_new_layer_stay():
    model = nn.Sequential(nn.BatchNorm2d(4))
    model[0].register_forward_hook(lambda m, args, kwargs, out: m.seen.append("old"), with_kwargs=True)
    normzoo.convert_norms(model, Hooked)
    model(torch.randn(2, 4, 3, 3))
    assert model[0].seen == ["own", "old"]


def doubled(module, args, output):
    return 2 * output


def test_copies_and_pickles_have_the_hooks():
    model = nn.Sequential(nn.BatchNorm2d(4))
    handle = model[0].register_forward_hook(doubled)
    normzoo.convert_norms(model, "layer")
    x = torch.randn(2, 4, 3, 3)
    y = model(x)
    assert torch.equal(copy.deepcopy(model)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), y)
    handle.remove()
    assert torch.equal(2 * model(x), y)
