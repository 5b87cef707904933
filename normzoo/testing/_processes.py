"""Real processes that talk over gloo, of which none outlives a deadline."""

from __future__ import annotations

import datetime as dt
import multiprocessing
import pickle
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from normzoo.testing._compare import BrokenError, NotApplicableError

Body = Callable[[Any, int, int, Callable[[str], None]], Any]


def in_ranks(body: Body, subject: Any, world: int, deadline: float) -> list[Any]:
    """What a function returns in each of several ranks; they meet in a file, so that no port has to be free.

    Args:
        body: ``body(subject, rank, world, note)``, a function of a module, which returns what ``torch.save`` takes;
            ``note(text)`` says what it is about to do, for the message if it fails.
        subject: what it is given.
        world: how many ranks.
        deadline: seconds after which all processes are killed.

    Raises:
        BrokenError: if a process fails or hangs; with the traceback of the one that failed first.
        NotApplicableError: without gloo; and where processes cannot be forked, for a subject that cannot be pickled.
    """
    if not dist.is_available() or not dist.is_gloo_available():
        raise NotApplicableError("this build of PyTorch has no gloo")
    forked = sys.platform == "linux" and not torch.cuda.is_available() and not dist.is_initialized()
    if not forked:
        try:
            pickle.dumps(subject)
        except Exception as error:
            why = f"ranks cannot be forked here, and the factory cannot be pickled: {error}"
            raise NotApplicableError(why) from error
    context: Any = multiprocessing.get_context("fork" if forked else "spawn")
    with tempfile.TemporaryDirectory() as folder:
        given = (body, subject, world, deadline, folder)
        processes = [context.Process(target=_rank, args=(*given, r), daemon=True) for r in range(world)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # forking a process with threads: each rank runs on one of its own
            for process in processes:
                process.start()
        hung = _wait(processes, deadline)
        failed = sorted(Path(folder).glob("rank*.txt"), key=lambda path: path.stat().st_mtime_ns)
        if failed:  # the others failed because the first one did
            raise BrokenError(f"{world} ranks: {failed[0].read_text(encoding='utf-8').rstrip()}")
        if hung:
            names = ", ".join(map(str, hung))
            raise BrokenError(f"{world} ranks: after {deadline:.0f} s rank {names} still waits; do all communicate?")
        codes = [p.exitcode for p in processes]
        if any(codes):
            raise BrokenError(f"{world} ranks: processes ended with {codes}")
        return [torch.load(Path(folder) / f"rank{r}.pt", weights_only=False) for r in range(world)]


def _wait(processes: list[Any], deadline: float) -> list[int]:
    """Wait until all have ended, or one has failed or the deadline passed; the ranks that had to be ended."""
    end = time.monotonic() + deadline
    while any(p.is_alive() for p in processes) and time.monotonic() < end:
        if any(p.exitcode for p in processes):
            end = min(end, time.monotonic() + 1)  # the others wait for it in vain
        time.sleep(0.01)
    hung = [rank for rank, p in enumerate(processes) if p.is_alive()]
    for p in processes:
        if p.is_alive():
            p.kill()
        p.join(10)
    return hung


def _rank(body: Body, subject: Any, world: int, deadline: float, folder: str, rank: int) -> None:
    """The body of one process."""
    torch.set_num_threads(1)
    doing = ""

    def note(text: str) -> None:
        nonlocal doing
        doing = f", {text}"

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            timeout = dt.timedelta(seconds=deadline / 2)  # so that a rank left alone can tell where
            store = f"file://{folder}/store"
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timeout)
        torch.save(body(subject, rank, world, note), Path(folder) / f"rank{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        text = f"rank {rank}{doing}: {traceback.format_exc(limit=-6)}"
        (Path(folder) / f"rank{rank}.txt").write_text(text, encoding="utf-8")
        sys.exit(1)
