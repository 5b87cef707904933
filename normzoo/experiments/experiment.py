"""The front door for experiments that are no training runs: what one says of itself, and what it is asked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from normzoo.records.schema import Column, Figure, Schema

__all__ = ["Column", "Experiment", "Figure"]

_STEP = Column("step", "int", "number of the part, from 0")


class Experiment:
    """Base of all experiments, ours and anybody's: parts that are made one after the other, each some rows of a record.

    A recipe names the class in its section ``experiment``, with the arguments of ``__init__``. ``seed``, ``data`` and
    ``task`` are arguments that other sections give: ``seed`` the section of that name; ``data`` a LightningDataModule,
    made from the section ``data``; ``task`` a LightningModule, made from ``model``, ``optimizer`` and ``lr_scheduler``,
    and not trained.

    A run that was killed goes on at the first part that is not on record. So the rows of a part may depend on nothing
    but the arguments, the seed and the part: what parts share, such as a trained network, is made in :meth:`prepare`,
    and a part leaves it as it was. The global random streams of Python, NumPy and torch are seeded anew, from (seed,
    number of the part), before each part, and from the seed before :meth:`prepare`.

    Args:
        seed: of the recipe.

    Raises:
        ValueError: as a subclass is defined, for columns and figures that do not go together, and for those that ask
            for loggers, which an experiment does not have.

    Example:
        >>> class Squares(Experiment):
        ...     name = "squares"
        ...     row = "a number"
        ...     columns = (Column("number", "int", "the number"), Column("square", "int", "its square"))
        ...     figures = (Figure("Squares", "line", x="number", y="square"),)
        ...
        ...     def __init__(self, numbers: int = 3, seed: int = 0) -> None:
        ...         super().__init__(seed)
        ...         self.numbers = numbers
        ...
        ...     def parts(self):
        ...         return [{"number": n} for n in range(self.numbers)]
        ...
        ...     def rows(self, part):
        ...         yield {"number": part["number"], "square": part["number"] ** 2}
        >>> Squares.schema.columns[0].name, Squares(2).parts()
        ('step', [{'number': 0}, {'number': 1}])
    """

    name: ClassVar[str] = ""  # of the record
    row: ClassVar[str] = ""  # what a row of the record is
    columns: ClassVar[tuple[Column, ...]] = ()
    figures: ClassVar[tuple[Figure, ...]] = ()
    schema: ClassVar[Schema]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not cls.name:  # a base of several
            return
        logged = [column.name for column in cls.columns if column.logged]
        sampled = [figure.title for figure in cls.figures if figure.samples]
        if logged or sampled:
            what = f"column {logged[0]!r} has logged" if logged else f"figure {sampled[0]!r} has samples"
            raise ValueError(f"{cls.__name__}: {what}, but an experiment has no loggers; leave it out")
        cls.schema = Schema(cls.name, cls.row, (_STEP, *cls.columns), tuple(cls.figures))

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.folder: Path | None = None  # of the run, from before prepare on; there prepare may keep what takes long

    def parts(self) -> Sequence[Mapping[str, Any]]:
        """What each part is of, in order, as plain data; quick, as it is asked before anything is written."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Make what all parts need; called once, before the first part that is made."""

    def rows(self, part: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
        """The rows of one of :meth:`parts`, each a mapping of all columns but ``step``, which is filled in."""
        raise NotImplementedError
