"""What a conversion or a fold did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from normzoo.changes import ChangeReport, CountReport, grouped, renamed


@dataclass
class ConvertedSite:
    """One layer that was replaced.

    Attributes:
        name: its dotted name.
        old: class and kind of the original.
        new: the layer in its place, as printed.
        channels: C.
        carried: parameters and buffers taken over, the same tensors.
        created: those that the original did not have.
        dropped: those of the original for which the new layer has no use, but for ``num_batches_tracked``.
        warnings: what to know before it is used.
        recognised: the formula that the original was found to compute, where its class is not known.
    """

    name: str
    old: str
    new: str
    channels: int
    carried: list[str]
    created: list[str]
    dropped: list[str]
    warnings: list[str]
    recognised: str | None = None


@dataclass
class Movement:
    """How far a model's outputs are from the original's on the calibration batches.

    Attributes:
        relative: L2 norm of the difference over that of the original's outputs.
        same_class: share of samples whose largest output is the same one; None unless outputs are (N, classes).
    """

    relative: float
    same_class: float | None


@dataclass(repr=False)
class ConversionReport(ChangeReport):
    """What :func:`normzoo.convert_norms` or :func:`normzoo.freeze_norms` did; see :class:`ChangeReport`.

    Attributes:
        changed: one :class:`ConvertedSite` for each layer replaced, in the order of registration.
        left: one :class:`LeftSite` for each norm layer that stayed, and for each module of an unknown class that may be
            one, with the reason.
        to: what was converted to.
        before: how far the outputs moved by the change of layers alone; None without calibration.
        after: how far they are after calibration; None without.
        warnings: what concerns the model as a whole.
    """

    changed: list[ConvertedSite] = field(default_factory=list)
    to: str = ""
    before: Movement | None = None
    after: Movement | None = None
    warnings: list[str] = field(default_factory=list)

    _old_keys: ClassVar[Mapping[str, str]] = {"sites": "changed"}

    @property
    def sites(self) -> list[ConvertedSite]:
        """What ``changed`` was called before."""
        renamed("ConversionReport.sites", "ConversionReport.changed")
        return self.changed

    @property
    def recognised(self) -> dict[str, str]:
        """{name: formula} of the layers of unknown classes that were recognised by what they compute."""
        return {site.name: site.recognised for site in self.changed if site.recognised is not None}

    @property
    def not_recognised(self) -> dict[str, str]:
        """{name: what it looks like} of modules of unknown classes that may be norms, and were left."""
        return {site.name: site.why for site in self.left if not site.recognised}

    def to_dict(self) -> dict[str, Any]:
        """Plain data: dictionaries, lists, strings and numbers."""
        data = super().to_dict()
        data["not_recognised"] = self.not_recognised
        return data

    def _title(self) -> str:
        return f"{len(self)} norm layers converted to {self.to}"

    def _headings(self) -> tuple[str, ...]:
        return ("site", "from", "to", "carried", "new", "dropped")

    def _row(self, site: ConvertedSite) -> tuple[str, ...]:
        return (site.name, site.old, site.new, *map(", ".join, (site.carried, site.created, site.dropped)))

    def _remarks(self) -> list[str]:
        of_sites = grouped((site.name, warning) for site in self.changed for warning in site.warnings)
        lines = [f"warning: {w}" for w in (*self.warnings, *(f"{names}: {text}" for names, text in of_sites))]
        recognised = grouped(self.recognised.items())
        lines += [f"recognised by what it computes: {names}: {text}" for names, text in recognised]
        for label, moved in (("before calibration", self.before), ("after calibration", self.after)):
            if moved is not None:
                same = "" if moved.same_class is None else f", {100 * moved.same_class:.1f} % of classes the same"
                lines.append(f"outputs {label}: {100 * moved.relative:.2g} % away{same}")
        return lines


@dataclass
class FoldedSite:
    """One normalization layer that was folded into another layer.

    Attributes:
        name: its dotted name.
        layer: its class and kind.
        channels: C.
        into: the dotted name of the convolution or linear layer that has its scale and shift now.
        before: whether that layer is before it; else it is behind it.
    """

    name: str
    layer: str
    channels: int
    into: str
    before: bool


@dataclass(eq=False, repr=False)
class FoldReport(CountReport):
    """What :func:`normzoo.fold_norms` did; see :class:`ChangeReport`.

    Attributes:
        changed: one :class:`FoldedSite` for each layer that is gone, in the order in which they were folded.
        left: one :class:`LeftSite` for each normalization layer that stayed, with the reason.
    """

    changed: list[FoldedSite] = field(default_factory=list)

    _function: ClassVar[str] = "fold_norms"
    _old_keys: ClassVar[Mapping[str, str]] = {"folded": "changed"}

    @property
    def folded(self) -> list[FoldedSite]:
        """What ``changed`` was called before."""
        renamed("FoldReport.folded", "FoldReport.changed")
        return self.changed

    def _title(self) -> str:
        return f"{len(self)} of {len(self) + len(self.left)} norm layers folded"

    def _headings(self) -> tuple[str, ...]:
        return ("folded", "layer", "into")

    def _row(self, site: FoldedSite) -> tuple[str, ...]:
        return (site.name, site.layer, f"{site.into}, {'before' if site.before else 'behind'} it")
