"""Imports point one way: between the parts by the table of the design, and between any two files of ours.

Both are read off the syntax tree of every file. The table of the parts is about what runs, so that imports under
``TYPE_CHECKING`` are free. A circle of files is one for their reader, so that for it every import counts, wherever it
stands: at the top, in a function, under ``TYPE_CHECKING``. A package's ``__init__`` counts where a name is imported
from it, not because Python runs it before the package's modules.
"""

from __future__ import annotations

import ast
import graphlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"normzoo": ROOT / "normzoo", "normzoo.callbacks": ROOT / "callbacks", "normzoo.recipes": ROOT / "recipes"}

ANYTHING = frozenset({"*"})
BASE = frozenset({"_errors", "_files", "_shapes"})
LIGHTNING = frozenset({"lightning", "pytorch_lightning", "lightning_fabric"})
TORCH = frozenset({"torch", "torchvision", "torchmetrics", "timm"})


@dataclass(frozen=True)
class Rule:
    """What a part may import: ``ours`` of normzoo's parts; of other packages all but ``never``, or only ``only``."""

    ours: frozenset[str] = frozenset()
    never: frozenset[str] = frozenset()
    only: frozenset[str] | None = field(default=None)


RULES = {
    "_errors": Rule(only=frozenset()),
    "_files": Rule(only=frozenset()),
    "_yaml_text": Rule(frozenset({"_errors"}), only=frozenset({"yaml"})),
    "_shapes": Rule(only=frozenset({"torch"})),
    "functional": Rule(BASE, never=frozenset({"torch.nn", "torchmetrics", "timm"}) | LIGHTNING),
    "records": Rule(only=frozenset({"numpy", "pandas", "pyarrow"})),
    "report": Rule(frozenset({"_errors", "_files", "_yaml_text", "records"}), never=TORCH | LIGHTNING),
    "metrics": Rule(BASE | {"functional"}, never=frozenset({"timm"}) | LIGHTNING),
    "_entries": Rule(only=frozenset()),
    "registry": Rule(frozenset({"_entries", "_errors"}), only=frozenset()),
    "recognition": Rule(frozenset({"registry"}), only=frozenset({"torch"})),
    "changes": Rule(only=frozenset({"rich"})),
    "layers": Rule(BASE | {"changes", "functional"}, never=frozenset({"timm", "torchmetrics"}) | LIGHTNING),
    "convert": Rule(BASE | {"changes", "recognition", "registry"}, never=LIGHTNING),
    "fold": Rule(BASE | {"changes", "convert"}, never=LIGHTNING | {"timm"}),
    "testing": Rule(BASE | {"registry"}, never=frozenset({"timm"}) | LIGHTNING),
    "models": Rule(BASE | {"changes", "convert", "registry"}, never=LIGHTNING),
    "timm": Rule(BASE | {"convert", "registry"}, never=LIGHTNING),
    "statistics": Rule(BASE | {"changes", "convert", "recognition", "registry"}, never=LIGHTNING | {"timm"}),
    "callbacks": Rule(
        BASE | {"convert", "metrics", "functional", "records", "recognition", "registry"}, never=frozenset({"timm"})
    ),
    "task": Rule(BASE | {"models"}),
    "data": Rule(BASE | {"models"}),
    "cli": Rule(ANYTHING),
    "recipes": Rule(only=frozenset()),
    "": Rule(only=frozenset()),  # normzoo/__init__.py, lazy
}
FUNCTIONS = frozenset({"torch.nn.functional"})  # in torch.nn, but no nn.Module


def is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def running(node: ast.AST) -> Iterator[ast.AST]:
    """Every node that runs: all but the bodies of ``if TYPE_CHECKING:``."""
    yield node
    skipped = node.body if isinstance(node, ast.If) and is_type_checking(node.test) else []
    for child in ast.iter_child_nodes(node):
        if child not in skipped:
            yield from running(child)


