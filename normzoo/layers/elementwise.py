"""Layers without statistics: functions of each value alone."""

from __future__ import annotations

import torch
from torch import Tensor

from normzoo.functional.elementwise import channel_scale_shift, dynamic_erf, dynamic_tanh
from normzoo.layers._base import Activation, NormLayer


class Affine(NormLayer):
    """A learnt scale and shift of each channel, in the place of normalization.

    ``y = x * weight + bias``. There are no statistics, so training and evaluation are the same and the layer folds
    into the convolution or linear layer beside it.

    ResMLP uses it before and after each block, the one after with a small initial weight. Use it as the control that
    tells normalization from its parameters, and in networks that are stable without. At large learning rates it does
    not help: activations grow as without normalization.

    Shapes: (N, C), (N, C, L), (N, C, H, W), (N, C, D, H, W) or, with ``channel_dim=-1``, (N, ..., C). The output has
    the shape, dtype and memory format of the input; statistics are float32 at least.

    Args:
        num_features: C.
        weight_init: initial ``weight``; 1 as before ResMLP's blocks, after them 0.1 to 1e-6 by depth.
        affine: learn ``weight`` and ``bias``, each (C,); without them the layer returns a copy of its input.
        act_layer: makes the activation that follows, such as ``torch.nn.ReLU``; None for none.
        channel_dim: 1 for (N, C, ...), -1 for (N, ..., C).
        device: where parameters are made.
        dtype: of parameters, which are float32 at least.

    Raises:
        ValueError: on input of another channel count.

    Source: Touvron et al. 2021, arXiv 2105.03404, equation 1.

    Example:
        >>> Affine(3)(torch.ones(1, 3, 2, 2)).mean().item()
        1.0
    """

    def __init__(
        self,
        num_features: int,
        *,
        weight_init: float = 1.0,
        affine: bool = True,
        act_layer: Activation | None = None,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features,
            affine=affine,
            act_layer=act_layer,
            channel_dim=channel_dim,
            device=device,
            dtype=dtype,
        )
        self.weight_init = weight_init
        if affine:
            self.add_parameter("weight", weight_init)

    def normalize(self, x: Tensor) -> Tensor:
        """Apply the layer to checked input."""
        return channel_scale_shift(x, self.weight, self.bias)


class DynamicTanh(NormLayer):
    """Dynamic tanh (DyT): a saturating function with a learnt slope, in the place of layer normalization.

    ``y = tanh(alpha * x) * weight + bias``, alpha one number for the layer. There are no statistics, so training and
    evaluation are the same. State dicts go to and from the authors' module: ``alpha`` has shape (1,).

    Use it in transformers in the place of ``layer_channel`` or ``rms``; the authors tune alpha's initial value for
    language models only (larger before attention than elsewhere). Not in convolutional networks that had batch norm:
    the authors found it to lose accuracy there.

    On a CPU tanh is taken as ``2 * sigmoid(2 z) - 1``, which is ten times as fast there and off by at most 1.2e-7 in
    float32; elsewhere it is torch's.

    Shapes: (N, C), (N, C, L), (N, C, H, W), (N, C, D, H, W) or, with ``channel_dim=-1``, (N, ..., C). The output has
    the shape, dtype and memory format of the input; statistics are float32 at least.

    Args:
        num_features: C.
        alpha_init: initial ``alpha``; 0.5 as in the paper.
        affine: learn ``weight`` and ``bias``, each (C,); ``alpha`` is learnt in any case.
        act_layer: makes the activation that follows, such as ``torch.nn.ReLU``; None for none.
        channel_dim: 1 for (N, C, ...), -1 for (N, ..., C).
        device: where parameters are made.
        dtype: of parameters, which are float32 at least.

    Raises:
        ValueError: on input of another channel count.

    Source: Zhu, Chen, He, LeCun & Liu 2025, arXiv 2503.10622, equation 1.

    Example:
        >>> DynamicTanh(3)(torch.full((1, 3), 1e4)).tolist()
        [[1.0, 1.0, 1.0]]
    """

    alpha: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        alpha_init: float = 0.5,
        affine: bool = True,
        act_layer: Activation | None = None,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features,
            affine=affine,
            act_layer=act_layer,
            channel_dim=channel_dim,
            device=device,
            dtype=dtype,
        )
        self.alpha_init = alpha_init
        self.add_parameter("alpha", alpha_init, size=1)

    def normalize(self, x: Tensor) -> Tensor:
        """Apply the layer to checked input."""
        return dynamic_tanh(x, self.alpha, self.weight, self.bias)


class DynamicErf(NormLayer):
    """Dynamic erf (Derf): the error function with a learnt slope and shift, in the place of layer normalization.

    ``y = erf(alpha * x + shift) * weight + bias``, alpha and shift one number each for the layer. There are no
    statistics, so training and evaluation are the same. State dicts go to and from the authors' module. Unlike
    ``dynamic_tanh`` it has a shift inside, and its slope at 0 is 2 / sqrt(pi) times as steep for the same alpha.

    Use it where ``dynamic_tanh`` is used; the authors report it to be better in vision, speech and DNA models.

    Shapes: (N, C), (N, C, L), (N, C, H, W), (N, C, D, H, W) or, with ``channel_dim=-1``, (N, ..., C). The output has
    the shape, dtype and memory format of the input; statistics are float32 at least.

    Args:
        num_features: C.
        alpha_init: initial ``alpha``; 0.5 as in the authors' code (1 in their largest diffusion model).
        shift_init: initial ``shift``.
        affine: learn ``weight`` and ``bias``, each (C,); ``alpha`` and ``shift`` are learnt in any case.
        act_layer: makes the activation that follows, such as ``torch.nn.ReLU``; None for none.
        channel_dim: 1 for (N, C, ...), -1 for (N, ..., C).
        device: where parameters are made.
        dtype: of parameters, which are float32 at least.

    Raises:
        ValueError: on input of another channel count.

    Source: Chen, Lu, Zhu, Sun & Liu 2025, arXiv 2512.10938.

    Example:
        >>> DynamicErf(3)(torch.zeros(1, 3)).tolist()
        [[0.0, 0.0, 0.0]]
    """

    alpha: Tensor
    shift: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        alpha_init: float = 0.5,
        shift_init: float = 0.0,
        affine: bool = True,
        act_layer: Activation | None = None,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features,
            affine=affine,
            act_layer=act_layer,
            channel_dim=channel_dim,
            device=device,
            dtype=dtype,
        )
        self.alpha_init, self.shift_init = alpha_init, shift_init
        self.add_parameter("alpha", alpha_init, size=1)
        self.add_parameter("shift", shift_init, size=1)

    def normalize(self, x: Tensor) -> Tensor:
        """Apply the layer to checked input."""
        return dynamic_erf(x, self.alpha, self.shift, self.weight, self.bias)
