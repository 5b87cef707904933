"""Norm classes as repositories of models write them, and modules that look like norms and are none."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import nn

ones, zeros = torch.ones, torch.zeros


def parameter(value):
    return nn.Parameter(value)


class GptLayerNorm(nn.Module):
    """Layer norm with an optional bias (nanoGPT)."""

    def __init__(self, n, bias=False):
        super().__init__()
        self.weight = parameter(ones(n))
        self.bias = parameter(zeros(n)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class BertLayerNorm(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.weight, self.bias, self.variance_epsilon = parameter(ones(n)), parameter(zeros(n)), 1e-12

    def forward(self, x):
        u = x.mean(-1, keepdim=True)
        s = (x - u).pow(2).mean(-1, keepdim=True)
        return self.weight * ((x - u) / torch.sqrt(s + self.variance_epsilon)) + self.bias


class LlamaRMSNorm(nn.Module):
    def __init__(self, n, eps=1e-6):
        super().__init__()
        self.weight, self.variance_epsilon = parameter(ones(n)), eps

    def forward(self, hidden_states):
        dtype = hidden_states.dtype
        x = hidden_states.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(dtype)


class T5LayerNorm(nn.Module):
    """Only the variance is computed in float32."""

    def __init__(self, n, eps=1e-6):
        super().__init__()
        self.weight, self.variance_epsilon = parameter(ones(n)), eps

    def forward(self, x):
        variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.variance_epsilon))


class GemmaRMSNorm(nn.Module):
    def __init__(self, n, eps=1e-6):
        super().__init__()
        self.eps, self.weight = eps, parameter(zeros(n))

    def _norm(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x):
        return (self._norm(x.float()) * (1.0 + self.weight.float())).type_as(x)


class UnitRMSNorm(nn.Module):
    """The root mean square by way of the norm of the vector, without eps."""

    def __init__(self, n):
        super().__init__()
        self.scale, self.gamma = n**0.5, parameter(ones(n))

    def forward(self, x):
        return F.normalize(x, dim=-1) * self.scale * self.gamma


class TorchRMSNorm(nn.Module):
    """Its eps is that of the input's dtype."""

    def __init__(self, n):
        super().__init__()
        self.g = parameter(ones(n))

    def forward(self, x):
        return F.rms_norm(x, self.g.shape, self.g)


class RoundedConstantRMSNorm(nn.Module):
    """A constant that is rounded to float32, and statistics in float64."""

    def __init__(self, n):
        super().__init__()
        self.weight = parameter(ones(n))
        self.register_buffer("root", torch.tensor(n**0.5))

    def forward(self, x):
        return F.normalize(x, dim=-1) * self.root * self.weight


class ShortNamesBatchNorm(nn.Module):
    """Running statistics whose names do not say what they are."""

    def __init__(self, n):
        super().__init__()
        self.w = parameter(ones(n))
        self.register_buffer("rm", zeros(n))
        self.register_buffer("rv", ones(n))

    def forward(self, x):
        return F.batch_norm(x, self.rm, self.rv, self.w, None, self.training, 0.05, 1e-4)


class BufferBiasLayerNorm(nn.Module):
    """Its bias is a buffer of zeros."""

    def __init__(self, n):
        super().__init__()
        self.gamma = parameter(ones(n))
        self.register_buffer("beta", zeros(n))

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], self.gamma, self.beta)


class DataFormatLayerNorm(nn.Module):
    """Layer norm of either layout (ConvNeXt)."""

    def __init__(self, n, data_format="channels_first"):
        super().__init__()
        self.weight, self.bias, self.eps = parameter(ones(n)), parameter(zeros(n)), 1e-6
        self.data_format, self.normalized_shape = data_format, (n,)

    def forward(self, x):
        if self.data_format == "channels_last":
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        u = x.mean(1, keepdim=True)
        s = (x - u).pow(2).mean(1, keepdim=True)
        x = (x - u) / torch.sqrt(s + self.eps)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class PermutingLayerNorm(nn.LayerNorm):
    """A subclass of torch's with a forward of its own, for maps."""

    def forward(self, x):
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class Float32LayerNorm(nn.LayerNorm):
    def forward(self, x):
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class Float32GroupNorm(nn.GroupNorm):
    """Cannot be run with weights of another dtype than float32."""

    def forward(self, x):
        return super().forward(x.float()).to(x.dtype)


