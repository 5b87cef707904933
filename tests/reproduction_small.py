"""A step of ResNet-32 on the embedded images, with batch normalization or without, for tests of the paper's figures."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pandas as pd
from callbacks_small import trainer

from normzoo import load_run
from normzoo.callbacks import Measurement
from normzoo.data import FashionMNIST
from normzoo.task import ImageClassification

SEEDS = range(10)


def first_step(folder: Path, norm: str, seed: int, measurement: Measurement) -> pd.DataFrame:
    """The record of a measurement at initialization, of 16 images that the seed has drawn."""
    pl.seed_everything(seed, verbose=False)
    task = ImageClassification("resnet32_cifar", norm, in_chans=1)
    trainer(str(folder), callbacks=[measurement], max_steps=1, limit_val_batches=0).fit(
        task, FashionMNIST(batch_size=16, seed=seed)
    )
    return load_run(folder / "log")[measurement.name]
