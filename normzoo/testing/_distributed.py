"""The promise of synchronized statistics, held in real processes over gloo."""

from __future__ import annotations

import datetime as dt
import io
import multiprocessing
import pickle
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from normzoo.testing._compare import BrokenError, NotApplicableError, agree
from normzoo.testing._inputs import sample, state, upstream
from normzoo.testing._promises import promise
from normzoo.testing._subject import Subject

DEADLINE = 60.0  # seconds for the processes of one job
STEPS = 2
JOBS: dict[int, tuple[tuple[int, ...], ...]] = {2: ((5, 3), (4, 0)), 4: ((4, 2, 1, 3),)}


@promise()
def sync(subject: Subject) -> None:
    """With sync=True several ranks, with batches of any size or none, equal one process on the whole batch."""
    subject.need_option("sync")
    if not dist.is_available() or not dist.is_gloo_available():
        raise NotApplicableError("this build of PyTorch has no gloo")
    subject.made(), subject.shape  # found once, for the ranks to have
    for world, splits in JOBS.items():
        found = _job(subject, world)
        for split in splits:
            for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
                _compare(subject, split, dtype, [of_rank[_key(split, dtype)] for of_rank in found], tolerance)


def _key(split: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{split} {dtype}"


def _compare(
    subject: Subject, split: tuple[int, ...], dtype: torch.dtype, found: list[dict[str, Any]], tolerance: float
) -> None:
    whole = _steps(subject.made(sync=True, dtype=dtype), _batches(subject, sum(split), dtype))
    text = f"{len(split)} ranks with batches of {split}, {dtype}"
    for i in range(STEPS):
        for name in ("output", "gradient of the input"):
            parts = whole[name][i].split(split)
            for rank, (of_rank, want) in enumerate(zip(found, parts, strict=True)):
                agree(f"{text}: {name}, rank {rank}, step {i}", of_rank[name][i], want, tolerance=tolerance)
    for name, want in whole["gradients"].items():
        of_ranks = [of_rank["gradients"][name] for of_rank in found]
        missing = [str(rank) for rank, g in enumerate(of_ranks) if g is None]
        if missing and want is not None:
            raise BrokenError(f"{text}: rank {', '.join(missing)} has no gradient of {name}")
        agree(f"{text}: gradient of {name}, summed over ranks", sum(of_ranks), want, tolerance=tolerance)
    for name, want in whole["state"].items():
        for rank, of_rank in enumerate(found):
            agree(f"{text}: {name} afterwards, rank {rank}", of_rank["state"][name], want, tolerance=tolerance)


def _batches(subject: Subject, size: int, dtype: torch.dtype) -> list[Tensor]:
    return [sample((size, *subject.shape[1:]), dtype, seed=i) for i in range(STEPS)]


def _steps(layer: nn.Module, batches: list[Tensor], rows: slice = slice(None)) -> dict[str, Any]:
    """A few steps of training on some rows of each batch; gradients of parameters add up."""
    outputs, of_inputs = [], []
    layer.train()
    for i, batch in enumerate(batches):
        x = batch[rows].clone().requires_grad_()
        y = layer(x)
        y.backward(upstream(batch, seed=i)[rows])
        outputs.append(y.detach())
        of_inputs.append(torch.zeros_like(x) if x.grad is None else x.grad)
    gradients = {k: p.grad for k, p in layer.named_parameters()}
    return {"output": outputs, "gradient of the input": of_inputs, "gradients": gradients, "state": state(layer)}


def _job(subject: Subject, world: int) -> list[dict[str, Any]]:
    """What each rank found; processes that fail or hang are ended and their tracebacks told."""
    forked = sys.platform == "linux" and not torch.cuda.is_available() and not dist.is_initialized()
    if not forked:
        try:
            pickle.dumps(subject)
        except Exception as error:
            why = f"ranks cannot be forked here, and the factory cannot be pickled: {error}"
            raise NotApplicableError(why) from error
    context: Any = multiprocessing.get_context("fork" if forked else "spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=_rank, args=(subject, r, world, folder), daemon=True) for r in range(world)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # forking a process with threads: each rank runs on one of its own
            for process in processes:
                process.start()
        hung = _wait(processes)
        failed = sorted(Path(folder).glob("rank*.txt"), key=lambda path: path.stat().st_mtime_ns)
        if failed:  # the others failed because the first one did
            raise BrokenError(f"{world} ranks: {failed[0].read_text(encoding='utf-8').rstrip()}")
        if hung:
            names = ", ".join(map(str, hung))
            raise BrokenError(f"{world} ranks: after {DEADLINE:.0f} s rank {names} still waits; do all communicate?")
        codes = [p.exitcode for p in processes]
        if any(codes):
            raise BrokenError(f"{world} ranks: processes ended with {codes}")
        return [torch.load(io.BytesIO((Path(folder) / f"rank{r}.pt").read_bytes())) for r in range(world)]


def _wait(processes: list[Any]) -> list[int]:
    """Wait until all have ended, or one has failed or the deadline passed; the ranks that had to be ended."""
    end = time.monotonic() + DEADLINE
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


def _rank(subject: Subject, rank: int, world: int, folder: str) -> None:
    """The body of one process."""
    torch.set_num_threads(1)
    case = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            timeout = dt.timedelta(seconds=DEADLINE / 2)  # so that a rank left alone can tell where
            store = f"file://{folder}/store"
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timeout)
        found = {}
        for split in JOBS[world]:
            start = sum(split[:rank])
            rows = slice(start, start + split[rank])
            for dtype in (torch.float64, torch.float32):
                case = f", batches of {split}, {dtype}"
                layer = subject.made(sync=True, dtype=dtype)
                found[_key(split, dtype)] = _steps(layer, _batches(subject, sum(split), dtype), rows)
        torch.save(found, Path(folder) / f"rank{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (Path(folder) / f"rank{rank}.txt").write_text(
            f"rank {rank}{case}: {traceback.format_exc(limit=-6)}", encoding="utf-8"
        )
        sys.exit(1)
