"""The promises about the record: columns, figures, log keys, and readers that know nothing of the measurement."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

from normzoo.callbacks.measurement import Measurement
from normzoo.report.drawing import draw_figure
from normzoo.testing._compare import BrokenError, NotApplicableError
from normzoo.testing._promises import promise
from normzoo.testing._running import where
from normzoo.testing.measurements._fits import Subject
from normzoo.testing.measurements._runs import own_keys

DEADLINE = 240.0  # seconds for a process

READER = """
import json, sys
sys.path[:] = json.loads(sys.argv[3])
for name in ("torch", "lightning", "normzoo.callbacks", *json.loads(sys.argv[2])):
    sys.modules[name] = None
from normzoo.records.reading import load_run
from normzoo.report.drawing import draw_figure
frames = load_run(sys.argv[1])
drawn = {
    name: [figure.title for figure in frame.attrs["figures"] if draw_figure(figure, {"": frame}) is not None]
    for name, frame in frames.items()
}
print(json.dumps({name: [len(frame), list(frame.columns), drawn[name]] for name, frame in frames.items()}))
"""

KEYS = """
import json, pickle, sys
sys.path[:] = json.loads(sys.argv[3])
from normzoo.testing.measurements._record import state_keys_of
with open(sys.argv[1], "rb") as file:
    try:
        subject = pickle.load(file)
    except (AttributeError, ImportError) as error:
        print(json.dumps(str(error)))
        sys.exit()
print(json.dumps(state_keys_of(subject, sys.argv[2])))
"""


@promise()
def record(subject: Subject) -> None:
    """Rows hold the columns declared, each with a meaning; figures are drawn; log keys begin with the record's name."""
    measurement, fitted, rows = subject.base
    schema = measurement.schema
    if (found := list(rows.columns)) != (declared := [column.name for column in schema.columns]):
        raise BrokenError(f"the record has the columns {found}, and {declared} are declared")
    for column in schema.columns:
        if not column.meaning.strip():
            raise BrokenError(f"column {column.name!r} does not say what its values mean")
    for figure in schema.figures:
        try:
            drawn = draw_figure(figure, {"": rows})
        except Exception as error:
            raise BrokenError(f"figure {figure.title!r}: {where(error)}") from error
        if drawn is None:
            raise BrokenError(f"figure {figure.title!r} is empty: nothing is drawn of {len(rows)} rows")
    named = [key for key in own_keys(fitted) if key.startswith(f"{measurement.name}/")]
    if any(column.statistic for column in schema.columns) and not named:
        raise BrokenError(f"columns are logged, and no key begins with {measurement.name}/: {own_keys(fitted)}")


@promise(slow=True)
def elsewhere(subject: Subject) -> None:
    """A process without torch, Lightning and the measurement's class reads the record and draws its figures."""
    measurement, fitted, rows = subject.base
    own = [c.__module__ for c in type(measurement).__mro__ if issubclass(c, Measurement)]
    answer = _in_new_process(READER, fitted.folder, json.dumps([name for name in own if name != "__main__"]))
    expected = [len(rows), list(rows.columns), [figure.title for figure in measurement.schema.figures]]
    if (found := answer.get(measurement.name)) != expected:
        raise BrokenError(f"rows, columns and figures elsewhere are {found}, and here {expected}")


@promise(slow=True)
def state_keys(subject: Subject) -> None:
    """In checkpoints its state has the same key in every process, whatever addresses and string hashes that has."""
    path = subject.new_folder() / "subject.pkl"
    try:
        path.write_bytes(pickle.dumps(subject))
    except Exception as error:
        raise NotApplicableError(f"another process cannot be given the factory: {error}") from error
    folder = path.parent / "elsewhere"
    here, there = state_keys_of(subject, str(folder)), _in_new_process(KEYS, path, str(folder))
    if isinstance(there, str):
        raise NotApplicableError(f"another process cannot import the factory: {there}")
    if here != there:
        raise BrokenError(f"the keys in this process are {here}, and in another {there}")


def state_keys_of(subject: Subject, folder: str) -> list[str]:
    """The keys of three measurements of one Trainer, of which one writes to a folder of its own."""
    fitted = subject.fit(subject.make(), subject.make(label="second"), subject.make(dirpath=folder), epochs=1)
    subject.rows(fitted)
    return fitted.keys


def _in_new_process(script: str, path: Path, *arguments: str) -> Any:
    """What a script prints, as JSON, in a new process that hashes strings differently."""
    command = [sys.executable, "-c", script, str(path), *arguments, json.dumps(sys.path)]
    environment = {**os.environ, "PYTHONHASHSEED": "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE, check=False)
    except subprocess.TimeoutExpired as error:
        raise BrokenError(f"a process is still running after {DEADLINE:.0f} s") from error
    if done.returncode:
        raise BrokenError(f"in another process: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])
