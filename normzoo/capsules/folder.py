"""A capsule's folder: each rank writes its shard, and whoever sees all of them the manifest, without a collective."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from normzoo._errors import shown
from normzoo.capsules import shard
from normzoo.capsules.limit import encode_within
from normzoo.capsules.sealed import CapsuleError, read_json, write_json
from normzoo.capsules.shard import Shard
from normzoo.capsules.tree import decode, encode

MANIFEST = "manifest.json"
_SHARD = re.compile(r"rank_(\d{5,})\.json")
_POLL = 0.05  # seconds between two looks for the other ranks' shards
_MOST_RANKS = 10**6
_SOME = 8  # ranks that a sentence names


def write_shard(
    folder: Path, rank: int, about: Mapping[str, Any], tree: Mapping[str, Any], max_bytes: int | None = None
) -> Path:
    """Write what one rank has to say, into a capsule's folder, which is made if it is not there.

    Args:
        folder: of the capsule.
        rank: this process's.
        about: plain data, what this rank knows of what happened.
        tree: ``{"frames": [...], "snapshots": [...]}``, as docs/capsules.md says; it is only read.
        max_bytes: of the tensors; :func:`normzoo.capsules.limit.encode_within` says what is left out beyond.

    Returns:
        the rank's JSON file.

    Raises:
        OSError: if it could not be written, as when the disk is full; of this rank nothing is left there then.
    """
    encoded = encode_within(tree, max_bytes)
    with contextlib.ExitStack() as undo:
        undo.callback(_remove_empty, folder)
        path = shard.write(folder, rank, _plain(about), encoded)
        undo.pop_all()
    return path


def seal(folder: Path, about: Mapping[str, Any], ranks: int, wait: float = 10.0) -> list[int]:
    """Write the manifest, without which the folder is no capsule: ``about``, and which ranks have written.

    All ranks call it after their shards are written, in any order. The first manifest's ``about`` stays; a rank whose
    shard comes later adds itself.

    Args:
        folder: of the capsule.
        about: plain data, for the manifest.
        ranks: how many there are in the job.
        wait: seconds to wait for the shards of the other ranks.

    Returns:
        the ranks that are missing.

    Raises:
        OSError: if the manifest could not be written.
    """
    content = _plain(about)
    deadline = time.monotonic() + wait
    while len(_ranks(folder)) < ranks and time.monotonic() < deadline:
        time.sleep(_POLL)
    while True:  # until no shard came while a manifest was written, by this rank or another
        shards = dict(_valid_shards(folder, ranks))
        missing = [rank for rank in range(ranks) if rank not in shards]
        with contextlib.suppress(CapsuleError):
            written = read_manifest(folder)
            if (written["ranks"], written["missing"]) == (ranks, missing):
                return missing
            content = _plain(written)
        left_out = {str(rank): part.left_out for rank, part in shards.items() if part.left_out}
        write_json(folder / MANIFEST, {**content, **_plain({"ranks": ranks, "missing": missing, "left_out": left_out})})


def withdraw(folder: Path, rank: int) -> None:
    """Remove what a rank has written of a capsule that has no manifest, and the folder if it is empty then."""
    if (folder / MANIFEST).exists():
        return
    with contextlib.suppress(OSError):
        for path in (shard.json_path(folder, rank), shard.tensors_path(folder, rank)):
            path.unlink(missing_ok=True)
    _remove_empty(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What the manifest says.

    Raises:
        CapsuleError: if it is not there, is damaged, or says too little.
    """
    path = folder / MANIFEST
    content = read_json(path)
    try:
        about: dict[str, Any] = decode({key: value for key, value in content.items() if key != "check"}, _no_tensor)
    except ValueError as error:
        raise CapsuleError(f"{path} is not a manifest: {error}") from error
    ranks, missing, left_out = (about.get(key) for key in ("ranks", "missing", "left_out"))
    if not (
        type(ranks) is int
        and 0 < ranks <= _MOST_RANKS
        and isinstance(missing, list)
        and all(type(rank) is int and 0 <= rank < ranks for rank in missing)
        and isinstance(left_out, dict)
        and all(isinstance(part, dict) for part in left_out.values())
        and isinstance(about.get("sentence", ""), str)
    ):
        raise CapsuleError(
            f"{path} is not a manifest: its ranks, missing, left_out or sentence is none that is written"
        )
    return about


def capsule_folders(folder: Path) -> list[Path]:
    """The folders of a run's capsules, finished or not, by name: in ``capsules`` or ``metrics/capsules``."""
    places = [folder / "capsules", folder / "metrics" / "capsules"]
    try:
        return sorted(path for place in places if place.is_dir() for path in place.iterdir() if path.is_dir())
    except OSError as error:
        raise CapsuleError(f"{error.filename or folder} cannot be read: {error.strerror}") from error


def unfinished(folder: Path) -> list[str]:
    """A sentence for each capsule of a run that has no valid manifest, or lacks ranks.

    Args:
        folder: of the run, or the one that its records are in.
    """
    return [sentence for path in capsule_folders(folder) if (sentence := _problem(path))]


def _problem(folder: Path) -> str | None:
    if not (folder / MANIFEST).exists():
        return f"{folder} is an unfinished capsule: it has no {MANIFEST}, {_written_by(_ranks(folder))}"
    try:
        about = read_manifest(folder)
    except CapsuleError as error:
        return str(error)
    missing = about["missing"]
    if not missing:
        return None
    return f"{folder} is a capsule without {listed_ranks(missing)} of {about['ranks']}, which had not written in time"


def _written_by(ranks: Collection[int]) -> str:
    return f"and only {listed_ranks(ranks)} had written when the job ended" if ranks else "and no rank had written"


def listed_ranks(ranks: Collection[int]) -> str:
    """Ranks in a sentence.

    Example:
        >>> listed_ranks([3]), listed_ranks([0, 1]), listed_ranks(range(100))
        ('rank 3', 'ranks 0, 1', 'ranks 0, 1, 2, 3, 4, 5, 6, 7, ... (100)')
    """
    rest = f", ... ({len(ranks)})" if len(ranks) > _SOME else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, sorted(ranks)[:_SOME]))}{rest}"


def _ranks(folder: Path) -> list[int]:
    """The ranks whose shards are there, valid or not."""
    names = (_SHARD.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(name[1]) for name in names if name)


def _valid_shards(folder: Path, ranks: int) -> Iterator[tuple[int, Shard]]:
    for rank in _ranks(folder):
        if rank < ranks:
            with contextlib.suppress(CapsuleError):
                yield rank, Shard(folder, rank)


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _plain(about: Mapping[str, Any]) -> dict[str, Any]:
    """Plain data as JSON.

    Raises:
        ValueError: if its keys are not names, or there are tensors in it.
    """
    encoded = encode(about)
    if encoded.tensors or type(encoded.skeleton) is not dict or "$dict" in encoded.skeleton:
        raise ValueError(f"about must be a dictionary of plain data without tensors, not {shown(about)}")
    return encoded.skeleton


def _no_tensor(tag: str, about: Mapping[str, Any]) -> Any:
    raise ValueError(f"{tag} has no place in it")
