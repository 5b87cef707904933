"""What ranks tell each other at setup, when one of them may have no measurement, and so take part in no collective."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from normzoo.callbacks._run.facts import rank_and_ranks

_FITS = itertools.count()  # numbers the fits on several ranks that this process has set up


class Notices:
    """Short texts that the ranks leave in the process group's store before a barrier, and read after it.

    A rank that leaves nothing keeps no other waiting.
    """

    def __init__(self) -> None:
        self._rank, self._ranks = rank_and_ranks()
        self._own: dict[str, str] = {}
        self._fit = next(_FITS) if self._ranks > 1 else 0

    def leave(self, subject: str, text: str) -> None:
        """Leave a text on a subject for all ranks, this one among them."""
        self._own[subject] = text
        if self._ranks > 1:
            store, key = _store(), self._key(self._rank, subject)
            store.set(key, text)
            store.get(key)  # the answer comes once the store has the text

    def own(self, subject: str) -> str | None:
        """What this rank has left on a subject; None for nothing."""
        return self._own.get(subject)

    def read(self, subject: str) -> list[str | None]:
        """What each rank has left on a subject; None for nothing."""
        if self._ranks == 1:
            return [self._own.get(subject)]
        store, keys = _store(), [self._key(rank, subject) for rank in range(self._ranks)]
        return [store.get(key).decode() if store.check([key]) else None for key in keys]

    def _key(self, rank: int, subject: str) -> str:
        return f"normzoo/fit/{self._fit}/{rank}/{subject}"


def _store() -> Any:
    return torch.distributed.distributed_c10d._get_default_store()
