"""The callbacks' figures are those of the golden files: bit for bit on the machine that wrote them, close elsewhere.

The fits are in ``golden_fits.py`` and ``golden_ranks.py``; a change that is meant to change figures writes the files
again, by ``python tests/golden_fits.py --write``, and says in its commit which figures changed and why.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import golden_files
import golden_ranks
import numpy as np
import pytest
from golden_files import Golden, Recording, Series, differences, floats, ints, texts
from golden_fits import FITS, GOLDEN, Fit, record

GROUPS = sorted({fit.group for fit in FITS} | {"ranks"})


@functools.cache
def golden(group: str) -> tuple[bool, Golden]:
    """Whether this is the machine that wrote the group's file, and what is in the file."""
    machine, recordings = golden_files.read(GOLDEN / f"{group}.npz")
    return machine == golden_files.machine(), recordings


def compare(name: str, now: Recording, rtol: float | None = None) -> None:
    exact, recordings = golden(name.split("/")[0])
    found = list(differences(recordings[name], now, exact, rtol or golden_files.RTOL, golden_files.RENAMED))
    how = "bit for bit" if exact else "within the tolerances of another machine"
    assert not found, f"{len(found)} series of {name} differ, compared {how}:\n" + "\n".join(found[:20])


@pytest.mark.parametrize("fit", [pytest.param(f, id=f.name, marks=[pytest.mark.slow] if f.slow else []) for f in FITS])
def test_a_fit_leaves_what_it_left_before(tmp_path: Path, fit: Fit) -> None:
    compare(fit.name, record(fit, tmp_path / "fit"), fit.rtol)


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> Golden:
    return golden_ranks.record_ranks(tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", golden_ranks.FITS)
def test_a_fit_on_two_ranks_leaves_what_it_left_before(of_ranks: Golden, name: str) -> None:
    compare(name, of_ranks[name])


def test_the_files_hold_every_fit_and_no_other() -> None:
    for group in GROUPS:
        fits = [f.name for f in FITS if f.group == group] or list(golden_ranks.FITS)
        assert list(golden(group)[1]) == fits
    assert sorted(path.stem for path in GOLDEN.iterdir()) == GROUPS
    assert len({f.name for f in FITS}) == len(FITS)


@pytest.mark.parametrize("quantity", ["gradient_tails", "relative_loss", "divergence", "channel_moments"])
@pytest.mark.parametrize("group", ["together", "watch", "ranks"])
def test_each_measurement_has_rows_in_each_kind_of_run(group: str, quantity: str) -> None:
    recordings = golden(group)[1].values()
    steps = [s for r in recordings for path, s in r.items() if path.endswith(f"/{quantity}/step")]
    assert sum(len(s.values) for s in steps) > 0


# What is compared: each breach in a recording has to be seen


@pytest.fixture
def before() -> Recording:
    return dict(golden("gradient_tails")[1]["gradient_tails/sources"])


def changed(recording: Recording, path: str, change: object) -> Recording:
    values = recording[path].values.copy()
    values[-1] = change(values[-1])  # type: ignore[operator]
    return {**recording, path: replace(recording[path], values=values)}


COLUMN = "record/normzoo_logs/version_0/gradient_tails/"


@pytest.mark.parametrize(
    ("path", "change"),
    [
        (COLUMN + "l2", lambda v: np.nextafter(v, np.inf)),  # one ulp
        (COLUMN + "l2", lambda v: np.nan),
        (COLUMN + "zeros", lambda v: v + 1),
        (COLUMN + "layer", lambda v: v.replace("net", "nets")),
        (COLUMN + "histogram/checksum", lambda v: v ^ 1),
        ("log/gradient/max/net.6.bias/value", lambda v: np.nextafter(v, np.inf)),
        ("log/gradient/max/net.6.bias/step", lambda v: v + 1),
        ("histogram/noise/histogram/net.0.weight/checksum", lambda v: v ^ 1),
    ],
)
def test_a_changed_value_is_seen(before: Recording, path: str, change: object) -> None:
    assert [*differences(before, before, exact=True)] == []
    (line,) = differences(before, changed(before, path, change), exact=True)
    assert line.startswith(f"{path}[{len(before[path].values) - 1}]: ")
    assert line.endswith(f"; 1 of {len(before[path].values)} differ")


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("path", [COLUMN + "kurtosis", "log/update/alpha/net.0.weight/value", COLUMN + "of"])
def test_what_is_missing_is_seen(before: Recording, path: str, exact: bool) -> None:
    without = {p: s for p, s in before.items() if p != path}
    assert [*differences(before, without, exact)] == [f"{path}: missing"]
    series = before[path]
    (line,) = differences(before, {**before, path: replace(series, values=series.values[1:])}, exact)
    assert line == f"{path}: {len(series.values)} values before, {len(series.values) - 1} now"
    (line,) = differences(before, {**before, path: ints([0] * len(series.values))}, exact)
    assert line == f"{path}: {series.kind} before, int now"
    assert [*differences(without, before, exact)] == []  # more than before is no difference


@pytest.mark.parametrize(
    ("path", "change", "seen"),
    [
        (COLUMN + "l2", lambda v: v * (1 + 3e-3), True),
        (COLUMN + "l2", lambda v: v * (1 + 3e-6), False),
        (COLUMN + "l2", lambda v: np.inf, True),
        (COLUMN + "q50", lambda v: v * 1.1, False),  # a bucket further
        (COLUMN + "q50", lambda v: v * 1.3, True),
        (COLUMN + "alpha", lambda v: v * 3, True),
        (COLUMN + "histogram/checksum", lambda v: v ^ 1, False),
        (COLUMN + "histogram/total", lambda v: v + 1, True),
        (COLUMN + "zeros", lambda v: v + 1, False),
        (COLUMN + "zeros", lambda v: v + 3, True),
        (COLUMN + "layer", lambda v: v.replace("net", "nets"), True),
    ],
)
def test_on_another_machine_a_change_beyond_rounding_is_seen(
    before: Recording, path: str, change: object, seen: bool
) -> None:
    assert len([*differences(before, changed(before, path, change), exact=False)]) == seen


def test_what_was_renamed_is_compared_under_its_new_name() -> None:
    old = {"record/log/gradient_tails/q999": floats([1.0]), "log/gradient/max/a/value": floats([2.0])}
    new = {"record/log/gradient_tails/high": floats([1.0]), "log/gradient_tails/max/a/value": floats([2.0])}
    names = {"gradient_tails/q999": "gradient_tails/high", "gradient": "gradient_tails"}
    assert [*differences(old, new, True, names=names)] == []
    assert len([*differences(old, new, True, names={})]) == 2
    new["log/gradient_tails/max/a/value"] = floats([3.0])
    assert len([*differences(old, new, True, names=names)]) == 1
    assert set(golden_files.renamed("log/gradients/max", names).split("/")) == {"log", "gradients", "max"}


def test_a_file_holds_what_was_written(tmp_path: Path) -> None:
    values = [0.1, -0.0, np.nan, np.inf, 5e-324, 0.1]
    fits: Golden = {
        "a/one": {"x": floats(values), "y": ints([3, -(2**62)]), "z": texts([None, "ä", 'a"b'])},
        "a/none": {},
        "a/two": {"x": floats([]), "y": Series("checksum", np.array([2**32 - 1]))},
    }
    golden_files.write(tmp_path / "a.npz", fits)
    machine, found = golden_files.read(tmp_path / "a.npz")
    assert machine == golden_files.machine()
    assert list(found) == list(fits)
    for name, recording in fits.items():
        assert [*differences(recording, found[name], exact=True)] == []
        assert [*differences(found[name], recording, exact=True)] == []
