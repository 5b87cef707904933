"""Convolutions whose weights are standardized."""

# No annotation here is a string: torch.fx of torch 2.12 cannot pickle a model whose forward has such annotations.
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from normzoo.changes import CountReport
from normzoo.functional.weight import scale_weight, standardize_weight
from normzoo.layers._leaf import Leaf


class StandardizedConv(Leaf):
    """Weight standardization: a convolution whose filters have mean 0 and variance 1.

    ``w' = (w - mean) / sqrt(var + eps)`` over the weights of each output filter; the convolution is by w', the
    parameter is w. There is no state, and training and evaluation are the same. It is used with a normalization of
    activations after it, group normalization above all (``norm="group+ws"``), and makes that as good as batch norm for
    large images and small batches; batch norm gains from it too.

    This class is mixed into a convolution by :func:`standardize_weights`, which changes convolutions where they stand:
    parameters, their names and state dicts stay as they were. The default is timm's rule; for weights trained with
    other code see :func:`normzoo.functional.weight.standardize_weight`.

    Source: Qiao, Wang, Liu, Shen & Yuille 2019, arXiv 1903.10520.
    """

    weight: Tensor
    bias: Tensor | None
    rule: dict[str, Any]

    def standardized_weight(self) -> Tensor:
        """The weight that the convolution applies, of the shape of ``weight``."""
        return standardize_weight(self.weight, **self.rule)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``x`` with the standardized weight."""
        if isinstance(x, Proxy):
            return self.recorded(x.tracer, (x,))
        return self._conv_forward(  # type: ignore[operator]
            x, self.standardized_weight(), self.bias
        )

    def extra_repr(self) -> str:
        """What ``print(layer)`` shows."""
        return ", ".join([super().extra_repr(), *(f"{k}={v!r}" for k, v in self.rule.items())])


class ScaledConv(StandardizedConv):
    """Scaled weight standardization: a convolution that keeps the variance of its input, for networks without norms.

    ``w' = gain * gamma / sqrt(fan_in) * (w - mean) / sqrt(var + eps)`` with a learnt ``gain`` for each output
    filter, initially 1. With ``gamma`` the gain of the nonlinearity before it, signals neither grow nor shrink with
    depth, which is half of what batch norm does; the other half, small residual branches, is up to the network
    (NFNets multiply them by constants).

    ``norm="scaled_ws"`` makes the convolutions of a model so and its norms learnt biases.

    Source: Brock, De & Smith 2021, arXiv 2101.08692; timm's form, the NFNet authors' with ``clamp=True, eps=1e-4``.
    """

    gain: Tensor

    def standardized_weight(self) -> Tensor:
        """The weight that the convolution applies, of the shape of ``weight``."""
        return scale_weight(self.weight, self.gain, **self.rule)


class StandardizedConv1d(StandardizedConv, nn.Conv1d):
    """:class:`StandardizedConv` of sequences."""


class StandardizedConv2d(StandardizedConv, nn.Conv2d):
    """:class:`StandardizedConv` of images."""


class StandardizedConv3d(StandardizedConv, nn.Conv3d):
    """:class:`StandardizedConv` of volumes."""


class ScaledConv1d(ScaledConv, nn.Conv1d):
    """:class:`ScaledConv` of sequences."""


class ScaledConv2d(ScaledConv, nn.Conv2d):
    """:class:`ScaledConv` of images."""


class ScaledConv3d(ScaledConv, nn.Conv3d):
    """:class:`ScaledConv` of volumes."""


_CLASSES: dict[str, dict[type[nn.Module], type[StandardizedConv]]] = {
    "ws": {nn.Conv1d: StandardizedConv1d, nn.Conv2d: StandardizedConv2d, nn.Conv3d: StandardizedConv3d},
    "scaled_ws": {nn.Conv1d: ScaledConv1d, nn.Conv2d: ScaledConv2d, nn.Conv3d: ScaledConv3d},
}


@dataclass
class StandardizedSite:
    """One convolution that standardizes its weights.

    Attributes:
        name: its dotted name.
        old: its class before.
        new: its class now.
        filters: how many filters it has, each of which is standardized by itself.
    """

    name: str
    old: str
    new: str
    filters: int


@dataclass(eq=False, repr=False)
class StandardizationReport(CountReport):
    """What :func:`standardize_weights` did; see :class:`normzoo.changes.ChangeReport`.

    Attributes:
        changed: one :class:`StandardizedSite` for each convolution.
        left: empty, as a convolution whose weights cannot be standardized is an error.
        method: ``"ws"`` or ``"scaled_ws"``.
    """

    changed: list[StandardizedSite] = field(default_factory=list)
    method: str = ""

    _function: ClassVar[str] = "standardize_weights"

    def _title(self) -> str:
        return f"{len(self)} convolutions standardize their weights ({self.method})"

    def _headings(self) -> tuple[str, ...]:
        return ("site", "from", "to", "filters")

    def _row(self, site: StandardizedSite) -> tuple[str, ...]:
        return (site.name, site.old, site.new, str(site.filters))


def standardize_weights(
    model: nn.Module,
    method: str = "ws",
    *,
    eps: float | None = None,
    unbiased: bool = False,
    eps_on_std: bool = False,
    gamma: float = 1.0,
    clamp: bool = False,
) -> StandardizationReport:
    """Make every convolution of a model standardize its weights, in place.

    Args:
        model: any module; ``torch.nn.Conv1d``, ``Conv2d`` and ``Conv3d`` in it are changed.
        method: ``"ws"``, weight standardization, or ``"scaled_ws"``, scaled weight standardization.
        eps: 1e-6 by default, with ``clamp`` 1e-4.
        unbiased: for ``"ws"``, see :func:`normzoo.functional.weight.standardize_weight`.
        eps_on_std: for ``"ws"``, likewise.
        gamma: for ``"scaled_ws"``, see :func:`normzoo.functional.weight.scale_weight`.
        clamp: for ``"scaled_ws"``, likewise.

    Returns:
        a :class:`StandardizationReport`: the convolutions that were changed.

    Raises:
        ValueError: for an unknown method, options of the other method, a model without convolutions, one with
            convolutions of another class or with filters of a single weight. The model is then as it was.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> len(standardize_weights(model, "scaled_ws", gamma=1.7139588594436646))
        1
        >>> model[0].standardized_weight().mean((1, 2, 3)).abs().max().item() < 1e-6
        True
    """
    if method not in _CLASSES:
        raise ValueError(f"method must be one of {', '.join(map(repr, _CLASSES))}, not {method!r}")
    if (gamma != 1.0 or clamp) if method == "ws" else (unbiased or eps_on_std):
        others = "gamma and clamp" if method == "ws" else "unbiased and eps_on_std"
        raise ValueError(f"{others} are not options of {method!r}")
    eps = (1e-4 if clamp else 1e-6) if eps is None else eps
    rule = {"eps": eps, "unbiased": unbiased, "eps_on_std": eps_on_std}
    if method == "scaled_ws":
        rule = {"eps": eps, "gamma": gamma, "clamp": clamp}
    found = {name: m for name, m in model.named_modules() if isinstance(m, nn.modules.conv._ConvNd)}
    if not found:
        raise ValueError(f"{type(model).__name__} has no convolutions whose weights could be standardized")
    for name, conv in found.items():
        if isinstance(conv, StandardizedConv):
            raise ValueError(f"the weights of the convolution {name!r} are standardized already")
        if type(conv) not in _CLASSES[method]:
            raise ValueError(
                f"the convolution {name!r} is a {type(conv).__name__}, whose weights cannot be standardized"
            )
        if conv.weight[0].numel() < 2:
            raise ValueError(f"the filters of the convolution {name!r} have a single weight, which would become 0")
    changed = []
    for name, conv in found.items():
        was = type(conv).__name__
        conv.__class__ = _CLASSES[method][type(conv)]  # type: ignore[assignment]
        conv.__dict__["rule"] = rule
        if method == "scaled_ws":
            conv.gain = nn.Parameter(torch.ones_like(conv.weight[:, 0].flatten(1)[:, 0]))
        changed.append(StandardizedSite(name or was, was, type(conv).__name__, len(conv.weight)))
    return StandardizationReport(changed, [], method)
