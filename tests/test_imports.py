"""Imports point one way: between the parts by the table of docs/architecture.md, and between any two files of ours.

Both are read off the syntax tree of every file. The table of the parts is about what runs, so that imports under
``TYPE_CHECKING`` are free; a string that names a module counts as an import of it. A circle of files is one for their
reader, so that for it every import counts, wherever it stands: at the top, in a function, under ``TYPE_CHECKING``, in a
string. A package's ``__init__`` counts where a name is imported from it, not because Python runs it before the
package's modules.
"""

from __future__ import annotations

import ast
import functools
import graphlib
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"normzoo": ROOT / "normzoo", "normzoo.callbacks": ROOT / "callbacks", "normzoo.recipes": ROOT / "recipes"}
PAGE = ROOT / "docs" / "architecture.md"
HEADER = "| part | imports | names in strings | never |"
IMPORTERS = frozenset({"import_module", "__import__", "resolve_name"})
COMPUTED = "any"  # module whose name is computed
parse = functools.cache(ast.parse)


@dataclass(frozen=True)
class Rule:
    """A row of the table: dotted names, of ours with ``normzoo.`` before them; None allows everything."""

    imports: frozenset[str] | None
    names: frozenset[str] | None
    never: frozenset[str]

    def allows(self, name: str, in_string: bool = False) -> bool:
        """Whether a module may be imported, or named in a string: the longest name of the row that covers it says."""
        if self.imports is None or (in_string and self.names is None):
            return True
        granted = self.imports | (self.names or frozenset() if in_string else frozenset())
        covering = [n for n in granted | self.never if within(name, n)]
        return bool(covering) and max(covering, key=len) in granted


class Found(NamedTuple):
    """What a line of a file imports, or names in a string; a computed name is ``any``."""

    line: int
    name: str
    in_string: bool = False


def rules(text: str) -> dict[str, Rule]:
    """The table, by part; the part ``""`` is ``normzoo`` itself."""
    lines = text.split(HEADER)[1].splitlines()[2:]
    found: dict[str, Rule] = {}
    for line in itertools.takewhile(lambda line: line.startswith("|"), lines):
        parts, imports, names, never = (cell.strip() for cell in line.strip("|").split(" | "))
        rule = Rule(entries(imports), entries(names), entries(never) or frozenset())
        for part in re.findall(r"`([\w.]+)/?`", parts):
            assert part not in found, f"{part} has two rows"
            found["" if part == "normzoo" else part] = rule
    return found


def entries(cell: str) -> frozenset[str] | None:
    """The names in a cell, of which those of ours are in backticks; None for "everything"."""
    if cell == "everything":
        return None
    names = [item.strip() for item in cell.split(",") if item.strip() not in ("", "nothing")]
    assert all(re.fullmatch(r"`[\w.]+/?`|[\w.]+", name) for name in names), f"no list of names: {cell}"
    return frozenset(f"normzoo.{n.strip('`/')}" if n.startswith("`") else n for n in names)


RULES = rules(PAGE.read_text(encoding="utf-8"))
PACKAGES = {n.split(".")[0] for r in RULES.values() for s in (r.imports, r.names, r.never) for n in s or ()}


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
    for node in nodes(parse(source)):
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


def strings(
    source: str, module: str, is_package: bool, nodes: Callable[[ast.AST], Iterator[ast.AST]] = running
) -> Iterator[Found]:
    """The modules that a file names in strings, and those that it imports by a string.

    A string names a module by its whole dotted name, with or without a class behind it; in a file that imports
    ``f"normzoo.{...}"``, by the part of the name behind ``normzoo.``, too.
    """
    tree = parse(source)
    documented = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    seen = list(nodes(tree))
    literal: set[int] = set()
    prefixes = {""}
    for node in seen:
        if not (isinstance(node, ast.Call) and dotted(node.func).rpartition(".")[2] in IMPORTERS and node.args):
            continue
        first = node.args[0]
        if isinstance(first, ast.Constant):
            literal.add(id(first))
            package = module if is_package else module.rpartition(".")[0]
            yield Found(node.lineno, resolved(str(first.value), package))
            continue
        start = first.values[0] if isinstance(first, ast.JoinedStr) else None
        prefix = str(start.value) if isinstance(start, ast.Constant) else ""
        prefixes.add(prefix)
        literal.add(id(start))
        whole = prefix.rpartition(".")[0]
        yield Found(node.lineno, whole if part_of(whole) else COMPUTED, in_string=True)
    for node in seen:
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str) or id(node) in documented | literal:
            continue
        if not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*([:.]\w*)?", node.value):
            continue
        for prefix in prefixes:
            name = (prefix + node.value).replace(":", ".").rstrip(".")
            top = name.split(".")[0]
            ours = top == "normzoo" and part_of(name) in RULES and part_of(name) != ""
            if ours or (not prefix and "." in name and top in PACKAGES - {"normzoo"}):
                yield Found(node.lineno, name, in_string=True)


