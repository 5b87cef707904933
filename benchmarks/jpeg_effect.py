"""What JPEG compression changes in the figures at initialization: the images are encoded as JPEG once more.

usage: python benchmarks/jpeg_effect.py FOLDER [--seeds N]

FOLDER holds CIFAR-10 as JPEG files, as ``data.root`` takes it. The recipe paper_depth is run on these images, on the
same images encoded once more with the files' own quantization tables, and at quality 90. The table says by how much
the logarithms (base 10) of the channels' means and deviations move at most, over seeds and the paper's layers.
It gives the maximum and the kurtosis of the gradient of layer 55 for each seed.

An image that was a JPEG file already loses less when it is encoded again with the same tables than it lost at first, so
that the files may differ from the original images by more than the table says.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning.pytorch.loggers import CSVLogger
from PIL import Image, JpegImagePlugin
from torch import Tensor

from normzoo import load_run
from normzoo.cli.build import build
from normzoo.cli.recipe import read

LAYERS = (6, 18, 30, 42, 54, 66, 78, 90, 102, 110)


class Encoded:
    """Images that are encoded as JPEG, and decoded again, when they are asked for: (N, 3, H, W) uint8."""

    def __init__(self, images: Any, options: dict[str, Any]) -> None:
        self.images, self.options = images, options

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor) -> Tensor:
        return torch.stack([self._encoded(image) for image in self.images[index]])

    def _encoded(self, image: Tensor) -> Tensor:
        file = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "jpeg", **self.options)
        return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)


def own_options(folder: Path) -> dict[str, Any]:
    """The quantization tables and the subsampling of the first file."""
    first = next(path for path in sorted((folder / "train").rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg"))
    with Image.open(first) as image:
        if not isinstance(image, JpegImagePlugin.JpegImageFile):
            raise ValueError(f"{first} is no JPEG file")
        return {"qtables": image.quantization, "subsampling": JpegImagePlugin.get_sampling(image)}


def numbers(folder: Path, norm: str, seed: int, options: dict[str, Any] | None) -> dict[str, Any]:
    """What a run of paper_depth says: logarithms of means and deviations by layer, and of the gradient."""
    recipe = read("paper_depth", [f"data.root={folder}", f"model.norm={norm}", f"seed={seed}"])
    training = build(recipe.config, recipe.source)
    data: Any = training.data
    if options is not None:
        load = data.load
        data.load = lambda split: (Encoded(load(split)[0], options), load(split)[1])
    with tempfile.TemporaryDirectory() as out:
        trainer = training.trainer(default_root_dir=out, logger=CSVLogger(out, name="", version=""))
        trainer.fit(training.task, data)
        records = load_run(out)
        moments: pd.DataFrame = records["channel_moments"].set_index("depth")
        [tail] = records["gradient_tails"].to_dict("records")
        at = [layer - 1 for layer in LAYERS]
        logs = {column: np.log10(moments.loc[at, column].to_numpy()) for column in ("mean", "deviation")}
        return {**logs, "max": tail["max"], "kurtosis": tail["kurtosis"]}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    encodings = {"own tables": own_options(arguments.folder), "quality 90": {"quality": 90}}
    print("| norm | encoded once more | log10 mean | log10 deviation | largest gradient | kurtosis |")
    print("|---|---|---|---|---|---|")
    for norm in ("batch", "none"):
        before = [numbers(arguments.folder, norm, seed, None) for seed in range(arguments.seeds)]
        for name, options in encodings.items():
            after = [numbers(arguments.folder, norm, seed, options) for seed in range(arguments.seeds)]
            pairs = list(zip(before, after, strict=True))
            moved = [
                f"{max(np.abs(b[column] - a[column]).max() for b, a in pairs):.3f}" for column in ("mean", "deviation")
            ]
            changed = [
                ", ".join(f"{b[column]:.3g} to {a[column]:.3g}" for b, a in pairs) for column in ("max", "kurtosis")
            ]
            print(f"| {norm} | {name} | {' | '.join([*moved, *changed])} |", flush=True)


if __name__ == "__main__":
    main()
