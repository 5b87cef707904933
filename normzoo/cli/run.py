"""``normzoo run``: train one recipe, or carry out its experiment, in a folder of its own."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from normzoo._errors import RecipeError
from normzoo._files import write_whole
from normzoo._yaml_text import dump
from normzoo.cli._resume import RUN, asked_for, check_unfinished, clear, locked
from normzoo.cli._status import Status
from normzoo.cli.recipe import is_experiment

if TYPE_CHECKING:
    from normzoo.callbacks import Alarm
    from normzoo.cli._going_on import Start
    from normzoo.cli._interrupts import Interrupts

_PACKAGES = ("normzoo", "torch", "torchvision", "lightning", "timm", "torchmetrics", "numpy")
# Tells the processes that a launcher starts by running this command again which folder is theirs
_FOLDER = "NORMZOO_RUN_FOLDER"


def execute(arguments: argparse.Namespace) -> int:
    """Train the recipe, or carry out its experiment, then write its report."""
    recipe, folder = asked_for(arguments, RUN)
    if not is_first_process():  # started by the first one, or by torchrun; writes nothing
        if arguments.dry_run:
            return 0
        if folder is not None and "class_path" in (model := recipe.config.get("model") or {}):
            from normzoo._components import import_class

            import_class(model["class_path"], "model", recipe.source)  # its module may allow classes in checkpoints
        place = Path(os.environ.get(_FOLDER, folder or "."))
        return train(recipe.config, place, recipe.source, goes_on=folder is not None).code
    from normzoo.cli._interrupts import listening
    from normzoo.cli.rehearse import rehearse
    from normzoo.cli.report import try_report

    if folder is not None and not is_experiment(recipe.config):
        check_unfinished(folder)
    check_out(arguments.out)
    rehearse(recipe.config, recipe.source)  # bad input leaves no folder behind
    if arguments.dry_run:
        print(dump(recipe.config), end="")
        return 0
    goes_on = folder is not None
    folder = folder or new_folder(arguments.out, recipe.name)
    os.environ[_FOLDER] = str(folder)
    with listening():
        try:
            code = train(recipe.config, folder, recipe.source, goes_on).code
        finally:
            del os.environ[_FOLDER]
        return try_report(folder, code)


class Outcome(NamedTuple):
    """How training ended: ``finished``, ``failed``, ``diverged`` or ``interrupted``; and the exit code for it."""

    state: str
    code: int


def train(config: Mapping[str, Any], folder: Path, source: str, goes_on: bool = False) -> Outcome:
    """Train one config in ``folder``, whose ``status.json`` says how training ended.

    An experiment that is no training run goes on at its first part that is not on record there. With ``goes_on`` a
    training run goes on from its newest checkpoint there; without one it starts again, in a clean folder.

    Returns:
        the state and an exit code: 0; 1 if training failed; that of the ``Stop`` that ended a run that has diverged,
        except for ranks other than the first, whose failure a launcher would take for that of all; 128 and the signal's
        number (130 for Ctrl-C) if a signal ended it.
    """
    from normzoo.callbacks import DivergenceExit
    from normzoo.cli._interrupts import listening

    first, code = is_first_process(), 0
    if is_experiment(config) and not first:  # it needs one process
        return Outcome("finished", 0)
    if first:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            print(f"normzoo: cannot make {folder}: {problem.strerror}", file=sys.stderr)
            return Outcome("failed", 1)
    with listening(child=not first) as interrupts, locked(folder) if first else contextlib.nullcontext():
        start = newest_or_clear(folder, first) if goes_on and not is_experiment(config) else None
        try:
            if first:
                status = Status(folder)
                interrupts.before_exit = lambda received: status.write("interrupted", received.name)
                status.write("running")
                write_whole(folder / RUN, dump(config))
                _write_environment(folder)
            if is_experiment(config):
                from normzoo.cli._experiment import carry_out, plan

                carry_out(plan(config, source), folder, status, interrupts)
            else:
                _fit(config, folder, source, interrupts, start)
            state, error = "finished", ""
        except DivergenceExit as exit_:
            state, error, code = "diverged", exit_.alarm.sentence, int(exit_.code or 0)
        except (KeyboardInterrupt, SystemExit):
            state, error = "interrupted", ""
        except Exception as problem:  # of the disk, or of any class that the recipe names
            state, error = "failed", f"{type(problem).__name__}: {problem}"
            if interrupts.received is None:
                traceback.print_exc()
        finally:
            interrupts.before_exit = interrupts.to_children = None
        # Also where a process that it ended is missed
        if interrupts.received is not None and state not in ("finished", "diverged"):
            state, error = "interrupted", interrupts.received.name
        if first:
            status.write(state, error)
        codes = {"finished": 0, "failed": 1, "diverged": code if first else 0}
        return Outcome(state, codes.get(state, interrupts.exit_code or 130))


def newest_or_clear(folder: Path, first: bool) -> Start | None:
    """The newest checkpoint of a run; without one the first process deletes what the run has left, and says so."""
    from normzoo.cli._going_on import newest

    start, remarks = newest(folder)
    if first:
        for remark in remarks:
            print(f"normzoo: {folder}: {remark}", file=sys.stderr)
        if start is not None:
            print(f"normzoo: {folder} {start.sentence}", file=sys.stderr)
        elif clear(folder):
            print(
                f"normzoo: {folder} has no checkpoint to go on from: the run starts again, in a clean folder",
                file=sys.stderr,
            )
    return start


def _fit(
    config: Mapping[str, Any], folder: Path, source: str, interrupts: Interrupts, start: Start | None = None
) -> None:
    from torch.multiprocessing.spawn import ProcessExitedException

    from normzoo.callbacks import Divergence, DivergenceExit
    from normzoo.cli._trainer import make_trainer
    from normzoo.cli.build import build

    if start is not None and start.point == "end":
        return
    if start is not None:
        warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    training = build(config, source)
    trainer = make_trainer(training, folder, start)
    if trainer.strategy.launcher is not None:
        interrupts.to_children = trainer.strategy.launcher.kill
    try:
        trainer.fit(training.task, training.data, ckpt_path=None if start is None else start.path, weights_only=True)
    except ProcessExitedException as error:  # of a rank that a launcher has started, which says no more than its code
        actions = [callback.action for callback in training.callbacks if isinstance(callback, Divergence)]
        alarm = _alarm_on_record(folder)
        if alarm is None or error.exit_code not in [getattr(action, "exit_code", None) for action in actions]:
            raise
        raise DivergenceExit(error.exit_code, alarm) from None


def _alarm_on_record(folder: Path) -> Alarm | None:
    """What the record says of the last divergence; None if there was none."""
    from normzoo.callbacks import Alarm
    from normzoo.records.reading import read_records

    rows = read_records(folder).get("divergence")
    if rows is None or rows.empty:
        return None
    last = rows.iloc[-1]
    return Alarm(int(last["step"]), last["rule"], last["value"])


def new_folder(out: str | None, name: str) -> Path:
    """Make the folder for a run or a sweep: ``out``, which must not exist, or ``runs/NAME-TIME``."""
    check_out(out)
    if out is not None:
        try:
            Path(out).mkdir(parents=True)
        except FileExistsError:  # made since
            raise _exists(out) from None
        except OSError as error:
            raise RecipeError(f"--out: cannot make {out}: {error.strerror}") from None
        return Path(out)
    stem = f"{shortened(name)}-{time.strftime('%Y%m%d-%H%M%S')}"
    for suffix in ("", *(f"-{i}" for i in range(2, 1000))):
        folder = Path("runs") / f"{stem}{suffix}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise RecipeError(f"cannot make {folder}: {error.strerror}; give another folder with --out") from None
        return folder
    raise RecipeError(f"runs/{stem} and 998 more of its name exist; give a folder with --out")


def check_out(out: str | None) -> None:
    """Refuse a value of ``--out`` that names no folder, or one that exists, before anything is made."""
    if out is None:
        return
    if not out:
        raise RecipeError("--out: expected the name of a new folder, not ''")
    if not out.isprintable():  # control characters, and bytes that are no text in the terminal's encoding
        raise RecipeError(f"--out: {out!r} has characters that cannot be printed")
    if os.path.lexists(out):
        raise _exists(out)


def _exists(out: str) -> RecipeError:
    return RecipeError(f"--out: {out} exists, and a run folder is never overwritten")


def shortened(label: str) -> str:
    """A label cut to what leaves room, within the 255 bytes of a file's name, for a number and a time.

    Example:
        >>> shortened("norm=batch"), len(shortened("x" * 300))
        ('norm=batch', 100)
    """
    most = 100  # bytes
    if len(label.encode()) <= most:
        return label
    return label.encode()[: most - 3].decode(errors="ignore") + "..."


def is_first_process() -> bool:
    """Whether this is the process that writes; launchers say so in the environment before any process group is."""
    return all(int(os.environ.get(v) or 0) == 0 for v in ("RANK", "LOCAL_RANK", "NODE_RANK"))


def _write_environment(folder: Path) -> None:
    """Write ``environment.json``; say so if a run goes on with other versions than it was begun with."""
    path, now = folder / "environment.json", environment()
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # there is none, or it is damaged
        before = json.loads(path.read_text(encoding="utf-8"))["packages"]
        other = [f"{p} {now['packages'][p]} (before: {v})" for p, v in before.items() if now["packages"][p] != v]
        if other:
            print(f"normzoo: {folder} goes on with {', '.join(other)}; numbers may differ", file=sys.stderr)
    write_whole(path, json.dumps(now, indent=2) + "\n")


def environment() -> dict[str, Any]:
    """What a run depended on: versions, machine, command and git state."""
    import torch

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    status = git("status", "--porcelain")
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": {p: importlib.metadata.version(p) for p in _PACKAGES},
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "git": {"commit": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)},
    }
