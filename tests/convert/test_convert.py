"""convert_norms: what is found, what is carried, and that an error changes nothing."""

from __future__ import annotations

import copy
import json
import pickle
import socket

import lightning.pytorch.plugins.layer_sync as lightning_sync
import pytest
import pytorch_lightning.plugins.layer_sync as pytorch_lightning_sync
import timm
import timm.layers as tl
import torch
import torch.distributed as dist
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from timm.layers.inplace_abn import InplaceAbn
from timm.models.mlp_mixer import Affine
from torch import nn
from torch.testing import assert_close

import normzoo
from normzoo.convert._kinds import kind_of, read
from normzoo.convert._replace import largest_divisor
from normzoo.convert._sites import find_sites
from normzoo.recognition import KINDS, qualified

C = 8
IMAGE, SEQUENCE, TOKENS = (4, C, 5, 5), (4, C, 7), (4, 5, C)


def of(cls, **options):
    return lambda: cls(C, **options)


# {class: (how it is made, an input's shape)}
MADE = {
    nn.BatchNorm1d: (of(nn.BatchNorm1d), SEQUENCE),
    nn.BatchNorm2d: (of(nn.BatchNorm2d), IMAGE),
    nn.BatchNorm3d: (of(nn.BatchNorm3d), (2, C, 3, 3, 3)),
    nn.SyncBatchNorm: (of(nn.SyncBatchNorm), None),
    lightning_sync._BatchNormXd: (of(lightning_sync._BatchNormXd), IMAGE),
    pytorch_lightning_sync._BatchNormXd: (of(pytorch_lightning_sync._BatchNormXd), SEQUENCE),
    nn.InstanceNorm1d: (of(nn.InstanceNorm1d, affine=True), SEQUENCE),
    nn.InstanceNorm2d: (of(nn.InstanceNorm2d), IMAGE),
    nn.InstanceNorm3d: (of(nn.InstanceNorm3d), (2, C, 3, 3, 3)),
    nn.GroupNorm: (lambda: nn.GroupNorm(4, C), IMAGE),
    nn.LayerNorm: (of(nn.LayerNorm), TOKENS),
    nn.RMSNorm: (of(nn.RMSNorm), TOKENS),
    torchvision.ops.misc.FrozenBatchNorm2d: (of(torchvision.ops.misc.FrozenBatchNorm2d), IMAGE),
    torchvision.models.convnext.LayerNorm2d: (of(torchvision.models.convnext.LayerNorm2d), IMAGE),
    tl.norm_act.BatchNormAct2d: (of(tl.norm_act.BatchNormAct2d), IMAGE),
    tl.norm_act.SyncBatchNormAct: (of(tl.norm_act.SyncBatchNormAct), None),
    tl.norm_act.FrozenBatchNormAct2d: (of(tl.norm_act.FrozenBatchNormAct2d), IMAGE),
    tl.split_batchnorm.SplitBatchNorm2d: (of(tl.split_batchnorm.SplitBatchNorm2d), IMAGE),
    InplaceAbn: (of(InplaceAbn), None),
    tl.norm.GroupNorm: (of(tl.norm.GroupNorm, num_groups=4), IMAGE),
    tl.norm.GroupNorm1: (of(tl.norm.GroupNorm1), IMAGE),
    tl.norm_act.GroupNormAct: (of(tl.norm_act.GroupNormAct, num_groups=4), IMAGE),
    tl.norm_act.GroupNorm1Act: (of(tl.norm_act.GroupNorm1Act), IMAGE),
    **{getattr(tl.norm, n): (of(getattr(tl.norm, n)), TOKENS) for n in ("LayerNorm", "LayerNormFp32")},
    **{getattr(tl.norm_act, n): (of(getattr(tl.norm_act, n)), TOKENS) for n in ("LayerNormAct", "LayerNormActFp32")},
    **{
        getattr(tl.norm, n): (of(getattr(tl.norm, n)), IMAGE)
        for n in ("LayerNorm2d", "LayerNorm2dFp32", "LayerNormExp2d", "RmsNorm2d", "RmsNorm2dFp32")
    },
    **{
        getattr(tl.norm_act, n): (of(getattr(tl.norm_act, n)), IMAGE)
        for n in ("LayerNormAct2d", "LayerNormAct2dFp32", "RmsNormAct2d", "RmsNormAct2dFp32")
    },
    **{getattr(tl.norm, n): (of(getattr(tl.norm, n)), TOKENS) for n in ("RmsNorm", "RmsNormFp32")},
    **{getattr(tl.norm_act, n): (of(getattr(tl.norm_act, n)), TOKENS) for n in ("RmsNormAct", "RmsNormActFp32")},
    **{getattr(tl.norm, n): (of(getattr(tl.norm, n)), TOKENS) for n in ("SimpleNorm", "SimpleNormFp32")},
    **{getattr(tl.norm, n): (of(getattr(tl.norm, n)), IMAGE) for n in ("SimpleNorm2d", "SimpleNorm2dFp32")},
    **{
        getattr(tl.evo_norm, f"EvoNorm2d{n}"): (of(getattr(tl.evo_norm, f"EvoNorm2d{n}")), IMAGE)
        for n in ("B0", "B1", "B2")
    },
    **{
        getattr(tl.evo_norm, f"EvoNorm2d{n}"): (of(getattr(tl.evo_norm, f"EvoNorm2d{n}"), groups=4), IMAGE)
        for n in ("S0", "S0a", "S1", "S1a", "S2", "S2a")
    },
    tl.filter_response_norm.FilterResponseNormTlu2d: (of(tl.filter_response_norm.FilterResponseNormTlu2d), IMAGE),
    tl.filter_response_norm.FilterResponseNormAct2d: (of(tl.filter_response_norm.FilterResponseNormAct2d), IMAGE),
    Affine: (of(Affine), TOKENS),
}


