"""Which conversions compute the same, and that these do: all pairs of kinds, in evaluation and in training."""

from __future__ import annotations

import copy

import pytest
import timm.layers as tl
import torch
import torchvision
from timm.layers.inplace_abn import InplaceAbn
from torch import nn
from torch.testing import assert_close

import normzoo
from normzoo import convert_norms

C = 8
NAMES = normzoo.list_norms()

# In evaluation a scale and shift of channels; what of it is by running statistics is not the same in training.
SCALES = {"affine", "none", "batch", "batch_renorm", "ghost_batch", "frozen_batch", "l1_batch", "batch_group", "power"}
# Those that can be any scale and shift, evonorm_b0 without an activation and batch_instance with its gate at batch norm
ANY_SCALE = SCALES - {"none"} | {"evonorm_b0", "iter_norm", "batch_instance"}
# Of samples alone: the same in both modes
SAMPLE = {
    *(("layer", "group"), ("instance", "group"), ("instance", "batch_instance")),
    *(("layer_channel", "positional"), ("positional", "layer_channel")),
}
IN_EVALUATION = {(a, a) for a in NAMES} | {(a, b) for a in SCALES for b in ANY_SCALE} | SAMPLE
# online is a scale and shift that is clamped: the same where nothing is
IN_EVALUATION |= {(a, "online") for a in SCALES} | {("online", b) for b in ANY_SCALE}
# In training what has no statistics of the batch, and what has the same
FIXED = {"affine", "none", "frozen_batch"}
# Batch norm in training as long as batches are no larger than virtual ones, and at the first steps
LIKE_BATCH = {"batch", "ghost_batch", "batch_renorm"}
IN_TRAINING = (
    {(a, a) for a in NAMES}
    | {(a, b) for a in FIXED for b in ("affine", "frozen_batch")}
    | {(a, b) for a in LIKE_BATCH for b in LIKE_BATCH | {"batch_instance"}}
    | SAMPLE
)


def norm(name, seed=0, training=False):
    """A layer that has been trained for three batches, in float64."""
    options = {"groups": 2} if "groups" in normzoo.norm_info(name).options and name != "power" else {}
    layer = normzoo.create_norm(name, C, **options).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for t in (*layer.parameters(), *layer.buffers()):
            if t.is_floating_point() and t.ndim == 1:
                t.copy_(torch.rand(t.shape, generator=generator, dtype=t.dtype) + 0.5)
        for _ in range(3):
            layer(1.3 * torch.randn(6, C, 5, 5, generator=generator, dtype=torch.float64) + 0.4)
    return layer.train(training)


X = 0.5 * torch.randn(4, C, 6, 6, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def moved(name, to, training=False):
    """How far outputs move by conversion, relative to the original's."""
    layer = norm(name, training=training)
    model = nn.Sequential(copy.deepcopy(layer))
    convert_norms(model, to)
    with torch.no_grad():
        y = layer(X)
        return float((model(X) - y).norm() / y.norm())


FIRST = ("batch", "none", "online", "positional", "l1_batch", "instance", "layer", "switchable")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FIRST else [pytest.mark.slow]) for n in NAMES])
def test_what_can_be_exact_is(name):
    for to in NAMES:
        assert (moved(name, to) < 1e-12) == ((name, to) in IN_EVALUATION), to


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_what_is_exact_in_training_too(name):
    for to in NAMES:
        assert (moved(name, to, training=True) < 1e-12) == ((name, to) in IN_TRAINING), to


def test_groups_of_one_and_of_all():
    for groups, to in ((1, "layer"), (C, "instance")):
        layer = normzoo.create_norm("group", C, groups=groups).double()
        model = nn.Sequential(copy.deepcopy(layer))
        convert_norms(model, to)
        assert_close(model(X), layer(X), rtol=1e-12, atol=1e-12)
        back = convert_norms(model, "group")
        assert model[0].groups == groups
        assert back.changed[0].created == []
    model = nn.Sequential(nn.InstanceNorm2d(C))
    convert_norms(model, "group", options={"groups": 2})
    assert model[0].groups == 2


def test_the_unbiased_variance_is_another_scale_and_eps():
    layer = normzoo.create_norm("positional", C, unbiased=True, eps=0.3).double()
    model = nn.Sequential(copy.deepcopy(layer))
    for to, options in (("layer_channel", {}), ("positional", {"unbiased": True}), ("positional", {})):
        convert_norms(model, to, options=options)
        assert_close(model(X), layer(X), rtol=1e-12, atol=1e-12)
    assert model[0].unbiased


