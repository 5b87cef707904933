"""Scripts run in several real processes, of which none outlives the deadline."""

from __future__ import annotations

import atexit
import contextlib
import inspect
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
ENVIRONMENT = {"TESTS": str(TESTS), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
PRELOADED = (
    *("lightning.pytorch", "torch.utils.tensorboard", "timm", "pandas", "pytest"),
    *("normzoo.callbacks", "normzoo.cli.main", "normzoo.cli.run", "normzoo.data", "normzoo.models", "normzoo.report"),
    *("normzoo.task", "normzoo.testing", "normzoo.layers"),
)
GRACE = 2.0  # seconds that the other ranks have after one has failed


def run_ranks(
    folder: Path, script: str, ranks: int, *arguments: str, deadline: float = 150, torchrun: bool = False
) -> None:
    """Run a script, in ``folder``, in one process or as ranks that find each other; ``TESTS`` is the tests' folder.

    Args:
        folder: made if it is not there; the script and its output are put there.
        script: its text.
        ranks: how many processes.
        *arguments: of the script.
        deadline: seconds after which all processes are killed.
        torchrun: really by torchrun, in new processes; otherwise in forks of one that has torch loaded.

    Raises:
        AssertionError: with the end of the output, if the script failed or was still running.
    """
    folder.mkdir(exist_ok=True)
    path, output = folder / "script.py", folder / "output.txt"
    path.write_text(script)
    if torchrun:
        _torchrun(path, output, ranks, *arguments, deadline=deadline)
        return
    with _rendezvous(ranks) as environments:
        forks = Forks(path, environments, *arguments)
        try:
            forks.wait(deadline)
        finally:
            forks.kill()


def run_function(
    folder: Path, function: Callable[..., Any], ranks: int, *arguments: str, deadline: float = 150
) -> None:
    """Run a function of a test module with strings as arguments, as :func:`run_ranks` runs a script."""
    run_ranks(folder, _calling(function), ranks, *arguments, deadline=deadline)


def exit_codes(
    folder: Path, function: Callable[..., Any], ranks: int, *arguments: str, deadline: float = 150
) -> list[int]:
    """The exit codes of ranks that run a function, as :func:`run_function` does, and may fail or be killed.

    Raises:
        AssertionError: if one still ran after ``deadline`` seconds: then all are killed.
    """
    folder.mkdir(exist_ok=True)
    path = folder / "script.py"
    path.write_text(_calling(function))
    with _rendezvous(ranks) as environments:
        return Forks(path, environments, *arguments).ended_with(deadline)


def _calling(function: Callable[..., Any]) -> str:
    """A script that calls a function of a test module."""
    return f"""
import os, runpy, sys
sys.path.insert(0, os.environ["TESTS"])
runpy.run_path({inspect.getfile(function)!r})[{function.__name__!r}](*sys.argv[1:])
"""


def start_script(folder: Path, script: str, *arguments: str) -> Forks:
    """Run a script, in ``folder``, in a process that is left running."""
    folder.mkdir(exist_ok=True)
    path = folder / "script.py"
    path.write_text(script)
    return Forks(path, [{}], *arguments)


def start_command(folder: Path, *arguments: str) -> Forks:
    """Run ``normzoo`` with these arguments, in ``folder``, in a process that is left running."""
    return start_script(
        folder, "import sys\nfrom normzoo.cli.main import main\nsys.exit(main(sys.argv[1:]))\n", *arguments
    )


class Forks:
    """A script that runs in forks of the fork server; one process for each of the environments.

    The folder of the script is the working folder, and gets the output: ``output.txt``.
    """

    def __init__(self, script: Path, environments: list[dict[str, str]], *arguments: str) -> None:
        self._output = script.parent / "output.txt"
        self._output.write_text("")
        self.pids = ask(
            script=str(script),
            arguments=arguments,
            folder=str(script.parent),
            output=str(self._output),
            environments=[{**os.environ, **ENVIRONMENT, **e} for e in environments],
        )
        self._codes: dict[int, int | None] = dict.fromkeys(self.pids)

    @property
    def codes(self) -> list[int | None]:
        """The exit codes, of which None says that a process still runs and -N that signal N ended it."""
        running = [pid for pid, code in self._codes.items() if code is None]
        if running:
            self._codes.update(zip(running, ask(poll=running), strict=True))
        return list(self._codes.values())

    @property
    def running(self) -> bool:
        return None in self.codes

    @property
    def output(self) -> str:
        return self._output.read_text()

    def ended_with(self, deadline: float) -> list[int]:
        """The exit codes once all have ended.

        Raises:
            AssertionError: if one still ran after ``deadline`` seconds: then all are killed.
        """
        end = time.monotonic() + deadline
        while self.running and time.monotonic() < end:
            time.sleep(0.01)
        codes = self.codes
        self.kill(traceback=True)
        assert None not in codes, f"still running after {deadline} s: {self.output[-5000:]}"
        return codes

    def wait(self, deadline: float) -> None:
        """Until all have ended.

        Raises:
            AssertionError: if one failed, or still ran after ``deadline`` seconds: then all are killed.
        """
        end = time.monotonic() + deadline
        failed = False
        while self.running and time.monotonic() < end:
            if any(self.codes) and not failed:
                failed, end = True, min(end, time.monotonic() + GRACE)  # the others wait for it in vain
            time.sleep(0.01)
        if any(self.codes) or self.running:
            codes = ["still running" if code is None else code for code in self.codes]
            late = "" if any(self.codes) else f" after {deadline} s"
            self.kill(traceback=True)
            raise AssertionError(f"exit codes {codes}{late}: {self.output[-5000:]}")

    def kill(self, traceback: bool = False) -> None:
        """Kill what still runs and all that it started; with ``traceback`` its stack goes to the output first."""
        if traceback and self.running:
            self._send(signal.SIGUSR1)
            time.sleep(0.5)
        self._send(signal.SIGKILL)
        end = time.monotonic() + 60
        while self.running:
            assert time.monotonic() < end, f"processes {self.pids} cannot be killed"
            time.sleep(0.01)

    def _send(self, number: signal.Signals) -> None:
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, number)


def ask(**request: Any) -> list[Any]:
    """The fork server's answer."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    assert answer, f"the fork server ended with {server.wait(60)}"
    return json.loads(answer)  # type: ignore[no-any-return]


@cache
def _server() -> subprocess.Popen[str]:
    """The fork server of this process, which is started when it is first needed."""
    server = subprocess.Popen(
        [sys.executable, str(TESTS / "fork_server.py"), *PRELOADED],
        env={**os.environ, **ENVIRONMENT},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n", f"the fork server ended with {server.wait(60)}"
    atexit.register(_stop_server, server)
    return server


def _stop_server(server: subprocess.Popen[str]) -> None:
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.close()
    server.wait(60)
    server.stdout.close()


@contextlib.contextmanager
def _rendezvous(ranks: int) -> Iterator[list[dict[str, str]]]:
    """The environments that torchrun would give, and the store that it would hold, on a free port."""
    if ranks == 1:
        yield [{}]
        return
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    same = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "tests",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    yield [{**same, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    del store


def _torchrun(path: Path, output: Path, ranks: int, *arguments: str, deadline: float) -> None:
    command = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={ranks}"]
    with output.open("w") as sink:
        process = subprocess.Popen(
            [sys.executable, *command, str(path), *arguments],
            env={**os.environ, **ENVIRONMENT},
            cwd=path.parent,
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
