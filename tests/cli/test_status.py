"""status.json says how a run ended, whatever the disk does."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normzoo._files import write_whole
from normzoo.cli import _trainer, run
from normzoo.cli._status import Status
from normzoo.cli.main import main
from normzoo.cli.run import shortened
from normzoo.report import read_runs


def read(folder: Path) -> dict[str, object]:
    return json.loads((folder / "status.json").read_text())


class FullDisk:
    """Lets no new file be written; bytes of files that are there can be overwritten."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(path: Path, *arguments: object, **options: object) -> int:
            raise OSError(28, "No space left on device", str(path))

        monkeypatch.setattr(Path, "write_text", refuse)


def test_seconds_do_not_follow_the_clock_on_the_wall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = Status(tmp_path)
    monkeypatch.setattr("time.time", lambda: 0.0)  # set back by an hour, or by years
    status.write("finished")
    assert 0 <= read(tmp_path)["seconds"] < 60  # type: ignore[operator]


@pytest.mark.parametrize("error", ["", "OSError: full", "é" * 5000, "\ud800"])
def test_a_full_disk_does_not_leave_a_run_that_seems_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    status = Status(tmp_path)
    status.write("running")
    size = (tmp_path / "status.json").stat().st_size
    FullDisk(monkeypatch)
    status.write("failed", error)
    assert read(tmp_path)["state"] == "failed"
    assert error.startswith(str(read(tmp_path)["error"]))
    assert (tmp_path / "status.json").stat().st_size <= size
    assert os.listdir(tmp_path) == ["status.json"]


def test_a_status_that_cannot_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    FullDisk(monkeypatch)
    Status(tmp_path).write("failed")
    printed = capsys.readouterr().err
    assert "status.json cannot say that the run is failed: [Errno 28] No space left" in printed
    assert len(printed.splitlines()) == 1


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "a", "before")

    def break_off(path: Path, text: str, **options: object) -> int:
        with path.open("w") as file:
            file.write(text[:3])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", break_off)
    with pytest.raises(OSError, match="No space"):
        write_whole(tmp_path / "a", "after, and longer")
    assert (tmp_path / "a").read_text() == "before"
    assert os.listdir(tmp_path) == ["a"]


@given(st.text(max_size=400))
@settings(max_examples=100)
def test_a_shortened_label_fits_a_file_name(label: str) -> None:
    label = label.encode(errors="ignore").decode()
    short = shortened(label)
    assert len(short.encode()) <= 100
    assert short == label or (short.endswith("...") and label.startswith(short[:-3]))


def test_a_sweep_goes_on_after_an_error_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files are limited to a size that the records of the second run pass, as on a disk that is full."""
    monkeypatch.chdir(tmp_path)
    trainer = (
        "{max_steps: 2, accelerator: cpu, limit_val_batches: 0, enable_model_summary: false, "
        "enable_checkpointing: false, enable_progress_bar: false}"
    )
    tails = "{class_path: normzoo.callbacks.GradientTails, init_args: {every_n_steps: 1}}"
    (tmp_path / "small.yaml").write_text(
        "model: {arch: resnet20_cifar, norm: batch}\ndata: {name: fashion_mnist, batch_size: 4}\n"
        f"trainer: {trainer}\nsweep:\n  callbacks: [[], [{tails}]]\n"
    )
    made: list[Path] = []
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def loggers(folder: Path, *_: object) -> list[object]:
        from lightning.pytorch.loggers import CSVLogger

        made.append(folder)
        return [CSVLogger(str(folder), name="metrics", version="")]

    monkeypatch.setattr(_trainer, "_loggers", loggers)
    original = run._fit

    def limited(*arguments: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
        try:
            original(*arguments)  # type: ignore[arg-type]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr(run, "_fit", limited)
    assert main(["sweep", "small.yaml", "--out", "sweep"]) == 1
    runs, damaged = read_runs("sweep")
    assert [r.state for r in runs] == ["finished", "failed"]
    assert runs[1].status["error"] == "OSError: [Errno 27] File too large"
    assert damaged == []
    assert "failed" in (tmp_path / "sweep" / "report.html").read_text()
    assert "report: sweep/report.html" in capsys.readouterr().out


def test_a_sweep_over_long_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "_fit", lambda *arguments: None)
    points = [[i, 1.0 + i / 10] for i in range(60)]
    name = "n" * 240
    (tmp_path / f"{name}.yaml").write_text(
        "model: {arch: resnet20_cifar}\ndata: fashion_mnist\ntrainer: {accelerator: cpu}\n"
        f"sweep:\n  model.norm: [{{name: batch_renorm, r_max: {points}}}, {{name: batch_renorm, d_max: {points}}}]\n"
    )
    assert main(["sweep", f"{name}.yaml"]) == 0
    [folder] = (tmp_path / "runs").iterdir()
    runs, damaged = read_runs(folder)
    assert [r.name[:26] for r in runs] == ["01-norm=batch_renorm(r_max", "02-norm=batch_renorm(d_max"]
    assert damaged == []


def test_a_folder_that_cannot_be_made_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("a file")
    recipe = ["quickstart", "trainer.accelerator=cpu"]
    for arguments in ([], ["--out", "runs/mine"], ["--out", "a\nb"], ["--out", "n" * 300]):
        assert main(["run", *recipe, *arguments]) == 2
        printed = capsys.readouterr()
        assert len(printed.err.splitlines()) == 1, printed.err
    assert os.listdir(tmp_path) == ["runs"]
