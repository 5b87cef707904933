"""What a conversion or a fold did."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


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


@dataclass
class ConversionReport:
    """What :func:`normzoo.convert_norms` did; ``print`` shows a table, :meth:`to_dict` gives plain data.

    Attributes:
        to: what was converted to.
        sites: one entry for each layer, in the order of registration.
        before: how far the outputs moved by the change of layers alone; None without calibration.
        after: how far they are after calibration; None without.
        warnings: what concerns the model as a whole.
        not_recognised: {name: what it looks like} of modules of unknown classes that may be norms, and were left.
    """

    to: str
    sites: list[ConvertedSite]
    before: Movement | None = None
    after: Movement | None = None
    warnings: list[str] = field(default_factory=list)
    not_recognised: dict[str, str] = field(default_factory=dict)

    @property
    def recognised(self) -> dict[str, str]:
        """{name: formula} of the layers of unknown classes that were recognised by what they compute."""
        return {site.name: site.recognised for site in self.sites if site.recognised is not None}

    def __len__(self) -> int:
        """Number of layers replaced."""
        return len(self.sites)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: dictionaries, lists, strings and numbers."""
        return asdict(self)

    def __rich__(self) -> Any:
        """A table for rich."""
        from rich.console import Group
        from rich.table import Table

        table = Table(title=f"{len(self)} norm layers converted to {self.to}", title_justify="left")
        for heading in ("site", "from", "to", "carried", "new", "dropped"):
            table.add_column(heading, overflow="fold")
        for s in self.sites:
            cells = (s.name, s.old, s.new, *(", ".join(v) for v in (s.carried, s.created, s.dropped)))
            table.add_row(*cells)
        lines = [f"warning: {w}" for w in (*self.warnings, *self._grouped())]
        lines += [f"recognised by what it computes: {line}" for line in _alike(self.recognised)]
        lines += [f"left, not recognised as a norm: {line}" for line in _alike(self.not_recognised)]
        for label, moved in (("before calibration", self.before), ("after calibration", self.after)):
            if moved is not None:
                same = "" if moved.same_class is None else f", {100 * moved.same_class:.1f} % of classes the same"
                lines.append(f"outputs {label}: {100 * moved.relative:.2g} % away{same}")
        return Group(table, *lines)

    def __str__(self) -> str:
        """The table as text."""
        return _printed(self)

    def _grouped(self) -> list[str]:
        """Each sites' warning once, with how many it concerns."""
        return _alike([(site.name, warning) for site in self.sites for warning in site.warnings])


def _alike(texts: Mapping[str, str] | Iterable[tuple[str, str]]) -> list[str]:
    """Each text once, behind the first of its names and how many more there are."""
    found: dict[str, list[str]] = {}
    for name, text in texts.items() if isinstance(texts, Mapping) else texts:
        names = found.setdefault(text, [])
        names += [name] * (name not in names)
    return [
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {text}" for text, names in found.items()
    ]


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


@dataclass
class LeftSite:
    """One normalization layer that was not folded.

    Attributes:
        name: its dotted name.
        layer: its class and kind.
        channels: C; None if it could not be read.
        why: the reason.
    """

    name: str
    layer: str
    channels: int | None
    why: str


class _Count:
    """A report that older code takes for the number of layers folded, for one version more, with a warning."""

    def __len__(self) -> int:
        raise NotImplementedError

    def _count(self) -> int:
        warnings.warn(
            "fold_norms returns a FoldReport and no longer a number: use len(report), or report.folded",
            DeprecationWarning,
            stacklevel=3,
        )
        return len(self)

    def __int__(self) -> int:
        return self._count()

    def __index__(self) -> int:
        return self._count()

    def __eq__(self, other: object) -> bool:
        if isinstance(other, int):
            return self._count() == other
        return self is other

    __hash__ = object.__hash__

    def __lt__(self, other: int) -> bool:
        return self._count() < other

    def __le__(self, other: int) -> bool:
        return self._count() <= other

    def __gt__(self, other: int) -> bool:
        return self._count() > other

    def __ge__(self, other: int) -> bool:
        return self._count() >= other

    def __add__(self, other: int) -> int:
        return self._count() + other

    __radd__ = __add__

    def __sub__(self, other: int) -> int:
        return self._count() - other

    def __rsub__(self, other: int) -> int:
        return other - self._count()

    def __format__(self, spec: str) -> str:
        return format(self._count(), spec) if spec else str(self)


@dataclass(eq=False)
class FoldReport(_Count):
    """What :func:`normzoo.fold_norms` did; ``print`` shows a table, :meth:`to_dict` gives plain data.

    Attributes:
        folded: one entry for each layer that is gone, in the order in which they were folded.
        left: one for each normalization layer that stayed, with the reason.
    """

    folded: list[FoldedSite]
    left: list[LeftSite]

    def __len__(self) -> int:
        """Number of layers folded."""
        return len(self.folded)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: dictionaries, lists, strings and numbers."""
        return asdict(self)

    def __rich__(self) -> Any:
        """A table for rich."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        of = len(self.folded) + len(self.left)
        title = f"{len(self)} of {of} norm layers folded"
        parts: list[Any] = [title]
        if self.folded:
            table = Table()
            for heading in ("folded", "layer", "into"):
                table.add_column(heading, overflow="fold")
            for site in self.folded:
                table.add_row(site.name, site.layer, f"{site.into}, {'before' if site.before else 'behind'} it")
            parts.append(table)
        if self.left:
            table = Table()
            for heading in ("left", "layer", "why"):
                table.add_column(heading, overflow="fold")
            for left in self.left:
                table.add_row(left.name, left.layer, left.why)
            parts.append(table)
        return Group(*(p if isinstance(p, Table) else Text(p) for p in parts))

    def __str__(self) -> str:
        """The table as text."""
        return _printed(self)


def _printed(report: Any) -> str:
    import io

    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=140).print(report)
    return out.getvalue()
