"""Batches of images that live in one tensor: sharded over ranks, shuffled and augmented from a seed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Images(Protocol):
    """Anything indexed by a tensor of positions that gives (B, C, H, W) uint8 images; a tensor is one.

    Images with an attribute ``ahead`` that is true are asked for the next batch while the one before is used.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Augmentation:
    """Pad-and-crop and horizontal flip of whole batches.

    Attributes:
        pad: zero pixels added on each side before a crop of the original size at a random position.
        flip: mirror each image with probability 1/2.
    """

    pad: int = 0
    flip: bool = False

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, 3) int64: row and column of the crop, and whether to flip; always three draws an image."""
        crops = torch.randint(0, 2 * self.pad + 1, (count, 2), generator=generator)
        flips = torch.randint(0, 2, (count, 1), generator=generator) * self.flip
        return torch.cat([crops, flips], 1)

    def __call__(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Apply what was drawn, (B, 3), to (B, C, H, W) images; the shape is kept."""
        if not (self.pad or self.flip):
            return images
        height, width = images.shape[-2:]
        padded = torch.nn.functional.pad(images, (self.pad,) * 4)
        rows = torch.arange(height, device=images.device) + drawn[:, :1]
        across = torch.arange(width, device=images.device).expand(len(images), width)
        columns = torch.where(drawn[:, 2:] == 1, width - 1 - across, across) + drawn[:, 1:2]
        batch = torch.arange(len(images), device=images.device)[:, None, None]
        return padded[batch, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1).contiguous()


class _Epoch:
    """Stands where Lightning looks for ``batch_sampler.sampler``, to be told the epoch."""

    def __init__(self) -> None:
        self.epoch = 0
        self.sampler = self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class BatchLoader:
    """Iterates over (images, labels): float32 (B, C, H, W) normalized, and int64 (B,), on one device.

    Training, each epoch is a fresh permutation, cut into steps of ``world_size * batch_size`` images of which each
    rank takes its consecutive part, augmentation included: R ranks of batch b see exactly what one rank of batch
    R * b sees. Images that fill no whole step are left out of that epoch. Evaluating, every image is seen once by
    exactly one rank, and all ranks take the same number of steps, so that collectives match.

    Args:
        images: uint8 images.
        labels: (N,) int64.
        batch_size: images for each rank and step.
        mean: of each channel, in [0, 1].
        std: of each channel, in [0, 1].
        shuffle: permute and augment (training).
        augmentation: applied when shuffling.
        seed: of the permutation and the augmentation, together with the epoch.
        rank: of this process.
        world_size: number of processes.
        device: of the batches.

    Raises:
        ValueError: if there are too few images for one step.
    """

    def __init__(
        self,
        images: Images,
        labels: Tensor,
        batch_size: int,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        shuffle: bool = False,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self.images, self.labels, self.batch_size = images, labels.to(device), batch_size
        self.mean, self.std = (
            torch.tensor(v, dtype=torch.float32, device=device).view(-1, 1, 1) * 255 for v in (mean, std)
        )
        self.shuffle, self.augmentation, self.seed = shuffle, augmentation or Augmentation(), seed
        self.rank, self.world_size, self.device = rank, world_size, torch.device(device)
        self.batch_sampler = _Epoch()
        self._steps_taken = 0
        self._resume_after = (0, 0)
        if len(self) == 0 or len(images) < world_size:
            needed = world_size * batch_size if shuffle else world_size
            raise ValueError(
                f"{len(images)} images are too few for one step of {world_size} ranks with batches of "
                f"{batch_size}: at least {needed} are needed"
            )

    def __len__(self) -> int:
        n, ranks = len(self.images), self.world_size
        if self.shuffle:
            return n // (ranks * self.batch_size)
        # No more steps than the smallest shard has images, so that no rank gets an empty batch: with a batch size
        # of one and uneven shards, the larger shards take two images in a step.
        return min(math.ceil(math.ceil(n / ranks) / self.batch_size), n // ranks)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        plan = self._training_plan() if self.shuffle else self._evaluation_plan()
        epoch, taken = self._resume_after
        self._resume_after = (0, 0)
        # A checkpoint from the end of an epoch, or of a shortened one, is followed by a whole one
        start = taken % len(self) if epoch == self.batch_sampler.epoch else 0
        steps = enumerate(itertools.islice(plan, start, None), start=start + 1)
        for step, index, drawn, images in self._with_images(steps):
            self._steps_taken = step
            images = images.to(self.device, non_blocking=True)
            if drawn is not None:
                images = self.augmentation(images, drawn)
            yield (images.float() - self.mean) / self.std, self.labels[index]

    def _with_images(
        self, steps: Iterator[tuple[int, tuple[Tensor, Tensor | None]]]
    ) -> Iterator[tuple[int, Tensor, Tensor | None, Tensor]]:
        """Each step with its images; if ``images.ahead`` is true, a thread reads those of the next step meanwhile."""
        if not getattr(self.images, "ahead", False):
            for step, (index, drawn) in steps:
                yield step, index, drawn, self.images[index]
            return
        with ThreadPoolExecutor(1) as pool:
            previous: tuple[int, Tensor, Tensor | None, Future[Tensor]] | None = None
            for step, (index, drawn) in steps:
                future = pool.submit(self.images.__getitem__, index)
                if previous is not None:
                    yield *previous[:3], previous[3].result()
                previous = step, index, drawn, future
            if previous is not None:
                yield *previous[:3], previous[3].result()

    def state_dict(self) -> dict[str, int]:
        """The epoch and the steps taken in it, which Lightning keeps in checkpoints."""
        return {"epoch": self.batch_sampler.epoch, "steps_taken": self._steps_taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Start the next pass, if it is over the same epoch, after the steps that were taken."""
        self._resume_after = (state["epoch"], state["steps_taken"])

    def _training_plan(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.batch_sampler.epoch)
        order = torch.randperm(len(self.images), generator=generator)
        drawn = self.augmentation.draw(len(order), generator)
        # One copy to the device an epoch; steps only slice.
        order, drawn = order.to(self.device), drawn.to(self.device)
        whole = self.world_size * self.batch_size
        for step in range(len(self)):
            start = step * whole + self.rank * self.batch_size
            part = slice(start, start + self.batch_size)
            yield order[part], drawn[part]

    def _evaluation_plan(self) -> Iterator[tuple[Tensor, None]]:
        shard = torch.arange(self.rank, len(self.images), self.world_size, device=self.device)
        for index in torch.tensor_split(shard, len(self)):
            yield index, None
