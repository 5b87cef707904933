"""``normzoo replay``: the steps before a divergence made again, and its cause named."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from normzoo._errors import RecipeError, one_line
from normzoo.capsules import Capsule, CapsuleError, load_capsule
from normzoo.capsules.folder import MANIFEST, capsule_folders, listed_ranks
from normzoo.cli._ranks import as_rank, is_rank, is_started_here, run_again
from normzoo.cli._terminal import printable, terminal

_OPTIONS = ("module", "init", "callbacks", "data", "batches")
_UNASKED = 8  # processes that are started on a machine with fewer cores


def execute(arguments: argparse.Namespace) -> int:
    """Replay a capsule, print what was found, and write the report on its run."""
    if is_rank():
        with as_rank():
            capsule, _ = chosen(Path(arguments.path), arguments.capsule)
            code = _replay(capsule, arguments)
        if is_started_here() or os.environ["RANK"] != "0":
            return code
        return code or _report(capsule)
    capsule, others = chosen(Path(arguments.path), arguments.capsule)
    if "module" in (settings := _settings(capsule)) and "precision" not in settings:  # of no Trainer
        raise RecipeError(f"{capsule.path} is of a plain loop, whose steps cannot be made again")
    ranks, why = _processes(capsule, arguments.ranks)
    _say(f"{capsule.path}: {one_line(str(capsule.about.get('sentence')))}")
    if others:
        _say(f"other capsules of this run: --capsule {', '.join(map(str, others))}")
    if why:
        _say(why)
    code = _replay(capsule, arguments) if ranks == 1 else run_again(_again(capsule, arguments), ranks)
    return code or _report(capsule)


def chosen(path: Path, number: int | None = None) -> tuple[Capsule, list[int]]:
    """The capsule to replay, and the numbers of the others of its run.

    Args:
        path: a capsule's folder; or a run's, or one that holds a single run with capsules: of these the capsule of the
            latest alarm, or the latest one if none is of an alarm.
        number: of the capsule in the run, at the beginning of its folder's name.

    Raises:
        RecipeError: if there is none, or it cannot be read.
    """
    try:
        if os.path.lexists(path / MANIFEST):
            if number is not None:
                raise RecipeError(f"--capsule: {path} is a capsule itself; give the folder of its run, or leave it out")
            return load_capsule(path), []
        finished = {_number(folder): folder for folder in _capsules(path)}
        if number is not None and number not in finished:
            raise RecipeError(f"--capsule: {path} has no capsule {number}; it has {', '.join(map(str, finished))}")
        capsules = {other: load_capsule(folder) for other, folder in finished.items() if number in (None, other)}
    except (CapsuleError, FileNotFoundError) as error:
        raise RecipeError(str(error)) from error
    except OSError as error:
        raise RecipeError(f"{error.filename or path} cannot be read: {error.strerror}") from error
    alarms = [other for other, capsule in capsules.items() if capsule.about.get("kind") == "divergence"]
    latest = max(alarms or capsules)
    return capsules[latest], [other for other in finished if other != latest and number is None]


def run_folder(capsule: Path) -> Path:
    """The folder of the run that a capsule is of; the capsule's own if it stands alone."""
    if capsule.parent.name != "capsules":
        return capsule
    folder = capsule.parent.parent
    return folder.parent if folder.name == "metrics" and (folder.parent / "recipe.yaml").is_file() else folder


def _capsules(path: Path) -> list[Path]:
    """The folders of the capsules of a run that are finished."""
    found = [folder for folder in capsule_folders(path) if os.path.lexists(folder / MANIFEST)] if path.is_dir() else []
    if found or not path.is_dir():
        return found or [load_capsule(path).path]  # which says what there is instead
    inside = [folder for folder in sorted(path.iterdir()) if folder.is_dir() and capsule_folders(folder)]
    if len(inside) > 1:
        raise RecipeError(f"{path} has several runs with capsules; give one of {', '.join(map(str, inside))}")
    return _capsules(inside[0]) if inside else [load_capsule(path).path]


def _number(capsule: Path) -> int:
    """The number at the beginning of a capsule's folder."""
    match = re.match(r"\d+", capsule.name)
    return int(match[0]) if match else -1


def _settings(capsule: Capsule) -> Mapping[str, Any]:
    settings = capsule.about.get("settings")
    return settings if isinstance(settings, Mapping) else {}


