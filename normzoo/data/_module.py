"""What all data modules share: splits in memory on the training device, and their loaders."""

from __future__ import annotations

import itertools
from typing import ClassVar

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from normzoo.data._loader import Augmentation, BatchLoader, Images

Split = tuple[Images, Tensor]


class RandomImages:
    """Uint8 noise of a shape (N, C, H, W), made when it is asked for, the same for each asking."""

    def __init__(self, shape: tuple[int, int, int, int]) -> None:
        self.shape = shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(256, (len(index), *self.shape[1:]), dtype=torch.uint8, generator=generator)


class ImageDataModule(LightningDataModule):
    """Base of the data modules; subclasses implement :meth:`load`.

    Args:
        batch_size: images for each rank and step.
        augment: pad-crop and flip the training images.
        seed: of shuffling and augmentation, which touch no global random state.

    Raises:
        ValueError: for a batch size below 1 or a negative seed.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: ClassVar[Augmentation] = Augmentation(pad=4, flip=True)

    def __init__(self, *, batch_size: int = 128, augment: bool = True, seed: int = 0) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.batch_size, self.augment, self.seed = batch_size, augment, seed
        self._splits: dict[str, Split] = {}
        self._ranks = 1  # that random images stand in for

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        raise TypeError(f"{type(self).__name__} does not define num_classes")

    @property
    def in_chans(self) -> int:
        """Channels of the images."""
        return len(self.mean)

    def check(self) -> None:
        """Raise a ValueError now if the images will not be found (nothing is loaded or downloaded)."""

    def shapes(self) -> dict[str, tuple[int, int, int, int]] | None:
        """(N, C, H, W) of ``"train"`` and ``"test"``, without loading or downloading; None if that cannot be known."""
        return None

    def use_random_images(self, ranks: int = 1) -> bool:
        """Put noise in the place of the images and labels, and nothing will be loaded or downloaded.

        Loaders then give the first of ``ranks`` ranks its share, on the CPU.

        Returns:
            whether that was possible: :meth:`shapes` must know how many there are.
        """
        shapes = self.shapes()
        if shapes is None:
            return False
        self._splits = {
            split: (RandomImages(shape), torch.arange(shape[0]) % self.num_classes) for split, shape in shapes.items()
        }
        self._ranks = ranks
        self.prepare_data = lambda: None  # type: ignore[method-assign]
        return True

    def load(self, split: str) -> Split:
        """Images and (N,) int64 labels of ``"train"`` or ``"test"``; called once a split."""
        raise TypeError(f"{type(self).__name__} does not define load(split)")

    def setup(self, stage: str | None = None) -> None:
        """Load what the stage needs onto the training device."""
        self.check()
        for split in ("train", "test") if stage in (None, "fit") else ("test",):
            if split not in self._splits:
                images, labels = self.load(split)
                on_device = images.to(self._device) if isinstance(images, Tensor) else images
                self._splits[split] = (on_device, labels)

    def train_dataloader(self) -> BatchLoader:
        """Shuffled, augmented batches of this rank's share."""
        return self._loader("train", shuffle=True)

    def calibration_batches(self, count: int) -> list[Tensor]:
        """Training images for calibration: ``count`` batches, shuffled by the seed, not augmented, alike on all ranks.

        Raises:
            ValueError: if the training data has fewer than ``count`` batches.
        """
        loader = self._loader("train", shuffle=True, alone=True)
        if count > len(loader):
            raise ValueError(f"{count} batches of {self.batch_size} images were asked for, and there are {len(loader)}")
        return [images for images, _ in itertools.islice(loader, count)]

    def val_dataloader(self) -> BatchLoader:
        """The test images, as no split of their own is kept for validation."""
        return self._loader("test", shuffle=False)

    def test_dataloader(self) -> BatchLoader:
        """The test images, each on exactly one rank."""
        return self._loader("test", shuffle=False)

    @property
    def _device(self) -> torch.device:
        return self.trainer.strategy.root_device if self.trainer else torch.device("cpu")

    def _loader(self, split: str, *, shuffle: bool, alone: bool = False) -> BatchLoader:
        if split not in self._splits:
            self.setup("fit" if split == "train" else "test")
        images, labels = self._splits[split]
        return BatchLoader(
            images,
            labels,
            self.batch_size,
            mean=self.mean,
            std=self.std,
            shuffle=shuffle,
            augmentation=self.augmentation if self.augment and not alone else None,
            seed=self.seed,
            rank=self.trainer.global_rank if self.trainer and not alone else 0,
            world_size=1 if alone else self._ranks * (self.trainer.world_size if self.trainer else 1),
            device=self._device,
        )
