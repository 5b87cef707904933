"""The paper's figures made again: the commands in the headers of the recipes ``paper_*``, their records and pictures.

usage: python benchmarks/reproduction.py [--data FOLDER] [--out FOLDER] [--only NAME ...] [--update]
       python benchmarks/reproduction.py --keep RUNFOLDER NAME
       python benchmarks/reproduction.py --draw [NAME ...]

The commands run one after the other in ``--out`` (default: reproduction), on the images in ``--data``, a folder as
``data.root`` takes it; without it CIFAR-10 is downloaded. Started again after a kill, the script leaves finished
commands out, and goes on with the one that was cut short: experiments at the first part that is not on record, sweeps
at the first point that has not finished. Recipes whose names end in ``_full`` run only if ``--only`` names them.
``--update`` then keeps the records of each recipe in docs/records and draws its pictures.

``--keep`` copies what a figure is drawn from into docs/records/NAME: of each run the recipe, status, environment,
metrics and records, and of a replayed capsule the records of the replay. Paths of the machine are left out.
``--draw`` makes docs/images/paper-*.png from docs/records, by the drawing of reports. A recipe's header says which:
``# Figure: TITLE``, a line for each; ``; runs PATTERN`` after it takes some of the runs, ``; file NAME.png`` names the
file.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import io
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from normzoo._errors import RecipeError
from normzoo._files import write_whole
from normzoo._yaml_text import dump, parse
from normzoo.cli._resume import locked, state_of
from normzoo.cli.recipe import header, shipped

ROOT = Path(__file__).parents[1]
RECORDS, IMAGES = ROOT / "docs" / "records", ROOT / "docs" / "images"
PREFIX, LONG = "paper_", "_full"
DATA = "data.root=FOLDER"  # in commands, for the folder that is given
ENDED = (0, 79)  # exit codes of commands that have done what they should: a run that diverges ends with 79
PROGRESS = "reproduction.json"  # which commands have ended, and in how many seconds
MOST = 1_500_000  # bytes of a recipe's records
# What a reader of a record needs to know of the machine
ENVIRONMENT = ("python", "packages", "platform", "cpu_count", "torch_threads", "gpus")
MACHINES = ("x86_64", "aarch64", "arm64", "AMD64")
_PAUSE = 2.0  # seconds
EARLIER = re.compile(r"(channel_(input|output)|gradient|update|noise)/")  # how keys of the version before begin
PATH = re.compile(r"(?<![\w.])/(?:[\w.+=,()-]+/)+[\w.+=,()-]*")


@dataclass(frozen=True)
class Command:
    """One command of a recipe's header.

    Attributes:
        recipe: its name.
        text: as it stands there, without what is said of it.
    """

    recipe: str
    text: str

    @property
    def words(self) -> list[str]:
        """Its words, without ``normzoo``."""
        return shlex.split(self.text)[1:]

    @property
    def folder(self) -> str:
        """What ``--out`` says; empty if it writes no folder of its own."""
        words = [*self.words, ""]
        return words[words.index("--out") + 1] if "--out" in words else ""


@dataclass(frozen=True)
class Picture:
    """A figure of a report that is kept as a file: its title, which runs it is of, and the name of the file."""

    title: str
    runs: str
    file: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10, as data.root takes it (default: download it)")
    parser.add_argument("--out", type=Path, default=Path("reproduction"), help="folder in which the commands run")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="recipes (default: all but those that end in _full)")
    parser.add_argument("--update", action="store_true", help="also keep the records and draw the pictures")
    parser.add_argument("--keep", nargs=2, metavar=("RUNFOLDER", "NAME"), help="keep the records of one folder")
    parser.add_argument("--draw", nargs="*", metavar="NAME", help="draw the pictures from docs/records")
    arguments = parser.parse_args()
    if arguments.keep:
        keep(Path(arguments.keep[0]), arguments.keep[1])
    elif arguments.draw is not None:
        for name in arguments.draw or sorted(path.name for path in RECORDS.iterdir() if path.is_dir()):
            draw(name)
    else:
        names = chosen(arguments.only)
        failed = run_all(names, arguments.out, arguments.data)
        for name in names if arguments.update else ():
            if name not in failed:
                keep(arguments.out / commands(name)[0].folder, name)
                draw(name)
        sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def chosen(only: Sequence[str] | None) -> list[str]:
    """The recipes whose commands are to run."""
    papers = [name for name in shipped() if name.startswith(PREFIX)]
    if only is None:
        return [name for name in papers if not name.endswith(LONG)]
    if unknown := [name for name in only if name not in papers]:
        sys.exit(f"{unknown[0]} is not one of {', '.join(papers)}")
    return [name for name in papers if name in only]


def commands(name: str) -> list[Command]:
    """The commands in the header of a recipe, in order."""
    lines = header(shipped()[name]).get("Command", [])
    texts = [re.sub(r"\s+\(.*", "", line) for line in lines if line.startswith("normzoo ")]
    return [Command(name, text) for text in texts]


def run_all(names: Sequence[str], out: Path, data: Path | None) -> list[str]:
    """Run what has not ended yet; tell the time of each command; the recipes of those that failed."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / PROGRESS
    ended: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
    failed: list[str] = []
    for command in (command for name in names for command in commands(name)):
        if command.text not in ended and command.recipe not in failed:  # later ones need what the first has made
            wait_for(out / command.folder)
            words, resumed = to_run(command, out, data)
            print(f"{out}$ normzoo {shlex.join(words)}", flush=True)
            start = time.monotonic()
            code = run(words, out)
            seconds = time.monotonic() - start
            if code > 128:  # a signal ended it
                sys.exit(code)
            if code not in ENDED:
                failed.append(command.recipe)
                print(f"{command.text}: exit code {code} after {time_text(seconds)}", flush=True)
                continue
            ended[command.text] = {"recipe": command.recipe, "seconds": round(seconds, 1), "resumed": resumed}
            write_whole(path, json.dumps(ended, indent=1) + "\n")
    print(times(ended), flush=True)
    return failed