class DtypeEpsLayerNorm(nn.Module):
    """Its eps follows the dtype of the input."""

    def __init__(self, n):
        super().__init__()
        self.g = parameter(ones(1, n, 1, 1))

    def forward(self, x):
        eps = 1e-5 if x.dtype == torch.float32 else 1e-3
        var, mean = torch.var_mean(x, 1, correction=0, keepdim=True)
        return (x - mean) * (var + eps).rsqrt() * self.g


class DtypeBranchNorm(nn.Module):
    """Another norm in float32 than in other dtypes."""

    def __init__(self, n):
        super().__init__()
        self.weight = parameter(ones(n))

    def forward(self, x):
        if x.dtype == torch.float32:
            return F.rms_norm(x, self.weight.shape, self.weight, 1e-3)
        return F.layer_norm(x, self.weight.shape, self.weight)


class RowsRMSNorm(nn.Module):
    """Views its input as rows of C values, whatever shape it has."""

    def __init__(self, n):
        super().__init__()
        self.weight = parameter(ones(n))

    def forward(self, x):
        return F.rms_norm(x.reshape(-1, len(self.weight)), self.weight.shape, self.weight, 1e-6).view(x.shape)


class ColumnLayerNorm(nn.Module):
    """Parameters of shape (1, C, 1, 1)."""

    def __init__(self, n):
        super().__init__()
        self.g, self.b, self.eps = parameter(ones(1, n, 1, 1)), parameter(zeros(1, n, 1, 1)), 1e-5

    def forward(self, x):
        var, mean = torch.var(x, dim=1, unbiased=False, keepdim=True), torch.mean(x, dim=1, keepdim=True)
        return (x - mean) / (var + self.eps).sqrt() * self.g + self.b


class UnbiasedLayerNorm(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.weight = parameter(ones(n))

    def forward(self, x):
        return (x - x.mean(-1, keepdim=True)) * (x.var(-1, keepdim=True) + 1e-5).rsqrt() * self.weight


class ViewGroupNorm(nn.Module):
    def __init__(self, n, groups=4):
        super().__init__()
        self.weight, self.bias = parameter(ones(1, n, 1, 1)), parameter(zeros(1, n, 1, 1))
        self.groups, self.eps = groups, 1e-5

    def forward(self, x):
        view = x.reshape(len(x), self.groups, -1)
        view = (view - view.mean(-1, keepdim=True)) / (view.var(-1, keepdim=True, unbiased=False) + self.eps).sqrt()
        return view.view(x.shape) * self.weight + self.bias


class GlobalLayerNorm(nn.Module):
    """One mean and variance for a sample (Conv-TasNet)."""

    def __init__(self, n):
        super().__init__()
        self.gamma, self.beta = parameter(ones(1, n, 1)), parameter(zeros(1, n, 1))

    def forward(self, y):
        mean = y.mean((1, 2), keepdim=True)
        var = (y - mean).pow(2).mean((1, 2), keepdim=True)
        return self.gamma * (y - mean) / torch.pow(var + 1e-8, 0.5) + self.beta


class PlainInstanceNorm(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.weight = parameter(ones(n))

    def forward(self, x):
        mean, var = x.mean((2, 3), keepdim=True), x.var((2, 3), keepdim=True, unbiased=False)
        return (x - mean) / (var + 1e-5).sqrt() * self.weight.view(1, -1, 1, 1)


class MovingBatchNorm(nn.Module):
    """Batch norm in the terms of Keras."""

    def __init__(self, n, momentum=0.1, unbiased=True):
        super().__init__()
        self.gamma, self.beta = parameter(ones(n)), parameter(zeros(n))
        self.register_buffer("moving_mean", zeros(n))
        self.register_buffer("moving_var", ones(n))
        self.momentum, self.unbiased = momentum, unbiased

    def forward(self, x):
        view, dims = (1, -1, *[1] * (x.ndim - 2)), (0, *range(2, x.ndim))
        mean, var = self.moving_mean, self.moving_var
        if self.training:
            mean, var = x.mean(dims), x.var(dims, unbiased=False)
            kept = 1 - self.momentum
            moved = x.var(dims, unbiased=self.unbiased).detach()
            self.moving_mean = kept * self.moving_mean + self.momentum * mean.detach()
            self.moving_var = kept * self.moving_var + self.momentum * moved
        y = (x - mean.view(view)) / torch.sqrt(var.view(view) + 1e-3)
        return y * self.gamma.view(view) + self.beta.view(view)


class ContiguousBatchNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x.contiguous())


class ActivatedBatchNorm(nn.BatchNorm2d):
    def __init__(self, n):
        super().__init__(n)
        self.activation = nn.LeakyReLU(0.1)

    def forward(self, x):
        return self.activation(super().forward(x))


class DetectorFrozenBatchNorm(nn.Module):
    def __init__(self, n):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, ones(n))
        self.eps = 1e-5

    def forward(self, x):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return x * scale.view(1, -1, 1, 1) + (self.bias - self.running_mean * scale).view(1, -1, 1, 1)


