"""A plain batch norm is one of torch's, and behaves as torch's does under what tools set; the others are none."""

from __future__ import annotations

import copy
import importlib
import pickle

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from norm_cases import CHANNELS, IMAGE, sample
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.testing import assert_close

import normzoo
from normzoo.layers import BatchNorm

NOT_PLAIN = [{"sync": True}, {"channel_dim": -1}, {"act_layer": nn.ReLU}]


@pytest.mark.parametrize(
    "make", [BatchNorm, normzoo.get_norm("batchnorm2d"), lambda c, **o: type(BatchNorm(1))(c, **o)]
)
def test_a_layer_is_torchs_if_it_is_plain(make):
    for options in ({}, {"affine": False, "eps": 1e-3}, {"momentum": None, "device": "meta", "dtype": torch.float64}):
        layer = make(4, **options)
        assert isinstance(layer, _BatchNorm)
        assert isinstance(layer, BatchNorm)
    for options in NOT_PLAIN:
        layer = make(4, **options)
        assert not isinstance(layer, _BatchNorm)
        assert isinstance(layer, BatchNorm)


@pytest.mark.parametrize(
    ("name", "value", "plain"), [("sync", True, False), ("channel_dim", -1, 1), ("act", nn.ReLU(), None)]
)
def test_its_class_follows_its_attributes(name, value, plain):
    layer = BatchNorm(4)
    for _ in range(2):
        setattr(layer, name, value)
        assert type(layer) is BatchNorm
        setattr(layer, name, plain)
        assert isinstance(layer, _BatchNorm)


def test_a_plain_layer_goes_by_the_name_of_its_public_class():
    layer = BatchNorm(4)
    assert repr(layer) == "BatchNorm(4, eps=1e-05, affine=True, momentum=0.1)"
    assert type(layer).__name__ == "BatchNorm"
    assert normzoo.registry.norm_name(type(layer)) == "batch"
    with pytest.raises(ValueError, match=r"^BatchNorm was made for 4 channels"):
        layer(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"^BatchNorm was made for 4 channels"):
        layer._check_input_dim(torch.ones(2, 3))


def test_subclasses_of_users_are_not_torchs():
    class Doubled(BatchNorm):
        def normalize(self, x):
            return 2 * super().normalize(x)

    layer = Doubled(4)
    layer.sync = True
    layer.sync = False
    assert type(layer) is Doubled
    assert not isinstance(layer, _BatchNorm)
    assert normzoo.registry.norm_name(Doubled) is None


@pytest.mark.parametrize("options", [{}, *NOT_PLAIN], ids=str)
@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_have_the_class_of_the_original(options, how):
    layer = BatchNorm(4, **options)
    assert type(how(layer)) is type(layer)
    layer.__class__ = BatchNorm  # as one pickled before plain layers had a class of their own
    assert isinstance(how(layer), _BatchNorm) == (not options)


def test_a_state_dict_without_a_count_loads_as_in_torch():
    state = nn.BatchNorm2d(4).state_dict()
    del state["num_batches_tracked"], state._metadata  # as before torch 0.4.1
    for layer in (nn.BatchNorm2d(4), BatchNorm(4)):
        layer.load_state_dict(dict(state))


OPERATIONS = {
    "train": lambda layer: layer.train(),
    "eval": lambda layer: layer.eval(),
    "freeze": lambda layer: setattr(layer, "track_running_stats", False),  # as Lightning's BaseFinetuning
    "average": lambda layer: setattr(layer, "momentum", None),  # as update_bn
    "reset": lambda layer: layer.reset_running_stats(),
    "renew": lambda layer: layer.reset_parameters(),
    "forget": torch.func.replace_all_batch_norm_modules_,
    "batch": None,
}


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(sorted(OPERATIONS)), max_size=12), st.booleans())
@example(["freeze", "reset"], True)
@example(["freeze", "renew"], True)
@example(["average", "batch", "reset", "batch", "batch"], True)
@example(["freeze", "batch", "eval", "batch", "forget"], False)
def test_under_what_tools_set_it_is_torchs_layer(operations, affine):
    generator = torch.Generator().manual_seed(0)
    ours = BatchNorm(3, affine=affine, dtype=torch.float64)
    theirs = nn.BatchNorm2d(3, affine=affine, dtype=torch.float64)
    for operation in ["batch", *operations, "batch", "eval", "batch"]:
        if (act := OPERATIONS[operation]) is not None:
            act(ours)
            act(theirs)
            continue
        x = torch.randn(4, 3, 2, 2, generator=generator, dtype=torch.float64) + 1
        assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-12, atol=1e-12)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


