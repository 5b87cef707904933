"""Every architecture family of timm converts, and every architecture, with an exact account of its tensors."""

from __future__ import annotations

import copy
import re
from collections import defaultdict

import pytest
import timm
import torch
import torch.nn.functional as F
from convert.families import FAMILIES, LEFT_OUT, NOT_CONVERTIBLE, TIMM, WITHOUT_BATCH_NORM, WITHOUT_NORM
from sweeps import FULL
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import normzoo
from normzoo.convert._kinds import kind_of
from normzoo.convert._sites import find_sites
from normzoo.recognition import KINDS, qualified

TARGETS = ("batch_renorm", "group", "none")
INSTALLED = {module for module in timm.list_modules() if hasattr(timm.models, module)}
# Not norm layers: a response normalization within an MLP, with a skip of its own; one scale and shift for all channels.
NO_NORM_LAYER = ("GlobalResponseNorm", "LearnableAffineBlock")
NORM_FUNCTIONS = {F.batch_norm, F.group_norm, F.instance_norm, F.layer_norm, F.local_response_norm, F.rms_norm}


# Of plain and depthwise convolutions, of dense blocks, and of layer norm beside scales
REPRESENTATIVES = {"convnext", "densenet", "mobilenetv3", "resnet"}


def families(names):
    """The families as parameters; those that the installed timm lacks are skipped, most others are slow."""
    absent = pytest.mark.skip(f"timm {timm.__version__} does not have this family")
    marks = {name: [] if name in INSTALLED else [absent] for name in names}
    return [
        pytest.param(name, marks=marks[name] if name in REPRESENTATIVES else [*marks[name], pytest.mark.slow])
        for name in sorted(names)
    ]


CONVERTIBLE = families(FAMILIES.keys() - NOT_CONVERTIBLE.keys())
WITH_BATCH_NORM = families(FAMILIES.keys() - NOT_CONVERTIBLE.keys() - WITHOUT_BATCH_NORM)


def built(family):
    """The family's member and a batch of two inputs."""
    name, options, size = FAMILIES[family]
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10, **options), torch.randn(2, 3, size, size)


@pytest.fixture(scope="module")
def member(request):
    """A family, its member and input for all tests of it, which change copies."""
    return request.param, *built(request.param)


@pytest.fixture(scope="module")
def seasoned(member):
    """The member in evaluation, with statistics, scales and shifts as after some training, and its input."""
    model, x = copy.deepcopy(member[1]), member[2]
    sites = scales_and_shifts(find_sites(model))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for site in sites:
            site.module.momentum = 0.9
        model.train()(x)
        for tensor in (t for site in sites for t in site.source.tensors.values()):
            if tensor is not None and tensor.is_floating_point():
                tensor.mul_(torch.rand(tensor.shape, generator=generator) + 0.5)
                tensor.add_(torch.rand(tensor.shape, generator=generator), alpha=0.1)
    return model.eval(), x


def scales_and_shifts(sites):
    """The norms that are no more than that in evaluation."""
    return [site for site in sites if site.source.kind.name in ("batch", "affine")]


def held(model):
    """{module: {name: tensor}} for all parameters and buffers, those that are shared once."""
    found = defaultdict(dict)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        module, _, tensor_name = name.rpartition(".")
        found[module][tensor_name] = tensor
    return found


def convert(model, to, sites):
    """Convert a model with these norm layers, and hold the report to what became of every tensor."""
    before = held(model)
    report = normzoo.convert_norms(model, to)
    after = held(model)
    assert [site.name for site in report.changed] == [site.name for site in sites]
    for entry, site in zip(report.changed, sites, strict=True):
        inner = ".norm" if isinstance(model.get_submodule(entry.name), nn.Sequential) else ""
        names = site.source.kind.names
        old = {names.get(n, n): t for n, t in before.pop(entry.name, {}).items()}
        new = after.pop(entry.name + inner, {})
        # a count of batches without running averages is nothing that is lost
        uncounted = {"num_batches_tracked"} & (old.keys() - new.keys())
        assert sorted(new) == sorted([*entry.carried, *entry.created]), entry
        assert sorted(old) == sorted([*entry.carried, *entry.dropped, *uncounted]), entry
        for name in entry.carried:
            # one that is called otherwise was of another shape
            same = names and (new[name].is_meta or torch.equal(new[name], old[name].flatten()))
            assert new[name] is old[name] or same, entry
    # nothing but norms has changed
    assert before.keys() == after.keys()
    for module, tensors in before.items():
        assert tensors.keys() == after[module].keys(), module
        assert all(after[module][name] is tensor for name, tensor in tensors.items()), module


