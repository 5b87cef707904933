"""CIFAR-10: torchvision's files, a download of them, or a tree of class folders."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
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
        train_images: train on so many images, drawn once and for all, evenly over the classes; None for all.
        test_images: likewise, test on so many.

    Raises:
        ValueError: if the folder holds neither and ``download`` is off; if it holds fewer images than are asked for.

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
        train_images: int | None = None,
        test_images: int | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, augment=augment, seed=seed)
        for name, count in (("train_images", train_images), ("test_images", test_images)):
            if count is not None and count < 1:
                raise ValueError(f"{name} must be at least 1, or None for all images, not {count}")
        self.root, self.download = root, download
        self._counts = {"train": train_images, "test": test_images}

    @property
    def _has_class_folders(self) -> bool:
        return (Path(self.root) / "train").is_dir()

    @property
    def _folder(self) -> ImageFolder:
        return ImageFolder(self.root, image_size=32, in_memory=False)

    @property
    def _has_original(self) -> bool:
        return (Path(self.root) / datasets.CIFAR10.base_folder).is_dir()

    def prepare_data(self) -> None:
        """Download the files if asked to and not there."""
        if self.download and not (self._has_class_folders or self._has_original):
            datasets.CIFAR10(self.root, download=True)

    def check(self) -> None:
        """Raise a ValueError if the images are neither there nor to be downloaded, or too few."""
        if self._has_class_folders:
            self._folder.check()
            if self._folder.num_classes > self.num_classes:
                raise ValueError(f"{self._folder.num_classes} class folders in {self.root!r}, but CIFAR-10 has ten")
        elif not (self._has_original or self.download):
            raise ValueError(
                f"no CIFAR-10 in {self.root!r}: expected torchvision's folder {datasets.CIFAR10.base_folder}, or class "
                "folders train/CLASS/image and test/CLASS/image; or set download=True"
            )
        asked_for = {split: count for split, count in self._counts.items() if count is not None}
        there_are = self._all_shapes() if asked_for else {}  # which lists the files of class folders
        for split, asked in asked_for.items():
            there = there_are[split][0]
            if asked > there:
                raise ValueError(f"{split}_images is {asked:,}, but {self.root!r} has {there:,} images for {split}")

    def shapes(self) -> dict[str, tuple[int, int, int, int]] | None:
        """Those of the class folders' images, else of the whole set; as many as are asked for."""
        shapes = self._all_shapes()
        return {split: (self._counts[split] or shapes[split][0], *shapes[split][1:]) for split in shapes}

    def load(self, split: str) -> Split:
        """(N, 3, 32, 32) uint8 images and (N,) int64 labels."""
        images, labels = self._load_all(split)
        asked = self._counts[split]
        kept = torch.arange(len(labels)) if asked is None else balanced_subset(labels, asked)
        return images[kept], labels[kept]  # which decodes files

    def _all_shapes(self) -> dict[str, tuple[int, int, int, int]]:
        """Those of :meth:`shapes`, of all images."""
        shapes = self._folder.shapes() if self._has_class_folders else None
        return shapes or {"train": (50_000, 3, 32, 32), "test": (10_000, 3, 32, 32)}

    def _load_all(self, split: str) -> Split:
        """All images of a split, those of class folders not decoded yet."""
        if self._has_class_folders:
            return self._folder.load(split)
        try:
            original = datasets.CIFAR10(self.root, train=split == "train")
        except RuntimeError as error:
            raise ValueError(f"the CIFAR-10 files in {self.root!r} are not whole: {error}") from error
        return torch.from_numpy(original.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(original.targets)


def balanced_subset(labels: Tensor, count: int) -> Tensor:
    """Indices of ``count`` samples, the same ones at each call, whose numbers in the classes differ by at most one.

    Args:
        labels: (N,) int64, with at least ``count / classes`` samples of each class.
        count: of samples, at most N.

    Returns:
        (count,) int64, in a random order.

    Example:
        >>> labels = torch.tensor([0, 0, 0, 1, 1, 1])
        >>> labels[balanced_subset(labels, 4)].bincount()
        tensor([2, 2])
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    one_hot = torch.nn.functional.one_hot(labels[order])
    place_in_class = (one_hot.cumsum(0) * one_hot).sum(1)
    return order[place_in_class.argsort(stable=True)[:count]]
