"""For each check a layer with one fault: the suite reports that promise broken, with numbers, and no other."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import normzoo
from normzoo._shapes import per_channel
from normzoo.functional._recomputation import in_backward
from normzoo.testing import CHECKS, NormCheckError, Subject, _distributed, check_norm

NoNorm, LayerNorm, BatchNorm = (normzoo.norm_info(name).layer_class for name in ("none", "layer", "batch"))
FAST = [name for name, check in CHECKS.items() if not check.slow]


def also_takes_anything(num_features, *, affine=True, channel_dim=1, device=None, dtype=None, **_):
    return NoNorm(num_features, affine=affine, channel_dim=channel_dim, device=device, dtype=dtype)


class CrashesOnFlatInput(NoNorm):
    def normalize(self, x):
        if x.ndim == 2:
            raise RuntimeError("maps only")
        return super().normalize(x)


class RefusesWithoutAShape(NoNorm):
    def normalize(self, x):
        if x.ndim == 5:
            raise ValueError("no volumes")
        return super().normalize(x)


class DropsADimension(NoNorm):
    def normalize(self, x):
        y = super().normalize(x)
        return y if x.ndim != 3 or x.requires_grad else y.flatten(1)


class GradientTooLarge(LayerNorm):
    def normalize(self, x):
        return super().normalize(x) + 0.1 * (x - x.detach())


class ParameterGradientTooLarge(NoNorm):
    def normalize(self, x):
        y = super().normalize(x)
        return y if self.bias is None else y + 0.1 * per_channel(self.bias - self.bias.detach(), x).to(x.dtype)


class Sine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return dy * ctx.saved_tensors[0].cos()


class SineFixed(Sine):
    @staticmethod
    def backward(ctx, dy):
        return dy * ctx.saved_tensors[0].detach().cos()


class DifferentiatesOnce(NoNorm):
    def normalize(self, x):
        return super().normalize(x) + Sine.apply(x)


class DifferentiatesTwiceWrongly(NoNorm):
    def normalize(self, x):
        return super().normalize(x) + SineFixed.apply(x)


class MistakesTheLastChannel(NoNorm):
    def normalize(self, x):
        y = super().normalize(x)
        return y.flip(2) if self.channel_dim == -1 and x.ndim > 2 else y


class MoreOfOneSample(NoNorm):
    def normalize(self, x):
        return super().normalize(x) * (1.001 if len(x) == 1 else 1)


class MakesContiguous(LayerNorm):
    def normalize(self, x):
        return super().normalize(x).contiguous()


class CopiesVolumes(NoNorm):
    def normalize(self, x):
        y = super().normalize(x)
        return y.contiguous(memory_format=torch.channels_last_3d) if x.ndim == 5 and self.channel_dim == 1 else y


class ContiguousInBfloat16(NoNorm):
    def normalize(self, x):
        y = super().normalize(x)
        return y.contiguous() if x.dtype == torch.bfloat16 and self.channel_dim == 1 else y


class CoarseInFloat16(LayerNorm):
    def normalize(self, x):
        y = super().normalize(x)
        return y * 1.02 if x.dtype == torch.float16 else y


class HalfParameters(NoNorm):
    def __init__(self, num_features, *, affine=True, channel_dim=1, device=None, dtype=None):
        super().__init__(num_features, affine=affine, channel_dim=channel_dim, device=device, dtype=dtype)
        self.to(dtype)


class NarrowsItsInput(NoNorm):
    def forward(self, x):
        y = super().forward(x)
        return y if self.bias is None or self.bias.dtype == torch.float64 or x.dtype != torch.float64 else y.float()


class WidensItsMean(BatchNorm):
    def normalize(self, x):
        if x.dtype == torch.float64:
            self.running_mean = self.running_mean.double()
        return super().normalize(x)


class RoundsItsInput(NoNorm):
    def normalize(self, x):
        wide = x.dtype == torch.float64 and self.bias is not None and self.bias.dtype == torch.float32
        return super().normalize(x.bfloat16().to(x.dtype) if wide else x)


class CoarseUnderAutocast(LayerNorm):
    def normalize(self, x):
        y = super().normalize(x)
        return y * 1.1 if torch.is_autocast_enabled("cpu") else y


class MeanOfSquares(LayerNorm):
    """The variance as E[x^2] - E[x]^2."""

    def normalize(self, x):
        wide, dims = x.detach().to(torch.promote_types(x.dtype, torch.float32)), list(range(1, x.ndim))
        right = wide.var(dims, unbiased=False, keepdim=True) + self.eps
        wrong = (wide.square().mean(dims, keepdim=True) - wide.mean(dims, keepdim=True).square()).clamp(min=0)
        return (super().normalize(x) * (right / (wrong + self.eps)).sqrt()).to(x.dtype)


class NothingOfOneValue(NoNorm):
    def normalize(self, x):
        return super().normalize(x) * (float("nan") if x.shape[0] == x[0, 0].numel() == 1 else 1)


class MovesWhatItRefuses(BatchNorm):
    def normalize(self, x):
        if self.training and x.numel() == x.shape[1]:
            self.running_var.mul_(0.9)
        return super().normalize(x)


class ConstantOfOneValue(BatchNorm):
    factor = 0

    def normalize(self, x):
        if not self.training or x.numel() > x.shape[1]:
            return super().normalize(x)
        y = self.factor * x
        return y if self.weight is None else y * per_channel(self.weight, x) + per_channel(self.bias, x)


class CollapsesOnOneValue(ConstantOfOneValue):
    factor = 1

    def normalize(self, x):
        y = super().normalize(x)
        if self.training and x.numel() == x.shape[1]:
            self.running_var.mul_(0.9)
        return y


class EmptyWithoutGradients(NoNorm):
    def forward(self, x):
        return super().forward(x) if x.numel() else x


class CountsEmptyBatches(BatchNorm):
    def forward(self, x):
        if not x.numel() and self.training:
            self.num_batches_tracked.add_(1)
        return super().forward(x)


class TakesIntegers(NoNorm):
    def forward(self, x):
        return super().forward(x if x.is_floating_point() else x.float())


class TakesMoreChannels(NoNorm):
    def forward(self, x):
        more = self.channel_dim == 1 and x.ndim > 1 and x.shape[1] > self.num_features
        return super().forward(x[:, : self.num_features] if more else x)


class SilentAboutTheShape(NoNorm):
    def forward(self, x):
        try:
            return super().forward(x)
        except ValueError:
            raise ValueError("bad input") from None


class TakesMoreChannelsAtTheEnd(NoNorm):
    def forward(self, x):
        more = self.channel_dim == -1 and x.ndim > 2 and x.shape[-1] > self.num_features
        return super().forward(x[..., : self.num_features] if more else x)


class Remembers(NoNorm):
    """Counts its evaluations."""

    def __init__(self, num_features, *, affine=True, channel_dim=1, device=None, dtype=None):
        super().__init__(num_features, affine=affine, channel_dim=channel_dim, device=device, dtype=dtype)
        self.register_buffer("seen", torch.zeros((), device=device))

    def reset_parameters(self):
        super().reset_parameters()
        self.seen.zero_()

    def normalize(self, x):
        if not self.training and not in_backward():
            self.seen.add_(1)
        return super().normalize(x)


class TrainsDifferently(LayerNorm):
    def normalize(self, x):
        return super().normalize(x) * (1.01 if self.training else 1)


class LooksAtTheBatch(BatchNorm):
    """In evaluation, where there are several samples of several positions."""

    def normalize(self, x):
        y = super().normalize(x)
        return y if self.training or x.ndim != 5 or len(x) != 2 else y + 1e-3 * x.mean(0, keepdim=True)


class KeepsTheShareOfMomentum(BatchNorm):
    def update_rate(self):
        rate = super().update_rate()
        return 1 - rate if self.momentum is not None else rate


class BiasedMean(BatchNorm):
    def normalize(self, x):
        y = super().normalize(x)
        if self.training and self.momentum is not None and not in_backward():
            self.running_mean.data.add_(1e-3 * self.momentum)
        return y


class CountsTwice(BatchNorm):
    """Where the count is no rate."""

    def count_batch(self):
        super().count_batch()
        if self.momentum is not None:
            super().count_batch()


class ForgetsTheFirstBatch(BatchNorm):
    def update_rate(self):
        return 1 / (self.num_batches_tracked + 2) if self.momentum is None else super().update_rate()


class LosesAVariance(BatchNorm):
    def load_state_dict(self, state_dict, strict=True, assign=False):
        held = {**state_dict, "running_var": torch.ones_like(state_dict["running_var"])}
        return super().load_state_dict(held, strict, assign)


class DoubtsTheCountOfOthers(BatchNorm):
    _version = 3

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *others):
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)
        if local_metadata["version"] != self._version:
            self.num_batches_tracked.zero_()


class AnotherVariance(BatchNorm):
    """The buffer is a standard deviation."""

    def normalize(self, x):
        var, self._buffers["running_var"] = self.running_var, self.running_var.square()
        try:
            y = super().normalize(x)
            if self.training:
                var.copy_(self.running_var.sqrt())
        finally:
            self._buffers["running_var"] = var
        return y


class HoldsALambda(NoNorm):
    def __init__(self, num_features, *, affine=True, channel_dim=1, device=None, dtype=None):
        super().__init__(num_features, affine=affine, channel_dim=channel_dim, device=device, dtype=dtype)
        self.hook = lambda y: y


class SharesItsBias(NoNorm):
    def __deepcopy__(self, memo):
        other = copy.copy(self)
        other.__dict__["_parameters"] = dict(self._parameters)
        return other


class CopiesWithAnotherMomentum(BatchNorm):
    def __setstate__(self, state):
        super().__setstate__(state)
        self.momentum = 0.3


class CopiesWithAnotherRepr(NoNorm):
    label = "made"

    def __setstate__(self, state):
        super().__setstate__(state)
        self.label = "copied"

    def extra_repr(self):
        return self.label


class ReadsAValue(NoNorm):
    def normalize(self, x):
        if x.detach().float().sum().item() > 1e30:
            raise OverflowError("too large")
        return super().normalize(x)


class ForgetsToReset(NoNorm):
    def reset_parameters(self):
        pass


class CountsByAnotherName(BatchNorm):
    def __init__(self, num_features, *, momentum=0.1, affine=True, channel_dim=1, device=None, dtype=None):
        super().__init__(
            num_features, momentum=momentum, affine=affine, channel_dim=channel_dim, device=device, dtype=dtype
        )
        self.counters = [self.num_batches_tracked]

    def count_batch(self):
        if self.training and not in_backward():
            self.counters[0].add_(1)


class LooksAtShapesInTracing(NoNorm):
    _call_impl = torch.nn.Module._call_impl

    def forward(self, x):
        if x.ndim < 2:
            raise ValueError(f"no vectors: {tuple(x.shape)}")
        return super().forward(x)


@torch.fx.wrap
def _in_mode(layer, x, training):
    before, layer.training = layer.training, training
    try:
        return BatchNorm.forward(layer, x)
    finally:
        layer.training = before


class StaysInTraining(BatchNorm):
    """Traced with the mode of that moment."""

    _call_impl = torch.nn.Module._call_impl

    def forward(self, x):
        return _in_mode(self, x, self.training)


class View(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return (x * 1).view(x.shape)

    @staticmethod
    def backward(ctx, dy):
        return dy


class GivesAView(NoNorm):
    def normalize(self, x):
        return View.apply(super().normalize(x))


class KeepsItsOutput(NoNorm):
    def normalize(self, x):
        return super().normalize(x).tanh()


class OverwritesItsInput(NoNorm):
    def normalize(self, x):
        y = super().normalize(x)
        if x.grad_fn is not None and self.channel_dim == 1:
            x.data.zero_()
        return y


class Reused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, dy):
        return dy.mul_(2)


class OverwritesItsGradient(NoNorm):
    def normalize(self, x):
        y = super().normalize(x)
        return Reused.apply(y) if x.grad_fn is not None and x.ndim == 5 else y * 2


class CountsRecomputations(BatchNorm):
    def count_batch(self):
        if self.training:
            self.num_batches_tracked.add_(1)


class AddsTheRunningMean(BatchNorm):
    """Its output depends on a statistic that has moved when it is recomputed."""

    def normalize(self, x):
        before = per_channel(self.running_mean.clone(), x)
        return super().normalize(x) + (1e-3 * before.to(x.dtype) if self.training else 0)


class UnpacksTwice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias):
        ctx.save_for_backward(bias)
        return x * 1

    @staticmethod
    def backward(ctx, dy):
        assert len(ctx.saved_tensors) == len(ctx.saved_tensors)
        return dy, None


class ReadsSavedTensorsTwice(NoNorm):
    def normalize(self, x):
        return UnpacksTwice.apply(super().normalize(x), self.bias)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, dy):
        return dy * 2 if torch.is_grad_enabled() else torch.mul(dy, 2, out=torch.empty_like(dy))


class WritesItsGradientIntoATensor(NoNorm):
    def normalize(self, x):
        return Doubled.apply(super().normalize(x))


class TakesTheFirstOfABatch(NoNorm):
    """The gradient of its bias is that of the first vector, for all of them."""

    def normalize(self, x):
        y = super().normalize(x)
        if self.bias is not None and self.bias.requires_grad and torch._C._current_graph_task_id() == -1:
            self.bias.register_hook(self._first)
        return y

    @staticmethod
    def _first(gradient):
        if not torch._C._functorch.is_batchedtensor(gradient):
            return None
        alone = torch._C._functorch.get_unwrapped(gradient)
        return gradient * 0 + alone[0]


class TakesTheFirstOfABatchInChannelsLast(TakesTheFirstOfABatch):
    def normalize(self, x):
        return super().normalize(x) if x.ndim == 4 and not x.is_contiguous() else NoNorm.normalize(self, x)


class KeepsAnIntermediate(NoNorm):
    def normalize(self, x):
        return super().normalize(x.sin())


class Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.kept = [x.double()]
        return x * 1

    @staticmethod
    def backward(ctx, dy):
        return dy


class KeepsACopyOnTheContext(NoNorm):
    def normalize(self, x):
        return Hidden.apply(super().normalize(x))


class ShiftsWithoutAffine(NoNorm):
    def normalize(self, x):
        return super().normalize(x) + (0 if self.affine else 0.5)


class StaysAffine(NoNorm):
    def __init__(self, num_features, *, affine=True, channel_dim=1, device=None, dtype=None):
        super().__init__(num_features, channel_dim=channel_dim, device=device, dtype=dtype)


class LosesAParameter(NoNorm):
    def __init__(self, num_features, *, affine=True, channel_dim=1, device=None, dtype=None):
        super().__init__(num_features, affine=affine, channel_dim=channel_dim, device=device, dtype=dtype)
        self.add_parameter("shift", 0.0 if affine else None)

    def normalize(self, x):
        y = super().normalize(x)
        return y if self.shift is None else y + per_channel(self.shift, x).to(x.dtype)


class IgnoresItsActivation(NoNorm):
    def __init__(self, num_features, *, affine=True, act_layer=None, channel_dim=1, device=None, dtype=None):
        super().__init__(num_features, affine=affine, channel_dim=channel_dim, device=device, dtype=dtype)


class NeverSynchronizes(BatchNorm):
    def normalize(self, x):
        self.sync = False
        return super().normalize(x)


class FailsOnRankOne(BatchNorm):
    def normalize(self, x):
        if torch.distributed.is_initialized() and torch.distributed.get_rank() == 1:
            raise ArithmeticError("rank one cannot")
        return super().normalize(x)


class Waits(BatchNorm):
    def normalize(self, x):
        if torch.distributed.is_initialized() and torch.distributed.get_rank() == 0:
            torch.distributed.barrier()
        return super().normalize(x)


@torch.compiler.disable
def _apart(x: Tensor) -> Tensor:
    return x


class BreaksTheGraph(NoNorm):
    def normalize(self, x):
        return super().normalize(_apart(x))


class ExportsTrainingWrongly(NoNorm):
    def normalize(self, x):
        y = super().normalize(x)
        return y + 1 if self.training and torch.compiler.is_exporting() else y


class ComputesWithTheBatchSize(NoNorm):
    def normalize(self, x):
        return super().normalize(x) * (1 if len(x) == 4 else 2)


class HasNoOnnxFunction(NoNorm):
    def normalize(self, x):
        y = super().normalize(x)
        return y if self.bias is None else y + per_channel(torch.erfinv(0 * self.bias), x).to(x.dtype)


@dataclass(frozen=True)
class Plant:
    """A faulty layer.

    Attributes:
        layer: the factory.
        broken: what is reported, and nothing else.
        text: numbers or words that the message must have, as a regular expression.
        arguments: of ``check_norm``.
    """

    layer: Callable[..., Any]
    broken: str | set[str]
    text: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{'+'.join(sorted(self.names))}-{self.layer.__name__}"

    @property
    def names(self) -> set[str]:
        return {self.broken} if isinstance(self.broken, str) else self.broken


def _other_eps(layer: LayerNorm, x: Tensor) -> Tensor:
    return torch.nn.functional.group_norm(x, 1, layer.weight.double(), layer.bias.double(), 1e-3)


def _identity(layer: NoNorm, x: Tensor) -> Tensor:
    return x + per_channel(layer.bias, x)


def _other_variance(layer: BatchNorm, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    twin = copy.deepcopy(layer)
    return twin(x), {"running_var": twin.running_var + 1e-6}


OFF = r"largest difference \d\S*, allowed \d\S*; at \(.*\) \S+ came out, \S+ was expected"
PLANTS = [
    Plant(also_takes_anything, "signature", r"\*\*_ would hide a mistyped option: the signature is \(num_features"),
    Plant(LayerNorm, "reference", f"training, input .* step 0: output: {OFF}", {"reference": _other_eps}),
    Plant(
        BatchNorm,
        "reference",
        r"training, input .* step 0: running_var afterwards: largest difference 1e-06",
        {"reference": _other_variance},
    ),
    Plant(MoreOfOneSample, "reference", rf"input \(1, 6\) float64, step 0: output: {OFF}", {"reference": _identity}),
    Plant(
        CrashesOnFlatInput, "ranks", r"training, input \(5, 6\) float32: RuntimeError, not a ValueError .* maps only"
    ),
    Plant(RefusesWithoutAShape, "ranks", r"\(2, 6, 2, 3, 2\) float32: the ValueError does not name the shape"),
    Plant(DropsADimension, "ranks", r"training, input \(3, 6, 4\) float32: the output is \(3, 24\) float32"),
    Plant(GradientTooLarge, "gradcheck", r"training, input \(3, 6, 4, 3\) float64: .*numerical:.* analytical:"),
    Plant(ParameterGradientTooLarge, "gradcheck", r"with respect to input 1, *numerical:.* *analytical:"),
    Plant(DifferentiatesOnce, "gradgradcheck", r"training, input .* float64: .*numerical:.* analytical:0.0 "),
    Plant(DifferentiatesTwiceWrongly, "gradgradcheck", r"training, input .* float64: .*numerical:.* *analytical:"),
    Plant(MistakesTheLastChannel, "channel_dim", rf"\(3, 4, 3, 6\) float32, channel_dim=-1: output, transposed: {OFF}"),
    Plant(
        MakesContiguous, "memory_format", r"\(3, 6, 4, 3\) float32, channels_last: the output is not channels_last: s"
    ),
    Plant(CopiesVolumes, "memory_format", r"\(2, 6, 2, 3, 2\) float32: the output is not contiguous: strides \(72, 1,"),
    Plant(ContiguousInBfloat16, "memory_format", r"4, 3\) bfloat16, channels_last: the output is not channels_last: s"),
    Plant(CoarseInFloat16, "half_precision", rf"float16: output, against float32: {OFF}"),
    Plant(HalfParameters, "half_precision", "bias of a layer made with dtype=torch.float16 is torch.float16"),
    Plant(NarrowsItsInput, "mixed_precision", r"float64, float32 layer: the output is \(3, 6, 4, 3\) float32"),
    Plant(WidensItsMean, "mixed_precision", r"float64, float32 layer: running_mean became torch.float64"),
    Plant(RoundsItsInput, "mixed_precision", rf"float64, float32 layer: output, against float64: {OFF}"),
    Plant(CoarseUnderAutocast, "autocast", rf"float32, autocast to bfloat16: output, against float32: {OFF}"),
    Plant(MeanOfSquares, "large_offset", rf"training, input \(8, 6, 8, 8\) float32: output: {OFF}"),
    Plant(NothingOfOneValue, "degenerate", r"input \(1, 6\) float32: output: 6 of 6 values are not finite"),
    Plant(MovesWhatItRefuses, "degenerate", rf"input \(1, 6\) float32, refused: running_var afterwards: {OFF}"),
    Plant(ConstantOfOneValue, "one_value", r"training, input \(1, 6\) float32: the gradient of the input is 0"),
    Plant(
        CollapsesOnOneValue,
        "one_value",
        r"training, input \(1, 6\) float32, a hundred times: the largest output of evaluation went from \d\S* to \d",
    ),
    Plant(EmptyWithoutGradients, "empty", r"input \(0, 6\) float32: gradient of bias: nothing came out, a tensor \(6,"),
    Plant(CountsEmptyBatches, "empty", rf"input \(0, 6\) float32: num_batches_tracked afterwards: {OFF}"),
    Plant(
        TakesIntegers, "bad_input", r"training, input \(3, 6, 4, 3\) int64: accepted, the output is \(3, 6, 4, 3\) fl"
    ),
    Plant(
        TakesMoreChannels, "bad_input", r"input \(3, 7, 4, 3\) float32: accepted, the output is \(3, 6, 4, 3\) float"
    ),
    Plant(TakesMoreChannelsAtTheEnd, "bad_input", r"input \(3, 6, 4, 7\) float32: accepted, the output is"),
    Plant(SilentAboutTheShape, "bad_input", r"ValueError does not have \(3, 7, 4, 3\): bad input"),
    Plant(Remembers, "train_eval", rf"evaluation, input .* float32: seen afterwards: {OFF}"),
    Plant(TrainsDifferently, "train_eval", rf"training, input .* float32: output, against evaluation: {OFF}"),
    Plant(
        LayerNorm,
        "batch_dependence",
        "when the other samples change, a sample's output changes by 0, against batch_statistics=True",
        {"batch_statistics": True},
    ),
    Plant(LooksAtTheBatch, "batch_dependence", r"evaluation, input \(2, 6, 2.* a sample's output changes by 0.0\d+$"),
    Plant(KeepsTheShareOfMomentum, "running_statistics", rf"momentum=0: running_mean afterwards: {OFF}"),
    Plant(BiasedMean, "running_statistics", rf"momentum=1: running_mean, against the batch's mean: {OFF}"),
    Plant(CountsTwice, "num_batches_tracked", r"twice in training and once in evaluation: num_batches_tracked: "),
    Plant(ForgetsTheFirstBatch, "momentum_none", rf"running_mean, against the average of 4 batches' means: {OFF}"),
    Plant(LosesAVariance, "state_dict", rf"running_var after saving and loading: {OFF}"),
    Plant(DoubtsTheCountOfOthers, "state_dict", rf"num_batches_tracked, back from torch.nn.BatchNorm2d: {OFF}"),
    Plant(AnotherVariance, "state_dict", rf"output, against torch.nn.BatchNorm2d of its state: {OFF}"),
    Plant(HoldsALambda, "copies", "pickle: .*lambda"),
    Plant(SharesItsBias, "copies", rf"copy.deepcopy, .*: bias of the original, after a step of the copy: {OFF}"),
    Plant(
        CopiesWithAnotherMomentum,
        {"copies", "fx"},
        rf"copy.deepcopy, training, .*: running_mean of the copy, after a step of it: {OFF}",
    ),
    Plant(CopiesWithAnotherRepr, "copies", r"the copy is CopiesWithAnotherRepr\(copied\), the original .*\(made\)"),
    Plant(ReadsAValue, "meta", r"training, input \(3, 6, 4, 3\) float32 on meta: RuntimeError: .*item\(\)"),
    Plant(ForgetsToReset, "meta", rf"bias after to_empty and reset_parameters: {OFF}"),
    Plant(CountsByAnotherName, "functional_call", rf"the layer's own num_batches_tracked afterwards: {OFF}"),
    Plant(LooksAtShapesInTracing, "fx", r"traced in training: TraceError: .*Let torch.fx record the layer as one call"),
    Plant(StaysInTraining, "fx", rf"traced in training, evaluation, input .* float32: output: {OFF}"),
    Plant(
        GivesAView, "output_overwritten", "relu_ on the output: Output 0 of View(Backward)? is a view and is being modi"
    ),
    Plant(
        KeepsItsOutput, {"output_overwritten", "saved_memory"}, "relu_ on the output: .* modified by an inplace oper"
    ),
    Plant(OverwritesItsInput, "input_kept", rf"training, input .* float32: the input afterwards: {OFF}"),
    Plant(OverwritesItsGradient, "input_kept", rf"\(2, 6, 2, 3, 2\) .* the gradient from above afterwards: {OFF}"),
    Plant(
        CountsRecomputations,
        "checkpointing",
        rf"training, .*, checkpoint\(use_reentrant=False\): num_batches_tracked afterwards: {OFF}",
    ),
    Plant(
        AddsTheRunningMean,
        "checkpointing",
        rf"training, .*, checkpoint\(use_reentrant=False\): gradient of weight: {OFF}",
    ),
    Plant(
        ReadsSavedTensorsTwice,
        "checkpointing",
        r"checkpoint\(use_reentrant=False\): CheckpointError: .* already unpacked once",
    ),
    Plant(
        WritesItsGradientIntoATensor,
        "batched_gradients",
        r"training, .*, is_grads_batched=True: RuntimeError: .*mul.out",
    ),
    Plant(TakesTheFirstOfABatch, "batched_gradients", rf"torch.vmap: gradient of bias: {OFF}"),
    Plant(
        TakesTheFirstOfABatchInChannelsLast,
        "batched_gradients",
        rf"training, input .* channels_last, .*: gradient of bias: {OFF}",
    ),
    Plant(
        KeepsAnIntermediate, "saved_memory", r"663552 bytes in 1 tensors .*, 100% of the input's 663552; allowed 15%"
    ),
    Plant(
        KeepsACopyOnTheContext, "saved_memory", "1327104 bytes in 1 tensors .* are kept for backward, 200% of the in"
    ),
    Plant(ShiftsWithoutAffine, "affine_false", rf"output with affine=False: {OFF}"),
    Plant(StaysAffine, "affine_false", "with affine=False there still is the parameter bias"),
    Plant(LosesAParameter, "affine_false", r"with affine=False the parameters are \[\], with affine \['bias', 'shift'"),
    Plant(IgnoresItsActivation, "activation", rf"act_layer=torch.nn.Tanh: output: {OFF}"),
    Plant(
        NeverSynchronizes, "sync", rf"2 ranks with batches of \(5, 3\), torch.float64: output, rank 0, step 0: {OFF}"
    ),
    Plant(
        FailsOnRankOne, "sync", r"2 ranks: rank 1, batches of \(5, 3\), torch.float64: Traceback [\S\s]*rank one cannot"
    ),
    Plant(Waits, "sync", r"2 ranks: "),
    Plant(BreaksTheGraph, "compile", r"training, input .* float32, compiled: Unsupported: "),
    Plant(ExportsTrainingWrongly, "export", rf"training, input .* float32, exported, step 0: output: {OFF}"),
    Plant(ComputesWithTheBatchSize, "export_dynamic", r"\(4, 6, 4, 3\) float32, exported with a dynamic batch size: "),
    Plant(HasNoOnnxFunction, "onnx", r"evaluation, input .* float32, ONNX: DispatchError: No ONNX function found"),
]


def _reported(plant: Plant, checks: list[str]) -> tuple[set[str], str]:
    with pytest.raises(NormCheckError) as caught:
        check_norm(plant.layer, checks=checks, **plant.arguments)
    text = str(caught.value)
    return {block.split(":")[0].strip() for block in text.split("\n\n")[1:]}, text


@pytest.mark.parametrize("plant", PLANTS, ids=str)
def test_the_fault_is_reported(plant, monkeypatch):
    # One that waits reports after half of the deadline; the others need it on a slow machine.
    monkeypatch.setattr(_distributed, "DEADLINE", 3.0 if plant.layer is Waits else 8.0)
    names, text = _reported(plant, [name for name in CHECKS if name in plant.names])
    assert names == plant.names
    assert all(CHECKS[name].__doc__ in text for name in names)
    assert re.search(plant.text, text), text


@pytest.mark.slow
@pytest.mark.parametrize("plant", PLANTS, ids=str)
def test_nothing_else_is_reported(plant):
    others = [name for name in FAST if name not in plant.names and name != "sync"]
    arguments = {k: v for k, v in plant.arguments.items() if k != "batch_statistics"}
    assert {result.status for result in check_norm(plant.layer, checks=others, **arguments)} <= {"passed", "skipped"}


def test_every_check_has_a_layer_that_breaks_it_alone():
    alone = {plant.broken for plant in PLANTS if isinstance(plant.broken, str)}
    assert CHECKS.keys() - alone == {"no_host_sync"}  # below: on a GPU, and on the CPU in its place


@pytest.mark.parametrize("base", [NoNorm, LayerNorm, BatchNorm])
def test_what_the_faults_are_planted_in_has_none(base):
    check_norm(base, checks=[name for name in FAST if name != "sync"])


@pytest.mark.gpu
def test_a_value_read_on_the_gpu_is_reported():
    with pytest.raises(NormCheckError, match=r"on cuda:0: called a synchronizing CUDA operation"):
        check_norm(ReadsAValue, checks=["no_host_sync"])
    (result,) = check_norm(NoNorm, checks=["no_host_sync"])
    assert result.status == "passed"


@pytest.mark.parametrize("layer", [ReadsAValue, NoNorm])
def test_a_value_read_where_the_cpu_stands_in_for_the_gpu_is_reported(layer, monkeypatch):
    """What CUDA's debug mode does, when a value is read in it."""
    modes, item = ["default"], Tensor.item

    def read(x):
        if modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        return item(x)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(Tensor, "cuda", lambda x: x)
    monkeypatch.setattr(layer, "cuda", lambda module: module)
    monkeypatch.setattr(Tensor, "item", read)
    if layer is NoNorm:
        assert check_norm(layer, checks=["no_host_sync"])[0].status == "passed"
        assert modes.count("error") == 8  # modes and ranks
    else:
        with pytest.raises(
            NormCheckError, match=r"training, input \(3, 6, 4, 3\) .*called a synchronizing CUDA operation"
        ):
            check_norm(layer, checks=["no_host_sync"])
    assert modes[-1] == "default"


def test_without_a_gpu_that_is_skipped(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (result,) = check_norm(ReadsAValue, checks=["no_host_sync"])
    assert (result.status, result.detail) == ("skipped", "there is no CUDA device")


def test_a_factory_that_gives_no_layer_is_reported():
    def nothing(num_features, *, device=None, dtype=None):
        return None

    with pytest.raises(NormCheckError, match="the factory returned None, not a torch.nn.Module"):
        check_norm(nothing, checks=["ranks"])
    assert str(Subject(nothing)) == "nothing(6)"
