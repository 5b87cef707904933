"""Tools of torch, Lightning and timm that look for torch's own layers, and what each does to a layer of the zoo.

A tool is a function of a layer that returns one of the words below, after checking that the word is true.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import BaseFinetuning, StochasticWeightAveraging
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from timm.layers import convert_splitbn_model, freeze_batch_norm_2d
from timm.layers import convert_sync_batchnorm as timm_convert_sync_batchnorm
from timm.models.repvit import ConvNorm
from timm.utils import distribute_bn, freeze, unfreeze
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
from torch.fx.experimental import optimization
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.mkldnn import to_mkldnn

import normzoo

C = 8
AS_TORCH = "as torch's own"
WORKS = "works"
PASSED = "passed over"
NOTHING = "nothing to do"
REFUSED = "refused"
WRONG = "wrong"
WORDS = (AS_TORCH, WORKS, PASSED, NOTHING, REFUSED, WRONG)

LAYERS = {name: (name, {}) for name in normzoo.list_norms()} | {
    "batch with sync": ("batch", {"sync": True}),
    "batch with act_layer": ("batch", {"act_layer": nn.ReLU}),
    "batch with channel_dim": ("batch", {"channel_dim": -1}),
}
PLAIN = {"batch"}
BATCH = {label for label, (name, _) in LAYERS.items() if normzoo.norm_info(name).batch_statistics} - PLAIN
REST = set(LAYERS) - PLAIN - BATCH


def layer_of(label: str) -> nn.Module:
    """The layer in training mode as after some training: parameters and statistics are not what they were made as."""
    name, options = LAYERS[label]
    if isinstance(normzoo.norm_info(name).options.get("groups"), int):
        options = {**options, "groups": 4}
    layer = normzoo.create_norm(name, C, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.3 + 0.5 * torch.rand(parameter.shape, generator=generator))
        for seed in range(3):
            layer(batch(layer, seed))
    return layer


def batch(layer: nn.Module, seed: int) -> Tensor:
    x = torch.randn(6, C, 4, 4, generator=torch.Generator().manual_seed(seed)) * (1 + seed % 3) + seed % 2
    return as_given(layer, x)


def as_given(layer: nn.Module, x: Tensor) -> Tensor:
    return x.movedim(1, -1) if getattr(layer, "channel_dim", 1) == -1 else x


def statistics(layer: nn.Module) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in layer.named_buffers() if "running_" in name}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def moves(layer: nn.Module) -> bool:
    """Whether training moves running statistics."""
    copied = copy.deepcopy(layer).train()
    before = statistics(copied)
    copied(batch(copied, 7))
    return not same(before, statistics(copied))


def twin(layer: nn.Module) -> nn.BatchNorm2d:
    """Torch's layer of the same state."""
    theirs = nn.BatchNorm2d(C)
    theirs.load_state_dict(layer.state_dict())
    return theirs


def with_update_bn(layer: nn.Module) -> str:
    moving, before, momentum = moves(layer), statistics(layer), getattr(layer, "momentum", None)
    loader = [batch(layer, seed) for seed in (5, 6, 7)]
    update_bn(loader, nn.Sequential(layer))
    if same(before, statistics(layer)):
        return PASSED if moving else NOTHING
    theirs = twin(layer)
    update_bn(loader, nn.Sequential(theirs))
    assert_close(statistics(layer), statistics(theirs))
    assert layer.momentum == momentum
    return AS_TORCH


def with_swa(layer: nn.Module) -> str:
    moving, before = moves(layer), statistics(layer)
    swa, net = StochasticWeightAveraging(0.1), nn.Sequential(layer)
    net.device = torch.device("cpu")
    swa.reset_batch_norm_and_save_state(net)
    if same(before, statistics(layer)):
        return PASSED if moving else NOTHING
    theirs = nn.BatchNorm2d(C, momentum=None)
    for seed in (5, 6, 7):
        layer(batch(layer, seed))
        theirs(batch(theirs, seed))
    assert_close(statistics(layer), statistics(theirs))
    swa.reset_momenta()
    assert layer.momentum == 0.1
    return AS_TORCH