# Layers of other packages, and how each differs from a batch norm with everything
OTHERS = {
    "torch": lambda: nn.BatchNorm2d(C),
    "no affine": lambda: nn.BatchNorm2d(C, affine=False),
    "no bias": lambda: nn.BatchNorm2d(C, bias=False),
    "eps": lambda: nn.BatchNorm2d(C, eps=0.1),
    "sync": lambda: nn.SyncBatchNorm(C),
    "instance": lambda: nn.InstanceNorm2d(C, affine=True, track_running_stats=True),
    "torchvision": lambda: torchvision.ops.misc.FrozenBatchNorm2d(C, eps=0.1),
    "split": lambda: tl.split_batchnorm.SplitBatchNorm2d(C),
    "timm": lambda: tl.norm_act.BatchNormAct2d(C),
    "timm frozen": lambda: tl.norm_act.FrozenBatchNormAct2d(C),
    "dead channels": lambda: nn.BatchNorm2d(C),
}


@pytest.mark.parametrize("to", sorted(ANY_SCALE - {"batch_instance"}))
@pytest.mark.parametrize("case", OTHERS)
def test_layers_of_other_packages(case, to):
    layer, generator = OTHERS[case]().double().eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for t in (*layer.parameters(), *layer.buffers()):
            if t.is_floating_point():
                t.copy_(torch.rand(t.shape, generator=generator, dtype=t.dtype) + 0.5)
        if case == "dead channels":
            layer.running_var[:3] = torch.tensor([0.0, 1e-12, 1e-6])
            layer.weight[2:4] = 0
    model, twin = nn.Sequential(layer), copy.deepcopy(layer)
    report = convert_norms(model, to, options={"act_layer": None} if to == "evonorm_b0" else None)
    y = twin(X)
    if to == "evonorm_b0" and "timm" in case:
        y = None  # the activation that it was made without
    if y is not None:
        assert_close(model(X), y, rtol=1e-12, atol=1e-12)
    if to == "affine":
        assert "running statistics are folded into weight and bias" in " ".join(report.changed[0].warnings)


@pytest.mark.parametrize("to", ["batch", "l1_batch", "frozen_batch", "power", "iter_norm"])
@pytest.mark.parametrize("name", ["affine", "l1_batch", "batch"])
def test_running_statistics_are_set_and_weights_stay(name, to):
    layer = norm(name)
    weight = layer.weight.clone()
    model = nn.Sequential(layer)
    convert_norms(model, to)
    assert torch.equal(model[0].weight, weight)


def test_single_precision_moves_by_rounding():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, C, 3), nn.BatchNorm2d(C), nn.ReLU())
    for _ in range(5):
        model(torch.randn(4, 3, 9, 9))
    model.eval()
    x = torch.randn(4, 3, 9, 9)
    for to in ("affine", "iter_norm", "l1_batch", "power", "batch"):
        twin = copy.deepcopy(model)
        convert_norms(twin, to)
        assert_close(twin(x), model(x), rtol=1e-5, atol=1e-6)


def test_an_optimizer_goes_on_with_what_is_folded():
    model = nn.Sequential(norm("batch").float().train())
    weight, bias = model[0].weight, model[0].bias
    report = convert_norms(model, "affine")
    assert model[0].weight is weight
    assert model[0].bias is bias
    assert model[0].training
    assert report.changed[0].carried == ["weight", "bias"]


def test_statistics_that_have_seen_no_batch_are_not_folded():
    model = nn.Sequential(nn.BatchNorm2d(C))
    report = convert_norms(model, "affine")
    assert torch.equal(model[0].weight, torch.ones(C))
    assert report.changed[0].warnings == []


def test_what_others_share_stays_as_it_was():
    model = nn.Sequential(norm("batch"), norm("batch", 1), nn.Linear(C, C))
    model[1].weight = model[0].weight
    model[2].bias = model[0].bias
    twin = copy.deepcopy(model)
    report = convert_norms(model, "affine")
    assert_close(model[1](model[0](X)), twin[1](twin[0](X)), rtol=1e-12, atol=1e-12)
    assert torch.equal(model[2].bias, twin[2].bias)
    shared = "was shared with others, and is a tensor of its own now"
    assert [sum(shared in w for w in s.warnings) for s in report.changed] == [2, 1]


def test_an_error_puts_values_back():
    model = nn.Sequential(norm("batch"), nn.Conv2d(C, C, 1))
    model[1].__class__ = type("Odd", (nn.Conv2d,), {})
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"the convolution '1' is a Odd"):
        convert_norms(model, "affine+ws")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_inplace_abn_scales_by_its_weight_and_eps():
    layer = InplaceAbn(C, apply_act=False)
    nn.init.normal_(layer.weight)
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    model = nn.Sequential(layer.eval())
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    scale = layer.weight.detach().abs() + layer.eps
    convert_norms(model, "batch")
    x = torch.randn(2, C, 3, 3)
    view = (1, -1, 1, 1)
    y = (x - mean.view(view)) * (var + layer.eps).rsqrt().view(view) * scale.view(view) + layer.bias.view(view)
    assert_close(model.eval()(x), y)