def _processes(capsule: Capsule, asked: int | None) -> tuple[int, str]:
    """How many processes replay a capsule, and a sentence if these are not as many as the run had."""
    ranks, missing = capsule.about["ranks"], capsule.about["missing"]
    if asked not in (None, 1, ranks):
        of, accepted = (f"{ranks} ranks", f"{ranks}, or 1") if ranks > 1 else ("one rank", "1")
        raise RecipeError(f"--ranks: the capsule is of {of}; give {accepted}, not {asked}")
    if ranks == 1:
        return 1, ""
    why = ""
    if missing:
        why = f"the capsule is without {listed_ranks(missing)} of {ranks}"
    elif asked is None:
        why = _too_many(ranks, _settings(capsule))
    if asked == 1 or why:
        if _settings(capsule).get("strategy") == "ModelParallelStrategy":
            raise RecipeError(
                f"--ranks: the weights are sharded over {ranks} ranks, and {why or 'one process has a part of them'}; "
                f"replay the capsule in {ranks} processes: --ranks {ranks}"
            )
        if missing and asked == ranks:
            raise RecipeError(f"--ranks: {why}; it can be replayed in one process only: --ranks 1")
        return 1, (
            f"the capsule of {ranks} ranks is replayed in one process{f', as {why}' if why else ''}: it adds up the "
            "gradients of the ranks in another order, so that losses agree but for rounding, and not bit for bit"
        )
    return ranks, f"replaying in {ranks} processes, as many as the run had"


def _too_many(ranks: int, settings: Mapping[str, Any]) -> str:
    """Why a machine is not asked for so many processes unless the user says so."""
    if settings.get("accelerator") == "CUDAAccelerator":
        import torch

        gpus = torch.cuda.device_count()
        if 0 < gpus < ranks:
            return f"this machine has {gpus} GPU{'s' * (gpus > 1)}"
    cores = os.cpu_count() or 1
    return f"this machine has {cores} cores" if ranks > max(cores, _UNASKED) else ""


def _again(capsule: Capsule, arguments: argparse.Namespace) -> list[str]:
    """The command line of a rank."""
    given = [f"--{name}={value}" for name in _OPTIONS if (value := getattr(arguments, name)) is not None]
    return ["replay", *given, *(f"--sites={site}" for site in arguments.sites or ()), "--", str(capsule.path)]


def _replay(capsule: Capsule, arguments: argparse.Namespace) -> int:
    """Replay a capsule in this process, alone or as a rank; the first one prints what was found."""
    settings = _settings(capsule)
    workspace = settings.get("cublas_workspace_config")
    if isinstance(workspace, str):  # is read once, before the first product of matrices
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", workspace)
    if not is_rank():
        os.environ.pop("SLURM_NTASKS", None)  # with which Lightning would expect as many processes
    from normzoo.cli._replayed import replayed
    from normzoo.cli.user_code import load_object
    from normzoo.replaying import ReplayError, replay

    made = replayed(
        settings,
        run_folder(capsule.path),
        arguments.module,
        init=arguments.init,
        callbacks=arguments.callbacks,
        data=arguments.data,
    )
    batches = None if arguments.batches is None else load_object(arguments.batches, "--batches", None)
    first = os.environ.get("RANK", "0") == "0"
    for line in [f"the module: {made.source}", *made.notices] if first else []:
        _say(line)
    try:
        with _interruptible():
            findings = replay(
                capsule,
                made.module,
                callbacks=made.callbacks,
                batches=batches,
                datamodule=made.datamodule,
                sites=arguments.sites,
                progress=lambda doing: _say(f"{doing} ..."),
            )
    except (ReplayError, CapsuleError) as error:
        raise RecipeError(str(error)) from error
    except Exception as error:  # of the module's code, which may fail in any way
        traceback.print_exc()
        print(f"normzoo: the replay failed: {one_line(f'{type(error).__name__}: {error}')}", file=sys.stderr)
        return 1
    if first:
        _say(f"\n{findings}\n")
    return 0


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Inside, Ctrl-C is a KeyboardInterrupt, of which the Trainer makes an exit."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)  # the Trainer leaves it ignored


def _report(capsule: Capsule) -> int:
    """Write the report on the capsule's run; 1 if it cannot be written."""
    from normzoo.report import read_runs, write_page

    folder = run_folder(capsule.path)
    try:
        runs, damaged = read_runs(folder)
        page = write_page(runs, folder / "report.html", damaged)
    except (OSError, ValueError) as error:
        print(f"normzoo: no report on {folder}: {one_line(error)}", file=sys.stderr)
        return 1
    _say(f"report: {page}")
    return 0


def _say(text: str) -> None:
    terminal().print("\n".join(printable(line) for line in text.split("\n")), soft_wrap=True)
