"""The CIFAR ResNets against He et al. 2016, and timm models with any norm of the zoo."""

from __future__ import annotations

import copy
import itertools
import re

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from sweeps import few
from torch import nn
from torch.testing import assert_close

import normzoo
from normzoo.layers._base import NormLayer
from normzoo.models import CifarResNet, PadShortcut
from normzoo.registry import layer_name

GROUP8 = {"name": "group", "groups": 8}
# The default of 32 groups does not divide the channels of CIFAR's networks
NORMS = [
    {"name": name, "groups": 8} if normzoo.norm_info(name).options.get("groups") == 32 else name
    for name in normzoo.list_norms()
]
# One of each kind: statistics, groups, an activation of its own, no parameter. The others are slow in large models.
FEW = ("batch_renorm", "group", "evonorm_s0", "none")
NORMS_OF_LARGE_MODELS = [
    pytest.param(norm, id=name, marks=[] if name in FEW else [pytest.mark.slow])
    for name, norm in zip(normzoo.list_norms(), NORMS, strict=True)
]
PAPER = {20: "0.27", 32: "0.46", 44: "0.66", 56: "0.85", 110: "1.7"}  # million parameters, table 6


def images(count: int = 2, size: int = 32, channels: int = 3) -> torch.Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(0))


def norms(model: nn.Module) -> list[nn.Module]:
    """Everything in a model that normalizes, ours or not."""
    return [
        m for m in model.modules() if isinstance(m, NormLayer) or re.search("norm", type(m).__name__, re.IGNORECASE)
    ]


def converted(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, NormLayer)]


def converted_from(model: nn.Module) -> list[nn.Module]:
    """Norm layers of torch and of timm, found by what they inherit; not those of the zoo."""
    torchs = nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.LayerNorm | nn.RMSNorm
    return [m for m in model.modules() if isinstance(m, torchs) and not isinstance(m, NormLayer)]


def counted(depth: int, classes: int = 10) -> int:
    """Parameters of the paper's network: 3x3 convolutions, a scale and a shift after each, one linear layer."""
    widths, n = [16], (depth - 2) // 6
    for width in (16, 32, 64):
        widths += [width] * (2 * n)
    convolutions = 9 * 3 * 16 + sum(9 * a * b for a, b in itertools.pairwise(widths))
    return convolutions + 2 * sum(widths) + 64 * classes + classes


@pytest.mark.parametrize(("depth", "millions"), PAPER.items())
def test_sizes_are_the_papers(depth, millions):
    model = timm.create_model(f"resnet{depth}_cifar")
    size = sum(p.numel() for p in model.parameters())
    assert f"{size / 1e6:.{len(millions) - 2}f}" == millions
    assert size == counted(depth)
    weighted = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(weighted) == depth
    assert len(norms(model)) == depth - 1


def test_shapes_and_classifier():
    model = timm.create_model("resnet20_cifar").eval()
    x = images()
    assert model.forward_features(x).shape == (2, 64, 8, 8)
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, 64)
    assert_close(model(x), model.fc(model.forward_features(x).mean((2, 3))))
    assert (model(x).shape, model.get_classifier()) == ((2, 10), model.fc)
    for count in (0, 7):
        model.reset_classifier(count)
        assert (model(x).shape, model.num_classes) == ((2, count or 64), count)
    assert isinstance(model.get_classifier(), nn.Linear)
    model.double().reset_classifier(5)
    assert model(x.double()).dtype == torch.float64
    other = normzoo.create_model("resnet20_cifar", "batch", num_classes=3, in_chans=1)
    assert other(images(channels=1)).shape == (2, 3)
    assert timm.create_model("resnet20_cifar", num_classes=0).eval()(images(size=40)).shape == (2, 64)


def test_features_are_dropped_before_the_classifier_in_training_alone():
    torch.manual_seed(0)
    model = timm.create_model("resnet20_cifar", drop_rate=0.5)
    features = torch.rand(64, 64, 2, 2) + 0.5
    pooled = features.mean((2, 3))
    assert_close(model.eval().forward_head(features, pre_logits=True), pooled)
    trained = model.train().forward_head(features, pre_logits=True)
    kept = trained != 0
    assert 0.4 < kept.float().mean() < 0.6
    assert_close(trained[kept], 2 * pooled[kept])


