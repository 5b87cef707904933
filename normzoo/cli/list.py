"""``normzoo list``: what there is."""

from __future__ import annotations

import argparse
import importlib.resources
import json
from typing import Any

from rich.table import Table
from rich.text import Text

from normzoo.cli._terminal import terminal
from normzoo.cli.recipe import header, shipped
from normzoo.names import CIFAR_RESNETS, SHORT_NAMES
from normzoo.registry import list_norms, norm_info


def measured_costs() -> tuple[dict[str, list[float]], dict[str, Any]]:
    """What benchmarks/norms.py measured last: {layer: [least, greatest]}, and on what machine."""
    text = (importlib.resources.files("normzoo") / "layer_costs.json").read_text(encoding="utf-8")
    held = json.loads(text)
    return held["costs"], held["machine"]


def execute(arguments: argparse.Namespace) -> int:
    """Print a table of one kind of thing."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    what = arguments.what
    if what == "norms":
        costs, machine = measured_costs()
        for column in ("name", "family", "summary", "paper", "batch-dependent", "cost"):
            table.add_column(column)
        for info in map(norm_info, [*list_norms(), *list_norms("weight")]):
            dependent = "yes" if info.batch_statistics else "no"
            cost = "-".join(f"{c:.1f}" for c in costs.get(info.name, ()))
            table.add_row(info.name, info.family, info.summary, info.paper, dependent, cost)
        table.caption = (
            "cost: forward and backward as a multiple of torch.nn.BatchNorm2d, least and greatest over shapes and "
            f"memory formats ({machine['processor']}, {machine['threads']} threads, {machine['date']})"
        )
    elif what == "recipes":
        _add_recipes(table)
    elif what == "models":
        table.add_column("name")
        for name in CIFAR_RESNETS:
            table.add_row(name)
        table.caption = "and every model of timm: python -c 'import timm; print(timm.list_models())'"
    else:
        table.add_column("name")
        table.add_column("class")
        for name, target in SHORT_NAMES[what.removesuffix("s") if what != "callbacks" else what].items():
            table.add_row(name, target)
    terminal(file_width=180).print(table)
    return 0


def _add_recipes(table: Table) -> None:
    """A row for each recipe, by what stands before the first ``_`` of its name: first those that are alone with it."""
    groups: dict[str, dict[str, dict[str, list[str]]]] = {}
    for name, text in shipped().items():
        groups.setdefault(name.partition("_")[0], {})[name] = header(text)
    for column in ("name", "question", "time"):
        table.add_column(column, no_wrap=column == "name")
    for prefix, recipes in sorted(groups.items(), key=lambda item: len(item[1]) > 1):
        indent = ""
        if len(recipes) > 1:
            table.add_row(Text(prefix, style="bold"))
            indent = "  "
        for name, fields in recipes.items():
            table.add_row(indent + name, " ".join(fields[""]), " ".join(fields.get("Time", ["-"])))
