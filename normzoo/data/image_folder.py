"""Images in a tree of class folders."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from normzoo.data._module import ImageDataModule, Split

_EXTENSIONS = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
_IN_MEMORY = 2 * 2**30  # bytes; larger sets are decoded batch by batch
_AT_ONCE = 1024  # images, of which there are two copies while they are put into memory


def _images(folder: Path) -> Iterator[Path]:
    """The image files in a folder and the folders below it."""
    return (p for p in folder.rglob("*") if p.suffix.lower() in _EXTENSIONS)


class ImageFiles:
    """Image files decoded on demand to (C, size, size) uint8: the short side resized, the centre cropped.

    Args:
        paths: the files.
        size: side of the square, in pixels.
        mode: ``"RGB"`` or ``"L"``.
        workers: threads that decode, None for one a processor; 0 decodes a batch when it is asked for, in no thread.
    """

    def __init__(self, paths: list[Path], size: int, mode: str, workers: int | None = None) -> None:
        self.paths, self.size, self.mode = paths, size, mode
        self.workers = os.cpu_count() or 1 if workers is None else workers

    @property
    def ahead(self) -> bool:
        """Whether the next batch is decoded while the one before is used."""
        return self.workers > 0

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Tensor) -> Tensor:
        if not self.workers:
            return torch.stack([*map(self._decode, index.tolist())])
        # PIL releases the interpreter lock while it decodes
        with ThreadPoolExecutor(self.workers) as pool:
            return torch.stack([*pool.map(self._decode, index.tolist())])

    def _decode(self, i: int) -> Tensor:
        try:
            with Image.open(self.paths[i]) as file:
                image = file.convert(self.mode)
        except OSError as error:
            raise ValueError(f"{self.paths[i]} is not a readable image: {error}") from error
        if image.size != (self.size, self.size):
            image = ImageOps.fit(image, (self.size, self.size), Image.Resampling.BILINEAR)
        array = np.array(image)
        return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())


class ImageFolder(ImageDataModule):
    """Any tree ``root/train/CLASS/image`` and ``root/test/CLASS/image`` (``val`` and ``valid`` serve for ``test``).

    Classes are the sorted folder names under ``train``. Sets of up to 2 GiB of pixels live on the training device;
    larger ones are decoded batch by batch.

    Args:
        root: the folder.
        image_size: side of the square that images are resized and cropped to, in pixels.
        mode: ``"RGB"`` or ``"L"`` (greyscale).
        in_memory: keep all decoded images on the device; None decides by size.
        workers: threads that decode images, None for one a processor. Of a set that is not in memory the next batch is
            decoded while the one before is used; with 0 it is decoded when it is asked for.
        batch_size: images for each rank and step.
        augment: pad by 4 and crop, and flip, the training images.
        seed: of shuffling and augmentation.
        mean: of each channel, in [0, 1]; by default ImageNet's, as timm uses it.
        std: of each channel, in [0, 1].

    Raises:
        ValueError: if a folder is missing or holds no images, or ``test`` has a class that ``train`` has not.
    """

    def __init__(
        self,
        root: str,
        *,
        image_size: int = 32,
        mode: str = "RGB",
        in_memory: bool | None = None,
        workers: int | None = None,
        batch_size: int = 128,
        augment: bool = True,
        seed: int = 0,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, augment=augment, seed=seed)
        if mode not in ("RGB", "L"):
            raise ValueError(f"mode must be 'RGB' or 'L', not {mode!r}")
        if image_size < 1:
            raise ValueError(f"image_size must be at least 1, not {image_size}")
        if workers is not None and workers < 0:
            raise ValueError(f"workers must not be negative, got {workers}")
        self.workers = workers
        self.root, self.image_size, self.mode, self.in_memory = Path(root), image_size, mode, in_memory
        channels = 3 if mode == "RGB" else 1
        self.mean = mean or ((0.485, 0.456, 0.406) if channels == 3 else (0.449,))
        self.std = std or ((0.229, 0.224, 0.225) if channels == 3 else (0.226,))
        if len(self.mean) != channels or len(self.std) != channels:
            raise ValueError(f"mode {mode!r} takes {channels} values in mean and std, got {mean} and {std}")

    @property
    def classes(self) -> list[str]:
        """The sorted folder names under ``train``."""
        self.check()
        return self._class_names()

    @property
    def num_classes(self) -> int:
        """Number of class folders under ``train``."""
        return len(self.classes)

    def check(self) -> None:
        """Raise a ValueError unless both splits are there with images, and train has all the classes."""
        for split in ("train", "test"):
            folder = self._folder(split)
            if not folder.is_dir() or not any(p.is_dir() for p in folder.iterdir()):
                raise ValueError(
                    f"no class folders in {str(folder)!r}: expected images as "
                    f"{self.root}/train/CLASS/image and {self.root}/test/CLASS/image"
                )
            unknown = sorted({p.name for p in folder.iterdir() if p.is_dir()} - set(self._class_names()))
            if unknown:
                raise ValueError(f"{str(folder)!r} has classes that train has not: {', '.join(unknown)}")
            filled = [name for name in self._class_names() if next(_images(folder / name), None)]
            if not filled:
                raise ValueError(
                    f"no images ({', '.join(sorted(_EXTENSIONS))}) in the class folders of {str(folder)!r}"
                )
            if split == "train" and len(filled) == 1:
                raise ValueError(f"images of one class only, {filled[0]!r}, in {str(folder)!r}: two are the least")

    def shapes(self) -> dict[str, tuple[int, int, int, int]] | None:
        """(N, C, size, size), with the images counted."""
        size = (self.in_chans, self.image_size, self.image_size)
        return {split: (len(self._files(split)[0]), *size) for split in ("train", "test")}

    def load(self, split: str) -> Split:
        """(N, C, size, size) uint8 images, as a tensor or decoded on demand, and (N,) int64 labels."""
        paths, labels = self._files(split)
        files = ImageFiles(paths, self.image_size, self.mode, self.workers)
        shape = (len(files), self.in_chans, self.image_size, self.image_size)
        keep = math.prod(shape) <= _IN_MEMORY if self.in_memory is None else self.in_memory
        if not keep:
            return files, torch.tensor(labels)
        images = torch.empty(shape, dtype=torch.uint8)
        for part in torch.arange(len(files)).split(_AT_ONCE):
            images[part] = files[part]
        return images, torch.tensor(labels)

    def _files(self, split: str) -> tuple[list[Path], list[int]]:
        """Paths and labels, by class and name."""
        paths: list[Path] = []
        labels: list[int] = []
        for label, name in enumerate(self.classes):
            images = sorted(_images(self._folder(split) / name))
            paths += images
            labels += [label] * len(images)
        return paths, labels

    def _class_names(self) -> list[str]:
        return sorted(p.name for p in (self.root / "train").iterdir() if p.is_dir())

    def _folder(self, split: str) -> Path:
        if split == "train":
            return self.root / "train"
        found = [self.root / name for name in ("test", "val", "valid") if (self.root / name).is_dir()]
        return found[0] if found else self.root / "test"