def test_instance_norm_without_parameters_is_calibrated():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, C, 3), nn.InstanceNorm2d(C), nn.ReLU(), nn.Conv2d(C, 4, 1))
    x = torch.randn(16, 3, 9, 9)
    for to in ("batch", "layer", "rms", "affine"):
        twin = copy.deepcopy(model)
        report = convert_norms(twin, to, calibrate=x)
        assert twin[1].weight.requires_grad
        assert "weight" in report.changed[0].created
        assert not any("not calibrated" in w for w in report.changed[0].warnings)
        assert report.after.relative < report.before.relative
    twin = copy.deepcopy(model)
    convert_norms(twin, "batch")
    assert twin[1].weight is None


def test_running_statistics_of_instance_norm_are_said_to_be_lost():
    model = nn.Sequential(nn.InstanceNorm2d(C, affine=True, track_running_stats=True))
    assert "by which it normalizes in evaluation, are not those of instance norm" in str(
        convert_norms(model, "instance")
    )


def test_statistics_in_other_terms_are_not_taken_anew():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, C, 3), norm("batch").float())
    x = torch.randn(8, 3, 9, 9)
    y = model(x)
    for calibrate in (None, x):
        twin = copy.deepcopy(model)
        report = convert_norms(twin, "iter_norm", calibrate=calibrate)
        assert report.changed[0].warnings == []
        assert_close(twin(x), y, rtol=1e-4, atol=1e-4)


class Registered:
    """Classes that a user registers without ``channel_dim``."""

    class First(nn.Module):
        def __init__(self, num_features, *, eps=1e-5, device=None, dtype=None):
            super().__init__()
            self.num_features, self.eps = num_features, eps
            self.weight, self.bias = nn.Parameter(torch.ones(num_features)), nn.Parameter(torch.zeros(num_features))
            self.register_buffer("running_mean", torch.zeros(num_features))
            self.register_buffer("running_var", torch.ones(num_features))

        def forward(self, x):
            batch = self.training
            return nn.functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, batch, 0.1, self.eps
            )

    class Last(nn.Module):
        def __init__(self, num_features, *, eps=1e-5, device=None, dtype=None):
            super().__init__()
            self.num_features, self.eps = num_features, eps
            self.weight = nn.Parameter(torch.ones(num_features))

        def forward(self, x):
            return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(normzoo.registry, "_NORMS", dict(normzoo.registry._NORMS))
    monkeypatch.setattr(normzoo.registry, "_ALIASES", dict(normzoo.registry._ALIASES))
    monkeypatch.setattr(normzoo.registry, "_BY_TARGET", dict(normzoo.registry._BY_TARGET))
    normzoo.register_norm("users_first", family="batch", batch_statistics=True)(Registered.First)
    normzoo.register_norm("users_last", family="sample")(Registered.Last)


def test_registered_classes_without_channel_dim(registered):
    torch.manual_seed(0)
    maps = nn.Sequential(nn.Conv2d(3, C, 3), nn.BatchNorm2d(C), nn.ReLU(), nn.Conv2d(C, 4, 1)).eval()
    maps[1].running_mean.normal_()
    x = torch.randn(16, 3, 9, 9)
    y = maps(x)
    convert_norms(maps, "users_first")
    assert_close(maps(x), y)
    convert_norms(maps, "group", options={"groups": 2}, calibrate=x)
    convert_norms(maps, "users_first", calibrate=x)
    out = maps[:2](x)
    assert_close(maps[1].running_mean, maps[0](x).mean((0, 2, 3)), rtol=1e-3, atol=1e-3)
    assert out.isfinite().all()
    tokens = nn.Sequential(nn.Linear(3, C), nn.RMSNorm(C, eps=1e-5))
    z = torch.randn(4, 5, 3)
    y = tokens(z)
    convert_norms(tokens, "users_last")
    assert_close(tokens(z), y)
    convert_norms(tokens, "rms")  # its dimension is found by trying
    assert_close(tokens(z), y)
    assert tokens[1].channel_dim == -1
    with pytest.raises(ValueError, match=r"its channels are in dimension 1, and Last takes them last"):
        convert_norms(maps, "users_last")
    for to in ("users_first", lambda c: nn.GroupNorm(2, c)):
        with pytest.raises(ValueError, match=r"its channels are last, and (First|GroupNorm) takes them in dimension 1"):
            convert_norms(tokens, to)
