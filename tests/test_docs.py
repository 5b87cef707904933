"""The Python examples of README and docs run as they stand."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest

from normzoo import registry

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


# The example of conformance.md runs all checks on a layer, for which tests/testing has tests of their own
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(p, id=p.name, marks=[pytest.mark.slow] if p.name in ("conformance.md", "conversion.md") else [])
        for p in PAGES
        if blocks(p)
    ],
)
def test_the_examples_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_NORMS", dict(registry._NORMS))
    monkeypatch.setattr(registry, "_ALIASES", dict(registry._ALIASES))
    monkeypatch.setattr(registry, "_BY_TARGET", dict(registry._BY_TARGET))
    module = types.ModuleType("example")  # found by its name when a class of it is pickled
    monkeypatch.setitem(sys.modules, "example", module)
    exec("import normzoo", vars(module))
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), vars(module))


def test_pages_with_examples_are_found() -> None:
    assert {p.name for p in PAGES if blocks(p)} >= {"README.md", "layers.md", "conversion.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_files_that_the_architecture_names_are_there() -> None:
    """By their path in the project or in ``normzoo/``."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = {p for p in re.findall(r"`([\w./]+)`", text) if re.fullmatch(r"[\w./]+/|[\w./]+/[\w.]+\.(py|md)", p)}
    assert len(named) > 60
    assert {p for p in named if not (ROOT / p).exists() and not (ROOT / "normzoo" / p).exists()} == set()