def dotted(node: ast.expr) -> str:
    """``torch.nn.Module`` of such an expression; empty for what does not start with a name."""
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return base and f"{base}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def imported(
    source: str, module: str, is_package: bool, nodes: Callable[[ast.AST], Iterator[ast.AST]] = running
) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of all that a module imports or reaches as ``torch.nn.Something``."""
    package = module if is_package else module.rpartition(".")[0]
    for node in nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1])
                base = f"{parent}.{base}".rstrip(".")
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute) and (name := dotted(node)).startswith("torch.nn."):
            yield node.lineno, name


def part_of(name: str) -> str:
    """``normzoo.layers.batch`` is of the part ``layers``, ``normzoo`` itself of the part ``""``."""
    return [*name.split("."), ""][1]


def within(name: str, packages: frozenset[str]) -> bool:
    return any(name == p or name.startswith(f"{p}.") for p in packages)


def breaches(source: str, module: str, is_package: bool = False) -> list[str]:
    """The imports of a module that its part's rule does not allow, as ``module:line imports name``."""
    part = part_of(module)
    rule = RULES[part]
    found = []
    for line, name in imported(source, module, is_package):
        top = name.partition(".")[0]
        if top == "normzoo":
            to = part_of(name)
            allowed = to == part or rule.ours == ANYTHING or to in rule.ours
        elif top in ("callbacks", "recipes"):
            allowed = False  # a second copy of normzoo.callbacks
        elif top in sys.stdlib_module_names:
            allowed = True
        elif within(name, rule.never):
            allowed = within(name, FUNCTIONS)
        else:
            allowed = rule.only is None or within(name, rule.only)
        if not allowed:
            found.append(f"{module}:{line} imports {name}")
    return found


def modules() -> dict[str, Path]:
    """Every file, by the name it is imported under."""
    named = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            if not (package == "normzoo" and parts[0] in ("callbacks", "recipes")):
                named[".".join([package, *parts]).removesuffix(".__init__")] = path
    return named


def check(path: Path, module: str) -> list[str]:
    return breaches(path.read_text(encoding="utf-8"), module, is_package=path.name == "__init__.py")


def circle(files: Mapping[str, Path]) -> list[str]:
    """Modules of which each imports the next, and the last is the first; empty if imports form no circle."""
    graph: dict[str, set[str]] = {module: set() for module in files}
    for module, path in files.items():
        source = path.read_text(encoding="utf-8")
        for _, name in imported(source, module, path.name == "__init__.py", ast.walk):
            while name and name not in files:  # a class or function is imported from its module
                name = name.rpartition(".")[0]
            if name and name != module:
                graph[name].add(module)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


@pytest.mark.parametrize("part", RULES)
def test_imports_point_one_way(part):
    files = {name: path for name, path in modules().items() if part_of(name) == part}
    assert files or part == "convert", f"the rule for {part!r} covers no file"
    assert [b for name, path in files.items() for b in check(path, name)] == []


def test_all_files_are_covered():
    """Counted another way: through the links, as Python imports them."""
    walked = {
        os.path.realpath(os.path.join(folder, name))
        for folder, _, names in os.walk(ROOT / "normzoo", followlinks=True)
        for name in names
        if name.endswith(".py")
    }
    covered = {os.path.realpath(path) for path in modules().values()}
    assert covered == walked
    assert len(covered) == len(modules()) > 45
    assert {part_of(name) for name in modules()} <= set(RULES), "a new part needs a rule here and in the design"
    assert (ROOT / "normzoo" / "callbacks").samefile(ROOT / "callbacks")
    assert (ROOT / "normzoo" / "recipes").samefile(ROOT / "recipes")