class EvalBatchNorm(nn.BatchNorm2d):
    """Stays in evaluation."""

    def train(self, mode=True):
        return super().train(False)

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


TOKENS, IMAGE, SEQUENCE = (4, 5, 8), (4, 8, 5, 3), (4, 8, 5)
# (how it is made, the zoo's norm, an input's shape, what the norm has besides)
NORMS = {
    "gpt": (lambda: GptLayerNorm(8), "layer_channel", TOKENS, {"eps": 1e-5}),
    "gpt with bias": (lambda: GptLayerNorm(8, True), "layer_channel", TOKENS, {"eps": 1e-5}),
    "bert": (lambda: BertLayerNorm(8), "layer_channel", TOKENS, {"eps": 1e-12}),
    "llama": (lambda: LlamaRMSNorm(8), "rms", TOKENS, {"eps": 1e-6}),
    "llama, eps": (lambda: LlamaRMSNorm(8, 3e-5), "rms", TOKENS, {"eps": 3e-5}),
    "t5": (lambda: T5LayerNorm(8), "rms", TOKENS, {"eps": 1e-6}),
    "gemma": (lambda: GemmaRMSNorm(8), "rms", TOKENS, {"eps": 1e-6}),
    "gemma of 2 channels": (lambda: GemmaRMSNorm(2), "rms", (4, 5, 2), {"eps": 1e-6}),
    "unit": (lambda: UnitRMSNorm(8), "rms", TOKENS, {}),
    "constant": (lambda: RoundedConstantRMSNorm(8), "rms", TOKENS, {}),
    "short names": (lambda: ShortNamesBatchNorm(8), "batch", IMAGE, {"eps": 1e-4, "momentum": 0.05}),
    "torch's": (lambda: TorchRMSNorm(8), "rms", TOKENS, {"eps": torch.finfo(torch.float32).eps}),
    "buffer": (lambda: BufferBiasLayerNorm(8), "layer_channel", TOKENS, {"eps": 1e-5}),
    "channels last": (lambda: DataFormatLayerNorm(8, "channels_last"), "layer_channel", TOKENS, {"eps": 1e-6}),
    "channels first": (lambda: DataFormatLayerNorm(8), "layer_channel", IMAGE, {"eps": 1e-6}),
    "permuting": (lambda: PermutingLayerNorm(8), "layer_channel", IMAGE, {"eps": 1e-5}),
    "float32": (lambda: Float32LayerNorm(8), "layer_channel", TOKENS, {"eps": 1e-5}),
    "float32 groups": (lambda: Float32GroupNorm(4, 8), "group", IMAGE, {"eps": 1e-5, "groups": 4}),
    "eps by dtype": (lambda: DtypeEpsLayerNorm(8), "layer_channel", IMAGE, {"eps": 1e-5}),
    "formula by dtype": (lambda: DtypeBranchNorm(8), "rms", TOKENS, {"eps": 1e-3}),
    "rows": (lambda: RowsRMSNorm(8), "rms", TOKENS, {"eps": 1e-6}),
    "column": (lambda: ColumnLayerNorm(8), "layer_channel", IMAGE, {"eps": 1e-5}),
    "unbiased": (lambda: UnbiasedLayerNorm(8), "positional", TOKENS, {"eps": 1e-5, "unbiased": True}),
    "groups": (lambda: ViewGroupNorm(8), "group", IMAGE, {"eps": 1e-5, "groups": 4}),
    "one group": (lambda: ViewGroupNorm(8, 1), "layer", IMAGE, {"eps": 1e-5}),
    "global": (lambda: GlobalLayerNorm(8), "layer", SEQUENCE, {"eps": 1e-8}),
    "instance": (lambda: PlainInstanceNorm(8), "instance", IMAGE, {"eps": 1e-5}),
    "moving": (lambda: MovingBatchNorm(8), "batch", IMAGE, {"eps": 1e-3, "momentum": 0.1}),
    "subclass": (lambda: ContiguousBatchNorm(8, momentum=0.3), "batch", IMAGE, {"eps": 1e-5, "momentum": 0.3}),
    "cumulative": (lambda: ContiguousBatchNorm(8, momentum=None), "batch", IMAGE, {"momentum": None}),
    "no affine": (lambda: ContiguousBatchNorm(8, affine=False), "batch", IMAGE, {"affine": False}),
    "activated": (lambda: ActivatedBatchNorm(8), "batch", IMAGE, {}),
    "detector": (lambda: DetectorFrozenBatchNorm(8), "frozen_batch", IMAGE, {"eps": 1e-5}),
    "in evaluation": (lambda: EvalBatchNorm(8), "frozen_batch", IMAGE, {"eps": 1e-5}),
}