def test_every_known_class_is_among_the_cases():
    assert {qualified(cls) for cls in MADE} == {name for name in KINDS if ".Lazy" not in name}


@pytest.mark.parametrize("to", ["batch", "group", "none", "rms", "evonorm_s0", "filter_response"])
@pytest.mark.parametrize("cls", MADE, ids=lambda c: qualified(c).removeprefix("torch.nn.modules."))
def test_every_class_converts(cls, to):
    made, shape = MADE[cls]
    layer = randomized(made())
    model = nn.Sequential(layer)
    report = normzoo.convert_norms(model, to, options={"groups": 4} if to in ("group", "evonorm_s0") else None)
    assert len(report) == 1
    assert kind_of(model[0]).name == to
    for name in report.changed[0].carried:
        if cls is InplaceAbn and name == "weight":
            assert_close(model[0].weight, layer.weight.abs() + layer.eps)
            continue
        assert getattr(model[0], name).data_ptr() == read(layer).tensors[name].data_ptr()
    if shape is None:
        shape = IMAGE
    model(torch.randn(shape, requires_grad=True)).sum().backward()


def randomized(layer):
    """Parameters and running statistics that are not those of a fresh layer."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return layer


# The zoo's layer that computes what another package's computes.
SAME = {cls: name for cls, name in ((c, KINDS[qualified(c)].name) for c in MADE) if name in normzoo.list_norms()}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("cls", SAME, ids=lambda c: qualified(c).removeprefix("torch.nn.modules."))
def test_the_same_kind_computes_the_same(cls, training):
    made, shape = MADE[cls]
    if shape is None or cls in (tl.evo_norm.EvoNorm2dB1, tl.evo_norm.EvoNorm2dB2):
        pytest.skip("it needs several processes or a package, or is another formula of the family")
    if "EvoNorm2dS" in cls.__name__ and cls is not tl.evo_norm.EvoNorm2dS0:
        pytest.skip("another formula of the family")
    layer = randomized(made()).train(training)
    twin = nn.Sequential(copy.deepcopy(layer))
    normzoo.convert_norms(twin, SAME[cls])
    for seed in range(2):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        assert_close(twin(x.clone()), layer(x.clone()), rtol=2e-5, atol=2e-5)


class Net(nn.Module):
    """Norms in all kinds of places, one of them shared."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, C, 3, padding=1, bias=False), nn.BatchNorm2d(C))
        self.blocks = nn.ModuleList([nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)])
        self.named = nn.ModuleDict({"n": nn.BatchNorm2d(C)})
        self.shared = self.named["n"]
        self.head = nn.Linear(C, 4)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = self.shared(x.relu())
        return self.head(self.named["n"](x).relu().mean((2, 3)))


