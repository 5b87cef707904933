"""Replacing the normalization layers of a model."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normzoo.changes import CountReport
from normzoo.convert._calibrate import calibrate as run_calibration
from normzoo.convert._flow import storage_of
from normzoo.convert._fold import Undo, shed_scales
from normzoo.convert._hooks import hand_over_hooks
from normzoo.convert._pairs import owners
from normzoo.convert._replace import Made, NormSpec, Options, TargetNorm, make, target_norm
from normzoo.convert._report import ConversionReport, ConvertedSite
from normzoo.convert._running import Forward
from normzoo.convert._sites import Selectors, Site, Survey, survey
from normzoo.convert._treat import Treat
from normzoo.registry import layer_name, norm_info


def convert_norms(
    model: nn.Module,
    to: NormSpec,
    *,
    include: Selectors | None = None,
    exclude: Selectors | None = None,
    options: Options | None = None,
    fold: bool = False,
    calibrate: Iterable[Any] | None = None,
    forward: Forward | None = None,
    example: Any = None,
    treat: Treat | None = None,
) -> ConversionReport:
    """Replace the normalization layers of a model, in place, keeping all that they have in common.

    Weight, bias and running statistics go over as the same tensors, so that an optimizer made before goes on with
    them; so do eps, momentum, groups, the channel's dimension, dtype, device, ``requires_grad``, training mode, hooks,
    and the activation and dropout of fused layers. Where some values make the new layer compute in evaluation what the
    original computes, as between layers that are a scale and shift of channels there, it gets these: running statistics
    are set, or folded into weight and bias. A norm that has an activation of its own (``evonorm_s0``,
    ``evonorm_b0``, ``filter_response``) takes the place of norm and activation where these were one layer, and is made
    without its own elsewhere. Any error leaves the model as it was.

    Args:
        model: any module; one wrapped for several ranks is refused, a compiled one is converted and compiled anew.
        to: a name of the zoo (``"group"``; ``"group+ws"`` also standardizes the weights of convolutions), a mapping
            ``{"name": "group", "groups": 8}``, or a factory that makes a layer from a channel count.
        include: which layers: name patterns (``"layer1.*"``), types, predicates ``(name, module) -> bool``, or several
            of these; None for all.
        exclude: which to leave, likewise.
        options: the new layers' options; a value may be a function of the channel count. ``groups`` becomes the largest
            divisor of the channels that is not above it (by default the original's, 1 for a layer norm, as many as
            channels for an instance norm, else 32 or fewer of 16 channels);
            ``channels_per_group`` may be given in its place.
        fold: with ``to="none"``, multiply each scale into the convolution or linear layer beside it, so that in
            evaluation the model computes what it computed before. ``example`` is needed as in :func:`fold_norms`.
        calibrate: batches of inputs (see below), such as a list, a loader or a generator; None to leave scales as they
            are. A batch is a tensor, a dict of keyword arguments, or a sequence that begins with as many inputs as the
            model's forward requires, as (input, target) does; batches may differ in size and shape. A list of tensors
            is one input if forward's first argument is annotated as a list, as of torchvision's detectors.
        forward: called as ``forward(model, batch)`` for calibration batches of other kinds.
        example: one input batch, for ``fold``; by default made from the configuration of a timm model.
        treat: what modules of unknown classes are, as {name pattern: norm}: a name of the zoo, or a mapping with
            ``name`` and any of ``channel_dim`` (1 or -1), ``eps``, ``groups``, ``momentum``, ``weight``, ``bias``,
            ``running_mean``, ``running_var`` (attributes that hold these), ``add_unit_offset`` (the scale is
            1 + weight) and ``unbiased`` (of ``positional``). What is left out is looked for in the module.

    With ``calibrate``, the original's outputs at every site are measured in evaluation mode; then, in the order of
    execution, running statistics are taken from the batches where the new layer has some of its own, and weight and
    bias are set so that the new layer's output has the mean and variance of the original's in every channel, over the
    values of all batches, each of which weighs alike; it gets a weight and bias of its own if the original has none. A
    few hundred samples are enough. This is what makes a pretrained model useful after the change; a short fine-tuning
    does the rest.

    The batches are iterated over once, and are kept, with the original's outputs on them, until the end; activations
    are those of one batch at a time. The model runs three times on each batch, and as often more as it takes for the
    layers to settle: once for a single batch, four to eight times for several, since what comes to a layer depends on
    all layers before it. Fewer and larger batches take less time and more memory. Where a model selects by its values
    (top-k, thresholds, NMS), ``before`` and ``after`` are with the original's selections; where outputs cannot be
    compared, they are of the outputs of the converted layers, and a warning says so.

    Norms of other packages are known by their classes. A module of an unknown class is tried if it may be a norm: if it
    holds vectors of C values, no other tensors and no layers, and takes one argument. A float64 copy with random
    parameters is run on noise and compared with layer, RMS, group, instance, batch and frozen batch norm over either
    dimension; one that agrees in training and evaluation to 1e-9 (5e-6 if it computes in float32) is that norm, and its
    scale ``1 + weight`` becomes the new weight. The report says which modules were recognised so, and what others
    looked like, which stay as they are.

    Returns:
        a :class:`ConversionReport`: what was replaced by what, what was carried, how far outputs moved, and which norms
        stayed, and why.

    Raises:
        UnknownNameError: a ValueError, for a norm that is not registered.
        TypeError: for an option that the norm does not have.
        ValueError: if there is nothing to convert, a layer cannot be read or made, or outputs cannot be calibrated.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> report = convert_norms(model, "group", options={"groups": 4})
        >>> model[1], report.changed[0].carried
        (GroupNorm(8, eps=1e-05, affine=True, groups=4), ['weight', 'bias'])
    """
    found = survey(model, include, exclude, treat)
    return convert(model, target_norm(to, options), found, fold, calibrate, forward, example)


def convert(
    model: nn.Module,
    target: TargetNorm,
    found: Survey,
    fold: bool = False,
    calibrate: Iterable[Any] | None = None,
    forward: Forward | None = None,
    example: Any = None,
) -> ConversionReport:
    """Replace the layers that a survey found; see :func:`convert_norms`."""
    sites = found.sites
    if example is not None and not fold:
        raise ValueError("example is what fold=True runs the model with; without it, leave example out")
    if fold and (target.norm != "none" or target.weights is not None):
        raise ValueError(f"fold=True goes with to='none', which has no scale of its own, not with {target.label!r}")
    if forward is not None and calibrate is None:
        raise ValueError("forward is what calibrate runs the model with; without it, leave forward out")
    made = [_made(target, site, calibrate is not None) for site in sites]
    report = ConversionReport([], found.left, target.label)
    with contextlib.ExitStack() as undo:
        undo.callback(_put, sites, [site.module for site in sites])
        if fold:
            undo.enter_context(shed_scales(model, sites, [m.layer for m in made], example))
        layers = [m.layer for m in made]
        changes = undo.enter_context(Undo())

        def change() -> None:
            if not fold:
                _set_values(model, made, changes)
            _put(sites, layers)

        if calibrate is None:
            change()
        else:
            undo.callback(_restore, {id(t): (t, t.clone()) for m in made for t in m.layer.state_dict().values()})
            report.before, report.after, report.warnings = run_calibration(
                model, sites, made, calibrate, forward, change
            )
        if target.weights is not None:
            standardize(model, target.weights)
        undo.pop_all()
    for site, layer in zip(sites, layers, strict=True):
        hand_over_hooks(layer, site.module)
    report.changed = [_entry(site, m) for site, m in zip(sites, made, strict=True)]
    report.warnings += _passed_over([site.module for site in sites], layers)
    return report


def _passed_over(old: list[nn.Module], new: list[nn.Module]) -> list[str]:
    """What tools did to the original batch norms and do not do to layers that are none to them."""
    parts = [part for o, n in zip(old, new, strict=True) if isinstance(o, _BatchNorm) for part in n.modules()]
    zoo = {layer_name(part): part for part in parts if not isinstance(part, _BatchNorm)}
    lost = [type(part).__name__ for name, part in zoo.items() if name and norm_info(name).batch_statistics]
    if not lost:
        return []
    return [
        f"tools that look for torch's batch norms pass {lost[0]} over; use in their place reestimate_statistics "
        "(update_bn), sync=True (SyncBatchNorm) and freeze_norms (freezing), as docs/layers.md says"
    ]


def _put(sites: list[Site], layers: list[nn.Module]) -> None:
    for site, layer in zip(sites, layers, strict=True):
        site.put(layer)


def _set_values(model: nn.Module, made: list[Made], changes: Undo) -> None:
    """Give tensors of the new layers the values with which these compute what the old ones did."""
    holders = owners([*model.modules(), *(m.layer for m in made)])
    for m in made:
        for layer, name, value in m.values:
            tensor: Any = getattr(layer, name)
            if holders[storage_of(tensor)] > 2:  # more than the old layer and the new one
                own = tensor.detach().clone()
                if isinstance(tensor, nn.Parameter):
                    layer._parameters[name] = own = nn.Parameter(own, tensor.requires_grad)
                else:
                    layer._buffers[name] = own
                m.warnings.append(f"its {name} was shared with others, and is a tensor of its own now")
                tensor = own
            changes.set(tensor, value)


def _restore(values: dict[int, tuple[Tensor, Tensor]]) -> None:
    """Give the tensors that both layers share the values that they had."""
    for tensor, value in values.values():
        tensor.copy_(value)


def _made(target: TargetNorm, site: Site, calibrated: bool) -> Made:
    try:
        return make(target, site.source, site.module, own_affine=calibrated)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{site.name} ({site.source.num_features} channels) cannot become {target.label}: {error}"
        ) from error


def _entry(site: Site, made: Made) -> ConvertedSite:
    kind, cls = site.source.kind.name, type(site.module).__name__
    text = str(made.layer).replace("\n", " ")
    return ConvertedSite(
        site.name,
        f"{cls} ({kind})",
        text,
        site.source.num_features,
        made.carried,
        made.new,
        made.dropped,
        made.warnings,
        site.source.recognised,
    )


def standardize(model: nn.Module, method: str, **options: Any) -> CountReport:
    """Make the convolutions of a model standardize their weights; the method is looked up in the registry."""
    module = importlib.import_module(norm_info(method).target.partition(":")[0])
    report: CountReport = module.standardize_weights(model, method, **options)
    return report