@pytest.mark.parametrize(
    ("module", "source", "caught"),
    [
        (
            "normzoo.layers.fancy",
            "import torch\nfrom normzoo.registry import get_norm",
            "2 imports normzoo.reg",
        ),
        ("normzoo.layers.fancy", "from ..registry import get_norm", "1 imports normzoo.registry.get_norm"),
        ("normzoo.layers.fancy", "from .. import metrics", "1 imports normzoo.metrics"),
        ("normzoo.layers.fancy", "def f():\n    import timm.layers", "2 imports timm.layers"),
        ("normzoo.functional.fancy", "from torch import nn", "1 imports torch.nn"),
        ("normzoo.functional.fancy", "import torch\nclass F(torch.nn.Module): ...", "2 imports torch.nn.Module"),
        ("normzoo.functional.fancy", "from torch.nn import Module as M", "1 imports torch.nn.Module"),
        (
            "normzoo.metrics.fancy",
            "try:\n    from lightning.pytorch import Trainer\nexcept ImportError: ...",
            "2 imports l",
        ),
        ("normzoo.registry", "import torch", "1 imports torch"),
        ("normzoo.registry", "import torch.nn.functional as F", "1 imports torch.nn.functional"),
        ("normzoo.registry", "import normzoo.layers.batch as b", "1 imports normzoo.layers.batch"),
        ("normzoo.models", "from normzoo.layers.batch import BatchNorm", "1 imports normzoo.layers.batch.BatchNorm"),
        ("normzoo.models", "import pytorch_lightning as pl", "1 imports pytorch_lightning"),
        (
            "normzoo.callbacks.fancy",
            "from ..task import ImageClassification",
            "1 imports normzoo.task.Image",
        ),
        ("normzoo.callbacks.fancy", "from normzoo import create_model", "1 imports normzoo.create_model"),
        ("normzoo.callbacks.fancy", "import normzoo", "1 imports normzoo"),
        ("normzoo.task", "from normzoo import callbacks", "1 imports normzoo.callbacks"),
        ("normzoo.data.fancy", "from callbacks import Divergence", "1 imports callbacks.Divergence"),
        ("normzoo.task", "from .cli.main import main", "1 imports normzoo.cli.main.main"),
        ("normzoo.report.fancy", "if x:\n    import torch", "2 imports torch"),
        ("normzoo._errors", "import torch", "1 imports torch"),
        ("normzoo._yaml_text", "import numpy", "1 imports numpy"),
        ("normzoo.report.fancy", "from normzoo.cli.recipe import read", "1 imports normzoo.cli.recipe.read"),
        ("normzoo._shapes", "from normzoo._errors import unknown_name", "1 imports normzoo._errors.unknown_name"),
        ("normzoo.convert", "from normzoo.layers import BatchNorm", "1 imports normzoo.layers.BatchNorm"),
        (
            "normzoo.registry",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\nelse:\n    import timm",
            "5 imports timm",
        ),
    ],
)
def test_a_planted_breach_is_caught(module, source, caught, tmp_path):
    path = tmp_path / f"{module.rpartition('.')[2]}.py"
    path.write_text(source, encoding="utf-8")
    (found,) = check(path, module)
    assert found.startswith(f"{module}:{caught}")


def test_a_breach_planted_in_a_package_is_resolved_from_the_package(tmp_path):
    path = tmp_path / "__init__.py"
    path.write_text("from .batch import BatchNorm\nfrom ..cli import main", encoding="utf-8")
    assert check(path, "normzoo.layers") == ["normzoo.layers:2 imports normzoo.cli.main"]
    path.write_text("def f():\n    import torch", encoding="utf-8")
    assert check(path, "normzoo") == ["normzoo:2 imports torch"]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("normzoo.layers.fancy", "import math\nfrom torch import nn\nfrom normzoo.functional import batch_norm"),
        ("normzoo.layers.fancy", "from ._base import NormLayer\nfrom .._shapes import check_input"),
        ("normzoo.functional.fancy", "import torch.nn.functional as F\nimport torch\ntorch.nn.functional.relu"),
        (
            "normzoo.registry",
            "import typing\nif typing.TYPE_CHECKING:\n    import torch, normzoo.layers",
        ),
        ("normzoo.callbacks.fancy", "from lightning.pytorch import Callback\nfrom normzoo.metrics import LogHistogram"),
        ("normzoo.cli.fancy", "from normzoo import __version__, callbacks, task\nimport timm, torch, normzoo"),
    ],
)
def test_what_the_design_allows_passes(module, source):
    assert breaches(source, module) == []


def test_no_files_import_each_other_in_a_circle():
    assert circle(modules()) == []


LATE = "def f():\n    from normzoo.testing._a import x"
TYPES = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ._a import X"


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ({"_a": "from normzoo.testing import _b", "_b": "from normzoo.testing._a import x"}, ["_a", "_b", "_a"]),
        ({"_a": "from normzoo.testing._b import x", "_b": LATE}, ["_a", "_b", "_a"]),
        ({"_a": "import normzoo.testing._b", "_b": TYPES}, ["_a", "_b", "_a"]),
        ({"_a": "from . import _b", "_b": "from . import _c", "_c": "from . import _a"}, ["_a", "_b", "_c", "_a"]),
        ({"__init__": "from ._a import x", "_a": "from normzoo.testing import y"}, ["", "_a", ""]),
        ({"__init__": "from ._a import x", "_a": "from . import _b\nimport torch", "_b": "import normzoo"}, []),
    ],
)
def test_a_planted_circle_is_caught(sources, expected, tmp_path):
    files = {}
    for name, source in sources.items():
        path = tmp_path / f"{name}.py"
        path.write_text(source, encoding="utf-8")
        files[f"normzoo.testing.{name}".removesuffix(".__init__")] = path
    expected = [f"normzoo.testing.{name}".rstrip(".") for name in expected]
    found = circle(files)
    assert len(found) == len(expected)
    assert set(itertools.pairwise(found)) == set(itertools.pairwise(expected))