def to_run(command: Command, out: Path, data: Path | None) -> tuple[list[str], bool]:
    """The words of a command on the data that there is, and whether they go on with what is in ``out``."""
    words = []
    for word in command.words:
        if word == DATA:
            words += [f"data.root={data.resolve()}"] if data else ["data.root=data", "data.download=true"]
        else:
            words.append(word)
    folder = out / command.folder
    if not command.folder or not folder.exists():
        return words, False
    if out.resolve() not in folder.resolve().parents:
        sys.exit(f"{command.text}: {folder} is not in {out}")
    if (folder / "sweep.yaml").exists() or is_of_experiment(folder / "recipe.yaml"):
        return [words[0], "--resume", command.folder], True
    if state_of(folder) in ("finished", "diverged"):  # this script was killed before it could note that
        return ["report", command.folder], True
    shutil.rmtree(folder)  # a training run cannot be continued
    return words, False


def wait_for(folder: Path) -> None:
    """Wait while a process works in a folder: a command that has outlived the script that started it."""
    told = False
    while folder.is_dir():
        try:
            with locked(folder):
                return
        except RecipeError as error:
            if not told:
                print(f"waiting: {error}", flush=True)
            told = True
        time.sleep(_PAUSE)


def is_of_experiment(recipe: Path) -> bool:
    """Whether a run's recipe is of an experiment, which can go on."""
    return recipe.exists() and parse(recipe.read_text(encoding="utf-8")).get("experiment") is not None