def test_norms_are_found_wherever_they_are_and_shared_ones_once():
    model = Net()
    report = normzoo.convert_norms(model, "group", options={"groups": 2})
    assert [s.name for s in report.changed] == ["stem.1", "blocks.1", "named.n"]
    assert model.shared is model.named["n"]
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    model(torch.randn(2, 3, 6, 6)).sum().backward()


def test_conversion_and_back_is_exact():
    torch.manual_seed(0)
    model, x = Net(), torch.randn(4, 3, 6, 6)
    model(x)
    twin, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    normzoo.convert_norms(model, "batch_renorm")
    normzoo.convert_norms(model, "batch")
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for training in (False, True):
        assert_close(model.train(training)(x), twin.train(training)(x), rtol=1e-6, atol=1e-6)
    assert_close(dict(model.state_dict()), dict(twin.state_dict()))


def test_an_optimizer_made_before_goes_on():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    normzoo.convert_norms(model, "group", options={"groups": 2})
    before = model.stem[1].weight.detach().clone()
    model(torch.randn(2, 3, 6, 6)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.stem[1].weight, before)


@pytest.mark.parametrize("chosen", [{"include": "stem.*"}, {"exclude": ["blocks.*", "named.*"]}])
def test_names_choose(chosen):
    model = Net()
    assert [s.name for s in normzoo.convert_norms(model, "rms", **chosen).changed] == ["stem.1"]
    assert isinstance(model.blocks[1], nn.BatchNorm2d)


def test_types_and_predicates_choose():
    model = nn.Sequential(nn.BatchNorm2d(C), nn.GroupNorm(2, C), nn.LayerNorm(C))
    assert len(find_sites(model, include=nn.GroupNorm)) == 1
    assert len(find_sites(model, include=[nn.GroupNorm, nn.LayerNorm], exclude="2")) == 1
    assert len(find_sites(model, include=lambda name, m: name == "0")) == 1
    with pytest.raises(TypeError, match=r"take name patterns, types and predicates, not 3"):
        find_sites(model, include=[3])
    with pytest.raises(ValueError, match=r"; 3 there are, none chosen by include and exclude"):
        find_sites(model, exclude="*")
    for chosen in ({"include": ["1", "layer*"]}, {"exclude": "layer*"}):
        with pytest.raises(ValueError, match=r"no normalization layer's name matches 'layer\*'"):
            find_sites(model, **chosen)
    with pytest.raises(TypeError, match=r"the model must be a torch.nn.Module, not dict"):
        find_sites({})


@given(channels=st.integers(1, 300), wish=st.integers(-3, 400))
def test_groups_always_divide(channels, wish):
    divisors = [d for d in range(1, channels + 1) if channels % d == 0 and d <= max(wish, 1)]
    assert largest_divisor(channels, wish) == max(divisors)