class Vector(nn.Module):
    """One weight for each channel."""

    def __init__(self, n):
        super().__init__()
        self.weight = parameter(ones(n))

    def norm(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight)


class Gate(Vector):
    def forward(self, x):
        return x * torch.sigmoid(x * self.weight)


class BoundedNorm(Vector):
    """Its outputs are bounded, which shows for large weights."""

    def forward(self, x):
        return self.norm(x).clamp(-10, 10)


class LargestNorm(Vector):
    def forward(self, x):
        return x / x.abs().amax(-1, keepdim=True) * self.weight


class CommunicatingNorm(Vector):
    """Takes statistics over all ranks, for which a trial must not wait."""

    def forward(self, x):
        torch.distributed.all_reduce(x.sum())
        return self.norm(x)


class LayerScale(Vector):
    def forward(self, x):
        return x * self.weight


class SoftmaxNorm(Vector):
    def forward(self, x):
        return x.softmax(-1) * self.weight


class OtherAxisNorm(Vector):
    def forward(self, x):
        return F.normalize(x, dim=0) * self.weight


class L2Norm(Vector):
    """Its scale is the weight by sqrt(C)."""

    def forward(self, x):
        return F.normalize(x, dim=-1) * self.weight


class ConditionalNorm(Vector):
    def forward(self, x, condition):
        return self.norm(x) * condition


class GatedNorm(Vector):
    """Norm of the input times a gate where one is given."""

    def forward(self, x, gate=None):
        return self.norm(x if gate is None else x * F.silu(gate))


class DropoutNorm(Vector):
    def forward(self, x):
        return F.dropout(self.norm(x), 0.1, self.training)


class DropoutModuleNorm(Vector):
    def __init__(self, n):
        super().__init__(n)
        self.drop = nn.Dropout(0.2)

    def forward(self, x):
        return self.drop(self.norm(x))


class NoisyNorm(Vector):
    def __init__(self, n):
        super().__init__(n)
        self.register_buffer("noise", zeros(n))

    def forward(self, x):
        self.noise = torch.randn_like(self.noise)
        return self.norm(x) + 0.01 * self.noise


class WarmingNorm(Vector):
    """Depends on how often it was called."""

    calls = 0

    def forward(self, x):
        self.calls = self.calls + 1
        return self.norm(x) * (1 + 1 / self.calls)


class MutatingNorm(Vector):
    def forward(self, x):
        return self.norm(x.sub_(x.mean(-1, keepdim=True)))


class RaisingNorm(Vector):
    def forward(self, x):
        raise RuntimeError("planted")


class PowerNorm(Vector):
    """Almost a norm: the root is another."""

    def forward(self, x):
        return x * (x.square().mean(-1, keepdim=True) + 1e-6) ** -0.49 * self.weight


class OutsideEpsNorm(nn.Module):
    """eps is added to the standard deviation."""

    def __init__(self, n):
        super().__init__()
        self.a_2, self.b_2, self.eps = parameter(ones(n)), parameter(zeros(n)), 1e-6

    def forward(self, x):
        return self.a_2 * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + self.eps) + self.b_2


class ClampedNorm(Vector):
    """The variance is at least eps."""

    def forward(self, x):
        return self.weight * (x - x.mean(-1, keepdim=True)) * x.var(-1, False, keepdim=True).clamp(min=1e-5).rsqrt()


class AbsoluteScaleNorm(Vector):
    def forward(self, x):
        return F.layer_norm(x, self.weight.shape) * self.weight.abs()


class ExtraParameterNorm(Vector):
    """A learnt factor would be lost."""

    def __init__(self, n):
        super().__init__(n)
        self.factor = parameter(torch.tensor(1.0))

    def forward(self, x):
        return self.norm(x) * self.factor


class ResidualNorm(Vector):
    def forward(self, x):
        return x + self.norm(x)


class HalfNorm(Vector):
    def forward(self, x):
        return F.layer_norm(x.bfloat16(), self.weight.shape, self.weight.bfloat16()).to(x.dtype)


