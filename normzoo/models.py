"""timm models with any norm of the zoo, and the CIFAR ResNets of He et al. 2016, registered with timm."""

# No annotation here is a string: torch.fx of torch 2.12 cannot pickle a model whose forward has such annotations.
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock
from torch import Tensor, nn

from normzoo._errors import UnknownNameError, near_matches
from normzoo.changes import CountReport
from normzoo.convert import convert_norms
from normzoo.convert._convert import standardize
from normzoo.convert._replace import NormSpec, target_norm
from normzoo.registry import weight_method

default_cfgs = generate_default_cfgs(
    {
        f"resnet{depth}_cifar.untrained": {
            "num_classes": 10,
            "input_size": (3, 32, 32),
            "pool_size": (8, 8),
            "mean": (0.4914, 0.4822, 0.4465),
            "std": (0.2470, 0.2435, 0.2616),
            "first_conv": "conv1",
            "classifier": "fc",
        }
        for depth in (20, 32, 44, 56, 110)
    }
)


class PadShortcut(nn.Module):
    """Parameter-free shortcut: every ``stride``-th position, with zero channels appended (He et al., option A)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.extra = out_channels - in_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) -> (N, out, ceil(H / stride), ceil(W / stride))."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))


class CifarResNet(nn.Module):
    """The CIFAR ResNet of He et al. 2016: 6n+2 layers in three stages of 16, 32 and 64 channels.

    Built from timm's ``BasicBlock``. Convolutions start from He et al.'s normal initialization (fan out), or from
    Glorot & Bengio's; the last norm of each block starts at one, as in the paper. Without norms activations of the
    former triple their variance in each block, so that ResNet-110 starts with losses beyond 10^8; of the latter they
    grow by half.

    Args:
        depth: number of layers, 6n+2.
        num_classes: outputs; 0 for features.
        in_chans: channels of the images.
        norm_layer: makes a norm from a channel count.
        shortcut: ``"pad"``, parameter-free (option A), or ``"projection"``, 1x1 convolution and norm (option B).
        drop_rate: dropout before the classifier.
        init: initialization of the convolutions, ``"kaiming"`` or ``"xavier"``, both normal.
        device: where parameters are made.
        dtype: of parameters.

    Raises:
        ValueError: for a depth that is not 6n+2, an unknown shortcut, or an unknown initialization.

    Source: He, Zhang, Ren & Sun 2016, arXiv 1512.03385, section 4.2; Glorot & Bengio 2010, eq. 12.
    """

    def __init__(
        self,
        depth: int,
        num_classes: int = 10,
        in_chans: int = 3,
        norm_layer: Any = nn.BatchNorm2d,
        shortcut: str = "pad",
        drop_rate: float = 0.0,
        init: str = "kaiming",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"a CIFAR ResNet has 6n+2 layers (20, 32, 44, 56, 110, ...), not {depth}")
        if shortcut not in ("pad", "projection"):
            raise ValueError(f"shortcut must be 'pad' or 'projection', not {shortcut!r}")
        if init not in ("kaiming", "xavier"):
            raise ValueError(f"init must be 'kaiming' or 'xavier', not {init!r}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_classes, self.num_features, self.drop_rate = num_classes, 64, drop_rate
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False, **factory)
        self.bn1 = norm_layer(16, **factory)
        self.act1 = nn.ReLU(inplace=True)
        self.feature_info = [{"num_chs": 16, "reduction": 1, "module": "act1"}]
        channels, stages = 16, []
        for stage, width in enumerate((16, 32, 64), start=1):
            blocks = []
            for i in range((depth - 2) // 6):
                stride = 2 if i == 0 and stage > 1 else 1
                downsample: nn.Module | None = None
                if stride > 1 and shortcut == "pad":
                    downsample = PadShortcut(channels, width, stride)
                elif stride > 1:
                    projection = nn.Conv2d(channels, width, 1, stride=stride, bias=False, **factory)
                    downsample = nn.Sequential(projection, norm_layer(width, **factory))
                blocks.append(BasicBlock(channels, width, stride, downsample, norm_layer=norm_layer, **factory))
                channels = width
            stages.append(nn.Sequential(*blocks))
            self.feature_info.append({"num_chs": width, "reduction": 2 ** (stage - 1), "module": f"layer{stage}"})
        self.layer1, self.layer2, self.layer3 = stages
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes, **factory) if num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and init == "xavier":
                nn.init.xavier_normal_(module.weight)
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def get_classifier(self) -> nn.Module:
        """The final linear layer."""
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the final linear layer by a fresh one of ``num_classes`` outputs, or none for 0."""
        self.num_classes = num_classes
        where: dict[str, Any] = {"device": self.conv1.weight.device, "dtype": self.conv1.weight.dtype}
        self.fc = nn.Linear(64, num_classes, **where) if num_classes else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) -> (N, 64, H/4, W/4)."""
        x = self.act1(self.bn1(self.conv1(x)))
        for stage in (self.layer1, self.layer2, self.layer3):
            x = stage(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(N, 64, h, w) -> (N, num_classes), or (N, 64) with ``pre_logits``."""
        x = F.dropout(self.global_pool(x).flatten(1), self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) -> (N, num_classes)."""
        return self.forward_head(self.forward_features(x))


def _build(depth: int, pretrained: bool, **kwargs: Any) -> nn.Module:
    features = {"out_indices": kwargs.pop("out_indices", (0, 1, 2, 3))}
    return build_model_with_cfg(
        CifarResNet, f"resnet{depth}_cifar", pretrained, depth=depth, feature_cfg=features, **kwargs
    )


@register_model
def resnet20_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-20 for 32x32 images, 0.27 M parameters."""
    return _build(20, pretrained, **kwargs)


