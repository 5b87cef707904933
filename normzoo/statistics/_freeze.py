"""Batch norms whose statistics, scale and shift stay as they are."""

from __future__ import annotations

from typing import Any

from torch import nn

from normzoo.changes import LeftSite
from normzoo.convert import ConversionReport
from normzoo.convert._convert import convert
from normzoo.convert._replace import target_norm
from normzoo.convert._sites import Selectors, Site, Survey, survey, to_try
from normzoo.recognition import FROZEN_KINDS, INPLACE_ABN, describe, is_a, is_frozen, known_class


def freeze_norms(
    model: nn.Module,
    *,
    include: Selectors | None = None,
    exclude: Selectors | None = None,
    recognise: bool | ConversionReport = False,
) -> ConversionReport:
    """Make batch norms ``frozen_batch``, in place: fixed statistics, scale and shift, in training as in evaluation.

    ``y = (x - running_mean) / sqrt(running_var + eps) * weight + bias``, all four of them buffers. Outputs in
    evaluation stay as they are, state dicts go to and from the original, and the activation of fused layers stays.

    Taken are layers whose evaluation is exactly this: batch norms of torch and timm that keep statistics, and the
    zoo's ``batch``, ``batch_renorm``, ``ghost_batch`` and ``batch_group``. All others stay: those that look at
    single samples (group, layer, instance), ``l1_batch``, whose eps is outside the root, ``InplaceAbn``, whose scale
    is ``|weight| + eps``, and without ``recognise`` layers with a forward of their own.

    Make the optimizer after this, for weight and bias are no longer parameters.

    Args:
        model: any module that is not wrapped for several ranks.
        include: which layers, as in :func:`normzoo.convert_norms`; None for all.
        exclude: which to leave, likewise.
        recognise: whether layers of unknown classes that compute batch norm are frozen too: True to try each, or the
            report of a conversion that recognised them.

    Returns:
        a :class:`ConversionReport`: what was frozen, and why each other norm was left.

    Raises:
        ValueError: if there is nothing to freeze, or the model cannot be converted.

    Source: He, Zhang, Ren & Sun 2016, arXiv 1512.03385, appendix A (fixed statistics in detection).

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GroupNorm(2, 8))
        >>> len(freeze_norms(model)), type(model[1]).__name__, type(model[2]).__name__
        (1, 'FrozenBatchNorm', 'GroupNorm')
    """
    names = to_try(recognise)

    def left(name: str, module: nn.Module) -> bool:
        return not (_freezable(module) or names is True or (names is not False and name in names))

    single = exclude is None or isinstance(exclude, str | type) or callable(exclude)
    several: list[Any] = ([] if exclude is None else [exclude]) if single else list(exclude)  # type: ignore[arg-type]
    if any(not left(name, module) for name, module in model.named_modules()):
        found = survey(model, include, [*several, left], recognise=names, strict=False)
        sites = [site for site in found.sites if _freezable(site.module) or _is_batch_norm(site)]
        if sites:
            return convert(model, target_norm("frozen_batch", None), Survey(sites, _left(model, sites, found.left)))
    raise ValueError(
        f"{type(model).__name__} has no layer to freeze; looked for batch norms with running statistics of torch "
        "and timm, and for the zoo's batch, batch_renorm, ghost_batch and batch_group"
    )


def _left(model: nn.Module, sites: list[Site], left: list[LeftSite]) -> list[LeftSite]:
    """Every norm that is not to be frozen, with the reason."""
    surveyed, frozen = {site.name: site for site in left}, {site.name for site in sites}
    reasons: list[LeftSite] = []
    for name, module in model.named_modules():
        if name in frozen or name.startswith(tuple(f"{site}." for site in frozen)):
            continue
        if known_class(module) is not None and not _freezable(module):
            reasons.append(LeftSite(name, describe(module), None, _why_not(module)))
        elif name in surveyed:
            reasons.append(surveyed[name])
    return reasons


def _why_not(module: nn.Module) -> str:
    """Why a norm of a known class is not one that can be frozen."""
    known = known_class(module)
    assert known is not None
    if known.overridden:
        return f"its class {type(module).__name__} has a forward of its own; recognise=True tries what it computes"
    if is_a(module, INPLACE_ABN):
        return "its scale is |weight| + eps"
    if is_frozen(module):
        return "it is frozen already"
    if known.kind.name in FROZEN_KINDS:
        return "it keeps no running statistics"
    return "in evaluation it is not a scale and shift by running statistics, weight and bias"


def _is_batch_norm(site: Site) -> bool:
    """Whether a layer that was recognised is a batch norm with running statistics."""
    return site.source.kind.name == "batch" and site.source.tensors.get("running_var") is not None


def _freezable(module: nn.Module) -> bool:
    """Whether evaluation is that of a frozen batch norm."""
    if any(module._buffers.get(n) is None for n in ("running_mean", "running_var")):
        return False
    known = known_class(module)
    if known is None or known.overridden or is_a(module, INPLACE_ABN):
        return False
    return known.kind.name in FROZEN_KINDS