def test_options_may_be_functions_of_the_channels():
    model = nn.Sequential(nn.BatchNorm2d(24), nn.BatchNorm2d(40))
    normzoo.convert_norms(model, "group", options={"groups": lambda c: c // 4, "eps": 1e-3})
    assert [m.groups for m in model] == [6, 10]
    assert model[0].eps == 1e-3
    normzoo.convert_norms(model, {"name": "group", "groups": 16})
    assert [m.groups for m in model] == [12, 10]
    normzoo.convert_norms(model, "group", options={"channels_per_group": 4})
    assert [m.groups for m in model] == [6, 10]
    fresh = nn.Sequential(nn.BatchNorm2d(24))
    normzoo.convert_norms(fresh, "group")
    assert fresh[0].groups == 1
    fresh = nn.Sequential(nn.BatchNorm2d(96), nn.BatchNorm2d(1024), nn.GroupNorm(8, 24))
    normzoo.convert_norms(fresh, "group")
    assert [m.groups for m in fresh] == [6, 32, 8]


def test_groups_are_the_layers_own_where_none_are_asked_for():
    model = nn.Sequential(nn.BatchNorm2d(48))
    for name, groups in (("group", 3), ("proxy", 1), ("power", None), ("iter_norm", 1)):
        normzoo.convert_norms(model, name)
        assert getattr(model[0], "groups", None) == groups, name
        model = nn.Sequential(nn.BatchNorm2d(48))
    for wrong in (0, -3):
        with pytest.raises(ValueError, match=rf"groups={wrong} does not divide 48 channels"):
            normzoo.convert_norms(model, "group", options={"groups": wrong})
    with pytest.raises(ValueError, match=r"channels_per_group must be at least 1, not 0"):
        normzoo.convert_norms(model, "group", options={"channels_per_group": 0})


def test_an_activation_inside_the_formula():
    model = nn.Sequential(tl.norm_act.BatchNormAct2d(C, act_layer=nn.SiLU, inplace=False), nn.BatchNorm2d(C))
    silu = model[0].act
    normzoo.convert_norms(model, "proxy")
    assert model[0].inner is silu
    assert isinstance(model[1].inner, nn.Identity)
    assert model[0].act is None
    pickle.dumps(model)
    normzoo.convert_norms(model, "batch")
    assert model[0].act is silu
    assert model[1].act is None


def test_what_a_layer_had_not_the_new_one_has_not():
    model = nn.Sequential(nn.BatchNorm2d(C, affine=False), nn.LayerNorm(C, bias=False), tl.norm.RmsNorm(C))
    report = normzoo.convert_norms(model, "group", options={"groups": 2})
    assert [(m.weight is None, m.bias is None) for m in model] == [(True, True), (False, True), (False, True)]
    assert [s.carried for s in report.changed] == [[], ["weight"], ["weight"]]
    x = torch.randn(TOKENS)
    model[1](x).sum().backward()


def test_none_always_has_a_bias():
    model = nn.Sequential(nn.BatchNorm2d(C, affine=False), tl.norm.RmsNorm2d(C))
    report = normzoo.convert_norms(model, "none")
    assert all(m.bias is not None for m in model)
    assert [s.created for s in report.changed] == [["bias"], ["bias"]]


def test_frozen_parameters_modes_and_hooks_stay():
    model = nn.Sequential(nn.BatchNorm2d(C), nn.BatchNorm2d(C)).eval()
    model[0].train()
    model[0].weight.requires_grad_(False)
    model[1].requires_grad_(False)
    seen = []
    model[0].register_forward_hook(lambda m, i, o: seen.append(type(m).__name__))
    normzoo.convert_norms(model, "dynamic_tanh")
    assert [m.training for m in model] == [True, False]
    assert [p.requires_grad for p in model[0].parameters()] == [False, True, True]
    assert not any(p.requires_grad for p in model[1].parameters())
    model(torch.randn(IMAGE))
    assert seen == ["DynamicTanh"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_stays(dtype):
    model = nn.Sequential(nn.Conv2d(3, C, 3), nn.BatchNorm2d(C)).to(dtype)
    normzoo.convert_norms(model, "dynamic_tanh")
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model(torch.randn(2, 3, 5, 5, dtype=dtype)).dtype == dtype


def test_meta_device():
    with torch.device("meta"):
        model = timm.create_model("resnet18")
    normzoo.convert_norms(model, "iter_norm")
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}


def test_activation_and_dropout_of_fused_layers_stay():
    act = tl.norm_act.BatchNormAct2d(C, act_layer=nn.PReLU, inplace=False, act_kwargs={"num_parameters": C})
    drop = tl.norm_act.BatchNormAct2d(C, act_layer=nn.ReLU, drop_layer=lambda: nn.Dropout(0.5))
    off = tl.norm_act.BatchNormAct2d(C, apply_act=False)
    model = nn.Sequential(act, drop, off)
    prelu, dropout = act.act, drop.drop
    normzoo.convert_norms(model, "batch")
    assert model[0].act is prelu
    assert model[1].act[0] is dropout
    assert isinstance(model[1].act[1], nn.ReLU)
    assert model[2].act is None
    x = torch.randn(IMAGE)
    assert_close(model[0](x), act(x))
    assert (model[1](x) >= 0).all()


def test_norms_with_an_activation_of_their_own():
    fused, plain = tl.norm_act.BatchNormAct2d(C), nn.BatchNorm2d(C)
    model = nn.Sequential(fused, plain)
    report = normzoo.convert_norms(model, "evonorm_s0", options={"groups": 4})
    assert [m.v is not None for m in model] == [True, False]
    assert report.changed[0].warnings == ["the activation is now evonorm_s0's own"]
    report = normzoo.convert_norms(model, "group", options={"groups": 4})
    assert [type(m.act) for m in model] == [nn.SiLU, type(None)]
    assert report.changed[0].warnings == ["evonorm_s0's own activation became SiLU"]
    normzoo.convert_norms(model, "group", options={"act_layer": nn.GELU})
    assert [type(m.act) for m in model] == [nn.GELU, nn.GELU]


def test_aliases_are_what_they_stand_for():
    alias = next(a for a in normzoo.norm_info("none").aliases)
    model = nn.Sequential(nn.Conv2d(3, C, 1), nn.BatchNorm2d(C, affine=False)).eval()
    normzoo.convert_norms(model, alias, fold=True)
    assert model[1].bias is not None
    tokens = nn.Sequential(nn.LayerNorm(C))
    assert normzoo.convert_norms(tokens, "groupnorm", options={"groups": 2}).changed[0].warnings
    with pytest.raises(ValueError, match=r"fold=True goes with to='none', .* not with 'none\+ws'"):
        normzoo.convert_norms(model, "none+ws", fold=True)
    with pytest.raises(ValueError, match=r"example is what fold=True runs the model with"):
        normzoo.convert_norms(model, "batch", example=torch.randn(2, 3, 4, 4))


def test_a_factory_may_be_given():
    model = nn.Sequential(nn.BatchNorm2d(C), tl.norm_act.BatchNormAct2d(C))
    weight = model[0].weight
    report = normzoo.convert_norms(model, lambda c: nn.GroupNorm(2, c))
    assert isinstance(model[0], nn.GroupNorm)
    assert model[0].weight is weight
    assert isinstance(model[1].norm, nn.GroupNorm)
    assert isinstance(model[1].act, nn.ReLU)
    assert len(report) == 2
    partial = normzoo.get_norm("group", groups=4)
    normzoo.convert_norms(model, partial)
    assert model[0].groups == 4


def test_weight_standardization_beside_a_norm():
    model = Net()
    report = normzoo.convert_norms(model, "group+ws", options={"groups": 2})
    assert report.to == "group+ws"
    assert type(model.stem[0]).__name__ == "StandardizedConv2d"


def test_compiled_models_are_converted_and_compiled_anew():
    torch.manual_seed(0)
    model = Net()
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(2, 3, 6, 6)
    before = compiled(x)
    normzoo.convert_norms(compiled, "group", options={"groups": 2})
    assert isinstance(model.stem[1], type(normzoo.create_norm("group", 8, groups=2)))
    after = compiled(x)
    assert not torch.allclose(before, after)
    assert_close(after, model(x))


class Fails(nn.LayerNorm):
    def forward(self, x):
        raise ValueError("planted")


@pytest.mark.parametrize("activation", ["relu", "gelu", nn.GELU()])
def test_the_encoder_layer_of_torch_is_kept_from_its_fast_path(activation):
    layer = nn.TransformerEncoderLayer(C, 2, 16, batch_first=True, activation=activation).eval()
    before, x = layer.activation_relu_or_gelu, torch.randn(2, 5, C)
    with pytest.raises(ValueError, match="planted"):
        normzoo.convert_norms(nn.Sequential(layer), Fails, calibrate=x)
    assert layer.activation_relu_or_gelu == before > 0
    normzoo.convert_norms(nn.Sequential(layer), "dynamic_tanh")
    with torch.no_grad():
        fast = layer(x)
    assert_close(fast, layer(x))


def test_wrapped_models_are_refused():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match=r"wrapped in DistributedDataParallel, .*: convert first, then wrap"):
            normzoo.convert_norms(nn.parallel.DistributedDataParallel(Net()), "group")
    finally:
        dist.destroy_process_group()
    with pytest.raises(ValueError, match=r"wrapped in DataParallel"):
        normzoo.convert_norms(nn.Sequential(nn.DataParallel(Net())), "group")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripts_are_refused():
    with pytest.raises(ValueError, match=r"a ScriptModule cannot be changed"):
        normzoo.convert_norms(torch.jit.script(nn.Sequential(nn.BatchNorm2d(C))), "group")


class OwnForward(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x).abs()


class OwnNormalize(normzoo.layers.GroupNorm):
    def normalize(self, x):
        return super().normalize(x) + 1


class Renamed(normzoo.layers.BatchNorm):
    pass


def test_subclasses_of_the_zoo():
    model = nn.Sequential(Renamed(C), nn.BatchNorm2d(C))
    assert len(normzoo.convert_norms(model, "group")) == 2
    with pytest.raises(ValueError, match=r"its class OwnNormalize has a forward of its own"):
        normzoo.convert_norms(nn.Sequential(OwnNormalize(C, groups=2)), "batch")


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_what_cannot_be_read_is_said():
    lazy = nn.Sequential(nn.Conv2d(3, C, 3), nn.LazyBatchNorm2d())
    with pytest.raises(ValueError, match=r"1: it does not know its channels yet; run the model on one batch first"):
        normzoo.convert_norms(lazy, "group")
    lazy(torch.randn(2, 3, 5, 5))
    assert len(normzoo.convert_norms(lazy, "group")) == 1
    with pytest.raises(ValueError, match=r"its class OwnForward has a forward of its own"):
        normzoo.convert_norms(nn.Sequential(OwnForward(C)), "group")
    with pytest.raises(ValueError, match=r"it normalizes over 2 dimensions, \(8, 8\), and not over channels"):
        normzoo.convert_norms(nn.Sequential(nn.LayerNorm((8, 8))), "group")
    with pytest.raises(ValueError, match=r"it is the model itself"):
        normzoo.convert_norms(nn.BatchNorm2d(C), "group")
    mixed = nn.Sequential(OwnForward(C), nn.LayerNorm(C))
    assert len(normzoo.convert_norms(mixed, "rms", exclude=OwnForward)) == 1


def test_nothing_to_convert_says_what_was_looked_for():
    with pytest.raises(
        ValueError, match=r"Linear has no normalization layer to convert. Looked for: torch's BatchNorm"
    ):
        normzoo.convert_norms(nn.Linear(3, 3), "group")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("gruop",), normzoo._errors.UnknownNameError, r"did you mean 'group'"),
        (("group", {"grups": 3}), TypeError, r"norm 'group' has no option 'grups'; did you mean 'groups'\?"),
        (("batch_renorm", {"eps": 0}), ValueError, r"stem.1 \(8 channels\) cannot become batch_renorm: "),
        (({"groups": 3},), ValueError, r"a norm with options needs its name"),
        ((3,), TypeError, r"to must be a name, a mapping with a name or a factory, not int"),
        ((nn.ReLU(),), TypeError, r"not ReLU, a layer: give what makes one"),
        ((lambda c: nn.GroupNorm(1, c + 1),), ValueError, r"its weight has 9 values, not one for each channel"),
        (("group", {"groups": 2, "channels_per_group": 4}), ValueError, r"give groups or channels_per_group, not both"),
    ],
)
def test_mistakes_are_told_before_anything_changes(arguments, error, message):
    model = Net()
    before = dict(model.named_modules())
    to, options = (*arguments, None)[:2]
    with pytest.raises(error, match=message):
        normzoo.convert_norms(model, to, options=options)
    assert dict(model.named_modules()) == before