def with_weight_averaging(layer: nn.Module) -> str:
    """``use_buffers=True``, the default of Lightning's WeightAveraging: the mean of buffers too."""
    moving, net, seen = moves(layer), nn.Sequential(layer), []
    if not moving:
        return NOTHING
    average = AveragedModel(net, use_buffers=True)
    for seed in (5, 6, 7):
        net(batch(layer, seed))
        average.update_parameters(net)
        seen.append(statistics(net))
    assert_close(statistics(average.module), {name: sum(s[name] for s in seen) / 3 for name in seen[0]})
    return WORKS


def synchronizing(convert: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], str]:
    def with_conversion(layer: nn.Module) -> str:
        net, needs = nn.Sequential(layer), moves(layer) and not getattr(layer, "sync", False)
        new = convert(net)[0]
        if new is layer:
            return PASSED if needs else NOTHING
        assert type(new) is nn.SyncBatchNorm
        assert all(new.state_dict(keep_vars=True)[name] is v for name, v in layer.state_dict(keep_vars=True).items())
        x = batch(layer, 5)
        assert_close(new.eval()(x), layer.eval()(x))
        return AS_TORCH

    return with_conversion


def with_splitbn(layer: nn.Module) -> str:
    moving, x = moves(layer), batch(layer, 5)
    expected = copy.deepcopy(layer).eval()(x)
    new = convert_splitbn_model(nn.Sequential(layer))[0]
    if new is layer:
        return PASSED if moving else NOTHING
    assert type(new).__name__ == "SplitBatchNorm2d"
    assert_close(new.eval()(x), expected)
    return AS_TORCH


def finetuning(train_bn: bool) -> Callable[[nn.Module], str]:
    def with_freeze(layer: nn.Module) -> str:
        moving, x = moves(layer), batch(layer, 5)
        BaseFinetuning.freeze(nn.Sequential(layer), train_bn=train_bn)
        trains = all(p.requires_grad for p in layer.parameters())
        if moves(layer) == moving and not (trains and list(layer.parameters())):
            return PASSED if moving else NOTHING
        theirs = twin(layer)
        BaseFinetuning.freeze(nn.Sequential(theirs), train_bn=train_bn)
        for seed in (5, 6):
            assert_close(layer(batch(layer, seed)), theirs(batch(theirs, seed)))
        assert_close(statistics(layer), statistics(theirs))
        assert_close(layer.eval()(x), theirs.eval()(x))
        assert [p.requires_grad for p in layer.parameters()] == [p.requires_grad for p in theirs.parameters()]
        BaseFinetuning.make_trainable(layer)
        assert moves(layer)
        return AS_TORCH

    return with_freeze


def with_timm_freeze(layer: nn.Module) -> str:
    moving, net = moves(layer), nn.Sequential(layer)
    freeze(net)
    assert net[0] is layer is freeze_batch_norm_2d(layer)
    assert not any(p.requires_grad for p in layer.parameters())
    assert moves(layer) == moving
    unfreeze(net)
    assert all(p.requires_grad for p in layer.parameters())
    return PASSED if moving else NOTHING


def with_distribute_bn(layer: nn.Module) -> str:
    own = {name for name, b in layer.named_buffers() if moves(layer) and "running_" in name}
    reduced: list[Tensor] = []
    whole, torch.distributed.broadcast = torch.distributed.broadcast, lambda tensor, source: reduced.append(tensor)
    try:
        distribute_bn(nn.Sequential(layer), world_size=2)
    finally:
        torch.distributed.broadcast = whole
    if not own:
        return NOTHING
    sent = {name for name, b in layer.named_buffers() if any(b is r for r in reduced)}
    return WORKS if sent == own else PASSED


def with_replacement(layer: nn.Module) -> str:
    """``torch.func.replace_all_batch_norm_modules_``, then a vmap over batches."""
    net = torch.func.replace_all_batch_norm_modules_(nn.Sequential(layer))
    xs = torch.stack([batch(layer, seed) for seed in (5, 6, 7)])
    state = {name: v.detach() for name, v in (*net.named_parameters(), *net.named_buffers())}
    try:
        got = torch.vmap(lambda x: torch.func.functional_call(net, state, (x,)))(xs)
    except RuntimeError:
        return REFUSED
    assert_close(got, torch.stack([net(x) for x in xs]), rtol=1e-4, atol=1e-5)
    if not isinstance(layer, nn.modules.batchnorm._BatchNorm):
        return NOTHING
    assert not statistics(layer)
    assert_close(net.eval()(xs[0]), net.train()(xs[0]))
    return AS_TORCH


