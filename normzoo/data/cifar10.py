"""CIFAR-10: torchvision's files, a download of them, or a tree of class folders."""

from __future__ import annotations

from pathlib import Path

import torch
from torchvision import datasets

from normzoo.data._module import ImageDataModule, Split
from normzoo.data.image_folder import ImageFolder


class CIFAR10(ImageDataModule):
    """CIFAR-10: 32x32 colour images of ten classes, 50,000 for training and 10,000 for test.

    Args:
        root: folder with torchvision's files (``cifar-10-batches-py``), or with ``train/CLASS/image`` and
            ``test/CLASS/image``.
        download: fetch the files into ``root`` through torchvision if they are not there.
        batch_size: images for each rank and step.
        augment: pad by 4 and crop, and flip, the training images (He et al. 2016, section 4.2).
        seed: of shuffling and augmentation.

    Raises:
        ValueError: if the folder holds neither and ``download`` is off.

    Source: Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images".
    """

    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)
    num_classes = 10

    def __init__(
        self,
        root: str = "data/cifar10",
        *,
        download: bool = False,
        batch_size: int = 128,
        augment: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, augment=augment, seed=seed)
        self.root, self.download = root, download

    @property
    def _has_class_folders(self) -> bool:
        return (Path(self.root) / "train").is_dir()

    @property
    def _folder(self) -> ImageFolder:
        return ImageFolder(self.root, image_size=32, in_memory=True)

    @property
    def _has_original(self) -> bool:
        return (Path(self.root) / datasets.CIFAR10.base_folder).is_dir()

    def prepare_data(self) -> None:
        """Download the files if asked to and not there."""
        if self.download and not (self._has_class_folders or self._has_original):
            datasets.CIFAR10(self.root, download=True)

    def check(self) -> None:
        """Raise a ValueError if the images are neither there nor to be downloaded."""
        if self._has_class_folders:
            self._folder.check()
            if self._folder.num_classes > self.num_classes:
                raise ValueError(f"{self._folder.num_classes} class folders in {self.root!r}, but CIFAR-10 has ten")
        elif not (self._has_original or self.download):
            raise ValueError(
                f"no CIFAR-10 in {self.root!r}: expected torchvision's folder {datasets.CIFAR10.base_folder}, or class "
                "folders train/CLASS/image and test/CLASS/image; or set download=True"
            )

    def shapes(self) -> dict[str, tuple[int, int, int, int]] | None:
        """Those of the class folders' images, else of the whole set."""
        if self._has_class_folders:
            return self._folder.shapes()
        return {"train": (50_000, 3, 32, 32), "test": (10_000, 3, 32, 32)}

    def load(self, split: str) -> Split:
        """(N, 3, 32, 32) uint8 images and (N,) int64 labels."""
        if self._has_class_folders:
            return self._folder.load(split)
        try:
            original = datasets.CIFAR10(self.root, train=split == "train")
        except RuntimeError as error:
            raise ValueError(f"the CIFAR-10 files in {self.root!r} are not whole: {error}") from error
        return torch.from_numpy(original.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(original.targets)
