"""What a file is that should be a checkpoint, by its content."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

_MAGIC = {
    b"\x93NUMPY": "a NumPy array",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file, as Keras writes",
    b"GGUF": "a GGUF file",
    b"\x1f\x8b": "compressed by gzip: unpack it first",
    b"BZh": "compressed by bzip2: unpack it first",
    b"\xfd7zXZ": "compressed by xz: unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it first",
    b"7z\xbc\xaf": "a 7z archive: unpack it first",
    b"Rar!": "a RAR archive: unpack it first",
    b"version https://git-lfs": "a Git LFS pointer in the place of the file: git lfs pull fetches that",
    b"%PDF": "a PDF document",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"\x7fELF": "a program",
}
_HEAD = 4096  # bytes


def describe(path: Path) -> str:
    """``"torch"`` and ``"safetensors"`` for a file that begins as such, else what it is, as in "a text file".

    Raises:
        OSError: if it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if not head:
        return "an empty file"
    if head.startswith(b"PK"):
        return _zip(path)
    if head.startswith(b"\x80") and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "torch"  # a pickle, as torch.save wrote before torch 1.6
    if head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= max(size, 10**8):
        return "safetensors"
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it first"
    if not head.strip(b"\0"):
        return "a file of zeros, such as a broken download leaves"
    return next((what for magic, what in _MAGIC.items() if head.startswith(magic)), None) or _text(path, head, size)


def _zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return "a zip archive that is cut short or damaged"
    if any(name.endswith("/constants.pkl") for name in names):
        return "a TorchScript archive: save its state dict with torch.save"
    if any(name.endswith("/data.pkl") for name in names):
        return "torch"
    arrays = bool(names) and all(name.endswith(".npy") for name in names)
    return "a NumPy archive" if arrays else "a zip archive that torch.save did not write"


def _text(path: Path, head: bytes, size: int) -> str:
    # A character may be cut at the end of the head
    text = head.decode("utf-8", errors="ignore" if size > _HEAD else "replace").lstrip("\ufeff")
    if not all(c.isprintable() or c.isspace() for c in text) or len(text.encode()) < len(head) - 3 or "\ufffd" in text:
        return "a file of a kind that is not known here"
    start = text.lstrip().lower()
    if start.startswith(("<!doctype html", "<html")):
        return "an HTML page, such as a download that failed leaves"
    if start.startswith(("{", "[")) and size <= 2**20:
        try:
            json.loads(path.read_bytes())
        except ValueError:
            return "a text file"
        return "a JSON file"
    return "a text file"