class Odd(nn.Conv2d):
    pass


def test_an_error_late_in_the_conversion_changes_nothing():
    model = Net()
    modules, values = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    made = []

    def third_fails(channels):
        made.append(channels)
        if len(made) == 3:
            raise ValueError("no more")
        return nn.GroupNorm(2, channels)

    with pytest.raises(ValueError, match=r"named.n \(8 channels\) cannot become third_fails: no more"):
        normzoo.convert_norms(model, third_fails)
    model.blocks[0].__class__ = Odd
    with pytest.raises(ValueError, match=r"the convolution 'blocks.0' is a Odd"):
        normzoo.convert_norms(model, "group+ws", options={"groups": 2})
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())


def test_the_report_is_plain_data_and_a_table():
    model = nn.Sequential(tl.norm_act.BatchNormAct2d(C), nn.BatchNorm2d(C))
    report = normzoo.convert_norms(model, "evonorm_b0")
    data = json.loads(json.dumps(report.to_dict()))
    assert data["to"] == "evonorm_b0"
    assert data["changed"][0]["carried"] == ["weight", "bias", "running_var", "num_batches_tracked"]
    assert data["changed"][0]["created"] == ["v"]
    assert data["changed"][0]["dropped"] == ["running_mean"]
    text = str(report)
    assert "2 norm layers converted to evonorm_b0" in text
    assert "warning: 0: the activation is now evonorm_b0's own" in text


