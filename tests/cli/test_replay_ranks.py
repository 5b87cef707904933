"""The processes in which a capsule of several ranks is replayed: they find each other, and end together."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from normzoo._errors import RecipeError
from normzoo.cli import _ranks


def ranks_that(monkeypatch: pytest.MonkeyPatch, command: str, *arguments: str, ranks: int = 2) -> int:
    monkeypatch.setattr(_ranks, "_COMMAND", f"import os, sys, time\nrank = int(os.environ['RANK'])\n{command}")
    monkeypatch.setattr(_ranks, "GRACE", 0.5)
    return _ranks.run_again(arguments, ranks)


def test_ranks_find_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = """
import torch.distributed as dist
dist.init_process_group("gloo")
values = [None, None]
dist.all_gather_object(values, rank)
open(f"{sys.argv[1]}/{rank}", "w").write(str(values))
dist.destroy_process_group()
"""
    assert ranks_that(monkeypatch, command, str(tmp_path)) == 0
    assert [path.read_text() for path in sorted(tmp_path.iterdir())] == ["[0, 1]"] * 2


def test_the_error_of_any_rank_ends_all_and_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refuses = """
from normzoo._errors import RecipeError
from normzoo.cli._ranks import as_rank
with as_rank():
    if rank == 1:
        raise RecipeError("no such class")
    time.sleep(100)
"""
    with pytest.raises(RecipeError, match="no such class"):
        ranks_that(monkeypatch, refuses)
    fails = "print('the last line', file=sys.stderr)\nsys.exit(3) if rank else time.sleep(100)"
    assert ranks_that(monkeypatch, fails) == 1
    said = capsys.readouterr().err
    assert "the last line" in said
    assert "rank 1 of 2 failed with exit code 3" in said
    assert ranks_that(monkeypatch, "os.kill(os.getpid(), 9) if rank else time.sleep(100)") == 1
    assert "rank 1 of 2 was killed by signal 9" in capsys.readouterr().err
    assert ranks_that(monkeypatch, "time.sleep(100 * rank)") == 1
    assert "of 2 ranks 1 have ended in time" in capsys.readouterr().err


def test_ranks_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    command = f"""
import os, sys, time
from normzoo.cli import _ranks
_ranks._COMMAND = '''
import os, sys, time
from normzoo.cli._ranks import as_rank
with as_rank():
    open(f"{tmp_path}/" + os.environ["RANK"], "w").write(str(os.getpid()))
    time.sleep(100)
'''
_ranks.run_again([], 2)
"""
    parent = subprocess.Popen([sys.executable, "-c", command])
    try:
        written = wait_for(
            lambda: [int(path.read_text() or 0) for path in tmp_path.iterdir()],
            lambda pids: len(pids) == 2 and all(pids),
        )
    finally:
        parent.kill()
        parent.wait()
    wait_for(lambda: [pid for pid in written if is_running(pid)], lambda running: not running)


def wait_for(value: Any, enough: Any) -> Any:
    end = time.monotonic() + 60
    while not enough(now := value()):
        assert time.monotonic() < end, now
        time.sleep(0.02)
    return now


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
