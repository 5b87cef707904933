"""What one rank writes of a capsule: a safetensors file, and a JSON file with the tree and the checksums.

The safetensors file is written here rather than by the package of that name: one tensor at a time goes through the
memory of the host, its checksum is taken on the way, and a full disk raises OSError. It is read by that package.
"""

from __future__ import annotations

import contextlib
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normzoo.capsules.sealed import CapsuleError, new_file, read_json, write_json
from normzoo.capsules.tree import Encoded, LeftOut, decode

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

_NUMBERS = frozenset({"F64", "F32", "F16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"})  # in NumPy


def json_path(folder: Path, rank: int) -> Path:
    """The JSON file of a rank, which is written last."""
    return folder / f"rank_{rank:05d}.json"


def tensors_path(folder: Path, rank: int) -> Path:
    """The safetensors file of a rank."""
    return folder / f"rank_{rank:05d}.safetensors"


def write(folder: Path, rank: int, about: Mapping[str, Any], encoded: Encoded) -> Path:
    """Write the two files of a rank.

    Returns:
        the JSON file.

    Raises:
        FileExistsError: if the rank has written before.
        OSError: if a file could not be written; then neither is there.
    """
    path, tensors = json_path(folder, rank), tensors_path(folder, rank)
    if path.exists():
        raise FileExistsError(17, "the rank has written this capsule before", str(path))
    with contextlib.ExitStack() as undo:
        undo.callback(tensors.unlink, missing_ok=True)
        content = {
            "rank": rank,
            "about": about,
            "safetensors": _write_tensors(tensors, encoded.tensors),
            "left_out": encoded.left_out,
            "tree": encoded.skeleton,
        }
        write_json(path, content)
        undo.pop_all()
    return path


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write a safetensors file.

    Returns:
        its size in bytes, and the checksums of its header and of each tensor.
    """
    from normzoo.capsules.tensors import DTYPES, data_of

    ranking = {dtype: place for place, dtype in enumerate(DTYPES)}  # aligns values, as their sizes fall
    names = sorted(tensors, key=lambda name: ranking[tensors[name].dtype])
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.dtype.itemsize
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    header = len(header).to_bytes(8, "little") + header
    checksums = {}
    with new_file(path) as file:
        file.write(header)
        for name in names:
            data = data_of(tensors[name])
            file.write(data)
            checksums[name] = zlib.crc32(data)
    return {"bytes": len(header) + end, "header": [len(header), zlib.crc32(header)], "tensors": checksums}


class Shard:
    """The two files of a rank, of which the JSON file is read at once.

    Raises:
        CapsuleError: if the JSON file cannot be read, or the other one is not there or cut off.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.path, self.tensors_path = json_path(folder, rank), tensors_path(folder, rank)
        content = read_json(self.path)
        try:
            self.rank: int = content["rank"]
            self.left_out = {str(path): str(reason) for path, reason in content["left_out"].items()}
            self._tree: Any = content["tree"]
            self._about: Any = content["about"]
            self._bytes: int = content["safetensors"]["bytes"]
            self._header_bytes, self._header_checksum = content["safetensors"]["header"]
            self._checksums: dict[str, int] = dict(content["safetensors"]["tensors"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CapsuleError(f"{self.path} is not a file of a capsule: what it must say is not in it") from error
        if self.rank != rank:
            raise CapsuleError(f"{self.path} is of rank {self.rank!r}, not of the rank that it is named after")
        try:
            size = self.tensors_path.stat().st_size if self.tensors_path.is_file() else None
        except OSError as error:
            raise CapsuleError(f"{self.tensors_path} cannot be read: {error.strerror}") from error
        if size is None:
            raise CapsuleError(f"{self.tensors_path} is not there, or is not a file")
        if size != self._bytes:
            raise CapsuleError(f"{self.tensors_path} is damaged: it has {size} bytes of {self._bytes}")

    def tree(self, *place: str | int) -> Any:
        """The tree, or the part at a place: keys of dictionaries and indices of lists. Imports torch for tensors.

        Raises:
            CapsuleError: if the file of the tensors is damaged, or there is nothing at that place.
        """
        with self._open("pt") as file:

            def leaf(tag: str, about: Mapping[str, Any]) -> Any:
                from normzoo.capsules import tensors

                return tensors.leaf(tag, about, load)

            load = cache(partial(self._tensor, file))
            return self._decoded(self._part(*place), leaf)

    def frames(self) -> list[dict[str, Any]]:
        """The frames, without their batches and the states of random generators, and without torch.

        A tensor of one value is that value; others are :class:`LeftOut`.
        """
        try:
            frames = [
                {**frame, "micro_batches": list(map(_small, frame["micro_batches"]))} for frame in self._part("frames")
            ]
        except (KeyError, TypeError, AttributeError) as error:
            raise CapsuleError(f"{self.path} is not a file of a capsule: it holds no frames") from error
        with self._open("np") as file:
            decoded: list[dict[str, Any]] = self._decoded(frames, partial(self._number, file))
        return decoded

    def steps(self, key: str) -> list[int]:
        """The steps of the frames or of the snapshots.

        Raises:
            CapsuleError: if they have none.
        """
        try:
            steps = [part["step"] for part in self._part(key)]
        except (KeyError, TypeError) as error:
            raise CapsuleError(f"{self.path} is not a file of a capsule: its {key} have no steps") from error
        return steps

    def has(self, *place: str | int) -> bool:
        """Whether there is anything at a place."""
        with contextlib.suppress(CapsuleError):
            self._part(*place)
            return True
        return False

    def count(self, *place: str | int) -> int:
        """How many items the list at a place has.

        Raises:
            CapsuleError: if there is no list.
        """
        part = self._part(*place)
        if not isinstance(part, list):
            raise CapsuleError(f"{self.path} is not a file of a capsule: it has no list at {_joined(place)}")
        return len(part)

    def _part(self, *place: str | int) -> Any:
        part = self._tree
        try:
            for key in place:
                part = part[key]
        except (KeyError, TypeError, IndexError) as error:
            raise CapsuleError(f"{self.path} has nothing at {_joined(place)}") from error
        return part

    def _decoded(self, skeleton: Any, leaf: Callable[[str, Mapping[str, Any]], Any]) -> Any:
        try:
            return decode(skeleton, leaf)
        except CapsuleError:
            raise
        except ValueError as error:
            raise CapsuleError(f"{self.path} is not a file of a capsule: {error}") from error

    @contextlib.contextmanager
    def _open(self, framework: str) -> Iterator[Any]:
        """The file of the tensors, whose header is what was written."""
        from safetensors import SafetensorError, safe_open

        path = self.tensors_path
        try:
            with path.open("rb") as file:
                header = file.read(min(self._header_bytes, self._bytes))
            if zlib.crc32(header) != self._header_checksum:
                raise CapsuleError(f"{path} is damaged: its header is not what was written")
            with safe_open(path, framework=framework) as opened:
                yield opened
        except (OSError, SafetensorError) as error:
            raise CapsuleError(f"{path} cannot be read: {error}") from error

    def _tensor(self, file: Any, name: str) -> Tensor:
        from normzoo.capsules.tensors import data_of

        tensor: Tensor = file.get_tensor(name).clone()  # else changes of the file would be seen
        self._check(name, data_of(tensor))
        return tensor

    def _number(self, file: Any, tag: str, about: Mapping[str, Any]) -> Any:
        name = about[tag]
        values = file.get_slice(name)
        if (
            tag == "$bytes"
            or "dtype" in about
            or values.get_dtype() not in _NUMBERS
            or math.prod(values.get_shape()) != 1
        ):
            return LeftOut("a tensor")
        array: np.ndarray = file.get_tensor(name)
        self._check(name, array.tobytes())
        return array.item()

    def _check(self, name: str, data: bytes | memoryview) -> None:
        if zlib.crc32(data) != self._checksums.get(name):
            raise CapsuleError(f"{self.tensors_path} is damaged: the tensor {name} is not what was written")


def _joined(place: tuple[str | int, ...]) -> str:
    return "/".join(map(str, ("", *place)))


def _small(micro_batch: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in micro_batch.items() if key not in ("batch", "random")}