def test_configuration_is_cifars():
    cfg = timm.create_model("resnet20_cifar").pretrained_cfg
    assert (cfg["input_size"], cfg["num_classes"], cfg["pool_size"]) == ((3, 32, 32), 10, (8, 8))
    assert (cfg["first_conv"], cfg["classifier"]) == ("conv1", "fc")
    assert {f"resnet{d}_cifar" for d in PAPER} <= set(timm.list_models("*_cifar"))


def test_start_is_he_initialization_with_all_norms_at_one():
    torch.manual_seed(0)
    for module in timm.create_model("resnet20_cifar").modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is None
            want = (2 / (9 * module.out_channels)) ** 0.5
            assert module.weight.std().item() == pytest.approx(want, rel=4 / (2 * module.weight.numel()) ** 0.5)
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()


@pytest.mark.parametrize(("size", "stride"), [(8, 2), (7, 2), (5, 1)])
def test_pad_shortcut_is_option_a(size, stride):
    """Every stride-th position, and zeros for the channels that are more."""
    x = images(2, size, 3).requires_grad_()
    y = PadShortcut(3, 5, stride)(x)
    positions = range(0, size, stride)
    assert y.shape == (2, 5, len(positions), len(positions))
    for c in range(5):
        for i, row in enumerate(positions):
            for j, column in enumerate(positions):
                assert torch.equal(y[:, c, i, j], x[:, c, row, column] if c < 3 else torch.zeros(2))
    assert list(PadShortcut(3, 5, stride).parameters()) == []
    y.sum().backward()
    assert x.grad.sum() == 2 * 3 * len(positions) ** 2