class BothLayoutsNorm(Vector):
    """Channels first for maps, last for tokens."""

    def forward(self, x):
        return self.norm(x.movedim(1, -1)).movedim(-1, 1) if x.ndim == 4 else self.norm(x)


class OnlyTrainingNorm(Vector):
    def forward(self, x):
        return self.norm(x) if self.training else x * self.weight


class FirstRunsNorm(Vector):
    """Rounds in training alone."""

    def forward(self, x):
        y = self.norm(x)
        return (y * 256).round() / 256 if self.training else y


class ReluBatchNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


class ForgetfulBatchNorm(MovingBatchNorm):
    """Keeps the larger of old and new variance."""

    def forward(self, x):
        before = self.moving_var
        y = super().forward(x)
        if self.training:
            self.moving_var = torch.maximum(before, self.moving_var)
        return y


# {name: (how it is made, a part of what is said of it; None where nothing is, as it is no norm at all)}
NOT_NORMS = {
    "gate": (lambda: Gate(8), None),
    "layer scale": (lambda: LayerScale(8), None),
    "bounded": (lambda: BoundedNorm(8), "but computes something else for large parameters"),
    "largest": (lambda: LargestNorm(8), "it is closest to|as in no known norm"),
    "softmax": (lambda: SoftmaxNorm(8), "its values depend on each other as in no known norm"),
    "other axis": (lambda: OtherAxisNorm(8), "as in no known norm"),
    "l2": (lambda: L2Norm(8), "root mean square of its channels, but its scale is no tensor of its own"),
    "conditional": (lambda: ConditionalNorm(8), "takes the arguments x, condition"),
    "gated": (lambda: GatedNorm(8), "may be given gate too, with which it was not tried"),
    "dropout": (lambda: DropoutNorm(8), "in training is random"),
    "dropout module": (lambda: DropoutModuleNorm(8), "in training is random"),
    "noise": (lambda: NoisyNorm(8), "is random or depends on what it computed before"),
    "warming": (lambda: WarmingNorm(8), "is random or depends on what it computed before"),
    "mutating": (lambda: MutatingNorm(8), "it changes its input"),
    "raising": (lambda: RaisingNorm(8), "RuntimeError: planted"),
    "power": (lambda: PowerNorm(8), "it is closest to division of each position by the root mean square"),
    "outside eps": (lambda: OutsideEpsNorm(8), "it is closest to layer norm of each position"),
    "clamped": (lambda: ClampedNorm(8), "it is closest to layer norm of each position"),
    "absolute": (lambda: AbsoluteScaleNorm(8), "but its scale is no tensor of its own"),
    "extra": (lambda: ExtraParameterNorm(8), "its parameter factor would be lost"),
    "residual": (lambda: ResidualNorm(8), "as in no known norm|it is closest to"),
    "half": (lambda: HalfNorm(8), "computes in half precision"),
    "both layouts": (
        lambda: BothLayoutsNorm(8),
        "with channels in dimension 1 layer norm .*with channels last layer norm",
    ),
    "two modes": (lambda: OnlyTrainingNorm(8), "in training it looks like layer norm .*, in evaluation like a scale"),
    "rounding": (lambda: FirstRunsNorm(8), "it is closest to layer norm of each position"),
    "forgetful": (lambda: ForgetfulBatchNorm(8), "do not move as an exponential or cumulative average"),
}


class Counting(Vector):
    """Leaves traces of each call wherever a module can."""

    calls = 0
    seen: list = []  # noqa: RUF012

    def forward(self, x):
        Counting.calls += 1
        Counting.seen.append(x.shape)
        self.mine = getattr(self, "mine", 0) + 1
        self.weight.data.add_(0)
        torch.rand(3)
        random.random()
        print("called")
        return self.norm(x)


class Small(nn.Module):
    """A language model's block with norms of its own."""

    def __init__(self, n=8, norm=LlamaRMSNorm):
        super().__init__()
        self.wte = nn.Embedding(11, n)
        self.h = nn.ModuleList(
            nn.ModuleDict({"ln_1": norm(n), "attn": nn.Linear(n, n), "ln_2": norm(n), "mlp": nn.Linear(n, n)})
            for _ in range(2)
        )
        self.ln_f = norm(n)
        self.head = nn.Linear(n, 11, bias=False)

    def forward(self, tokens):
        x = self.wte(tokens)
        for block in self.h:
            x = x + block["attn"](block["ln_1"](x))
            x = x + F.silu(block["mlp"](block["ln_2"](x)))
        return self.head(self.ln_f(x))
