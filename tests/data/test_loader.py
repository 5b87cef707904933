"""The loader against plain loops: shards, order, augmentation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normzoo.data._loader import Augmentation, BatchLoader


def loader(
    n: int, batch_size: int, *, rank: int = 0, ranks: int = 1, shuffle: bool = True, seed: int = 0
) -> BatchLoader:
    images = torch.arange(n * 2 * 6 * 5).reshape(n, 2, 6, 5).remainder(251).to(torch.uint8)
    return BatchLoader(
        images,
        torch.arange(n),
        batch_size,
        mean=(0.25, 0.5),
        std=(0.5, 0.125),
        shuffle=shuffle,
        augmentation=Augmentation(pad=2, flip=True),
        seed=seed,
        rank=rank,
        world_size=ranks,
    )


@given(st.integers(1, 4), st.integers(1, 7), st.integers(0, 40), st.integers(0, 3))
@settings(max_examples=60)
def test_ranks_together_see_what_one_rank_with_the_whole_batch_sees(
    ranks: int, batch_size: int, extra: int, epoch: int
) -> None:
    n = ranks * batch_size + extra
    parts = [loader(n, batch_size, rank=r, ranks=ranks) for r in range(ranks)]
    whole = loader(n, ranks * batch_size)
    for part in (*parts, whole):
        part.batch_sampler.sampler.set_epoch(epoch)
    steps = list(zip(*parts, strict=True))
    assert len(steps) == len(whole) == len(parts[0]) == n // (ranks * batch_size)
    for step, (images, labels) in zip(steps, whole, strict=True):
        assert torch.equal(torch.cat([x for x, _ in step]), images)
        assert torch.equal(torch.cat([y for _, y in step]), labels)
    seen = [y for _, labels in whole for y in labels.tolist()]
    assert len(set(seen)) == len(seen)


@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 60))
@settings(max_examples=60)
def test_evaluation_sees_each_image_once_in_as_many_steps_on_each_rank(ranks: int, batch_size: int, extra: int) -> None:
    n = ranks + extra
    shards = [list(loader(n, batch_size, rank=r, ranks=ranks, shuffle=False)) for r in range(ranks)]
    assert len({len(s) for s in shards}) == 1
    assert sorted(y for s in shards for _, labels in s for y in labels.tolist()) == list(range(n))
    assert all(0 < len(labels) <= max(batch_size, 2) for s in shards for _, labels in s)


def test_the_seed_and_the_epoch_decide_and_nothing_else() -> None:
    def first(seed: int, epoch: int) -> torch.Tensor:
        made = loader(40, 8, seed=seed)
        made.batch_sampler.set_epoch(epoch)
        return next(iter(made))[0]

    before = torch.get_rng_state()
    assert torch.equal(first(1, 2), first(1, 2))
    assert not torch.equal(first(1, 2), first(1, 3))
    assert not torch.equal(first(1, 2), first(2, 2))
    assert torch.equal(before, torch.get_rng_state())


@given(st.integers(0, 4), st.booleans(), st.integers(0, 1000))
@settings(max_examples=40)
def test_augmentation_is_pad_crop_and_flip_of_each_image(pad: int, flip: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (5, 3, 6, 4), generator=generator, dtype=torch.uint8)
    augmentation = Augmentation(pad, flip)
    drawn = augmentation.draw(5, generator)
    assert drawn[:, :2].min() >= 0
    assert drawn[:, :2].max() <= 2 * pad
    assert flip or not drawn[:, 2].any()
    result = augmentation(images, drawn).numpy()
    for image, (row, column, mirrored), out in zip(images.numpy(), drawn.tolist(), result, strict=True):
        expected = np.pad(image, ((0, 0), (pad, pad), (pad, pad)))[:, row : row + 6, column : column + 4]
        np.testing.assert_array_equal(out, expected[:, :, ::-1] if mirrored else expected)


def test_every_crop_and_both_sides_are_drawn() -> None:
    drawn = Augmentation(pad=2, flip=True).draw(2000, torch.Generator().manual_seed(0))
    assert len(drawn.unique(dim=0)) == 5 * 5 * 2


def test_images_are_normalized_for_each_channel() -> None:
    images, _ = next(iter(loader(4, 4, shuffle=False)))
    raw = torch.arange(4 * 2 * 6 * 5).reshape(4, 2, 6, 5).remainder(251).double() / 255
    expected = (raw - torch.tensor([0.25, 0.5]).view(2, 1, 1)) / torch.tensor([0.5, 0.125]).view(2, 1, 1)
    assert torch.allclose(images.double(), expected, atol=1e-6)


@pytest.mark.parametrize(("n", "ranks", "shuffle"), [(7, 1, True), (15, 2, True), (1, 2, False)])
def test_too_few_images(n: int, ranks: int, shuffle: bool) -> None:
    with pytest.raises(ValueError, match=f"{n} images are too few for one step of {ranks} ranks"):
        loader(n, 8, ranks=ranks, shuffle=shuffle)


class Orders(pl.LightningModule):
    """Remembers the labels of each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.seen.append(batch[1].tolist())
        return self.w * batch[0].mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SavesAt(pl.Callback):
    """Saves a checkpoint after a step."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def fit(batches: BatchLoader, resume: Path | None = None, **options: Any) -> list[list[int]]:
    module = Orders()
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, batches, ckpt_path=resume, weights_only=False)
    return module.seen


@pytest.mark.parametrize("stop", [2, 5, 7, 9, 10])
def test_a_run_resumed_within_an_epoch_sees_the_batches_it_had_not_seen(tmp_path: Path, stop: int) -> None:
    checkpoint = tmp_path / "a.ckpt"
    whole = fit(loader(40, 8), max_epochs=3, callbacks=[SavesAt(checkpoint, stop)])  # five steps an epoch
    assert fit(loader(40, 8), max_epochs=3, resume=checkpoint) == whole[stop:]


@pytest.mark.parametrize("stop", [2, 3, 4, 6])
def test_a_run_of_shortened_epochs_is_resumed_in_step(tmp_path: Path, stop: int) -> None:
    checkpoint, options = tmp_path / "a.ckpt", {"max_epochs": 3, "limit_train_batches": 3}
    whole = fit(loader(40, 8), **options, callbacks=[SavesAt(checkpoint, stop)])
    assert fit(loader(40, 8), **options, resume=checkpoint) == whole[stop:]


@pytest.mark.parametrize("shuffle", [True, False])
def test_only_the_pass_after_loading_a_state_starts_within_an_epoch(shuffle: bool) -> None:
    batches = loader(40, 8, shuffle=shuffle)
    whole = [labels.tolist() for _, labels in batches]
    batches.load_state_dict({"epoch": 0, "steps_taken": 2})
    assert [[labels.tolist() for _, labels in batches] for _ in range(2)] == [whole[2:], whole]


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_pass_that_was_broken_off_is_not_continued_by_the_next(shuffle: bool) -> None:
    batches = loader(40, 8, shuffle=shuffle)
    whole = [labels.tolist() for _, labels in batches]
    for taken in (1, 3, 5):
        for _, _ in zip(range(taken), batches, strict=False):
            pass
        assert [labels.tolist() for _, labels in batches] == whole


class Asked:
    """Images that say which were asked for, and whether to ask ahead."""

    def __init__(self, images: torch.Tensor, ahead: bool) -> None:
        self.images, self.ahead, self.asked = images, ahead, 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        self.asked += 1
        return self.images[index]


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_batch_is_asked_for_ahead_and_its_position_told_when_it_is_given(shuffle: bool) -> None:
    plain, asked = loader(40, 8, shuffle=shuffle), {}
    for ahead in (False, True):
        batches = loader(40, 8, shuffle=shuffle)
        asked[ahead] = batches.images = Asked(batches.images, ahead)  # type: ignore[arg-type]
        given = iter(batches)
        first, _ = next(given)
        pairs = zip([(first, None), *given], plain, strict=True)
        assert batches.state_dict()["steps_taken"] == 5
        assert all(torch.equal(x, y) for (x, _), (y, _) in pairs)
        assert asked[ahead].asked == 5
    asked[True].asked = 0
    batches = loader(40, 8, shuffle=shuffle)
    batches.images = asked[True]  # type: ignore[assignment]
    given = iter(batches)
    for step in range(1, 4):
        next(given)
        assert batches.state_dict()["steps_taken"] == step
        assert asked[True].asked >= step  # the next one is under way in a thread
    given.close()  # type: ignore[attr-defined]
    assert asked[True].asked == 4
    whole = [labels.tolist() for _, labels in plain]
    batches.load_state_dict({"epoch": 0, "steps_taken": 3})
    assert [labels.tolist() for _, labels in batches] == whole[3:]


def test_lightning_tells_the_epoch() -> None:
    orders = fit(loader(16, 16), max_epochs=3)
    assert len(orders) == 3
    assert len({tuple(o) for o in orders}) == 3
    assert all(sorted(o) == list(range(16)) for o in orders)