def test_converted_models_copy_pickle_and_load():
    model = timm.create_model("efficientnet_b0", num_classes=4).eval()
    normzoo.convert_norms(model, "batch_renorm")
    again = timm.create_model("efficientnet_b0", num_classes=4).eval()
    normzoo.convert_norms(again, "batch_renorm")
    again.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 64, 64)
    for other in (again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close(other(x), model(x))


def test_what_looks_at_other_tokens_is_warned_of():
    model = nn.Sequential(nn.LayerNorm(C), nn.BatchNorm2d(C))
    report = normzoo.convert_norms(model, "layer")
    assert [len(s.warnings) for s in report.changed] == [1, 0]
    assert "in causal models use layer_channel or rms" in report.changed[0].warnings[0]


def test_tokens_and_maps_keep_their_channel():
    vit = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, num_classes=4)
    normzoo.convert_norms(vit, "rms")
    assert {m.channel_dim for m in vit.modules() if hasattr(m, "channel_dim")} == {-1}
    conv = timm.create_model("convnext_atto", num_classes=4)
    normzoo.convert_norms(conv, "dynamic_tanh")
    assert {m.channel_dim for m in conv.modules() if hasattr(m, "channel_dim")} >= {1}
    for model in (vit, conv):
        assert model(torch.randn(2, 3, 32, 32)).isfinite().all()


