"""The wheel holds both top-level folders, the recipes, the images and the entry points."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DEADLINE = 180  # seconds
CHECK = """
import sys, pathlib
import normzoo, normzoo.callbacks
from normzoo.cli.recipe import shipped
from normzoo.data.fashion_mnist import read_embedded
home = pathlib.Path(sys.argv[1])
for module in (normzoo, normzoo.callbacks):
    assert home in pathlib.Path(module.__file__).parents, module.__file__
assert len(shipped()) >= 9
assert len(read_embedded("test")[1]) == 1000
assert (home / "normzoo" / "py.typed").exists()
assert (home / "normzoo" / "report" / "page.html").exists()
from importlib.metadata import entry_points
for package in ("lightning.pytorch", "pytorch_lightning", "lightning.fabric", "lightning_fabric"):
    [point] = entry_points(group=f"{package}.callbacks_factory", name="normzoo")
    assert pathlib.Path(point.dist.locate_file("")).samefile(home), point
    assert point.load()() == []
from normzoo.cli.main import main
sys.exit(main(["list", "recipes"]))
"""


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.slow
def test_the_wheel_works_in_a_clean_folder(tmp_path: Path) -> None:
    source = tmp_path / "source"
    kept = shutil.ignore_patterns(
        ".git", ".venv", "runs", "build", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis"
    )
    shutil.copytree(ROOT, source, symlinks=True, ignore=kept)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    run(*pip, "wheel", ".", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path / "dist"), cwd=source)
    [wheel] = (tmp_path / "dist").glob("normzoo-*.whl")
    assert wheel.stat().st_size < 4.5e6  # 3.1 MB of them are images
    home = tmp_path / "home"
    run(*pip, "install", "--no-deps", "--no-index", "--target", str(home), str(wheel), cwd=tmp_path)
    assert not (home / "callbacks").exists()
    done = run(sys.executable, "-c", f"import sys; sys.path.insert(0, {str(home)!r})\n{CHECK}", str(home), cwd=tmp_path)
    assert "quickstart" in done.stdout


def test_callbacks_have_one_name_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    with pytest.raises(ImportError, match=r"import normzoo\.callbacks, not callbacks"):
        __import__("callbacks")
