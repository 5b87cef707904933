"""Scripts run in several real processes, of which none outlives the deadline."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def run_ranks(folder: Path, script: str, ranks: int, *arguments: str, deadline: float = 150) -> None:
    """Run a script, in ``folder``, in one process or under torchrun on a free port; ``TESTS`` is the tests' folder.

    Args:
        folder: made if it is not there; the script and its output are put there.
        script: its text.
        ranks: how many processes.
        *arguments: of the script.
        deadline: seconds after which all processes are killed.

    Raises:
        AssertionError: with the end of the output, if the script failed or was still running.
    """
    folder.mkdir(exist_ok=True)
    path, output = folder / "script.py", folder / "output.txt"
    path.write_text(script)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={ranks}"]
    with output.open("w") as sink:
        process = subprocess.Popen(
            [sys.executable, *(torchrun if ranks > 1 else []), str(path), *arguments],
            env={**os.environ, "TESTS": str(TESTS), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            cwd=folder,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | str = process.wait(deadline)
        except subprocess.TimeoutExpired:
            code = f"still running after {deadline} s"
        finally:
            if process.poll() is None:
                _stop(process)
    assert code == 0, f"{code}: {output.read_text()[-5000:]}"


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask first: torchrun has its processes in sessions of their own, and ends them when it is asked to."""
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
