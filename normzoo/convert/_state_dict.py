"""Converting the norm layers of a state dict, where only the tensors' names are known and not the model."""

from __future__ import annotations

import fnmatch
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normzoo.changes import LeftSite
from normzoo.convert._kinds import Source
from normzoo.convert._replace import STATISTICS_GO_ELSEWHERE, Made, NormSpec, Options, TargetNorm, make, target_norm
from normzoo.convert._report import ConversionReport, ConvertedSite
from normzoo.recognition import AFFINE_NAMES, PER_CHANNEL, TENSORS, Kind, norm_entries, outer_norm

_LEARNT = ("weight", "bias", "tau", "v")
_PARTS = ("aux_bn.",)  # of timm's SplitBatchNorm2d


@dataclass(frozen=True)
class ConvertedState:
    """A state dict for the converted model.

    Attributes:
        state: the entries.
        report: what became of which layer.
        parameters_changed: whether there are other parameters than before, for which an optimizer has no state.
    """

    state: dict[str, Any]
    report: ConversionReport
    parameters_changed: bool


def convert_state_dict(
    state: Mapping[str, Any], to: NormSpec, *, options: Options | None = None, exclude: Iterable[str] = ()
) -> ConvertedState:
    """Replace the norm layers' entries by those that :func:`convert_norms` leaves in the model.

    A norm layer is what has a weight of one dimension, or running statistics, under names that norm layers have.
    Layers without any entries, or with a bias alone, are not seen, nor is which activation follows.

    Args:
        state: {name: tensor}.
        to: as for :func:`convert_norms`.
        options: likewise.
        exclude: patterns of layers' dotted names to leave.

    Raises:
        UnknownNameError: a ValueError, for a norm that is not registered.
        TypeError: for an option that the norm does not have.
        ValueError: if there are no norm layers, one cannot be made, or more than the names would have to be known.

    Example:
        >>> state = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4)).state_dict()
        >>> list(convert_state_dict(state, "group").state)
        ['0.weight', '0.bias', '1.weight', '1.bias']
    """
    target = target_norm(to, options)
    if isinstance(target.known.get("act_layer"), str) and "act_layer" not in target.options:
        raise ValueError(
            f"{target.label!r} has an activation of its own, and names do not tell after which norm layers the model "
            "applies one: load the weights into the model and use normzoo.convert_norms"
        )
    patterns = tuple(exclude)
    norms = norm_entries(state)
    excluded = [prefix for prefix in norms if any(fnmatch.fnmatchcase(prefix, p) for p in patterns)]
    chosen = {prefix: entries for prefix, entries in norms.items() if prefix not in excluded}
    if not chosen:
        raise ValueError("there is no norm layer: no entries with a weight of one dimension or running statistics")
    made = {prefix: _made(target, prefix, _source(entries)) for prefix, entries in chosen.items()}
    new = _merged(state, made)
    changed = any(dict(m.layer.named_parameters()).keys() != _parameters(chosen[p]) for p, m in made.items())
    if target.weights is not None:
        gains = _gains(new, target.weights)
        new.update(gains)
        changed = changed or bool(gains)
    if hasattr(state, "_metadata"):
        new._metadata = state._metadata  # type: ignore[attr-defined]
    left = [LeftSite(p, _kind_of_entries(norms[p]), _channels(norms[p]), "exclude leaves it") for p in excluded]
    report = ConversionReport([_entry(prefix, chosen[prefix], m) for prefix, m in made.items()], left, target.label)
    return ConvertedState(new, report, changed)


def _parameters(entries: Mapping[str, Tensor]) -> set[str]:
    return {AFFINE_NAMES.get(n, n) for n in entries if not n.startswith(("running_", "num_batches"))}


def _source(entries: Mapping[str, Tensor]) -> Source:
    tensors: dict[str, Tensor | None] = {n: t for n, t in entries.items() if n in TENSORS}
    tensors |= {ours: entries[n].flatten() for n, ours in AFFINE_NAMES.items() if entries.keys() == AFFINE_NAMES.keys()}
    channels = next(t.numel() for n, t in tensors.items() if t is not None and n in PER_CHANNEL)
    statistics = "running_mean" in tensors or "running_var" in tensors
    if "weight" not in tensors or (statistics and "bias" not in tensors):  # made without
        tensors = {"weight": None, "bias": None, **tensors}
    learnt = {n: nn.Parameter(t, False) for n, t in tensors.items() if t is not None and n in _LEARNT}
    return Source(Kind("norm"), channels, {**tensors, **learnt}, {}, {}, None)


def _made(target: TargetNorm, prefix: str, source: Source) -> Made:
    try:
        made = make(target, source, nn.Module())
    except (ValueError, TypeError) as error:
        raise ValueError(f"{prefix} ({source.num_features} channels) cannot become {target.label}: {error}") from error
    if source.tensors.keys() == {"weight"}:
        made.warnings.append("a weight alone may as well be that of a PReLU or a loss: exclude it if it is")
    shapes = {n: t.ndim for n, t in made.layer.state_dict().items()}
    if "groups" in target.known and "groups" not in target.options and max(shapes.values(), default=0) > 1:
        made.warnings.append("the shape of its statistics depends on groups, which a file does not tell: give them")
    if source.tensors.get("running_var") is not None and target.norm in STATISTICS_GO_ELSEWHERE:
        made.warnings.append(
            "its running statistics are not folded in, as a file does not tell eps: convert_norms on a model does that"
        )
    return made


def _merged(state: Mapping[str, Any], made: Mapping[str, Made]) -> OrderedDict[str, Any]:
    """The state with the new layers' entries where the old ones' were."""
    new: OrderedDict[str, Any] = OrderedDict()
    for key, value in state.items():
        prefix = key.rpartition(".")[0]
        outer = outer_norm(key, made)
        if prefix in made:
            new.update({f"{prefix}.{name}": t for name, t in made[prefix].layer.state_dict().items()})
        elif outer is None or not key.startswith(tuple(f"{outer}.{part}" for part in _PARTS)):
            new[key] = value
    return new


def _gains(state: Mapping[str, Any], method: str) -> dict[str, Tensor]:
    """What standardized convolutions hold beside their weight: those of ``scaled_ws`` a gain for each filter."""
    weights = {
        key.removesuffix(".weight"): w
        for key, w in state.items()
        if key.endswith(".weight") and isinstance(w, Tensor) and w.ndim > 2
    }
    if not weights:
        raise ValueError("there are no convolutions whose weights could be standardized")
    if already := next((prefix for prefix in weights if f"{prefix}.gain" in state), None):
        raise ValueError(f"the weights of the convolution {already!r} are standardized already")
    if method != "scaled_ws":
        return {}
    return {f"{prefix}.gain": torch.ones_like(w[:, 0].flatten(1)[:, 0]) for prefix, w in weights.items()}


def _entry(prefix: str, entries: Mapping[str, Tensor], made: Made) -> ConvertedSite:
    lost = [n for n in entries if n not in TENSORS and n not in AFFINE_NAMES]
    return ConvertedSite(
        prefix,
        _kind_of_entries(entries),
        str(made.layer).replace("\n", " "),
        _channels(entries),
        made.carried,
        made.new,
        [*made.dropped, *(n for n in lost if n not in made.dropped)],
        made.warnings,
    )


def _kind_of_entries(entries: Mapping[str, Tensor]) -> str:
    return f"norm with {', '.join(entries)}"


def _channels(entries: Mapping[str, Tensor]) -> int:
    return next(t.numel() for t in entries.values() if t.ndim)