def resolved(name: str, package: str) -> str:
    """The absolute name of what ``import_module(name, package)`` imports."""
    up = len(name) - len(name.lstrip("."))
    parts = package.split(".")
    return ".".join([*parts[: len(parts) - up + 1], name.lstrip(".")]) if up else name


def part_of(name: str) -> str:
    """``normzoo.layers.batch`` is of the part ``layers``, ``normzoo`` of ``""``; a folder that has a row is a part."""
    folder = ".".join(name.split(".")[1:3])
    return folder if folder in RULES else [*name.split("."), ""][1]


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@functools.cache
def found_in(source: str, module: str, is_package: bool = False) -> list[Found]:
    """What a file imports or names of other parts and of packages that are not Python's own."""
    part = part_of(module)
    everything = [Found(*pair) for pair in imported(source, module, is_package)]
    everything += strings(source, module, is_package)
    return [f for f in everything if not is_own(f.name, part) and f.name.split(".")[0] not in sys.stdlib_module_names]


def is_own(name: str, part: str) -> bool:
    return name.split(".")[0] == "normzoo" and part_of(name) == part and (part != "" or name == "normzoo")


def breaches(source: str, module: str, is_package: bool = False) -> list[str]:
    """The imports of a module that its part's row does not allow, as ``module:line imports name``."""
    rule = RULES[part_of(module)]
    return [
        f"{module}:{f.line} {'names' if f.in_string else 'imports'} {f.name}"
        for f in found_in(source, module, is_package)
        if not rule.allows(f.name, f.in_string)
    ]


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
        is_package = path.name == "__init__.py"
        named = [f.name for f in strings(source, module, is_package, ast.walk) if not within(module, f.name)]
        for name in itertools.chain(named, (n for _, n in imported(source, module, is_package, ast.walk))):
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
    assert files, f"the row of {part!r} covers no file"
    assert [b for name, path in files.items() for b in check(path, name)] == []


def untrue(part: str, rule: Rule) -> list[str]:
    """What a row allows and the part does not use, and what it says is never imported and yet allows."""
    found = [
        f
        for name, path in modules().items()
        if part_of(name) == part
        for f in found_in(path.read_text(encoding="utf-8"), name, path.name == "__init__.py")
    ]
    imports = [a for a in rule.imports or () if not any(within(f.name, a) and not f.in_string for f in found)]
    names = [a for a in rule.names or () if not any(within(f.name, a) and f.in_string for f in found)]
    never = [a for a in rule.never if rule.allows(a) or rule.allows(a, in_string=True)]
    return [*imports, *names, *never]


@pytest.mark.parametrize("part", RULES)
def test_rows_say_nothing_that_is_not_so(part):
    assert untrue(part, RULES[part]) == []


