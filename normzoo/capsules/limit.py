"""What is left out of a rank's tree if its tensors are too large."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from typing import Any

from normzoo.capsules.tree import Encoded, LeftOut, encode

Place = Sequence[str | int]  # keys of dictionaries and indices of lists


def encode_within(tree: Mapping[str, Any], max_bytes: int | None) -> Encoded:
    """A tree of frames and snapshots, encoded, whose tensors have at most ``max_bytes`` bytes together.

    If they have more, the module as it was when the capsule was written is left out; then batches, the oldest first,
    until they fit; then snapshots, the oldest first, of each the optimizers, the module and the trainer; then the
    states of random generators, the oldest first. Numbers stay.
    """
    if max_bytes is None:
        return encode(tree)
    places = list(_expendable(tree))
    reason = LeftOut(f"beyond max_bytes={max_bytes}")

    def encoded(count: int) -> Encoded:
        return encode(reduce(lambda rest, place: _replaced(rest, place, reason), places[:count], tree))

    def fits(count: int) -> bool:
        return sum(t.numel() * t.dtype.itemsize for t in encoded(count).tensors.values()) <= max_bytes

    return encoded(bisect_left(range(len(places)), True, key=fits))


def _expendable(tree: Mapping[str, Any]) -> Iterator[Place]:
    """The places of a tree, in the order in which they are left out."""
    if "module" in tree.get("now", ()):
        yield ("now", "module")
    passes = [
        ("frames", i, "micro_batches", j)
        for i, frame in enumerate(tree["frames"])
        for j in range(len(frame["micro_batches"]))
    ]
    yield from ((*place, "batch") for place in passes)
    for i in range(len(tree["snapshots"])):
        yield from (("snapshots", i, key) for key in ("optimizers", "module", "trainer"))
    yield from ((*place, "random") for place in passes)


def _replaced(tree: Any, place: Place, value: Any) -> Any:
    """The tree with another value at a place; copies what leads there."""
    if not place:
        return value
    copy = tree.copy()
    copy[place[0]] = _replaced(tree[place[0]], place[1:], value)
    return copy
