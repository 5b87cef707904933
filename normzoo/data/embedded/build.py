"""Make the embedded Fashion-MNIST subset from the original IDX files.

usage: python build.py FOLDER_OF_IDX_FILES fashion_mnist.npz

Takes the first 600 training and the first 100 test images of each class, in their original order.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from normzoo.data.fashion_mnist import read_idx_folder


def build(folder: Path, target: Path) -> None:
    """Write the subset of the images in ``folder`` to ``target``."""
    arrays = {}
    for split, per_class in (("train", 600), ("test", 100)):
        images, labels = (t.numpy() for t in read_idx_folder(folder, split))
        chosen = np.sort(np.concatenate([np.flatnonzero(labels == c)[:per_class] for c in range(10)]))
        arrays[f"{split}_images"] = images[chosen, 0]
        arrays[f"{split}_labels"] = labels[chosen].astype(np.uint8)
    np.savez_compressed(target, **arrays)


if __name__ == "__main__":
    build(Path(sys.argv[1]), Path(sys.argv[2]))
