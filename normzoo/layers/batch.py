"""Batch normalization and its kin that keep its running mean and variance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from normzoo._shapes import check_input
from normzoo.functional.batch import batch_norm
from normzoo.functional.ghost import ghost_batch_norm
from normzoo.functional.l1 import l1_batch_norm
from normzoo.layers._base import Activation, NormLayer, RunningStatsLayer


class BatchNorm(RunningStatsLayer):
    """Batch normalization: each channel by its mean and variance over batch and space.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``, training with the batch's statistics (biased variance),
    evaluating with running averages (of the unbiased variance), as ``torch.nn.BatchNorm2d``; state dicts go across.

    ``sync=True`` is ``torch.nn.SyncBatchNorm``, also on gloo and for ranks with batches of different size.

    A plain layer (``channel_dim=1``, no ``act_layer``, no ``sync``) is an instance of
    ``torch.nn.modules.batchnorm._BatchNorm``, so that tools that look for it (``update_bn``,
    ``convert_sync_batchnorm``, Lightning's finetuning callbacks) treat the layer as torch's own. Others are none, since
    such tools would drop the activation, or normalize along another dimension. It changes with these attributes.

    With ``track_running_stats = False``, which such tools set, running statistics stay as they are; where
    ``running_mean`` and ``running_var`` are None, evaluation too normalizes by the batch. Both as in torch.

    Use it for convolutional networks at batch sizes of 16 and more for each device. Not for batches of one or
    two, nor where the batches of training and use differ: see ``batch_renorm`` and ``group``.

    Shapes: (N, C), (N, C, L), (N, C, H, W), (N, C, D, H, W) or, with ``channel_dim=-1``, (N, ..., C). The output has
    the shape, dtype and memory format of the input; statistics are float32 at least.

    Args:
        num_features: C.
        eps: added to the variance; 1e-5 as in PyTorch.
        momentum: update rate of the running averages; None for the cumulative average of all batches.
        sync: when training, take statistics over all ranks: R ranks of batch b are then one of batch R * b.
        affine: learn ``weight`` and ``bias``, each (C,).
        act_layer: makes the activation that follows, such as ``torch.nn.ReLU``; None for none.
        channel_dim: 1 for (N, C, ...), -1 for (N, ..., C).
        device: where parameters and buffers are made.
        dtype: of parameters and buffers, which are float32 at least.

    Raises:
        ValueError: on input of another channel count, or of one value per channel when training.

    Source: Ioffe & Szegedy 2015, arXiv 1502.03167; defaults as in PyTorch.

    Example:
        >>> import torch
        >>> BatchNorm(3)(torch.randn(8, 3, 4, 4)).mean((0, 2, 3)).abs().max().item() < 1e-6
        True
    """

    track_running_stats = True

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in ("channel_dim", "act", "sync"):
            self._choose_class()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._choose_class()

    def _choose_class(self) -> None:
        """Make a plain layer a PlainBatchNorm, and any other not; subclasses of users stay what they are."""
        if type(self) in (BatchNorm, PlainBatchNorm) and "sync" in vars(self):  # which is set last
            plain = self.channel_dim == 1 and self.act is None and not self.sync
            self.__class__ = PlainBatchNorm if plain else BatchNorm

    def extra_repr(self) -> str:
        """The options, and whether a tool has ended the tracking of running statistics."""
        return super().extra_repr() + ", track_running_stats=False" * (not self.track_running_stats)

    def reset_running_stats(self) -> None:
        """Set the running mean to 0, the running variance to 1 and the count to 0, if they are tracked, as torch."""
        if self.track_running_stats:
            super().reset_running_stats()

    def normalize(self, x: Tensor) -> Tensor:
        """Apply the layer to checked input."""
        tracking = self.track_running_stats
        mean, var = (self.running_mean, self.running_var) if tracking or not self.training else (None, None)
        moving = self.training and mean is not None
        y = batch_norm(
            x,
            mean,
            var,
            self.weight,
            self.bias,
            training=self.training or (mean is None and var is None),
            momentum=self.update_rate() if moving else 0.0,
            eps=self.eps,
            sync=self.sync and self.training,
        )
        if tracking:
            self.count_batch()
        return y


class PlainBatchNorm(BatchNorm, _BatchNorm):  # type: ignore[misc]  # which may have None for tensors
    """The class of a :class:`BatchNorm` that is plain, which makes it an instance of torch's ``_BatchNorm`` as well.

    Only the type differs: all that the layer does is defined by :class:`BatchNorm`.
    """

    _registered_as = "BatchNorm"

    def _check_input_dim(self, input: Tensor) -> None:
        check_input(input, self.num_features, self.channel_dim, type(self).__name__)


PlainBatchNorm.__name__ = "BatchNorm"  # in printed models and messages; pickle goes by __qualname__


class FrozenBatchNorm(NormLayer):
    """Batch normalization by fixed statistics, with nothing to learn: a scale and shift of each channel.

    ``y = (x - running_mean) / sqrt(running_var + eps) * weight + bias``, all four of them buffers, in training as in
    evaluation. State dicts go to and from ``torch.nn.BatchNorm2d`` and torchvision's ``FrozenBatchNorm2d``.

    Use it to fine-tune a pretrained network on few images at a time, as detectors do. Made afresh it is the identity;
    it means something only with statistics loaded into it.

    Shapes: (N, C), (N, C, L), (N, C, H, W), (N, C, D, H, W) or, with ``channel_dim=-1``, (N, ..., C). The output has
    the shape, dtype and memory format of the input; statistics are float32 at least.

    Args:
        num_features: C.
        eps: added to the variance; 1e-5 as in PyTorch.
        affine: keep ``weight`` and ``bias``, each (C,), as buffers.
        act_layer: makes the activation that follows, such as ``torch.nn.ReLU``; None for none.
        channel_dim: 1 for (N, C, ...), -1 for (N, ..., C).
        device: where parameters and buffers are made.
        dtype: of parameters and buffers, which are float32 at least.

    Raises:
        ValueError: on input of another channel count.

    Source: He, Zhang, Ren & Sun 2016, arXiv 1512.03385, section 4.3 and appendix A (fixed statistics in detection).

    Example:
        >>> list(FrozenBatchNorm(3).parameters())
        []
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        affine: bool = True,
        act_layer: Activation | None = None,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features,
            eps=eps,
            affine=False,
            act_layer=act_layer,
            channel_dim=channel_dim,
            device=device,
            dtype=dtype,
        )
        self.affine = affine
        for name, value in (("weight", 1.0), ("bias", 0.0)):
            del self._parameters[name]
            held = torch.full((num_features,), value, **self._placement) if affine else None
            self.register_buffer(name, held)
        self.register_buffer("running_mean", torch.zeros(num_features, **self._placement))
        self.register_buffer("running_var", torch.ones(num_features, **self._placement))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long, device=device))

    def reset_parameters(self) -> None:
        """Make the layer the identity, up to eps."""
        for name, held in self.named_buffers():
            held.fill_(1 if name in ("weight", "running_var") else 0)

    def normalize(self, x: Tensor) -> Tensor:
        """Apply the layer to checked input."""
        return batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class GhostBatchNorm(RunningStatsLayer):
    """Ghost batch normalization: batch norm of virtual batches, for large batches that generalize like small ones.

    The batch is cut into virtual batches of ``ghost_size`` consecutive samples, of which the last one may be smaller,
    and each is normalized by its own mean and (biased) variance as in batch norm. Evaluation uses running averages.

    The running statistics move once for each batch, towards the average of the virtual batches' means and unbiased
    variances, so that evaluation does not depend on their number; the paper's algorithm moves them once for each
    virtual batch. Keras' ``virtual_batch_size`` and the ghost norm of Page's CIFAR-10 networks interleave samples
    instead of taking consecutive ones, which is the same for shuffled data.

    Use it for large batches on one device, as a regularizer. Under several ranks each already has a batch of its own.

    Shapes: (N, C), (N, C, L), (N, C, H, W), (N, C, D, H, W) or, with ``channel_dim=-1``, (N, ..., C). The output has
    the shape, dtype and memory format of the input; statistics are float32 at least.

    Args:
        num_features: C.
        ghost_size: samples of a virtual batch; 128 in the paper's experiments with batches of 4,096.
        eps: added to the variance.
        momentum: update rate of the running averages; None for the cumulative average of all batches.
        affine: learn ``weight`` and ``bias``, each (C,).
        act_layer: makes the activation that follows, such as ``torch.nn.ReLU``; None for none.
        channel_dim: 1 for (N, C, ...), -1 for (N, ..., C).
        device: where parameters and buffers are made.
        dtype: of parameters and buffers, which are float32 at least.

    Raises:
        ValueError: for a ghost_size below 1; when training, if a virtual batch has one value per channel; on input of
            another channel count.

    Source: Hoffer, Hubara & Soudry 2017, arXiv 1705.08741, algorithm 1.

    Example:
        >>> y = GhostBatchNorm(3, ghost_size=4)(torch.randn(10, 3, 8, 8))
        >>> y[4:8].mean((0, 2, 3)).abs().max().item() < 1e-6
        True
    """

    def __init__(
        self,
        num_features: int,
        *,
        ghost_size: int = 32,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        act_layer: Activation | None = None,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features,
            eps=eps,
            momentum=momentum,
            affine=affine,
            act_layer=act_layer,
            channel_dim=channel_dim,
            device=device,
            dtype=dtype,
        )
        if ghost_size < 1:
            raise ValueError(f"ghost_size must be at least 1, not {ghost_size}")
        self.ghost_size = ghost_size

    def normalize(self, x: Tensor) -> Tensor:
        """Apply the layer to checked input."""
        y = ghost_batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            training=self.training,
            momentum=self.update_rate(),
            eps=self.eps,
            ghost_size=self.ghost_size,
        )
        self.count_batch()
        return y


