"""Fashion-MNIST: an embedded subset, a folder of the original files, or a download."""

from __future__ import annotations

import gzip
import zlib
from importlib import resources
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from normzoo.data._loader import Augmentation
from normzoo.data._module import ImageDataModule, Split

_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


class FashionMNIST(ImageDataModule):
    """Fashion-MNIST: 28x28 greyscale images of ten kinds of clothing.

    Args:
        root: folder of the original IDX files (``train-images-idx3-ubyte``, ..., plain or ``.gz``), in itself or as
            torchvision lays them out; None for the embedded subset, 6,000 training and 1,000 test images balanced
            over the classes.
        download: fetch the full set into ``root`` through torchvision if it is not there.
        batch_size: images for each rank and step.
        augment: pad by 2 and crop, and flip, the training images.
        seed: of shuffling and augmentation.

    Raises:
        ValueError: if the folder does not hold the files and ``download`` is off.

    Source: Xiao, Rasul & Vollgraf 2017, arXiv 1708.07747.
    """

    mean = (0.2860,)
    std = (0.3530,)
    num_classes = 10
    augmentation: ClassVar[Augmentation] = Augmentation(pad=2, flip=True)

    def __init__(
        self,
        root: str | None = None,
        *,
        download: bool = False,
        batch_size: int = 128,
        augment: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, augment=augment, seed=seed)
        if download and root is None:
            raise ValueError("download=True needs root, the folder to download Fashion-MNIST into")
        self.root, self.download = root, download

    def prepare_data(self) -> None:
        """Download the files if asked to."""
        if self.download and self.root is not None and _find_idx_folder(Path(self.root)) is None:
            from torchvision.datasets import FashionMNIST as Original

            Original(self.root, download=True)

    def check(self) -> None:
        """Raise a ValueError if the files are neither there nor to be downloaded."""
        if self.root is not None and not self.download and _find_idx_folder(Path(self.root)) is None:
            raise ValueError(
                f"no Fashion-MNIST files in {self.root!r}: expected {_FILES['train'][0]}[.gz] and its three "
                "companions there or in FashionMNIST/raw below it; or set download=True, or leave root out for "
                "the embedded subset"
            )

    def shapes(self) -> dict[str, tuple[int, int, int, int]] | None:
        """Those of the embedded subset, of the files, or of the set to be downloaded."""
        folder = None if self.root is None else _find_idx_folder(Path(self.root))
        if folder is not None:
            counts = {split: _count_idx(_plain_or_gz(folder / names[0])) for split, names in _FILES.items()}
        else:
            counts = {"train": 6000, "test": 1000} if self.root is None else {"train": 60_000, "test": 10_000}
        return {split: (count, 1, 28, 28) for split, count in counts.items()}

    def load(self, split: str) -> Split:
        """(N, 1, 28, 28) uint8 images and (N,) int64 labels."""
        if self.root is None:
            return read_embedded(split)
        folder = _find_idx_folder(Path(self.root))
        if folder is None:
            raise ValueError(f"no Fashion-MNIST files in {self.root!r} after the download")
        return read_idx_folder(folder, split)


def read_embedded(split: str) -> tuple[Tensor, Tensor]:
    """The embedded subset: (N, 1, 28, 28) uint8 and (N,) int64."""
    with (
        (resources.files("normzoo.data") / "embedded" / "fashion_mnist.npz").open("rb") as file,
        np.load(file) as arrays,
    ):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    return torch.from_numpy(images)[:, None], torch.from_numpy(labels).long()


def read_idx_folder(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """The original files: (N, 1, 28, 28) uint8 and (N,) int64.

    Raises:
        ValueError: for a file that is not IDX of unsigned bytes, or is cut short.
    """
    images, labels = (_read_idx(_plain_or_gz(folder / name)) for name in _FILES[split])
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise ValueError(f"{folder}: images of shape {images.shape} and labels of {labels.shape} do not match")
    return torch.from_numpy(images)[:, None], torch.from_numpy(labels).long()


def _find_idx_folder(root: Path) -> Path | None:
    for folder in (root, root / "FashionMNIST" / "raw"):
        if all(_plain_or_gz(folder / name).exists() for pair in _FILES.values() for name in pair):
            return folder
    return None


def _plain_or_gz(path: Path) -> Path:
    return path if path.exists() else path.with_name(path.name + ".gz")


def _count_idx(path: Path) -> int:
    """The first dimension of a file, from its header."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(8)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from error
    if len(header) < 8 or header[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is not an IDX file of unsigned bytes")
    return int.from_bytes(header[4:], "big")


def _read_idx(path: Path) -> np.ndarray:
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from error
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is not an IDX file of unsigned bytes")
    if len(data) < 4 + 4 * data[3]:
        raise ValueError(f"{path} is cut short within its header")
    shape = np.frombuffer(data, ">i4", count=data[3], offset=4)
    body = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    if body.size != shape.prod():
        raise ValueError(f"{path} is cut short: {body.size} of {shape.prod()} bytes")
    return body.reshape(shape).copy()
