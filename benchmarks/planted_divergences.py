"""Does replay name the cause of a divergence? Causes are planted in small runs, and what replay finds is judged.

usage: python benchmarks/planted_divergences.py [--half a|b|c|d|all] [--only CAUSE ...] [--jobs 2] [--keep FOLDER]
                                                [--plant-only] [--results FOLDER] [--write docs/divergence.md]
       python benchmarks/planted_divergences.py --replay-only FOLDER [...]

Each run is trained with ``GradientNorm()`` and ``Divergence()`` as they are by default, but for innocent runs, whose
rules are tighter. That the cause is the cause is tried: the run without it raises no alarm, nor do further changes that
take the cause away; a learning rate said to be too large is so after a warm-up as well (``planted/plan.py``). Then
``normzoo.replay`` is given the first capsule and a new module. Its first finding is compared with what was planted.

``--keep`` leaves the runs in a folder with ``truths.json``, and ``--replay-only`` judges such a folder again.
``--results`` writes ``verdicts.json`` and ``page.md``; ``--write`` makes the section of the page between its markers.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

from planted.fit import AFTER, Settings, Task, fit, quiet
from planted.page import page, verdict_line, write
from planted.plan import Plan, changed
from planted.runs import runs

DEADLINE = 900  # seconds for one replay, or for one run and its proofs
WITHIN = 12  # steps after the planting in which the alarm has to come
LAST = 10  # steps whose mean loss says whether a run goes on well
FINE = 1.25  # times the loss of the run without the hard batch
BAD = (
    2.0  # a run with a planted cause, unless that is a hard batch, must pass this many times its loss before the alarm
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--half", default="all", choices=["a", "b", "c", "d", "all"])
    parser.add_argument("--only", nargs="*", default=None, help="causes, or names of runs such as a07")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="folder in which the runs stay")
    parser.add_argument("--plant-only", action="store_true", help="plant and try, and replay nothing")
    parser.add_argument("--replay-only", type=Path, help="folder of runs that were kept")
    parser.add_argument("--results", type=Path, help="folder for verdicts.json and page.md")
    parser.add_argument("--write", type=Path, help="page whose section is made, at its end if it has none")
    arguments = parser.parse_args()
    folder = arguments.replay_only or arguments.keep or Path(tempfile.mkdtemp())
    try:
        if arguments.replay_only is None:
            records = plant_all(folder, arguments.half, arguments.only, arguments.jobs)
        else:
            records = json.loads((folder / "truths.json").read_text(encoding="utf-8"))
        records = [r for r in records if asked(r["name"], r["half"], r["truth"], arguments.half, arguments.only)]
        if arguments.plant_only:
            return
        verdicts = judge_all(folder, [r for r in records if not r["problems"]], arguments.jobs, arguments.results)
    finally:
        if folder not in (arguments.replay_only, arguments.keep):
            shutil.rmtree(folder)
    text = page(verdicts)
    print(text)
    if arguments.results is not None:
        (arguments.results / "page.md").write_text(text + "\n", encoding="utf-8")
    if arguments.write is not None:
        write(arguments.write, text)


def asked(name: str, half: str, truth: Iterable[str], wanted_half: str, only: list[str] | None) -> bool:
    """Whether a run is among those asked for."""
    return wanted_half in ("all", half) and (only is None or name in only or not {*truth}.isdisjoint(only))


def in_processes(work: Callable[..., Any], tasks: list[tuple[Any, ...]], jobs: int) -> Iterable[Any]:
    """Results as they come, from processes that are new."""
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(work, *task) for task in tasks]):
            yield future.result()


# Planting


def plant_all(folder: Path, half: str, only: list[str] | None, jobs: int) -> list[dict[str, Any]]:
    """Train all runs that are asked for and not there yet; their records, which truths.json has as well."""
    counts: Counter[str] = Counter()
    tasks, names = [], []
    truths = folder / "truths.json"
    folder.mkdir(parents=True, exist_ok=True)
    earlier = json.loads(truths.read_text(encoding="utf-8")) if truths.exists() else []
    records = {record["name"]: record for record in earlier}
    for plan in runs():
        counts[plan.half] += 1
        name = f"{plan.half}{counts[plan.half]:02d}"
        if asked(name, plan.half, plan.truth, half, only):
            names.append(name)
            if not is_planted(plan, records.get(name)):
                tasks.append((name, plan, folder / name))
    for record in in_processes(plant, tasks, jobs):
        records[record["name"]] = record
        said = "; ".join(record["problems"]) or f"alarm at step {record['alarm']}, {record['rule'] or record['error']}"
        print(f"{record['name']} planted in {record['seconds']:.0f} s: {said}", flush=True)
        ordered = [records[name] for name in sorted(records)]
        truths.write_text(json.dumps(ordered, indent=1), encoding="utf-8")
    return [records[name] for name in names]


def is_planted(plan: Plan, record: dict[str, Any] | None) -> bool:
    """Whether a record is of this very run, and nothing is wrong with it."""
    if record is None or record["problems"]:
        return False
    read = asdict(Settings(**record["settings"]))  # with the settings that there were not when it was written
    return bool(json.dumps(read) == json.dumps(asdict(plan.planted)))


def plant(name: str, plan: Plan, folder: Path) -> dict[str, Any]:
    """Train a run with what is planted, the run without, and the proofs; what came of the first, and what is wrong."""
    start = time.perf_counter()
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(DEADLINE)
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        base = fit(plan.base, Path(scratch) / "base", plan.goes_on)
        run = fit(plan.planted, folder, plan.goes_on)
        proofs = [
            (change, alarms, fit(changed(plan.planted, change), Path(scratch) / str(i)))
            for i, (change, alarms) in enumerate(plan.proofs)
        ]
    signal.alarm(0)
    problems = [] if run["capsules"] else ["no capsule"]
    if not alarmed(run):
        problems.append("no alarm")
    elif plan.at is not None and run["alarm"] is not None and not plan.at <= run["alarm"] <= plan.at + WITHIN:
        problems.append(f"alarm at step {run['alarm']}, and step {plan.at} was planted in")
    if alarmed(base):
        problems.append(f"an alarm at step {base['alarm']} without what is planted")
    for change, alarms, tried in proofs:
        if alarmed(tried) != alarms:
            problems.append(f"{'no' if alarms else 'an'} alarm with {change}")
    if plan.goes_on and not goes_on_well(run, base):
        problems.append("the run does not go on well")
    if not plan.goes_on and run["alarm"] is not None and not suffers(run, plan.planted.accumulation):
        problems.append("the loss does not suffer")
    return {
        "name": name,
        "half": plan.half,
        "truth": plan.truth,
        "lenient": plan.lenient,
        "settings": asdict(plan.planted),
        "capsule": run["capsules"][0] if run["capsules"] else None,
        "alarm": run["alarm"],
        "rule": run["rule"],
        "error": run["error"],
        "problems": problems,
        "seconds": time.perf_counter() - start,
    }


def alarmed(run: dict[str, Any]) -> bool:
    """Whether a run has diverged, or failed."""
    return run["alarm"] is not None or run["error"] is not None


def goes_on_well(run: dict[str, Any], base: dict[str, Any]) -> bool:
    """Whether the alarm was the only one, and the last losses are about those without the hard batch, or still fall."""

    def mean(losses: list[float]) -> float:
        return sum(losses) / len(losses)

    at = max(run["alarm"] or 0, LAST)
    bound = max(FINE * mean(base["losses"][-LAST:]), mean(run["losses"][at - LAST : at]))
    return len(run["capsules"]) == 1 and mean(run["losses"][-LAST:]) <= bound


def suffers(run: dict[str, Any], accumulation: int) -> bool:
    """Whether a loss at the alarm or soon after it is far above those before, or not finite."""
    at = accumulation * run["alarm"]
    before, after = run["losses"][max(0, at - LAST) : at], run["losses"][at : at + accumulation * (AFTER + 1)]
    usual = sum(before) / len(before) if before else 0.0
    return any(not loss <= max(usual, BAD * usual) for loss in after)


# Judging


def judge_all(
    folder: Path, records: list[dict[str, Any]], jobs: int, results: Path | None = None
) -> list[dict[str, Any]]:
    """Replay the capsules; a verdict for each run, in their order, which verdicts.json has as they come."""
    verdicts, ordered = {}, []
    if results is not None:
        results.mkdir(parents=True, exist_ok=True)
    for verdict in in_processes(judge, [(record, folder / record["name"]) for record in records], jobs):
        verdicts[verdict["name"]] = verdict
        print(verdict_line(verdict), flush=True)
        ordered = [verdicts[record["name"]] for record in records if record["name"] in verdicts]
        if results is not None:
            (results / "verdicts.json").write_text(json.dumps(ordered, indent=1), encoding="utf-8")
    return ordered


def judge(record: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Replay a capsule in a process that has not trained the run, and compare the findings with what was planted."""
    import normzoo

    quiet()
    capsule = folder / record["capsule"]
    verdict = {name: record[name] for name in ("name", "half", "truth", "lenient")}
    verdict |= {"first": "undetermined", "confidence": "", "sentence": "", "listed": [], "crash": None, "ratio": None}
    start = time.perf_counter()
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(DEADLINE)
    try:
        findings = normzoo.replay(capsule, Task(Settings(**record["settings"])))
        verdict["listed"] = [[f.cause, f.confidence, f.sentence] for f in findings.causes]
        verdict["said"] = str(findings)
        if findings.causes:
            verdict["first"], verdict["confidence"], verdict["sentence"] = verdict["listed"][0]
        passed = json.loads((capsule / "replay" / "evidence.json").read_text(encoding="utf-8"))["seconds"]
        verdict["ratio"] = passed["replay"] / passed["steps"] if passed.get("steps") else None
    except Exception:  # whatever replay raises is a result: a crash, which the page counts
        verdict["first"], verdict["crash"] = "crash", traceback.format_exc()
    finally:
        signal.alarm(0)
    verdict["seconds"] = time.perf_counter() - start
    return verdict


def too_long(*_: Any) -> None:
    """Raise once a run or a replay has taken too long."""
    raise TimeoutError(f"a run with its proofs, or a replay, took more than {DEADLINE} s")


if __name__ == "__main__":
    main()
