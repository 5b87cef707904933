"""``normzoo convert`` says what a file is that is no checkpoint, whatever its name; and reads those that are."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn

from normzoo.cli.main import main


def saved(content: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def zipped(**files: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return file.getvalue()


def arrays() -> bytes:
    file = io.BytesIO()
    np.savez(file, a=np.ones(3))
    return file.getvalue()


def array() -> bytes:
    file = io.BytesIO()
    np.save(file, np.ones(3))
    return file.getvalue()


def tarred() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a"))
    return file.getvalue()


STATE = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).state_dict()
TORCH, OLD = saved(STATE), saved(STATE, _use_new_zipfile_serialization=False)
SAFE = save(STATE)
KINDS = {
    "empty": (b"", "is an empty file"),
    "text": (b"extends: quickstart\ntrainer: {max_epochs: 50}\n", "is a text file"),
    "text with letters": ("Gewichte für später\n".encode(), "is a text file"),
    "long text": ("ä".encode() * 4000, "is a text file"),
    "text that looks like JSON": (b"{not json}", "is a text file"),
    "json": (b'\n{"weights": [1, 2]}', "is a JSON file"),
    "html": (b"<!DOCTYPE html>\n<html><body>404</body></html>", "is an HTML page"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "zeros": (b"\0" * 5000, "is a file of zeros"),
    "noise": (bytes(range(255, 0, -1)) * 20, "of a kind that is not known here"),
    "gzip": (gzip.compress(TORCH), "is compressed by gzip: unpack it first"),
    "tar": (tarred(), "is a tar archive: unpack it first"),
    "zip": (zipped(a=b"1"), "is a zip archive that torch.save did not write"),
    "empty zip": (zipped(), "is a zip archive that torch.save did not write"),
    "numpy": (array(), "is a NumPy array"),
    "numpy archive": (arrays(), "is a NumPy archive"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + b"\0" * 99, "is an HDF5 file"),
    "image": (b"\x89PNG\r\n\x1a\n" + b"\0" * 99, "is an image"),
    "script": (zipped(**{"x/data.pkl": b"", "x/constants.pkl": b""}), "is a TorchScript archive"),
    "cut": (TORCH[:-200], "is a zip archive that is cut short or damaged"),
    "cut to its start": (TORCH[:20], "is a zip archive that is cut short or damaged"),
    "old and cut": (OLD[:-20], "cannot be read: it is cut short, damaged"),
    "old and cut to its start": (OLD[:5], "cannot be read: it is cut short, damaged"),
    "pickle": (pickle.dumps({"a": 1}), "cannot be read: it is cut short, damaged, or a pickle that torch.save did not"),
    "pickle of a list": (pickle.dumps([1]), "a pickle that torch.save did not write"),
    "pickle alone": (b"\x80\x04", "cannot be read: it is cut short"),
    "list": (saved([1]), "holds a list, not a state dict"),
    "number": (saved(3), "holds a int, not a state dict"),
    "empty dict": (saved({}), "holds no state dict"),
    "keys that are numbers": (saved({1: torch.ones(2)}), "holds no state dict"),
    "no data": (zipped(**{"x/data.pkl": b""}), "cannot be read"),
    "safetensors cut": (SAFE[:-9], "is a safetensors file cut short or damaged"),
    "safetensors cut to its header": (SAFE[:20], "is a safetensors file cut short or damaged"),
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_it_is_is_said(kind: str, ending: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, expected = KINDS[kind]
    path = folder / f"file.{ending}"
    path.write_bytes(data)
    assert main(["convert", path.name, "--to", "group", "--out", "new.pt"]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1, error
    assert len(error) <= 300
    assert path.name in error
    assert expected in error
    assert os.listdir(folder) == [path.name]


@pytest.mark.parametrize("data", [TORCH, OLD, SAFE], ids=["torch", "before torch 1.6", "safetensors"])
@pytest.mark.parametrize("name", ["file.pt", "file.safetensors", "file"])
def test_the_content_decides(data: bytes, name: str, folder: Path) -> None:
    (folder / name).write_bytes(data)
    assert main(["convert", name, "--to", "group", "--out", "new.pt"]) == 0
    assert set(torch.load("new.pt", weights_only=True)) == {"0.weight", "0.bias", "1.weight", "1.bias"}


def test_paths_that_are_no_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo("pipe")
    for name, expected in {
        "pipe": "is not a file",
        ".": "is a folder",
        "/dev/zero": "is not a file",
        "x" * 999: "long",
    }.items():
        assert main(["convert", name, "--to", "group", "--out", "new.pt"]) == 2
        error = capsys.readouterr().err
        assert expected in error
        assert len(error.splitlines()) == 1


CHANGES = st.tuples(st.integers(0, 5000), st.sampled_from(["flip", "cut", "zero", "double"]))


@given(st.sampled_from([TORCH, OLD, SAFE, b'{"a": 1}']), st.lists(CHANGES, min_size=1, max_size=3))
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_is_read_or_refused_in_one_line(
    folder: Path, data: bytes, changes: list[tuple[int, str]]
) -> None:
    for at, how in changes:
        at %= max(len(data), 1)
        rest = data[at + 3 :]
        end = {"flip": bytes(255 - b for b in data[at : at + 3]) + rest, "cut": b"", "zero": b"\0\0\0" + rest}
        data = data[:at] + end.get(how, data[at:] * 2)
    (folder / "file.pt").write_bytes(data)
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        code = main(["convert", "file.pt", "--to", "group", "--out", "new.pt", "--force"])
    error = err.getvalue().rstrip("\n")
    assert code == 0 or (code == 2 and len(error) <= 300 and error.isprintable()), error