class L1BatchNorm(RunningStatsLayer):
    """Batch normalization by the mean absolute deviation in place of the standard deviation.

    ``y = (x - mean) / (s + eps) * weight + bias`` with ``s = sqrt(pi / 2) * mean(|x - mean|)``, the standard deviation
    of a normal distribution of that mean absolute deviation. Evaluation uses running averages of mean and s.

    ``running_var`` holds the square of the average of s, so that it means what it means in BatchNorm2d; eps is added
    to s, outside any root. The authors' modules average s or 1 / s, start at 0 and keep a share of ``momentum`` of the
    old value; here it is torch's update rate, and the start is 1.

    Use it in low precision, where squares overflow or lose digits, and against outliers, which weigh less.

    Shapes: (N, C), (N, C, L), (N, C, H, W), (N, C, D, H, W) or, with ``channel_dim=-1``, (N, ..., C). The output has
    the shape, dtype and memory format of the input; statistics are float32 at least.

    Args:
        num_features: C.
        eps: added to s; 1e-5 as in the authors' code.
        momentum: update rate of the running averages; None for the cumulative average of all batches.
        sync: when training, take statistics over all ranks: R ranks of batch b are then one of batch R * b.
        affine: learn ``weight`` and ``bias``, each (C,).
        act_layer: makes the activation that follows, such as ``torch.nn.ReLU``; None for none.
        channel_dim: 1 for (N, C, ...), -1 for (N, ..., C).
        device: where parameters and buffers are made.
        dtype: of parameters and buffers, which are float32 at least.

    Raises:
        ValueError: on input of another channel count, or of one value per channel when training.

    Source: Hoffer, Banner, Golan & Soudry 2018, arXiv 1803.01814, section 4.

    Example:
        >>> y = L1BatchNorm(3)(torch.randn(8, 3, 16, 16))
        >>> (y.abs().mean((0, 2, 3)) * 1.2533 - 1).abs().max().item() < 1e-3
        True
    """

    def normalize(self, x: Tensor) -> Tensor:
        """Apply the layer to checked input."""
        y = l1_batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            training=self.training,
            momentum=self.update_rate(),
            eps=self.eps,
            sync=self.sync,
        )
        self.count_batch()
        return y