@pytest.mark.parametrize("name", normzoo.list_norms())
def test_every_norm_of_the_zoo_is_a_target_and_a_source(name):
    torch.manual_seed(0)
    model, x = Net(), torch.randn(4, 3, 6, 6)
    options = {"groups": 2} if "groups" in normzoo.norm_info(name).options else None
    normzoo.convert_norms(model, name, options=options)
    assert {kind_of(m).name for m in model.modules() if kind_of(m)} == {name}
    model(x).sum().backward()
    weight = model.stem[1].weight
    normzoo.convert_norms(model, "batch")
    assert weight is None or model.stem[1].weight.data_ptr() == weight.data_ptr()
    model(x).sum().backward()


@pytest.mark.parametrize("name", normzoo.list_norms())
def test_every_norm_takes_weight_without_bias(name):
    if "affine" not in normzoo.norm_info(name).options:
        pytest.skip("it has nothing to learn")
    model = nn.Sequential(nn.Conv2d(3, C, 1), nn.BatchNorm2d(C))
    model[1].bias = None
    options = {"groups": 2} if "groups" in normzoo.norm_info(name).options else None
    normzoo.convert_norms(model, name, options=options)
    for training in (True, False):
        model.train(training)(torch.randn(4, 3, 6, 6)).sum().backward()