def with_stacking(layer: nn.Module) -> str:
    """``torch.func.stack_module_state``: an ensemble of models, statistics included."""
    nets = [nn.Sequential(copy.deepcopy(layer)) for _ in range(2)]
    with torch.no_grad():
        for parameter in nets[1].parameters():
            parameter.mul_(0.8)
    parameters, buffers = torch.func.stack_module_state(nets)
    if not parameters and not buffers:
        return NOTHING
    x = batch(layer, 5)
    expected = [net(x) for net in nets]

    def call(p: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(nets[0], (p, b), (x,))

    try:
        got = torch.vmap(call)(parameters, buffers)
    except RuntimeError:
        return REFUSED
    assert_close(got, torch.stack(expected), rtol=1e-4, atol=1e-5)
    for i, net in enumerate(nets):
        assert_close({name: b[i] for name, b in buffers.items()}, dict(net.named_buffers()), rtol=1e-4, atol=1e-5)
    return WORKS


def with_flops(layer: nn.Module) -> str:
    """It counts matrix products and convolutions, forward and backward; batch norm counts as none, of torch's too."""
    x = as_given(layer, torch.randn(2, C, 4, 4)).requires_grad_()
    with FlopCounterMode(display=False) as alone:
        layer(x).sum().backward()
    products = any(name in type(layer).__name__ for name in ("IterNorm", "OnlineNorm"))
    assert (alone.get_total_flops() > 0) == products
    return WORKS


def with_fsdp(layer: nn.Module) -> str:
    """Parameters in bfloat16; FSDP wraps torch's batch norms by themselves and leaves theirs in float32."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        plain = isinstance(layer, nn.modules.batchnorm._BatchNorm)
        dtypes: list[torch.dtype] = []
        layer.register_forward_pre_hook(lambda module, _: dtypes.extend(p.dtype for p in module.parameters()))
        layer.register_forward_hook(lambda module, _, y: dtypes.append(y.dtype))
        size = batch(layer, 5).shape[-1]
        model = FullyShardedDataParallel(
            nn.Sequential(nn.Linear(size, size), layer),
            mixed_precision=MixedPrecision(param_dtype=torch.bfloat16),
            auto_wrap_policy=lambda module, recurse, nonwrapped_numel: recurse,
            device_id=torch.device("cpu"),
        )
        y = model(batch(layer, 5))
        y.float().sum().backward()
        assert set(dtypes) == {torch.float32 if plain else torch.bfloat16}
        assert all(b.dtype == torch.float32 for b in statistics(layer).values())
        assert bool(y.isfinite().all())
    finally:
        dist.destroy_process_group()
    return AS_TORCH if plain else WORKS


@contextlib.contextmanager
def evaluating(layer: nn.Module) -> Iterator[tuple[nn.Conv2d, Tensor, Tensor]]:
    """A convolution, an input, and what the layer makes of the convolution's output."""
    convolution, x = nn.Conv2d(C, C, 3, padding=1).eval(), torch.randn(4, C, 6, 6)
    layer.eval()
    with torch.no_grad():
        y = layer(as_given(layer, convolution(x)))
        yield convolution, x, y.movedim(-1, 1) if getattr(layer, "channel_dim", 1) == -1 else y


def judged(layer: nn.Module, got: Tensor, expected: Tensor) -> str:
    if (got - expected).abs().max() > 2e-6 * expected.abs().max():
        return WRONG
    return AS_TORCH if isinstance(layer, nn.modules.batchnorm._BatchNorm) else WORKS


def with_fusion(layer: nn.Module) -> str:
    with evaluating(layer) as (convolution, x, expected):
        try:
            fused = nn.utils.fuse_conv_bn_eval(convolution, layer)
        except (AttributeError, AssertionError):
            return REFUSED
        return judged(layer, fused(x), expected)


def with_reparameterization(layer: nn.Module) -> str:
    with evaluating(layer) as (convolution, x, expected):
        block = ConvNorm(C, C, 3, 1, 1)
        block.c, block.bn = convolution, layer
        if convolution.bias is not None:
            convolution.bias.zero_()
            expected = layer(as_given(layer, convolution(x)))
            expected = expected.movedim(-1, 1) if getattr(layer, "channel_dim", 1) == -1 else expected
        try:
            fused = block.eval().fuse()
        except (AttributeError, TypeError):
            return REFUSED
        return judged(layer, fused(x), expected)


def with_fuse_modules(layer: nn.Module) -> str:
    net = nn.Sequential(nn.Conv2d(C, C, 3), layer).eval()
    try:
        torch.ao.quantization.fuse_modules(net, [["0", "1"]])
    except (AssertionError, NotImplementedError):
        return REFUSED
    return WORKS


def with_quantization(layer: nn.Module) -> str:
    """Quantization in eager mode after training: prepare, then convert; the layer is given quantized values."""
    with evaluating(layer) as (convolution, x, _):
        quantize = torch.ao.quantization
        net = nn.Sequential(quantize.QuantStub(), convolution, layer, quantize.DeQuantStub()).eval()
        net.qconfig = quantize.default_qconfig
        net = quantize.prepare(net)
        net[1](net[0](x))
        try:
            quantize.convert(net)(x)
        except ValueError:
            return REFUSED
        return WORKS


def with_fx_fuse(layer: nn.Module) -> str:
    with evaluating(layer) as (convolution, x, expected):
        if getattr(layer, "channel_dim", 1) == -1:
            return PASSED
        fused = optimization.fuse(nn.Sequential(convolution, layer))
        assert_close(fused(x), expected)
        assert [type(m) for m in fused.modules()].count(type(layer)) == 1
        statistics_held = getattr(layer, "running_mean", None) is not None
        return PASSED if statistics_held else NOTHING


def with_mkldnn(layer: nn.Module) -> str:
    with evaluating(layer) as (convolution, x, expected):
        net = to_mkldnn(nn.Sequential(convolution, layer))
        try:
            got = net(x.to_mkldnn()).to_dense()
        except (RuntimeError, ValueError):
            return REFUSED
        return WRONG if judged(layer, got, expected) == WRONG else WORKS


TOOLS: dict[str, Callable[[nn.Module], str]] = {
    "torch.optim.swa_utils.update_bn": with_update_bn,
    "StochasticWeightAveraging": with_swa,
    "WeightAveraging": with_weight_averaging,
    "nn.SyncBatchNorm.convert_sync_batchnorm": synchronizing(nn.SyncBatchNorm.convert_sync_batchnorm),
    "timm.layers.convert_sync_batchnorm": synchronizing(timm_convert_sync_batchnorm),
    "Trainer(sync_batchnorm=True)": synchronizing(TorchSyncBatchNorm().apply),
    "timm.layers.convert_splitbn_model": with_splitbn,
    "BaseFinetuning.freeze(train_bn=True)": finetuning(train_bn=True),
    "BaseFinetuning.freeze(train_bn=False)": finetuning(train_bn=False),
    "timm.utils.freeze": with_timm_freeze,
    "timm.utils.distribute_bn": with_distribute_bn,
    "torch.func.replace_all_batch_norm_modules_": with_replacement,
    "torch.func.stack_module_state": with_stacking,
    "FullyShardedDataParallel(mixed_precision=...)": with_fsdp,
    "torch.utils.flop_counter.FlopCounterMode": with_flops,
    "nn.utils.fuse_conv_bn_eval": with_fusion,
    "timm.utils.reparameterize_model": with_reparameterization,
    "torch.ao.quantization.fuse_modules": with_fuse_modules,
    "torch.ao.quantization.convert": with_quantization,
    "torch.fx.experimental.optimization.fuse": with_fx_fuse,
    "torch.utils.mkldnn.to_mkldnn": with_mkldnn,
}