def test_block_adds_its_shortcut_before_the_last_activation():
    model = timm.create_model("resnet20_cifar").eval()
    for stage, stride in ((model.layer1, 1), (model.layer2, 2), (model.layer3, 2)):
        x = images(2, 8, stage[0].conv1.in_channels)
        nn.init.zeros_(stage[0].bn2.weight)  # leaves the shortcut alone
        extra = stage[0].conv2.out_channels - x.shape[1]
        want = F.relu(torch.cat([x[:, :, ::stride, ::stride], torch.zeros(2, extra, 8 // stride, 8 // stride)], 1))
        assert_close(stage[0](x), want)
        assert [b.downsample for b in stage[1:]] == [None] * (len(stage) - 1)


@pytest.mark.parametrize(("init", "gain"), [("kaiming", 2.0), ("xavier", 1.0)])
def test_convolutions_start_from_the_initialization_asked_for(init, gain):
    torch.manual_seed(0)
    weight = normzoo.create_model("resnet20_cifar", init=init).layer3[1].conv1.weight
    assert weight.var().item() == pytest.approx(gain / (9 * 64), rel=0.03)


def test_projection_shortcut_is_option_b():
    model = normzoo.create_model("resnet20_cifar", "instance", shortcut="projection")
    plain = timm.create_model("resnet20_cifar")
    more = (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters()) + more
    convolution, norm = model.layer2[0].downsample
    assert (convolution.kernel_size, convolution.stride, convolution.bias) == ((1, 1), (2, 2), None)
    assert isinstance(norm, normzoo.norm_info("instance").layer_class)
    assert model.layer1[0].downsample is None
    assert model(images()).shape == (2, 10)


def test_features_only():
    model = timm.create_model("resnet20_cifar", features_only=True).eval()
    shapes = [(2, 16, 32, 32), (2, 16, 32, 32), (2, 32, 16, 16), (2, 64, 8, 8)]
    assert [tuple(f.shape) for f in model(images())] == shapes
    assert model.feature_info.channels() == [16, 16, 32, 64]
    assert model.feature_info.reduction() == [1, 1, 2, 4]
    two = normzoo.create_model("resnet20_cifar", GROUP8, features_only=True, out_indices=(1, 3))
    assert [tuple(f.shape) for f in two(images())] == shapes[1::2]


@pytest.mark.parametrize("norm", NORMS, ids=normzoo.list_norms())
def test_every_norm_trains_a_step_in_a_cifar_resnet(norm):
    trains_a_step("resnet20_cifar", {}, 32, 19, norm)


@pytest.mark.parametrize("norm", NORMS_OF_LARGE_MODELS)
def test_every_norm_trains_a_step_in_a_timm_resnet(norm):
    trains_a_step("test_resnet", {"zero_init_last": False, "num_classes": 10}, 64, 15, norm)


def trains_a_step(arch, options, size, count, norm):
    torch.manual_seed(0)
    model = normzoo.create_model(arch, norm, **options)
    name = norm if isinstance(norm, str) else norm["name"]
    assert {layer_name(m) for m in norms(model)} == {name}
    assert len(norms(model)) == count
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = images(8, size), torch.arange(8)
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    still = {k for k, p in model.named_parameters() if torch.equal(p, before[k])}
    # A threshold of 0 does nothing where a ReLU follows at once
    assert {k for k in still if not k.endswith("tau")} == set()
    assert len(still) < len(norms(model))
    with torch.no_grad():
        assert model.eval()(x).isfinite().all()


def test_batch_of_the_zoo_equals_torchs_in_a_model():
    ours, theirs = normzoo.create_model("resnet20_cifar", "batch"), timm.create_model("resnet20_cifar")
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for _ in range(2):
        assert_close(ours(images(8)), theirs(images(8)))
    assert_close(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("norm", [GROUP8, "batch_renorm", "none"], ids=["group", "batch_renorm", "none"])
@pytest.mark.parametrize("name", ["resnet18", "seresnet18", "resnet18d", "resnext50_32x4d"])
def test_timm_resnets_take_any_norm(name, norm):
    device = "cpu" if name == "resnet18d" else "meta"
    options = {"num_classes": 3, "layers": (1, 1, 1, 1)}
    original = timm.create_model(name, device="meta", **options)
    model = normzoo.create_model(name, norm, device=device, **options)
    assert len(norms(model)) == len(norms(original)) > 10
    assert all(isinstance(m, NormLayer) for m in norms(model))
    with torch.no_grad():
        assert model.eval()(images(2, 64).to(device)).shape == (2, 3)


@pytest.mark.parametrize("norm", NORMS_OF_LARGE_MODELS)
@pytest.mark.parametrize("name", ["resnetv2_50", "vgg11_bn", "test_efficientnet", "test_convnext"])
def test_architectures_that_do_not_take_norm_layer_take_any_norm(name, norm):
    """Norms that the builder chooses, those fused with an activation, and those of the last channel."""
    options = {"device": "meta", **({"layers": (1, 1, 1, 1)} if name == "resnetv2_50" else {})}
    original = timm.create_model(name, **options)
    model = normzoo.create_model(name, norm, **options)
    assert len(converted(model)) == len(converted_from(original)) >= 8
    assert converted_from(model) == []


def test_transformers_take_norms_with_their_channel_found():
    ours, theirs = (make("vit_tiny_patch16_224") for make in (with_layer_channel, timm.create_model))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = images(1, 224)
    with torch.no_grad():
        assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-5)


def with_layer_channel(name: str) -> nn.Module:
    return normzoo.create_model(name, "layer_channel")


@pytest.mark.parametrize("norm", ["batch_renorm", *(pytest.param(n, marks=pytest.mark.slow) for n in ("group", "rms"))])
@pytest.mark.parametrize(
    "name",
    few(
        [
            "vit_tiny_patch16_224",
            "swin_tiny_patch4_window7_224",
            "swinv2_tiny_window8_256",
            "convnext_atto",
            "densenet121",
        ],
        "vit_tiny_patch16_224",
        "convnext_atto",
    ),
)
def test_channels_are_found_where_each_layer_has_them(name, norm):
    model = normzoo.create_model(name, norm, device="meta", num_classes=3)
    dims = {m.channel_dim for m in converted(model)}
    assert dims == {"vit": {-1}, "swi": {-1}, "den": {1}}.get(name[:3], {1, -1} & dims)
    assert model(torch.empty(2, *model.pretrained_cfg["input_size"], device="meta")).shape == (2, 3)


def test_weights_are_loaded_before_the_norms_are_changed(tmp_path):
    trained = timm.create_model("test_resnet")
    for tensor in trained.state_dict().values():
        if tensor.is_floating_point():
            torch.nn.init.uniform_(tensor, 0.5, 1.5)
    torch.save(trained.state_dict(), tmp_path / "trained.pth")
    source = {"file": str(tmp_path / "trained.pth")}
    model = normzoo.create_model("test_resnet", "batch_renorm", pretrained=True, pretrained_cfg_overlay=source)
    assert {type(m) for m in converted(model)} == {normzoo.norm_info("batch_renorm").layer_class}
    assert_close(dict(model.state_dict()), dict(trained.state_dict()), rtol=0, atol=0)
    grouped = normzoo.create_model("test_resnet", "group", pretrained=True, pretrained_cfg_overlay=source).state_dict()
    assert_close(dict(grouped), {k: v for k, v in trained.state_dict().items() if k in grouped}, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["test_resnet", "resnet20_cifar", "test_efficientnet"])
def test_the_seed_gives_the_same_start_whatever_the_norm(name):
    torch.manual_seed(0)
    original = timm.create_model(name).state_dict()
    for norm in ("group", "switchable", "none", None):
        torch.manual_seed(0)
        state = normzoo.create_model(name, norm).state_dict()
        shared = {k: v for k, v in state.items() if k in original}
        assert len(shared) > len(original) // 4
        assert_close(shared, {k: original[k] for k in shared}, rtol=0, atol=0)


def test_scales_that_start_at_zero_start_there_still():
    model = normzoo.create_model("test_resnet", GROUP8)
    assert [stage[0].bn2.weight.abs().sum() for stage in (model.layer1, model.layer2)] == [0, 0]
    assert (model.layer1[0].bn1.weight == 1).all()


@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny", "swin_t", "mobilenet_v3_small"])
def test_models_of_torchvision_are_converted(name):
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(num_classes=3).eval()
    count = len(converted_from(model))
    same = copy.deepcopy(model)
    x = images(2, 32)
    report = normzoo.convert_norms(model, "group")
    assert len(report) == len(converted(model)) == count >= 20
    assert converted_from(model) == []
    model(x).square().mean().backward()
    with torch.no_grad():
        want = same(x)
        normzoo.convert_norms(same, {"BatchNorm2d": "batch"}.get(report.changed[0].old.split()[0], "layer_channel"))
        assert_close(same(x), want, rtol=1e-4, atol=1e-5)


def test_models_of_torchvision_take_factories():
    model = torchvision.models.resnet18(num_classes=3, norm_layer=normzoo.get_norm("batch_renorm"))
    assert {type(m) for m in norms(model)} == {normzoo.norm_info("batch_renorm").layer_class}
    assert model(images(2, 64)).shape == (2, 3)


def test_norm_may_be_none_or_a_factory():
    assert {type(m) for m in norms(normzoo.create_model("resnet18"))} == {nn.BatchNorm2d}
    factory = normzoo.get_norm("group", groups=4, eps=1e-3)
    assert {(m.groups, m.eps) for m in norms(normzoo.create_model("resnet20_cifar", factory))} == {(4, 1e-3)}
    theirs = normzoo.create_model("resnet20_cifar", lambda c, **where: nn.GroupNorm(2, c, **where))
    assert {type(m) for m in norms(theirs)} == {nn.GroupNorm}
    assert normzoo.create_model("resnet20_cifar", {"name": "batch", "momentum": None}).bn1.momentum is None


@pytest.mark.parametrize(
    ("name", "norm", "options", "text"),
    [
        ("resnet20_cifr", None, {}, r"^'resnet20_cifr' is not a timm model; did you mean 'resnet20_cifar' or "),
        ("resnet20_cifr", "batch", {}, r"^'resnet20_cifr' is not a timm model; did you mean 'resnet20_cifar' or "),
        ("qqqq", None, {}, r"^'qqqq' is not a timm model \(timm.list_models\(\) lists them\)$"),
        ("resnet20_cifar", "gruop", {}, r"^'gruop' is not a known norm; did you mean 'group' or "),
        ("resnet20_cifar", {"name": "gruop"}, {}, r"^'gruop' is not a known norm; did you mean 'group' or "),
        ("resnet20_cifar", {"groups": 8}, {}, r"^a norm with options needs its name, as in \{name: group, groups: 8\}"),
        ("vgg11", "batch", {"device": "meta"}, r"^VGG has no normalization layer to convert"),
        ("nf_resnet26", "batch", {"device": "meta"}, r"^NormFreeNet has no normalization layer to convert"),
        (
            "resnet20_cifar",
            {"name": "batch_renorm", "r_max": 0},
            {},
            r"^bn1 \(16 channels\) cannot become batch_renorm: r_max must be at least 1, got 0$",
        ),
        ("resnet20_cifar", None, {"shortcut": "zero"}, r"^shortcut must be 'pad' or 'projection', not 'zero'$"),
        ("resnet20_cifar", None, {"init": "he"}, r"^init must be 'kaiming' or 'xavier', not 'he'$"),
        ("resnet18", "batch", {"norm_layer": nn.BatchNorm2d}, r"^pass the norm as norm= or as norm_layer=, not both$"),
    ],
)
def test_errors_name_what_is_accepted(name, norm, options, text):
    with pytest.raises(ValueError, match=text):
        normzoo.create_model(name, norm, **options)


def test_groups_become_what_divides_the_channels():
    model = normzoo.create_model("resnet20_cifar", {**GROUP8, "groups": 5})
    assert [model.bn1.groups, model.layer3[0].bn1.groups] == [4, 4]
    model = normzoo.create_model("resnet20_cifar", "group")
    assert [model.bn1.groups, model.layer3[0].bn1.groups] == [1, 4]


def test_names_from_elsewhere_are_left_to_timm(monkeypatch):
    seen = []
    monkeypatch.setattr(timm, "create_model", lambda name, **_: seen.append(name) or nn.Sequential(nn.BatchNorm2d(4)))
    model = normzoo.create_model("hf-hub:someone/something", "group")
    assert (seen, type(model[0])) == (["hf-hub:someone/something"], normzoo.norm_info("group").layer_class)


def test_mistyped_options_are_type_errors():
    with pytest.raises(TypeError, match=r"^norm 'group' has no option 'gruops'; did you mean 'groups'\?"):
        normzoo.create_model("resnet20_cifar", {"name": "group", "gruops": 8})
    with pytest.raises(TypeError, match=r"^norm 'layer_channel' has no option 'channel_dim'"):
        normzoo.create_model("vit_tiny_patch16_224", {"name": "layer_channel", "channel_dim": -1})
    with pytest.raises(TypeError, match="shortcutt"):
        normzoo.create_model("resnet20_cifar", "batch", shortcutt="pad")


@pytest.mark.parametrize("depth", [2, 18, 21, -4])
def test_depths_are_6n_plus_2(depth):
    text = rf"^a CIFAR ResNet has 6n\+2 layers \(20, 32, 44, 56, 110, ...\), not {depth}$"
    with pytest.raises(ValueError, match=text):
        CifarResNet(depth)


@pytest.mark.parametrize("name", ["densenet121", "xception41", "swinv2_tiny_window8_256"])
def test_layers_that_timm_would_put_in_place_of_ours_are_ours(name):
    """By the bare name of the class timm would take its own RmsNormAct for the zoo's RMSNorm."""
    model = normzoo.create_model(name, "rms", device="meta")
    assert {type(m) for m in converted(model)} == {normzoo.norm_info("rms").layer_class}
    left = {type(m).__name__ for m in norms(model)} - {"RMSNorm"}
    assert not any(re.search("act$", n, re.IGNORECASE) for n in left - {"ConvNormAct"})  # convolution, norm, activation


def test_nothing_is_made_for_a_norm_that_does_not_exist(monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("weights would have been loaded"))
    with pytest.raises(ValueError, match=r"^'gruop' is not a known norm"):
        normzoo.create_model("resnet18", "gruop", pretrained=True)
