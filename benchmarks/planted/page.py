"""The verdicts of planted_divergences.py: what is right, and the page's section."""

from __future__ import annotations

import datetime as dt
import platform
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import lightning
import torch

CAUSES = (
    *("data", "learning_rate", "warm_up", "normalization", "precision", "parameter", "hardware", "innocent"),
    *("error", "undetermined", "crash"),
)
TWO = "two at once"
BEGIN, END = "<!-- planted divergences -->", "<!-- end of planted divergences -->"
TITLE = "## How often a replay names the right cause"
INTRODUCTION = """Causes are planted in small runs: convolutional and MLP-mixer networks, transformers, recurrent
networks, an autoencoder, a U-Net, a normalizing flow and others, with SGD, Adam, AdamW, RMSprop, NAdam, Adagrad, Adamax
and RAdam, with and without clipping and accumulation.
`Divergence()` and `GradientNorm()` raise the alarm as they are by default, with tighter rules for innocent runs,
and `normzoo.replay` is given the capsule and the module, without what was planted from outside. Each run without
its cause raises no alarm. A row is what was planted, a column the cause that the first finding names. A finding
that counts as right *leniently* names what a careful person might say as well: the learning rate where a warm-up
was left out or where one parameter's own learning rate is too large, the error that a label out of range raises,
the batch where its labels are noise or a rare token is what makes a layer's input constant. Which these are was
decided before the first replay. Sets a, b and c were looked at while the criteria were written; set d, whose
networks, optimizers and schedules these do not have, was planted without sight of the criteria and judged once."""
Verdict = dict[str, Any]


def outcome(verdict: Verdict) -> str:
    """``"right"``, ``"lenient"``, ``"undetermined"``, ``"wrong, high"``, ``"wrong, low"`` or ``"crash"``."""
    first = verdict["first"]
    if first in verdict["truth"]:
        return "right"
    if first in ("undetermined", "crash"):
        return first
    return "lenient" if first in verdict["lenient"] else f"wrong, {verdict['confidence']}"


def row_of(verdict: Verdict) -> str:
    """The row of the matrix."""
    return verdict["truth"][0] if len(verdict["truth"]) == 1 else TWO


def verdict_line(v: Verdict) -> str:
    """A line for people who wait."""
    ratio = "" if v["ratio"] is None else f", {v['ratio']:.1f} times its steps"
    said = f"{' and '.join(v['truth'])} -> {v['first']} ({v['confidence']}), {outcome(v)}"
    return f"{v['name']} {said}, {v['seconds']:.0f} s{ratio}"


def page(verdicts: list[Verdict]) -> str:
    """The section in Markdown."""
    return "\n\n".join([INTRODUCTION, summary(verdicts), matrix(verdicts), conditions(verdicts)])


def summary(verdicts: list[Verdict]) -> str:
    """Shares of all runs, and of each half."""
    lines = [
        "| runs | first finding right | right, leniently | wrong with high confidence | wrong, low | undetermined |",
        "|---|---|---|---|---|---|",
    ]
    halves = sorted({v["half"] for v in verdicts})
    for half in [*halves, ""] if len(halves) > 1 else [""]:
        counts = Counter(outcome(v) for v in verdicts if half in ("", v["half"]))
        total = counts.total()
        shares = [counts["right"], counts["right"] + counts["lenient"], counts["wrong, high"], counts["wrong, low"]]
        shares.append(counts["undetermined"] + counts["crash"])
        cells = [f"{count} ({count / max(total, 1):.0%})" for count in shares]
        lines.append(f"| {f'{total} of set {half}' if half else total} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def matrix(verdicts: list[Verdict]) -> str:
    """The confusion matrix: a row for each planted cause, a column for each first finding."""
    counts = Counter((row_of(v), v["first"]) for v in verdicts)
    rows = [row for row in (*CAUSES, TWO) if any(row_of(v) == row for v in verdicts)]
    columns = [c for c in CAUSES if c not in ("error", "crash") or any(v["first"] == c for v in verdicts)]
    lines = [
        "| planted | " + " | ".join(c.replace("_", " ") for c in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for row in rows:
        cells = [str(counts[row, c] or "") for c in columns]
        cells = [f"**{cell}**" if cell and c == row else cell for cell, c in zip(cells, columns, strict=True)]
        lines.append(f"| {row.replace('_', ' ')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def conditions(verdicts: list[Verdict]) -> str:
    """What the numbers are of."""
    double = [v for v in verdicts if len(v["truth"]) > 1]
    both = sum({*v["truth"]} <= {cause for cause, *_ in v["listed"]} for v in double)
    ratios = [v["ratio"] for v in verdicts if v["ratio"] is not None]
    parts = [
        f"Measured on {dt.date.today().isoformat()} by `python benchmarks/planted_divergences.py`, n = {len(verdicts)} "
        f"runs: torch {torch.__version__}, lightning {lightning.__version__}, Python {platform.python_version()}, "
        f"{processor()}, one thread for each run."
    ]
    if double:
        parts.append(f"Of {len(double)} runs with two causes at once, {both} have both among their findings.")
    if ratios:
        parts.append(
            f"A replay takes {statistics.median(ratios):.1f} times the time of the steps of its capsule in the median, "
            f"at most {max(ratios):.1f} times."
        )
    return " ".join(parts)


def processor() -> str:
    """Its name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())


def write(path: Path, text: str) -> None:
    """Put the section between its markers in a page, at the end of one that has none."""
    content = path.read_text(encoding="utf-8")
    if BEGIN not in content or END not in content:
        content = f"{content.rstrip()}\n\n{TITLE}\n\n{BEGIN}\n{END}\n"
    head, _, rest = content.partition(BEGIN)
    path.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")
