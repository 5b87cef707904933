"""Folding only where nothing else uses what it takes away."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
from convert.folding import Net, assert_folds, assert_untouched, run, snapshot, trained
from torch import nn
from torch.nn.utils import prune

import normzoo
from normzoo.convert import _flow, _fold
from normzoo.fold import fold_norms


def keep(net, x):
    net.kept = net.conv(x)
    return net.bn(net.kept)


@torch.jit.script
def scripted(y: torch.Tensor) -> torch.Tensor:
    return y.mean(0) * 2


class Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()


class Holder:
    def __init__(self, y):
        self.y = y


def stateful(net, x):
    y = net.conv(x)
    z = net.bn(y)
    y.add_(1)
    return z + y.sum()


# Where the output of conv has another use, or its or the norm's parameters have, so that bn cannot go into it.
UNSAFE = {
    "output used twice": lambda n, x: (y := n.conv(x), n.bn(y) + y)[1],
    "output returned": lambda n, x: (y := n.conv(x), n.bn(y)),
    "view returned": lambda n, x: (y := n.conv(x), (n.bn(y), y[:, :1]))[1],
    "output kept": keep,
    "read by a view": lambda n, x: (y := n.conv(x), v := y.flatten(2), n.bn(y) + v.mean())[2],
    "read through data": lambda n, x: (y := n.conv(x), n.bn(y) + y.data.mean())[1],
    "read by a script": lambda n, x: (y := n.conv(x), n.bn(y) + scripted(y))[1],
    "read by a function": lambda n, x: (y := n.conv(x), n.bn(y) + Custom.apply(y))[1],
    "read in inference mode": lambda n, x: (y := n.conv(x), n.bn(y) + inference(y))[1],
    "changed in place before": lambda n, x: n.bn(n.conv(x).mul_(2)),
    "changed through a view before": lambda n, x: (y := n.conv(x), y[0].fill_(1.0), n.bn(y))[2],
    "changed in place after": stateful,
    "activation between": lambda n, x: n.bn(n.conv(x).relu()),
    "activation between, in place": lambda n, x: n.bn(F.relu(n.conv(x), inplace=True)),
    "conv called twice": lambda n, x: n.bn(n.conv(n.conv(x))),
    "norm called twice": lambda n, x: n.bn(n.bn(n.conv(x))),
    "norm of two": lambda n, x: n.bn(n.conv(x)) + n.bn(n.conv2(x)),
    "output to two norms": lambda n, x: (y := n.conv(x), n.bn(y) * n.bn2(y))[1],
    "weight used": lambda n, x: n.bn(n.conv(x)) + n.conv.weight.sum(),
    "weight used as another's": lambda n, x: n.bn(n.conv(x)) + F.conv2d(x, n.conv.weight, padding=1),
    "weight returned": lambda n, x: (n.bn(n.conv(x)), n.conv.weight),
    "forward called": lambda n, x: n.bn(n.conv(x)) + n.conv.forward(x),
    "only forward called": lambda n, x: n.bn(n.conv.forward(x)),
    "norm's weight used": lambda n, x: n.bn(n.conv(x)) * n.bn.weight.norm(),
    "norm's statistics used": lambda n, x: n.bn(n.conv(x)) * n.bn.running_var.sum(),
    "norm's forward called": lambda n, x: n.bn.forward(n.conv(x)),
    "norm's weight returned": lambda n, x: (n.bn(n.conv(x)), n.bn.weight),
    "not a number of its own": lambda n, x: n.bn(n.conv(x).expand(2, -1, -1, -1)),
    "copied between": lambda n, x: n.bn(n.conv(x).clone()),
    "flipped": lambda n, x: n.bn(n.conv(x).transpose(2, 3).flip(1)),
    "in another dtype": lambda n, x: n.bn(n.conv(x).double().float()),
    "channels in another place": lambda n, x: n.bn(n.conv(x)[..., :3].transpose(1, 3)),
    "channels moved": lambda n, x: n.bn(n.conv(x[..., :3]).mT.transpose(1, 2)),
}


def inference(y):
    with torch.inference_mode():
        return float(y.mean())


@pytest.mark.parametrize("case", UNSAFE)
def test_other_uses_are_seen(case):
    x = torch.randn(1, 3, 6, 6)
    model = trained(Net(UNSAFE[case]))
    before, weight = run(model, x), model.conv.weight
    assert len(fold_norms(model, torch.randn_like(x))) == 0
    assert model.conv.weight is weight
    assert all(torch.equal(a, b) for a, b in zip(run(model, x), before, strict=True))


SAFE = {
    "form is read": lambda n, x: (y := n.conv(x), n.bn(y) * y.shape[1] * y.dim() * len(y) + y.numel() * y.stride(0))[1],
    "identity and dropout between": lambda n, x: n.bn(F.dropout(nn.Identity()(n.conv(x)), 0.5, n.training)),
    "contiguous": lambda n, x: n.bn(n.conv(x).contiguous().float()),
    "output changed in place after": lambda n, x: n.bn(n.conv(x)).add_(1).relu_(),
    "garbage": lambda n, x: (y := n.conv(x), loop(y), n.bn(y))[2],
    "in inference mode": lambda n, x: infer(n, x),
    "in a script's neighbourhood": lambda n, x: n.bn(n.conv(x)) + scripted(x),
    "path by the number of samples": lambda n, x: n.bn(n.conv(x)) if len(x) < 99 else x,
}


def loop(y):
    """A reference that only the garbage collector finds."""
    holder = Holder(y)
    holder.self = holder


def infer(n, x):
    with torch.inference_mode():
        y = n.bn(n.conv(x))
    return y.clone()


@pytest.mark.parametrize("case", SAFE)
def test_what_is_no_other_use(case):
    gc.collect()
    assert_folds(trained(Net(SAFE[case])), torch.randn(2, 3, 6, 6), 1)


def test_an_unsafe_fold_would_be_caught(monkeypatch):
    """Plant: a flow that sees no other use folds what it must not, and the comparison of outputs catches it."""
    model = trained(Net(UNSAFE["output used twice"]))
    before = snapshot(model)
    monkeypatch.setattr(_flow._Watch, "_use", lambda self, key: None)
    with pytest.raises(ValueError, match="the outputs of Net moved by .* Nothing was folded"):
        fold_norms(model, torch.randn(2, 3, 6, 6))
    assert_untouched(model, before)
    monkeypatch.setattr(_fold, "_check", lambda *args: None)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        assert_folds(model, torch.randn(2, 3, 6, 6), 1)


def shared_weight(net):
    net.conv2.weight = net.conv.weight


def shared_memory(net):
    net.conv2.weight.data = net.conv.weight.data


def averaged(net):
    net.register_buffer("average", net.conv.weight.data)


def weight_norm(net):
    nn.utils.parametrizations.weight_norm(net.conv)


def spectral_norm(net):
    nn.utils.spectral_norm(net.conv)


def pruned(net):
    prune.l1_unstructured(net.conv, "weight", 0.5)


def computed_elsewhere(net):
    weight = net.conv.weight.data
    del net.conv.weight
    net.conv.weight = weight


def standardized(net):
    del net.conv2
    normzoo.standardize_weights(net, "ws")


def hooked(net):
    net.conv.register_forward_hook(lambda m, args, y: y * 2)


def hooked_norm(net):
    net.bn.register_forward_pre_hook(lambda m, args: (args[0] + 1,))


def patched(net):
    forward = net.conv.forward
    net.conv.forward = lambda x: forward(x) + 1


def subclass(net):
    net.conv = type("Conv", (nn.Conv2d,), {"forward": lambda self, x: nn.Conv2d.forward(self, x) ** 2})(3, 3, 3)


@pytest.mark.parametrize(
    "change",
    [
        shared_weight,
        shared_memory,
        averaged,
        weight_norm,
        spectral_norm,
        pruned,
        computed_elsewhere,
        standardized,
        hooked,
        hooked_norm,
        patched,
        subclass,
    ],
)
def test_weights_and_calls_that_are_not_the_layers_own(change):
    def both(net, x):
        y = net.bn(net.conv(x))
        return y + net.conv2(x).relu() if change in (shared_weight, shared_memory) else y

    assert_folds(trained(Net(both, change)), torch.randn(2, 3, 6, 6), 0)


def test_norms_that_share_parameters_are_folded():
    def share(net):
        net.bn2.weight, net.bn2.running_mean = net.bn.weight, net.bn.running_mean

    assert_folds(trained(Net(lambda n, x: n.bn2(n.conv2(n.bn(n.conv(x)))), share)), torch.randn(2, 3, 6, 6), 2)


def test_a_norm_in_two_places_called_once_is_replaced_in_both():
    def alias(net):
        net.again = nn.ModuleDict({"norm": net.bn})

    model = assert_folds(trained(Net(lambda n, x: n.again["norm"](n.conv(x)), alias)), torch.randn(2, 3, 6, 6), 1)
    assert model.bn is model.again["norm"]


@pytest.mark.parametrize(
    ("path", "make", "message"),
    [
        (lambda n, x: n.bn(n.conv(x)) * n.bn.eps, None, "fails without: AttributeError"),
        (lambda n, x: n.norms[0](n.conv(x)), lambda n: setattr(n, "norms", [n.bn]), "keeps bn elsewhere"),
        (lambda n, x: n.bn(n.conv(x)) * len(list(n.bn.parameters())), None, "the outputs of Net moved"),
    ],
)
def test_uses_that_only_show_afterwards_are_undone(path, make, message):
    model = trained(Net(path, make or (lambda net: None)))
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        fold_norms(model, torch.randn(2, 3, 6, 6))
    assert_untouched(model, before)
