"""Which parameters take weight decay."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from typing import Any

from torch import nn

from normzoo._errors import near_matches
from normzoo.convert import ConversionReport
from normzoo.convert._sites import recognised_norms
from normzoo.recognition import is_a, is_norm


def param_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    decay_biases: bool = False,
    spare: str | Iterable[str] = (),
    use_no_weight_decay: bool = False,
    recognise: bool | ConversionReport = False,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer, so that weight decay leaves the normalization layers alone.

    Decay of a weight that a normalization follows only changes its learning rate; decay of the scale after it changes
    the function, drawing it towards zero. The group without decay holds

    - all parameters of normalization layers, whatever they are called (``weight``, ``v``, ``tau``, ``alpha``,
      ``gate``): those of torch, torchvision, timm and the zoo, registered ones, and their subclasses;
    - the gains of convolutions with scaled weight standardization;
    - biases, unless ``decay_biases``: parameters called ``bias``, ``bias_*`` or ``*_bias``;
    - parameters whose names match ``spare``, or that the model names itself, with ``use_no_weight_decay``.

    Everything else decays, embeddings and class tokens too.

    Args:
        model: any module.
        weight_decay: of the first group.
        decay_biases: whether biases outside of normalization layers decay.
        spare: names of further parameters without decay, or patterns of names (as of ``fnmatch``), such as
            ``"*.pos_embed"``.
        use_no_weight_decay: whether to leave out of decay what modules name in a method ``no_weight_decay()``, as
            timm's models do with position embeddings and class tokens; a model inside another module counts as well.
        recognise: whether modules of unknown classes that compute a norm are normalization layers too: True to try
            each (see :func:`normzoo.convert_norms`), or the report of a conversion that recognised them.

    Returns:
        ``[{"params": [...], "weight_decay": weight_decay}, {"params": [...], "weight_decay": 0.0}]``, of which one
        that would be empty is left out. Each parameter that requires a gradient is in one of them, once, in the
        order of the model.

    Raises:
        ValueError: if no parameter requires a gradient, for a negative weight_decay, or if a pattern of ``spare``
            matches no parameter.

    Source: Goyal et al. 2017, arXiv 1706.02677, section 5.1 (none on batch norm's); Brock, De, Smith & Simonyan 2021,
    arXiv 2102.06171 (none on gains and biases).

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> groups = param_groups(model, 0.05)
        >>> [(len(g["params"]), g["weight_decay"]) for g in groups]
        [(1, 0.05), (3, 0.0)]
        >>> import torch
        >>> optimizer = torch.optim.AdamW(groups, lr=1e-3)
    """
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must not be negative, got {weight_decay}")
    recognised = recognised_norms(model, recognise)
    spared = {
        id(param)
        for module in model.modules()
        for name, param in module.named_parameters(recurse=False)
        if module in recognised or is_norm(module) or _is_gain(module, name) or (not decay_biases and _is_bias(name))
    }
    named = dict(model.named_parameters(remove_duplicate=False))
    patterns = [*_checked_patterns(spare, named), *(_own_patterns(model) if use_no_weight_decay else ())]
    spared |= {id(p) for name, p in named.items() if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)}
    trained = [param for param in model.parameters() if param.requires_grad]  # a shared one comes once
    if not trained:
        raise ValueError(f"{type(model).__name__} has no parameter that requires a gradient")
    groups = [
        {"params": [p for p in trained if id(p) not in spared], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) in spared], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _checked_patterns(spare: str | Iterable[str], names: Iterable[str]) -> list[str]:
    patterns, names = [spare] if isinstance(spare, str) else list(spare), list(names)
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            near = near_matches(pattern, names)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise ValueError(f"spare: {pattern!r} matches no parameter{hint}")
    return patterns


def _own_patterns(model: nn.Module) -> list[str]:
    """Names and patterns that modules give in ``no_weight_decay()``; timm's also name what not every model has."""
    patterns: list[str] = []
    for prefix, module in model.named_modules():
        method = getattr(module, "no_weight_decay", None)
        if callable(method):
            patterns += [f"{prefix}.{name}".lstrip(".") for name in method()]
    return patterns


def _is_gain(module: nn.Module, name: str) -> bool:
    return name == "gain" and is_a(module, "normzoo.layers.weight.ScaledConv")


def _is_bias(name: str) -> bool:
    return name == "bias" or name.startswith("bias_") or name.endswith("_bias")