def test_an_untrue_row_is_caught():
    row = "| `layers/` | `_shapes`, `functional`, `models`, scipy, torch | timm | `registry`, `models`, torch.nn |"
    table = f"{HEADER}\n|---|---|---|---|\n{row}\n"
    rule = rules(table)["layers"]
    assert sorted(untrue("layers", rule)) == ["normzoo.models", "normzoo.models", "scipy", "timm"]
    assert breaches("from torch import nn\nimport torch", "normzoo.layers.fancy") == []
    assert not rule.allows("torch.nn.Module")
    assert rule.allows("torch.Tensor")
    assert not rule.allows("torchmetrics.Metric")
    with pytest.raises(AssertionError, match="layers has two rows"):
        rules(f"{table}{row}\n")
    with pytest.raises(AssertionError, match="no list of names: .*torch without nn"):
        rules(table.replace("scipy, torch", "torch without nn"))


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
    assert {part_of(name) for name in modules()} == set(RULES), "a new part needs a row in docs/architecture.md"
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
        ("normzoo.testing._fancy", "import lightning.pytorch as pl", "1 imports lightning.pytorch"),
        ("normzoo.testing.measurements._fancy", "from normzoo.models import create_model", "1 imports normzoo.models"),
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
        ("normzoo.callbacks.fancy", "from normzoo.metrics import LogHistogram", "1 imports normzoo.metrics.LogHist"),
        (
            "normzoo.callbacks.fancy",
            "from normzoo.report.page import write_page",
            "1 imports normzoo.report.page.write",
        ),
        ("normzoo.convert.fancy", "import timm", "1 imports timm"),
        ("normzoo.timm", "import lightning", "1 imports lightning"),
        ("normzoo.data.fancy", "import pandas", "1 imports pandas"),
        # Strings
        ("normzoo.layers.fancy", "KNOWN = ('normzoo.registry',)", "1 names normzoo.registry"),
        (
            "normzoo.layers.fancy",
            "def f(x, name='normzoo.registry:get_norm'): ...",
            "1 names normzoo.registry.get_norm",
        ),
        ("normzoo.records.fancy", "X = {'a': 'normzoo.callbacks.GradientTails'}", "1 names normzoo.callbacks.Gradient"),
        ("normzoo.statistics.fancy", "is_a(m, 'timm.layers.norm.LayerNorm2d')", "1 names timm.layers.norm.LayerNorm2d"),
        ("normzoo.records.fancy", "import importlib\nimportlib.import_module('torch')", "2 imports torch"),
        ("normzoo.report.fancy", "from importlib import import_module as i\ni('normzoo.task')", "2 names normzoo.task"),
        ("normzoo.layers.fancy", "__import__('normzoo.registry')", "1 imports normzoo.registry"),
        ("normzoo.layers.fancy", "importlib.import_module('..registry', __package__)", "1 imports normzoo.registry"),
        ("normzoo.models", "def f(name):\n    return importlib.import_module(name)", "2 names any"),
        ("normzoo.models", "importlib.import_module(f'{package}.task')", "1 names any"),
        ("normzoo.models", "importlib.import_module(f'normzoo.{name}')", "1 names any"),
        ("normzoo.models", "importlib.import_module(f'normzoo.cli.{name}')", "1 names normzoo.cli"),
        ("normzoo.registry", "_FROM = {'x': 'torch.nn'}", "1 names torch.nn"),
    ],
)
def test_a_planted_breach_is_caught(module, source, caught, tmp_path):
    path = tmp_path / f"{module.rpartition('.')[2]}.py"
    path.write_text(source, encoding="utf-8")
    (found,) = check(path, module)
    assert found.startswith(f"{module}:{caught}")


def test_a_planted_table_of_modules_is_caught():
    source = "_FROM = {'f': 'task', 'g': 'convert', 'h': 'nothing'}\nimportlib.import_module(f'normzoo.{_FROM[name]}')"
    assert breaches(source, "normzoo.models") == ["normzoo.models:2 names any", "normzoo.models:1 names normzoo.task"]


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
        ("normzoo.callbacks.fancy", "from lightning.pytorch import Callback\nfrom normzoo.functional import buckets"),
        (
            "normzoo.layers.fancy",
            '"""``normzoo.registry``"""\ndef f():\n    \'normzoo.registry\'\n    raise E(\'normzoo.x, no\')',
        ),
        ("normzoo.recognition", "KNOWN = {'timm.layers.norm.LayerNorm': 1, 'normzoo.layers._base.NormLayer': 2}"),
        ("normzoo.registry", "importlib.import_module(module)"),
        (
            "normzoo.testing.measurements._fancy",
            "import lightning.pytorch as pl\nfrom normzoo.testing._compare import BrokenError",
        ),
        ("normzoo.cli.fancy", "from normzoo import __version__, callbacks, task\nimport timm, torch, normzoo"),
    ],
)
def test_what_the_design_allows_passes(module, source):
    assert breaches(source, module) == []


def test_the_suite_for_measurements_is_imported_when_it_is_used():
    for name, path in modules().items():
        if part_of(name) == "testing":
            tree = parse(path.read_text(encoding="utf-8"))
            functions = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
            late = {node.lineno for f in functions for node in ast.walk(f) if hasattr(node, "lineno")}
            found = found_in(path.read_text(encoding="utf-8"), name, path.name == "__init__.py")
            assert [f for f in found if within(f.name, "normzoo.testing.measurements") and f.line not in late] == []


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
        ({"_a": "from . import _b", "_b": "X = 'normzoo.testing._a.X'"}, ["_a", "_b", "_a"]),
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
