"""Parses the command line; a command's own module is imported only when it is run."""

from __future__ import annotations

import argparse
import importlib
import itertools
import sys
from collections.abc import Sequence
from typing import NoReturn

from normzoo import __version__
from normzoo._errors import RecipeError, one_line

_OVERRIDES = "overrides of single values, as in optimizer.lr=0.01 or --trainer.max_epochs 3"
_OUT = "folder for the results; must not exist (default: runs/NAME-TIME)"
_RESUME = {
    "run": "go on with the run of this folder from its newest checkpoint, or with its experiment at the next part",
    "sweep": "go on with the sweep of this folder: points that have finished or diverged are kept, others go on",
}
_DRY_RUN = {
    "run": "check the recipe and print it as the run would keep it; write nothing",
    "sweep": "check the recipe and print that of each run; write nothing",
}
_OPTIONS = ("--out", "--resume")  # of commands whose other options are overrides
_FLAGS = ("--dry-run", "--help", "--version")  # options that take no value
_RECIPE = "name of a shipped recipe (see: normzoo list recipes) or path of a YAML file"


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{one_line(f'{self.prog}: {message}; see {self.prog} --help')}\n")


def build_parser() -> argparse.ArgumentParser:
    """All commands and their arguments."""
    parser = _Parser(
        prog="normzoo", description="Train, measure and report experiments on normalization and stability."
    )
    parser.add_argument("--version", action="version", version=f"normzoo {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    for name, summary in (
        ("run", "train one recipe, or carry out its experiment, and report on it"),
        ("sweep", "run every point of a recipe's sweep: grid, and report on all of them"),
        ("validate", "check a recipe without running it"),
    ):
        command = commands.add_parser(name, help=summary, description=summary)
        command.add_argument("recipe", nargs=None if name == "validate" else "?", help=_RECIPE)
        command.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help=_OVERRIDES)
        if name != "validate":
            command.add_argument("--out", metavar="FOLDER", help=_OUT)
            command.add_argument("--resume", metavar="FOLDER", help=_RESUME[name])
            command.add_argument("--dry-run", action="store_true", help=_DRY_RUN[name])

    summary = (
        "print and draw the runs in folders: runs of normzoo, and any log of Lightning's CSV and TensorBoard loggers"
    )
    command = commands.add_parser("report", help=summary, description=summary)
    command.add_argument(
        "folders", metavar="FOLDER", nargs="+", help="a run's folder, or one that holds runs, such as lightning_logs"
    )
    page = "page to write (default: report.html in the folder, of several folders in the current one)"
    command.add_argument("--out", metavar="FILE", help=page)
    command.add_argument("--csv", metavar="FOLDER", help="write runs, metrics and records as CSV files into it, too")
    command.add_argument("--metric", action="append", metavar="NAME", help="metric for a column of the printed table")
    command.add_argument("--all", action="store_true", help="print all rows, and what all capsules tell")
    command = commands.add_parser(
        "replay",
        help="make the steps before a divergence again, and name its cause",
        description="Make the steps of a capsule again, try things on them, and name the cause of the divergence.",
    )
    command.add_argument("path", metavar="RUN_OR_CAPSULE", help="a run's folder, or one of its capsules")
    command.add_argument("--capsule", type=int, metavar="NUMBER", help="of the run (default: that of the latest alarm)")
    command.add_argument(
        "--module",
        metavar="package.module:Class",
        help="the LightningModule; or train.py:Class, or a function that returns it (default: the one of the run)",
    )
    command.add_argument("--init", metavar="FILE.yaml", help="arguments of its __init__ (default: those it has saved)")
    command.add_argument("--callbacks", metavar="package.module:function", help="returns the run's own callbacks")
    command.add_argument(
        "--data", metavar="package.module:Class", help="of the run's data module, if the module asks it"
    )
    command.add_argument("--batches", metavar="package.module:function", help="makes a batch from a list of sample ids")
    command.add_argument("--sites", action="append", metavar="PATTERN", help="modules whose channels are followed")
    command.add_argument("--ranks", type=int, metavar="N", help="processes: as many as the run had (the default), or 1")
    command = commands.add_parser(
        "convert",
        help="replace the norm layers in a checkpoint file",
        description="Replace the norm layers in a checkpoint, for the model that normzoo.convert_norms makes.",
    )
    command.add_argument("checkpoint", help="file of torch.save (a state dict, Lightning's, timm's) or .safetensors")
    command.add_argument("--to", required=True, help="norm to convert to (see: normzoo list norms)")
    command.add_argument("--out", required=True, help="file to write; must not exist")
    command.add_argument("--options", help="options of the norm, as in '{groups: 8}'")
    command.add_argument("--exclude", action="append", metavar="PATTERN", help="layers to leave, as in 'head.*'")
    command.add_argument("--recipe", metavar="RECIPE", help="with --calibrate: recipe of the model and its data")
    command.add_argument(
        "--calibrate", type=int, metavar="N", help="calibrate on N batches of the recipe's training data"
    )
    command.add_argument(
        "--set", action="append", metavar="KEY=VALUE", help="override in the recipe, as data.root=FOLDER"
    )
    command.add_argument("--force", action="store_true", help="overwrite --out")
    command = commands.add_parser(
        "export",
        help="write the network of a run as one ONNX file",
        description="Write the network of a run or recipe as one ONNX file, and compare the file with the network.",
    )
    command.add_argument("source", metavar="RUN_OR_RECIPE", help="a run's folder, or a recipe's name or path")
    command.add_argument("out", metavar="FILE.onnx", help="file to write; must not exist")
    command.add_argument("--checkpoint", metavar="FILE", help="weights (default: those of the run's newest checkpoint)")
    command.add_argument("--fold", action="store_true", help="fold norms into the layers beside them")
    command.add_argument("--input", metavar="C,H,W", help="shape of one input (default: that of the recipe's data)")
    command.add_argument("--set", action="append", metavar="KEY=VALUE", help="override in the recipe")
    command.add_argument("--force", action="store_true", help="overwrite the file")
    command = commands.add_parser("list", help="list norms, models, data, callbacks, experiments, recipes and more")
    command.add_argument(
        "what",
        nargs="?",
        default="norms",
        choices=("norms", "models", "data", "callbacks", "optimizers", "lr_schedulers", "experiments", "recipes"),
        help="what to list (default: norms)",
    )
    command = commands.add_parser("show", help="print a recipe, with what it extends filled in")
    command.add_argument("recipe", help=_RECIPE)
    command = commands.add_parser("copy", help="copy a shipped recipe to edit it")
    command.add_argument("recipe", help=_RECIPE)
    command.add_argument("target", help="file to write; must not exist")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 if all went well, 1 if a run failed, 2 for bad input, 79 if it diverged, 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what a terminal cannot show is escaped
            stream.reconfigure(errors="backslashreplace")
    arguments = build_parser().parse_args(_join_overrides(list(sys.argv[1:] if argv is None else argv)))
    command = importlib.import_module(f"normzoo.cli.{arguments.command}")
    try:
        return int(command.execute(arguments))
    except RecipeError as error:
        print(f"normzoo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("normzoo: interrupted", file=sys.stderr)
        return 130


def _split(token: str) -> list[str]:
    """``--out=DIR`` as ``--out DIR``, and likewise for the other options."""
    option, equals, value = token.partition("=")
    return [option, value] if equals and option in _OPTIONS else [token]


def _join_overrides(argv: list[str]) -> list[str]:
    """Write ``--key.sub value`` and ``--key.sub=value`` as ``key.sub=value``, which the parser takes anywhere."""
    if argv[:1] in (["convert"], ["export"], ["replay"], ["report"]):  # they have no recipe to override
        return argv
    joined, options, rest = [], [], iter([part for token in argv for part in _split(token)])
    for token in rest:
        if token in _OPTIONS:  # argparse takes positional arguments in one run only, so options go last
            options += [token, *itertools.islice(rest, 1)]
        elif token in _FLAGS:
            options.append(token)
        elif token.startswith("--"):
            following = None if "=" in token else next(rest, None)
            joined.append(token[2:] if following is None else f"{token[2:]}={following}")
        else:
            joined.append(token)
    return joined + options
