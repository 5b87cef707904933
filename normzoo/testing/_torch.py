"""Promises to PyTorch: state dicts, copies, devices, autograd."""

from __future__ import annotations

import copy
import io
import pickle

import torch
import torch.fx
from torch import nn

from normzoo.testing._compare import BrokenError, agree
from normzoo.testing._inputs import MODES, sample, state, step, upstream, where
from normzoo.testing._promises import promise
from normzoo.testing._subject import Subject


@promise()
def state_dict(subject: Subject) -> None:
    """State dicts survive saving and strict loading; those with BatchNorm2d's keys evaluate the same in it."""
    layer = subject.made()
    stream = io.BytesIO()
    torch.save(layer.state_dict(), stream)
    stream.seek(0)
    loaded = subject.make()
    loaded.load_state_dict(torch.load(stream, weights_only=True), strict=True)
    held = state(layer)
    for name, value in state(loaded).items():
        agree(f"{name} after saving and loading", value, held[name])
    x = sample(subject.shape)
    text = where(False, x)
    with torch.no_grad():
        agree(f"{text}: output after saving and loading", loaded.eval()(x), layer.eval()(x))
    theirs = nn.BatchNorm2d(subject.num_features, eps=getattr(layer, "eps", 1e-5))
    if layer.state_dict().keys() != theirs.state_dict().keys():
        return
    options = {"act_layer": None} if "act_layer" in subject.parameters else {}
    ours, back = subject.made(**options), subject.make(**options)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    back.load_state_dict(theirs.state_dict(), strict=True)
    for name, value in state(ours).items():
        agree(f"{name}, back from torch.nn.BatchNorm2d", state(back)[name], value)
    image = x if x.ndim == 4 else x.reshape(x.shape[0], x.shape[1], -1, 1)
    with torch.no_grad():
        want = theirs.eval()(image).reshape(x.shape)
        agree(f"{text}: output, against torch.nn.BatchNorm2d of its state", ours.eval()(x), want, tolerance=1e-4)
        agree(f"{text}: output, back from torch.nn.BatchNorm2d", back.eval()(x), ours(x), tolerance=1e-6)


@promise()
def copies(subject: Subject) -> None:
    """copy.deepcopy and pickle give equal layers that share nothing with the original."""
    x = sample(subject.shape)
    for training in MODES:
        layer = subject.made().train(training)
        made = {"copy.deepcopy": copy.deepcopy(layer)}
        try:
            made["pickle"] = pickle.loads(pickle.dumps(layer))
        except Exception as error:
            raise BrokenError(f"pickle: {type(error).__name__}: {error}") from error
        for how, other in made.items():
            text = f"{how}, {where(training, x)}"
            untouched = state(layer)
            got, held = step(other, x), state(other)
            with torch.no_grad():
                for p in other.parameters():
                    p.add_(1)
            for name, value in state(layer).items():
                agree(f"{text}: {name} of the original, after a step of the copy", value, untouched[name])
            twin = subject.made().train(training)
            want = step(twin, x)
            for name, gradient in got.items():
                agree(f"{text}: {name}", gradient, want[name])
            expected = state(twin)
            for name, value in held.items():
                agree(f"{text}: {name} of the copy, after a step of it", value, expected.get(name))
            if repr(other) != repr(layer) == repr(twin):  # where a repr is no address
                raise BrokenError(f"{text}: the copy is {other!r}, the original {layer!r}")


@promise()
def meta(subject: Subject) -> None:
    """On the meta device, where no value can be read, it is made and runs; to_empty and reset_parameters renew it."""
    for training in MODES:
        layer = subject.make(device="meta").train(training)
        there = [k for k, v in state(layer).items() if not v.is_meta]
        if there:
            raise BrokenError(f"made with device='meta', {', '.join(there)} is not on it")
        for shape in subject.shapes:
            x = torch.empty(shape, device="meta")
            text = f"{where(training, x)} on meta"
            try:
                got = step(layer, x)
            except (RuntimeError, NotImplementedError) as error:
                raise BrokenError(f"{text}: {type(error).__name__}: {error}") from error
            for name, value in got.items():
                if value is not None and not value.is_meta:
                    raise BrokenError(f"{text}: {name} is on {value.device}")
        layer = layer.to_empty(device="cpu")
        with torch.no_grad():
            for value in (*layer.parameters(), *layer.buffers()):
                value.fill_(7)
        reset = getattr(layer, "reset_parameters", None)
        if reset is None:
            raise BrokenError("it has no reset_parameters() to give values to what to_empty left without")
        reset()
        fresh = state(subject.make())
        for name, value in state(layer).items():
            agree(f"{name} after to_empty and reset_parameters", value, fresh[name])