@pytest.mark.parametrize("options", NOT_PLAIN, ids=str)
def test_layers_that_are_not_plain_honour_it_too(options):
    layer = BatchNorm(3, **options)
    x = torch.randn(8, 3) + 1
    layer.track_running_stats = False
    layer(x)
    assert_close(layer.running_mean, torch.zeros(3))
    assert layer.num_batches_tracked == 0
    layer.running_mean = layer.running_var = None
    assert_close(layer.eval()(x), layer.train()(x))


def test_what_is_converted_to_batch_is_plain_where_the_site_allows():
    model = nn.Sequential(
        nn.BatchNorm2d(4), BatchNormAct2d(4), nn.SyncBatchNorm(4), nn.LayerNorm(4), nn.GroupNorm(2, 4)
    )
    normzoo.convert_norms(model, "batch")
    assert [isinstance(m, _BatchNorm) for m in model] == [True, False, False, False, True]
    report = normzoo.convert_norms(model, "group", options={"groups": 2})
    assert [site.old for site in report.changed] == ["BatchNorm (batch)"] * 5


@pytest.mark.parametrize("kept", [True, False])
def test_a_batch_norm_that_tracks_nothing_is_converted_to_one(kept):
    original = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=kept), nn.InstanceNorm2d(4))
    original[1].track_running_stats = False  # Lightning's finetuning leaves the buffers
    model = copy.deepcopy(original)
    report = normzoo.convert_norms(model, "batch", exclude="2")
    assert repr(model[1]) == "BatchNorm(4, eps=1e-05, affine=True, momentum=0.1, track_running_stats=False)"
    assert report.changed[1].created == report.changed[1].dropped == report.changed[1].warnings == []
    x = torch.randn(4, 4, 3, 3) + 1
    for training in (True, False, True):
        assert_close(model.train(training)(x), original.train(training)(x))
    assert_close(model.state_dict(), original.state_dict())
    normzoo.convert_norms(original, "batch")
    assert original[2].track_running_stats  # an instance norm without statistics becomes a batch norm with some


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_what_lightning_leaves_of_synchronized_layers_is_a_batch_norm(package):
    plugin = importlib.import_module(f"{package}.plugins.layer_sync").TorchSyncBatchNorm()
    model = plugin.revert(plugin.apply(nn.Sequential(nn.Conv2d(3, 4, 1), BatchNorm(4))))
    report = normzoo.convert_norms(model, "batch")
    assert [site.old for site in report.changed] == ["_BatchNormXd (batch)"]
    assert isinstance(model[1], BatchNorm)


@pytest.mark.parametrize("to", normzoo.list_norms())
def test_a_conversion_says_what_tools_will_pass_over(to):
    for act in (nn.Identity, nn.ReLU):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), BatchNormAct2d(4, act_layer=act), nn.InstanceNorm2d(4))
        options = {"groups": 2} if isinstance(normzoo.norm_info(to).options.get("groups"), int) else None
        report = normzoo.convert_norms(model, to, options=options)
        lost = normzoo.norm_info(to).batch_statistics and not isinstance(model[1], _BatchNorm)
        assert [f"pass {type(model[1]).__name__} over; use" in warning for warning in report.warnings] == [True] * lost
    model = nn.Sequential(nn.InstanceNorm2d(4))
    assert normzoo.convert_norms(model, to, options=options).warnings == []  # tools did nothing to the original


@pytest.mark.parametrize("batches", [1, 3, 7, 40])
def test_a_cumulative_average_in_double_precision_is_that_of_torch(batches):
    layer = normzoo.create_norm("batch", CHANNELS, momentum=None, dtype=torch.float64)
    theirs = nn.BatchNorm2d(CHANNELS, momentum=None, dtype=torch.float64)
    for i in range(batches):
        x = sample(IMAGE, seed=i)
        layer(x), theirs(x)
    assert_close(layer.running_mean, theirs.running_mean, rtol=0, atol=1e-15)
    assert_close(layer.running_var, theirs.running_var, rtol=1e-15, atol=1e-15)
