"""The data modules: what they read, and what they say when it is not there."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from normzoo.data import CIFAR10, FashionMNIST, ImageFolder
from normzoo.data.fashion_mnist import read_embedded

IDX_NAMES = {"train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
             "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")}  # fmt: skip


def idx(array: np.ndarray) -> bytes:
    return b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


def write_idx(folder: Path, *, compressed: bool = False) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    generator, written = np.random.default_rng(0), {}
    for split, names in IDX_NAMES.items():
        images = generator.integers(0, 256, (20, 28, 28), dtype=np.uint8)
        for name, array in zip(names, (images, np.arange(20, dtype=np.uint8) % 10), strict=True):
            data = idx(array)
            (folder / (name + ".gz" * compressed)).write_bytes(gzip.compress(data) if compressed else data)
        written[split] = images
    return written


def write_image(path: Path, value: int, size: tuple[int, int] = (32, 32), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value, 0, 255)).save(path)


def test_the_embedded_subset() -> None:
    folder = resources.files("normzoo.data") / "embedded"
    data = (folder / "fashion_mnist.npz").read_bytes()
    assert len(data) <= 3.5e6
    assert "MIT License" in (folder / "README.md").read_text(encoding="utf-8")
    for split, count in (("train", 600), ("test", 100)):
        images, labels = read_embedded(split)
        assert (images.shape, images.dtype) == ((10 * count, 1, 28, 28), torch.uint8)
        assert labels.bincount().tolist() == [count] * 10
    digest = hashlib.sha256(read_embedded("train")[0].numpy().tobytes()).hexdigest()
    assert digest == "2b17438af55637db62c122a92490b5b4275bed5719a838b5b0486ea2193a98a4"


def test_normalization_constants_fit_the_images() -> None:
    images = torch.cat([x for x, _ in FashionMNIST().test_dataloader()])
    assert images.mean().abs() < 0.05
    assert abs(images.std() - 1) < 0.05


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("below", ["", "FashionMNIST/raw"])
def test_original_files_in_a_folder(tmp_path: Path, compressed: bool, below: str) -> None:
    written = write_idx(tmp_path / below, compressed=compressed)
    data = FashionMNIST(str(tmp_path), batch_size=4)
    images, labels = data.load("train")
    assert np.array_equal(images[:, 0].numpy(), written["train"])
    assert labels.tolist() == [i % 10 for i in range(20)]
    assert sum(len(y) for _, y in data.train_dataloader()) == 20


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x89PNG....", "is not an IDX file of unsigned bytes"),
        (b"", "is not an IDX file"),
        (b"\0\0\x08\x03\0\0", "is cut short within its header"),
        (idx(np.zeros((20, 28, 28), np.uint8))[:-5], "is cut short: 15675 of 15680 bytes"),
        (idx(np.zeros((19, 28, 28), np.uint8)), "do not match"),
    ],
)
def test_spoilt_files(tmp_path: Path, data: bytes, message: str) -> None:
    write_idx(tmp_path)
    (tmp_path / IDX_NAMES["train"][0]).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        FashionMNIST(str(tmp_path)).setup("fit")


def test_a_gzip_file_cut_short(tmp_path: Path) -> None:
    write_idx(tmp_path, compressed=True)
    path = tmp_path / (IDX_NAMES["train"][0] + ".gz")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz is not a whole gzip file"):
        FashionMNIST(str(tmp_path)).setup("fit")


def test_class_names_are_no_patterns(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("[ab]", "a", "*"):
            write_image(tmp_path / split / name / "0.png", 1)
    images, labels = ImageFolder(str(tmp_path)).load("train")
    assert (len(images), labels.tolist()) == (3, [0, 1, 2])


def test_missing_files_are_told_before_loading(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no Fashion-MNIST files in .* expected train-images"):
        FashionMNIST(str(tmp_path)).check()
    with pytest.raises(ValueError, match="needs root"):
        FashionMNIST(download=True)


def test_a_download_goes_through_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.datasets

    calls: list[Any] = []

    def fake(root: str, download: bool) -> None:
        calls.append((root, download))
        write_idx(Path(root) / "FashionMNIST" / "raw")

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", fake)
    data = FashionMNIST(str(tmp_path), download=True)
    data.check()
    data.prepare_data()
    data.prepare_data()  # there now, so not fetched again
    assert calls == [(str(tmp_path), True)]
    assert len(data.load("test")[0]) == 20


def test_cifar10_from_class_folders(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for label, name in enumerate(("cat", "dog")):
            write_image(tmp_path / split / name / "0.png", 40 * label)
    images, labels = CIFAR10(str(tmp_path)).load("train")
    assert images.shape == (2, 3, 32, 32)
    assert labels.tolist() == [0, 1]
    assert images[:, 0, 0, 0].tolist() == [0, 40]
    assert CIFAR10(str(tmp_path)).num_classes == 10


def test_cifar10_from_the_original_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    folder = tmp_path / datasets.CIFAR10.base_folder
    folder.mkdir()
    raw = np.random.default_rng(0).integers(0, 256, (2, 3072), dtype=np.uint8)
    for name, _ in (*datasets.CIFAR10.train_list, *datasets.CIFAR10.test_list):
        (folder / name).write_bytes(pickle.dumps({"data": raw, "labels": [3, 5]}))
    (folder / datasets.CIFAR10.meta["filename"]).write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda *args: True)
    images, labels = CIFAR10(str(tmp_path)).load("train")
    assert images.shape == (10, 3, 32, 32)
    assert np.array_equal(images[:2].numpy().reshape(2, -1), raw)
    assert labels.tolist() == [3, 5] * 5


def test_part_of_cifar10(tmp_path: Path) -> None:
    for split, count in (("train", 5), ("test", 3)):
        for label, name in enumerate(("bird", "cat", "dog")):
            for i in range(count):
                write_image(tmp_path / split / name / f"{i}.png", 80 * label + i)
    whole, part = CIFAR10(str(tmp_path)), CIFAR10(str(tmp_path), train_images=8, test_images=4)
    for data in (whole, part):
        data.check()
    for split, count in (("train", 8), ("test", 4)):
        (images, labels), (again, _), (everything, _) = part.load(split), part.load(split), whole.load(split)
        shapes = part.shapes()
        assert shapes is not None
        assert images.shape == shapes[split] == (count, 3, 32, 32)
        assert torch.equal(images, again)
        pixels = images[:, 0, 0, 0].tolist()
        assert len({*pixels}) == count  # each image once
        assert {*pixels} <= {*everything[:, 0, 0, 0].tolist()}
        assert [pixel // 80 for pixel in pixels] == labels.tolist()
        of_class = labels.bincount(minlength=3)
        assert of_class.max() - of_class.min() <= 1
    assert not torch.equal(part.load("train")[1], part.load("train")[1].sort().values)  # classes are mixed
    seeded = CIFAR10(str(tmp_path), train_images=8, seed=1).load("train")[0]
    assert torch.equal(seeded, part.load("train")[0])  # runs of several seeds see the same images


def test_more_of_cifar10_than_there_is(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            write_image(tmp_path / split / name / "0.png", 0)
    with pytest.raises(ValueError, match=r"test_images is 3, but .* has 2 images for test"):
        CIFAR10(str(tmp_path), train_images=1, test_images=3).check()
    with pytest.raises(ValueError, match=r"train_images is 60,000, but 'nowhere' has 50,000"):
        CIFAR10("nowhere", download=True, train_images=60_000).check()
    with pytest.raises(ValueError, match="train_images must be at least 1, or None for all images, not 0"):
        CIFAR10(str(tmp_path), train_images=0)


def test_cifar10_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no CIFAR-10 in .*cifar-10-batches-py.*download=True"):
        CIFAR10(str(tmp_path)).check()


def tree(root: Path) -> Path:
    for split, count in (("train", 5), ("test", 3)):
        for label, name in enumerate(("b", "a", "c")):
            for i in range(count):
                write_image(root / split / name / "deeper" / f"{i}.jpg", 80 * label + i, size=(40, 30))
    return root


def test_image_folder(tmp_path: Path) -> None:
    data = ImageFolder(str(tree(tmp_path)), image_size=16, batch_size=5)
    assert (data.classes, data.num_classes, data.in_chans) == (["a", "b", "c"], 3, 3)
    images, labels = data.load("train")
    assert isinstance(images, torch.Tensor)
    assert (images.shape, images.dtype) == ((15, 3, 16, 16), torch.uint8)
    assert labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert (tmp_path / "train" / "notes.txt").write_text("not a class") > 0
    assert data.num_classes == 3


@pytest.mark.parametrize("workers", [None, 0, 1, 3])
def test_images_in_memory_and_decoded_on_demand_are_the_same(tmp_path: Path, workers: int | None) -> None:
    tree(tmp_path)
    kept = ImageFolder(str(tmp_path), in_memory=True, batch_size=4)
    streamed = ImageFolder(str(tmp_path), in_memory=False, workers=workers, batch_size=4)
    files = streamed.load("train")[0]
    assert not isinstance(files, torch.Tensor)
    assert files.ahead == (workers != 0)
    for which in ("train_dataloader", "test_dataloader"):
        pairs = list(zip(getattr(kept, which)(), getattr(streamed, which)(), strict=True))
        assert pairs
        for (x, y), (u, v) in pairs:
            assert torch.equal(x, u)
            assert torch.equal(y, v)


def test_a_set_in_memory_is_put_there_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path)
    whole, _ = ImageFolder(str(tmp_path)).load("train")
    monkeypatch.setattr("normzoo.data.image_folder._AT_ONCE", 4)
    parts, _ = ImageFolder(str(tmp_path)).load("train")
    assert torch.equal(whole, parts)


def test_an_image_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    spoilt = tree(tmp_path) / "test" / "a" / "deeper" / "1.jpg"
    spoilt.write_bytes(spoilt.read_bytes()[:100])
    for workers in (0, 2):
        data = ImageFolder(str(tmp_path), in_memory=False, workers=workers, batch_size=2)
        with pytest.raises(ValueError, match=r"a/deeper/1\.jpg is not a readable image"):
            list(data.test_dataloader())


def test_greyscale(tmp_path: Path) -> None:
    data = ImageFolder(str(tree(tmp_path)), mode="L", image_size=8)
    assert data.in_chans == 1
    assert data.load("test")[0].shape == (9, 1, 8, 8)


@pytest.mark.parametrize("name", ["val", "valid"])
def test_other_names_for_the_test_split(tmp_path: Path, name: str) -> None:
    (tree(tmp_path) / "test").rename(tmp_path / name)
    assert len(ImageFolder(str(tmp_path)).load("test")[0]) == 9


def test_trees_that_are_not_right(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no class folders in .*train"):
        ImageFolder(str(tmp_path / "nowhere")).check()
    root = tree(tmp_path)
    write_image(root / "test" / "zebra" / "0.png", 1)
    with pytest.raises(ValueError, match="has classes that train has not: zebra"):
        ImageFolder(str(root)).load("test")
    shutil.rmtree(root / "test" / "zebra")
    (root / "train" / "a" / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"broken\.png is not a readable image"):
        ImageFolder(str(root)).load("train")
    for split in ("train", "test"):
        (tmp_path / "empty" / split / "a").mkdir(parents=True)
    with pytest.raises(ValueError, match="no images"):
        ImageFolder(str(tmp_path / "empty")).load("train")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FashionMNIST(batch_size=0), "batch_size must be at least 1"),
        (lambda: FashionMNIST(seed=-1), "seed must not be negative"),
        (lambda: ImageFolder(".", mode="CMYK"), "mode must be 'RGB' or 'L'"),
        (lambda: ImageFolder(".", image_size=0), "image_size must be at least 1"),
        (lambda: ImageFolder(".", workers=-1), "workers must not be negative"),
        (lambda: ImageFolder(".", mean=(0.5,)), "takes 3 values in mean and std"),
    ],
)
def test_bad_arguments(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
