"""A process that has the modules named in its arguments loaded, and forks itself to run scripts.

``ranks.py`` starts and asks it, with torch and Lightning among the modules.
A request is a line of JSON on stdin, the answer one on stdout:

- ``{"script", "arguments", "folder", "output", "environments"}``: fork one process for each environment, and run the
  script in it as ``python script.py`` in the folder would, in a process group of its own. Answer: the process ids.
- ``{"poll": [pid, ...]}``: the exit codes, null for a process that still runs. A code is told once.

When stdin ends, whatever still runs is killed. Nothing is ever computed here: a fork inherits no thread but that of
Arrow's allocator, which comes up again by itself, and no random state that has been drawn from.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import gc
import importlib
import json
import os
import random
import signal
import sys
import threading
import traceback
import types
import warnings
from pathlib import Path
from typing import Any, NoReturn

ALLOCATOR = "jemalloc_bg_thd"


def serve() -> dict[str, Any] | None:
    """Answer requests; in a forked process, what it is to run."""
    running: set[int] = set()
    while line := sys.stdin.readline():
        request = json.loads(line)
        if "poll" in request:
            answer = [_exit_code(pid) for pid in request["poll"]]
            running -= {pid for pid, code in zip(request["poll"], answer, strict=True) if code is not None}
        else:
            answer = []
            for environment in request["environments"]:
                pid = _fork()
                if not pid:
                    return {**request, "environment": environment}
                running.add(pid)
                answer.append(pid)
        print(json.dumps(answer), flush=True)
    for pid in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    return None


def _fork() -> int:
    """Fork a process that leads a group of its own."""
    threads = {path.parent.name: path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")}
    others = {tid: name for tid, name in threads.items() if tid != str(os.getpid()) and name != ALLOCATOR}
    if others:
        raise RuntimeError(f"the fork server has threads, which forks would lack: {others}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads: Python counts the allocator's
        pid = os.fork()
    with contextlib.suppress(OSError):  # whichever of the two comes first
        os.setpgid(pid, pid)
    return pid


def _exit_code(pid: int) -> int | None:
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def prepare(job: dict[str, Any]) -> None:
    """Make of this fork what a new process with the script would start as."""
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["folder"])
    output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(descriptor, target)
    os.close(output)
    os.close(nothing)
    sys.argv = [job["script"], *job["arguments"]]
    sys.path[0] = str(Path(job["script"]).parent)
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.seed()


def run(script: Path) -> int:
    """Run the script as ``__main__``; the exit code."""
    main = types.ModuleType("__main__")
    main.__file__ = str(script)
    sys.modules["__main__"] = main
    try:
        exec(compile(script.read_text(encoding="utf-8"), str(script), "exec", dont_inherit=True), vars(main))
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def finish(code: int) -> NoReturn:
    """End the process as the interpreter would, but leave what the server had loaded: to take it down takes seconds."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    vars(sys.modules["__main__"]).clear()
    gc.collect()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    # A job in the background of a shell ignores interrupts, one under nohup hang-ups, and so would their descendants
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for _number in (signal.SIGHUP, signal.SIGTERM, signal.SIGQUIT):
        signal.signal(_number, signal.SIG_DFL)
    faulthandler.register(signal.SIGUSR1)  # whoever is late is asked where it stands
    for _name in sys.argv[1:]:
        importlib.import_module(_name)
    gc.collect()
    gc.freeze()  # what is shared with the forks is not walked, and so not copied, by their collectors
    print("ready", flush=True)
    job = serve()
    if job is None:
        os._exit(0)
    prepare(job)
    finish(run(Path(job["script"])))
