"""The command run again as ranks of one job on this machine, as torchrun would start it; none outlives this process."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from normzoo._errors import RecipeError

GRACE = 30.0  # seconds that the other ranks have to end after one has ended
_MESSAGES = "NORMZOO_REPLAY_MESSAGES"  # tells a rank the folder for its message
_COMMAND = "import sys; from normzoo.cli.main import main; sys.exit(main(sys.argv[1:]))"
_END = 3000  # characters of a rank's output


class Ranks:
    """Processes of one job: :func:`run_again` starts them."""

    def __init__(self, processes: Sequence[subprocess.Popen[bytes]]) -> None:
        self.processes = processes

    def wait(self) -> list[int | None]:
        """The exit codes when all have ended, or the others have not within ``GRACE`` of one: None for these."""
        end = float("inf")
        while None in (codes := [process.poll() for process in self.processes]) and time.monotonic() < end:
            if end == float("inf") and any(code is not None for code in codes):
                end = time.monotonic() + GRACE
            time.sleep(0.02)
        return codes

    def kill(self) -> None:
        """End those that still run, at once."""
        for process in self.processes:
            with contextlib.suppress(OSError):
                process.kill()
        for process in self.processes:
            process.wait()
            if process.stdin is not None:
                process.stdin.close()


def run_again(arguments: Sequence[str], ranks: int) -> int:
    """Run the command in ``ranks`` processes that find each other; the first one writes to this terminal.

    Returns:
        0, or 1 if a rank failed: then the end of its output is printed.

    Raises:
        RecipeError: that a rank has raised.
    """
    with tempfile.TemporaryDirectory(prefix="normzoo-") as folder, _started(arguments, ranks, Path(folder)) as job:
        codes = job.wait()
        messages = [path.read_text() for path in sorted(Path(folder).glob("message_*"))]
        if messages:
            raise RecipeError(messages[0])
        if all(code == 0 for code in codes):
            return 0
        job.kill()
        said = "ended" if None not in codes else f"ended, and others waited for it for {GRACE:.0f} s"
        for rank, code in enumerate(codes):
            if code:
                how = f"was killed by signal {-code}" if code < 0 else f"failed with exit code {code}"
                output = Path(folder) / f"output_{rank}"
                text = output.read_text(errors="replace")[-_END:] if output.exists() else ""
                print(f"{text}normzoo: the replay has {said}: rank {rank} of {ranks} {how}", file=sys.stderr)
                return 1
        print(f"normzoo: the replay has ended: of {ranks} ranks {codes.count(0)} have ended in time", file=sys.stderr)
        return 1


def is_rank() -> bool:
    """Whether this process is one of several ranks, of :func:`run_again` or of a launcher such as torchrun."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1


def is_started_here() -> bool:
    """Whether :func:`run_again` has started this process."""
    return _MESSAGES in os.environ


@contextlib.contextmanager
def as_rank() -> Iterator[None]:
    """Inside, a RecipeError goes to the process that has started this one, with which this one ends."""
    if not is_started_here():
        yield
        return
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        yield
    except RecipeError as error:
        path = Path(os.environ[_MESSAGES]) / f"message_{int(os.environ['RANK']):05d}"
        path.with_suffix(".part").write_text(str(error))
        path.with_suffix(".part").rename(path)
        sys.stderr.flush()
        os._exit(2)  # others may wait for this rank in a collective, and it for them at its end


@contextlib.contextmanager
def _started(arguments: Sequence[str], ranks: int, folder: Path) -> Iterator[Ranks]:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # has a port before ranks ask for it
    same = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "normzoo",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        _MESSAGES: str(folder),
    }
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(ranks):
            with (folder / f"output_{rank}").open("wb") as output:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-c", _COMMAND, *arguments],
                        env={**same, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdin=subprocess.PIPE,  # is closed when this process is gone
                        stdout=None if rank == 0 else output,
                        stderr=None if rank == 0 else output,
                        start_new_session=True,  # Ctrl-C comes here alone
                    )
                )
        yield Ranks(processes)
    finally:
        Ranks(processes).kill()
        del store


def _end_with_parent() -> None:
    """End this process, wherever it is, when what it reads from is closed."""
    with contextlib.suppress(OSError):
        while os.read(0, 1024):
            pass
    os._exit(1)