def run(words: Sequence[str], folder: Path) -> int:
    """The exit code of ``normzoo`` with these words; a signal to this process goes to it as well."""
    code = "import sys; from normzoo.cli.main import main; sys.exit(main())"
    process = subprocess.Popen([sys.executable, "-c", code, *words], cwd=folder)
    before = {number: signal.signal(number, _leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        return process.wait()
    except KeyboardInterrupt:  # which a terminal sends to both
        return process.wait()
    except _SignalError as left:
        process.send_signal(left.number)
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _SignalError(Exception):
    """This process has received a signal."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise _SignalError(number)


def times(ended: dict[str, dict[str, Any]]) -> str:
    """A line for the time of each command, and one for all."""
    lines = [
        f"{time_text(each['seconds']):>8}  {text}{'  (since it was resumed)' if each['resumed'] else ''}"
        for text, each in ended.items()
    ]
    return "\n".join([*lines, f"{time_text(sum(each['seconds'] for each in ended.values())):>8}  in all"])


def time_text(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def keep(folder: Path, name: str, records: Path = RECORDS) -> Path:
    """Copy what the figures of a run or a sweep are drawn from to ``records/name``, in the place of what is there."""
    runs = {"": folder}
    if (folder / "sweep.yaml").exists():
        runs = {path.name: path for path in sorted(folder.iterdir()) if (path / "status.json").exists()}
    if not all((run / "status.json").exists() for run in runs.values()) or not runs:
        sys.exit(f"{folder} is not the folder of a run or a sweep")
    states = {run.name: json.loads((run / "status.json").read_text(encoding="utf-8"))["state"] for run in runs.values()}
    if cut := [f"{run} is {state}" for run, state in states.items() if state not in ("finished", "diverged")]:
        sys.exit(f"{folder}: {cut[0]}; records are kept of what has finished or diverged")
    target = records / name
    if target.exists():
        shutil.rmtree(target)
    replays = sorted(folder.glob("**/capsules/*/replay/records"))
    for run_name, run_folder in runs.items():
        keep_run(run_folder, target / (run_name or ("run" if replays else "")), name)
    for number, replayed in enumerate(replays):
        copied = target / ("replay" if len(replays) == 1 else f"replay-{number}")
        shutil.copytree(replayed, copied)
    if (folder / "sweep.yaml").exists():
        keep_recipe(folder / "sweep.yaml", target / "sweep.yaml")
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(f"{target}: {size:,} bytes{f', more than {MOST:,}' if size > MOST else ''}")
    return target


def keep_run(run: Path, target: Path, name: str) -> None:
    """Copy what is kept of one run."""
    (target / "metrics").mkdir(parents=True)
    keep_recipe(run / "recipe.yaml", target / "recipe.yaml")
    status = json.loads((run / "status.json").read_text(encoding="utf-8"))
    status["error"] = PATH.sub("FOLDER", status["error"])
    write_whole(target / "status.json", json.dumps(status, indent=1) + "\n")
    environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    kept = {"command": command_of(run, name), **{key: environment[key] for key in ENVIRONMENT if key in environment}}
    system, *parts = kept["platform"].split("-")
    kept["platform"] = "-".join([system, *(part for part in parts if part in MACHINES)])  # no kernel
    write_whole(target / "environment.json", json.dumps(kept, indent=1) + "\n")
    for path in sorted((run / "metrics").glob("*")):
        if path.suffix == ".arrows":
            shutil.copyfile(path, target / "metrics" / path.name)
        elif path.name == "metrics.csv":
            write_whole(target / "metrics" / path.name, without_earlier_keys(path.read_text(encoding="utf-8")))


def without_earlier_keys(metrics: str) -> str:
    """A metrics file without the columns that stand under the keys of this version as well."""
    rows = list(csv.reader(io.StringIO(metrics)))
    kept = [i for i, name in enumerate(rows[0]) if not EARLIER.match(name)] if rows else []
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([row[i] for i in kept] for row in rows)
    return file.getvalue()


def keep_recipe(recipe: Path, target: Path) -> None:
    """Copy a recipe with ``FOLDER`` in the place of paths."""
    config = parse(recipe.read_text(encoding="utf-8"))
    write_whole(target, dump(without_paths(config)))


def without_paths(value: Any) -> Any:
    """Plain data with ``FOLDER`` in the place of each text that is a path of this machine."""
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    return "FOLDER" if isinstance(value, str) and Path(value).is_absolute() else value


def command_of(run: Path, name: str) -> str:
    """The command of the recipe's header that has made a run: that of its folder, else the first of its kind."""
    kind = "sweep" if (run.parent / "sweep.yaml").exists() else "run"
    folder = run.parent if kind == "sweep" else run
    of_kind = [command for command in commands(name) if command.words[0] == kind] if name in shipped() else []
    of_folder = [command for command in of_kind if Path(command.folder).name == folder.name]
    return next(command.text for command in (*of_folder, *of_kind, Command(name, f"normzoo {kind} {name}")))


def pictures(name: str) -> list[Picture]:
    """The figures of a recipe that are kept as files."""
    found = []
    for number, line in enumerate(header(shipped()[name]).get("Figure", [])):
        title, *options = (part.strip() for part in line.split(";"))
        given = dict(option.split(" ", 1) for option in options)
        file = f"{name.replace('_', '-')}{f'-{number + 1}' if number else ''}.png"
        if unknown := given.keys() - {"runs", "file"}:
            sys.exit(f"{name}: # Figure: {sorted(unknown)[0]} is neither runs nor file")
        found.append(Picture(title, given.get("runs", "*"), given.get("file", file)))
    return found


def draw(name: str, records: Path = RECORDS, images: Path = IMAGES) -> None:
    """Draw the figures that a recipe's header names, from its records."""
    from normzoo.report import load_runs, save
    from normzoo.report.figures import draw as draw_runs

    runs = load_runs(records / name)
    wanted = pictures(name) if name in shipped() else []
    if not wanted:
        print(f"{name}: no '# Figure:' in its header; there are {', '.join(draw_runs(runs))}")
    for picture in wanted:
        figures = draw_runs([run for run in runs if fnmatch.fnmatchcase(run.name, picture.runs)])
        if picture.title not in figures:
            sys.exit(f"{name}: there is no figure {picture.title!r}; there are {', '.join(figures)}")
        save(figures[picture.title], images / picture.file, scale=0.9)
        print(images / picture.file)


if __name__ == "__main__":
    main()