@promise()
def functional_call(subject: Subject) -> None:
    """torch.func.functional_call uses and updates the tensors it is given and leaves the layer's own alone."""
    x = sample(subject.shape)
    for training in MODES:
        layer, held = subject.make().train(training), subject.made().train(training)
        before, given = state(layer), state(held)
        text = where(training, x)
        with torch.no_grad():
            got, want = torch.func.functional_call(layer, given, (x,)), held(x)
        agree(f"{text}: output", got, want)
        for name, value in state(layer).items():
            agree(f"{text}: the layer's own {name} afterwards", value, before[name])
        for name, value in state(held).items():
            agree(f"{text}: the given {name} afterwards", given[name], value)


@promise()
def fx(subject: Subject) -> None:
    """torch.fx traces a model that holds the layer; the traced model follows train(), eval(), deepcopy, state dicts."""
    x = sample(subject.shape)
    for traced_in in MODES:
        model, twin = (nn.Sequential(nn.Identity(), subject.made()).train(traced_in) for _ in range(2))
        text = f"traced in {'training' if traced_in else 'evaluation'}"
        try:
            graph = torch.fx.symbolic_trace(model)
        except Exception as error:
            raise BrokenError(
                f"{text}: {type(error).__name__}: {error}. Let torch.fx record the layer as one call: compute in a "
                "function outside the class, with the module for its first argument, and decorate it with torch.fx.wrap"
            ) from error
        for i, training in enumerate((traced_in, not traced_in, traced_in)):
            graph, now = copy.deepcopy(graph).train(training), f"{text}, {where(training, x)}"
            want = step(twin.train(training), x, seed=i)
            for name, value in step(graph, x, seed=i).items():
                agree(f"{now}: {name}", value, want.get(name))
        held, expected = graph.state_dict(), twin.state_dict()
        if held.keys() != expected.keys():
            raise BrokenError(f"{text}: the traced model's state has {sorted(held)}, the model's {sorted(expected)}")
        for name, value in expected.items():
            agree(f"{text}: {name} afterwards", held[name], value)


@promise()
def output_overwritten(subject: Subject) -> None:
    """The output may be overwritten in place, as by timm's activations, before the backward pass."""
    for training in MODES:
        for shape in subject.shapes[:2]:
            x = sample(shape)
            text = where(training, x)
            found = []
            for relu in (torch.relu, torch.relu_):
                layer, leaf = subject.made().train(training), x.clone().requires_grad_()
                try:
                    relu(layer(leaf * 1)).backward(upstream(x))
                except RuntimeError as error:
                    raise BrokenError(f"{text}, relu_ on the output: {error}") from error
                found.append({"the input": leaf.grad, **{k: p.grad for k, p in layer.named_parameters()}})
            for name, want in found[0].items():
                agree(f"{text}, relu_ on the output: gradient of {name}", found[1][name], want, tolerance=1e-6)


@promise()
def input_kept(subject: Subject) -> None:
    """Neither the input nor the gradient that comes from above is modified."""
    for training in MODES:
        for shape in subject.shapes:
            forms = [torch.contiguous_format] + [torch.channels_last] * (len(shape) == 4)
            for form in forms:
                x = sample(shape).contiguous(memory_format=form)
                leaf, dy = x.clone().requires_grad_(), upstream(x)
                given, above = leaf * 1, dy.clone()
                before = given.detach().clone()
                subject.made().train(training)(given).backward(dy)
                text = where(training, x)
                agree(f"{text}: the input afterwards", given, before)
                agree(f"{text}: the gradient from above afterwards", dy, above)
