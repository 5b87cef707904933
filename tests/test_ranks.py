"""Processes of the fork server are as new ones, and none outlives its deadline."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
from ranks import TESTS, Forks, run_function, run_ranks
from sweeps import slow

REDUCE = """
import os, sys
import torch
import torch.distributed as dist
assert {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ)
dist.init_process_group("gloo")
x = torch.tensor([1.0 + dist.get_rank()])
dist.all_reduce(x)
line = f"rank {dist.get_rank()} of {dist.get_world_size()} got {x.item()} {sys.argv[1]}\\n"
os.write(1, line.encode())  # in one piece, as the ranks write into one file
dist.destroy_process_group()
"""
STATE = """
import atexit, json, os, random, signal, sys, threading
import numpy, torch
path = sys.argv[1] if len(sys.argv) > 1 else "state.json"
state = {
    "threads": [t.name for t in threading.enumerate()],
    "set": [torch.get_num_threads(), torch.is_grad_enabled(), str(torch.get_default_dtype())],
    "argv": sys.argv[1:], "file": __file__, "name": __name__, "path": sys.path[0], "folder": os.getcwd(),
    "signals": {n.name: str(signal.getsignal(n)) for n in signal.valid_signals() if n in {*signal.Signals}},
    "annotations": (lambda x: x).__code__.co_flags, "ranks": sorted(n for n in os.environ if "RANK" in n),
    "main": sys.modules["__main__"].__dict__ is globals(), "stdin": sys.stdin.read(),
}
drawn = {"random": random.random(), "numpy": numpy.random.rand(),
         "torch": torch.initial_seed()}
atexit.register(lambda: open(path, "w").write(json.dumps([state, drawn])))
"""


def test_ranks_find_each_other(tmp_path: Path) -> None:
    run_ranks(tmp_path, REDUCE, 3, "argument")
    lines = (tmp_path / "output.txt").read_text().splitlines()
    assert sorted(line for line in lines if "got" in line) == [f"rank {r} of 3 got 6.0 argument" for r in range(3)]


def hears_signals() -> None:
    """The tests may run in the background or under nohup, where some signals are ignored."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)


def test_a_fork_starts_as_a_new_process_would(tmp_path: Path) -> None:
    run_ranks(tmp_path, STATE, 1)
    forked, draws = json.loads((tmp_path / "state.json").read_text())
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    script = [sys.executable, str(tmp_path / "script.py")]
    subprocess.run(script, cwd=tmp_path, env=environment, timeout=120, check=True, preexec_fn=hears_signals)
    new, others = json.loads((tmp_path / "state.json").read_text())
    assert forked == new
    assert not {*draws.values()} & {*others.values()}


def test_forks_do_not_share_what_they_draw(tmp_path: Path) -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    found = []
    for name in ("a", "b"):
        run_ranks(tmp_path, STATE, 1, name)
        found.append(json.loads((tmp_path / name).read_text()))
    assert not {*found[0][1].values()} & {*found[1][1].values()}


def on_rank(path: str, text: str) -> None:
    Path(f"{path}{os.environ['RANK']}").write_text(text)


def test_a_function_of_a_test_module_runs_on_ranks(tmp_path: Path) -> None:
    run_function(tmp_path, on_rank, 2, "said", "hello")
    assert [(tmp_path / f"said{rank}").read_text() for rank in range(2)] == ["hello", "hello"]


@pytest.mark.parametrize(
    ("dies", "code"),
    [
        ("raise ValueError('on purpose')", 1),
        ("os.kill(os.getpid(), 9)", -9),
        slow("sys.exit(7)", 7),
        slow("sys.exit('on')", 1),
    ],
)
def test_a_rank_that_fails_is_reported_and_the_others_are_killed(
    tmp_path: Path, dies: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = f"""
import os, pathlib, sys, time
print("rank", os.environ["RANK"], "is here", flush=True)
if os.environ["RANK"] == "1":
    while not os.path.exists("rank 0 waits"):
        time.sleep(0.01)
    {dies}
def waits_for_rank_1():
    pathlib.Path("rank 0 waits").touch()
    time.sleep(1000)
waits_for_rank_1()
"""
    monkeypatch.setattr(ranks, "GRACE", 0.1)
    start = time.monotonic()
    with pytest.raises(AssertionError) as failure:
        run_ranks(tmp_path, script, 2)
    assert time.monotonic() - start < 100
    text = str(failure.value)
    assert text.startswith(f"exit codes ['still running', {code}]: ")
    for said in ("rank 0 is here", "rank 1 is here", "in waits_for_rank_1", "on" if code == 1 else ""):
        assert said in text


def alive(pid: int) -> bool:
    """Whether the process runs; what has ended but was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ended(pid: int) -> bool:
    end = time.monotonic() + 60
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.01)
    return not alive(pid)


SPAWNS = """
import os, signal, subprocess, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "1000"])
print(os.getpid(), child.pid, flush=True)
"""


def test_after_the_deadline_all_processes_are_killed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"^exit codes \['still running', 'still running'\] after 3 s: "):
        run_ranks(tmp_path, SPAWNS + "time.sleep(1000)", 2, deadline=3)
    lines = [line.split() for line in (tmp_path / "output.txt").read_text().splitlines()]
    pids = [int(word) for line in lines if len(line) == 2 and line[0].isdigit() for word in line]
    assert len(pids) == 4
    assert all(ended(pid) for pid in pids)


def test_what_a_script_leaves_running_is_killed(tmp_path: Path) -> None:
    run_ranks(tmp_path, SPAWNS, 1)
    pids = [int(word) for word in (tmp_path / "output.txt").read_text().split()]
    assert len(pids) == 2
    assert all(ended(pid) for pid in pids)


def test_nothing_is_left_when_the_tests_are_killed(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("import os, time; print(os.getpid(), flush=True); time.sleep(1000)")
    code = f"""
import os, signal, sys, time
sys.path.insert(0, {str(TESTS)!r})
from pathlib import Path
import ranks
ranks.PRELOADED = ()
forks = ranks.Forks(Path({str(tmp_path / "script.py")!r}), [{{}}])
while not forks.output.strip():
    time.sleep(0.01)
print(ranks._server().pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=200, check=False)
    assert done.returncode == -signal.SIGKILL
    rank = int((tmp_path / "output.txt").read_text())
    assert ended(int(done.stdout))
    assert ended(rank)


def test_a_process_can_be_sent_signals_while_it_runs(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("""
import time
print("ready", flush=True)
try:
    time.sleep(1000)
except KeyboardInterrupt:
    raise SystemExit(5)
""")
    forks = Forks(tmp_path / "script.py", [{}])
    try:
        while not forks.output:
            assert forks.running
            time.sleep(0.01)
        os.kill(forks.pids[0], signal.SIGINT)
        with pytest.raises(AssertionError, match=r"^exit codes \[5\]: ready"):
            forks.wait(100)
    finally:
        forks.kill()
    assert forks.codes == [5]
