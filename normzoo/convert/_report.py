"""What a conversion did."""

from __future__ import annotations

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
        import io

        from rich.console import Console

        out = io.StringIO()
        Console(file=out, width=140).print(self)
        return out.getvalue()

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