@register_model
def resnet32_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-32 for 32x32 images, 0.46 M parameters."""
    return _build(32, pretrained, **kwargs)


@register_model
def resnet44_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-44 for 32x32 images, 0.66 M parameters."""
    return _build(44, pretrained, **kwargs)


@register_model
def resnet56_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-56 for 32x32 images, 0.85 M parameters."""
    return _build(56, pretrained, **kwargs)


@register_model
def resnet110_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-110 for 32x32 images, 1.7 M parameters."""
    return _build(110, pretrained, **kwargs)


def create_model(name: str, norm: NormSpec | None = None, **timm_kwargs: Any) -> nn.Module:
    """A timm model with a norm of the zoo.

    The model is made as ``timm.create_model`` makes it, with its weights if ``pretrained``, and then converted by
    :func:`normzoo.convert_norms`: what the norms hold is carried over, scales that start at zero start there still,
    and other weights depend on the seed and not on the norm. Channels are found where each layer has them, so that
    transformers and ConvNeXts need no option.

    Args:
        name: any architecture of timm's, the CIFAR ResNets of this package included.
        norm: a name (``"group"``), a mapping with its options (``{"name": "group", "groups": 8}``) or a factory;
            None keeps the model's own norms. ``"group+ws"``, with any norm before the plus, also standardizes the
            weights of convolutions; ``"scaled_ws"`` does so in the place of norms. ``groups`` becomes the largest
            divisor of a layer's channels that is not above it, by default 32 or that of the model's own layer.
        **timm_kwargs: as for ``timm.create_model`` (``num_classes``, ``in_chans``, ``pretrained``, ...).

    Raises:
        UnknownNameError: a ValueError, for an unknown model or norm, with the nearest names.
        TypeError: for an option that the norm does not have.
        ValueError: if the model has no norm layers, or the norm or its options do not go with one of them; if weights
            cannot be standardized.

    Example:
        >>> model = create_model("resnet20_cifar", {"name": "group", "groups": 8}, num_classes=10)
        >>> model.bn1
        GroupNorm(16, eps=1e-05, affine=True, groups=8)
    """
    if ":" not in name and not timm.is_model(name):  # hf-hub:..., local-dir:...
        near = near_matches(name, timm.list_models())
        hint = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
        raise UnknownNameError(f"{name!r} is not a timm model{hint} (timm.list_models() lists them)")
    if norm is None:
        return timm.create_model(name, **timm_kwargs)
    if "norm_layer" in timm_kwargs:
        raise ValueError("pass the norm as norm= or as norm_layer=, not both")
    target_norm(norm, None)  # its errors, before weights are loaded
    model = timm.create_model(name, **timm_kwargs)
    convert_norms(model, norm)
    return model


def standardize_weights(model: nn.Module, method: str = "ws", **options: Any) -> CountReport:
    """Make every convolution of a model standardize its weights, in place; see ``normzoo.layers.weight``.

    Args:
        model: any module.
        method: ``"ws"`` or ``"scaled_ws"``.
        **options: of the method: ``eps``, ``unbiased``, ``eps_on_std``; ``eps``, ``gamma``, ``clamp``.

    Returns:
        a report (:class:`normzoo.layers.weight.StandardizationReport`) of the convolutions that were changed.

    Raises:
        UnknownNameError: a ValueError, for an unknown method.
        ValueError: for options of the other method, and a model with no convolutions or some that cannot be changed.
    """
    return standardize(model, weight_method(method), **options)