def originals(model):
    """Names of the modules that normalize and are not the zoo's."""
    found = []
    for name, module in model.named_modules():
        cls = type(module)
        named = re.search("norm|affine|^bn|bn$", cls.__name__, re.IGNORECASE) and cls.__name__ not in NO_NORM_LAYER
        itself = not list(module.children()) or [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        known = any(qualified(c) in KINDS for c in cls.__mro__)
        if not cls.__module__.startswith("normzoo.") and (known or (named and itself)):
            found.append(f"{name}: {cls.__name__}")
    return found


class Watch(TorchFunctionMode):
    """Counts calls of torch's normalization functions on samples."""

    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        # standardized weights go through batch_norm as one sample, inputs are two
        if func in NORM_FUNCTIONS and args[0].shape[0] > 1:
            self.called.append(func.__name__)
        return func(*args, **(kwargs or {}))


def outputs(model, x):
    return [y for y in tree_leaves(model(x)) if isinstance(y, Tensor)]


def test_the_table_has_every_family():
    assert not FAMILIES.keys() & LEFT_OUT.keys()
    assert NOT_CONVERTIBLE.keys() <= FAMILIES.keys()
    missing = INSTALLED - FAMILIES.keys() - LEFT_OUT.keys()
    if timm.__version__ != TIMM:
        pytest.skip(f"the table is of timm {TIMM}; {timm.__version__} also has {sorted(missing)}")
    assert not missing
    assert FAMILIES.keys() | LEFT_OUT.keys() == INSTALLED
    assert len(FAMILIES) >= 60


@pytest.mark.parametrize("family", families({"resnet", "vision_transformer", "convnext"}))
def test_the_search_for_originals_finds_them(family):
    model, x = built(family)
    with Watch() as watch:
        outputs(model, x)
    assert len(originals(model)) == len(find_sites(model))
    assert len(watch.called) == len(find_sites(model))


@pytest.mark.parametrize("member", CONVERTIBLE, indirect=True)
def test_a_family_converts_and_trains(member):
    family, original, x = member
    sites = find_sites(original)
    assert bool(scales_and_shifts(sites)) == (family not in WITHOUT_BATCH_NORM)
    for to in TARGETS:
        model = copy.deepcopy(original).train()
        convert(model, to, sites)
        assert [site.source.kind.name for site in find_sites(model)] == [to] * len(sites)
        assert originals(model) == []
        with Watch() as watch:
            ys = outputs(model, x)
        assert to != "none" or watch.called == []
        sum(y.square().mean() for y in ys).backward()
        assert all(y.isfinite().all() for y in ys)
        for name, p in model.named_parameters():
            assert p.grad is not None, name
            assert p.grad.isfinite().all(), name


@pytest.mark.parametrize("member", WITH_BATCH_NORM, indirect=True)
def test_there_and_back_is_the_same_model(member, seasoned):
    original, x = seasoned
    model = copy.deepcopy(original)
    there = normzoo.convert_norms(model, "batch_renorm", include=lambda _, m: kind_of(m).name == "batch")
    back = normzoo.convert_norms(model, "batch", include=lambda _, m: kind_of(m).name == "batch_renorm")
    assert len(there) == len(back)
    assert not any(site.created or site.dropped for site in (*there.changed, *back.changed))
    old, new = original.state_dict(), model.state_dict()
    assert list(old) == list(new)
    assert all(torch.equal(old[name], new[name]) for name in old)
    with torch.no_grad():
        assert all(torch.equal(y, z) for y, z in zip(outputs(original, x), outputs(model, x), strict=True))


@pytest.mark.parametrize("member", WITH_BATCH_NORM, indirect=True)
def test_folding_keeps_what_is_computed(member, seasoned):
    original, x = copy.deepcopy(seasoned[0]).double(), seasoned[1].double()
    with torch.no_grad():
        expected = outputs(original, x)
        sites = len(find_sites(original))
        count = len(normzoo.fold_norms(original, x))
        # in float32 it is rounding, up to 2e-5 in visformer
        for y, z in zip(expected, outputs(original, x), strict=True):
            assert (y - z).abs().max() <= 1e-12 * y.abs().max()
    left = [m for m in original.modules() if kind_of(m) is not None]
    assert len(left) == sites - count


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("family", families(FAMILIES))
def test_every_architecture_converts(family):
    """To each target in a full sweep, to one otherwise: the targets take turns."""
    for number, name in enumerate(timm.list_models(module=family)):
        with torch.device("meta"):
            original = timm.create_model(name, num_classes=10)
        if family in NOT_CONVERTIBLE or name in WITHOUT_NORM:
            with pytest.raises(ValueError, match="has no normalization layer to convert"):
                normzoo.convert_norms(original, "none")
            continue
        sites = find_sites(original)
        for to in TARGETS if FULL else [TARGETS[number % len(TARGETS)]]:
            model = copy.deepcopy(original) if FULL else original
            convert(model, to, sites)
            assert [site.source.kind.name for site in find_sites(model)] == [to] * len(sites), name
            assert originals(model) == [], name


@pytest.mark.parametrize("family", sorted(NOT_CONVERTIBLE))
def test_what_has_no_norm_says_so(family):
    model, _ = built(family)
    text = f"{type(model).__name__} has no normalization layer to convert; it is made to do without"
    for to in TARGETS:
        with pytest.raises(ValueError, match=text):
            normzoo.convert_norms(model, to)
