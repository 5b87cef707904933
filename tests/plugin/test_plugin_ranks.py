"""The variable on two ranks: what differs between them is said and hangs nothing, and they leave out alike."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from ranks import exit_codes, run_function

from normzoo.records.reading import read_records

SCENARIOS: dict[str, tuple[str | None, str | None]] = {
    "other measurements": ("gradient_tails", "divergence"),
    "files differ": ("rank0.yaml", "rank1.yaml"),
    "check, rank 1": ("{own}:fails_in=check:rank=1,gradient_norm",) * 2,
    "check of layers made late, rank 1": ("{own}:fails_in=check:rank=1,gradient_norm",) * 2,
    "no folder": ("{own},gradient_norm",) * 2,
    "full disk": ("{own},divergence",) * 2,
    "unwritable": ("{own},divergence",) * 2,
    "measure, both": ("{own}:fails_in=measure,gradient_norm",) * 2,
    "same": ("{own},divergence,gradient_norm:every_n_steps=2", " {own}, divergence , gradient_norm: every_n_steps = 2"),
}
ALONE: dict[str, tuple[str | None, str | None]] = {
    "only rank 0": ("gradient_tails,divergence", None),
    "only rank 1": (None, "gradient_tails"),
}
STEPS = 3


def many_fits(folder: str, *names: str) -> None:
    """On each rank a fit for each scenario of these names, and what came of it in a file."""
    import warnings

    import pytest
    from callbacks_small import SmallNet, loader, trainer
    from plugin_small import added, install

    from normzoo.records.segments import Segment

    def fails(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    rank = int(os.environ["RANK"])
    Path("rank0.yaml").write_text("[gradient_norm]")
    Path("no folder").mkdir(exist_ok=True)
    Path("no folder", "normzoo_logs").write_text("")  # where the folder of records would be made, by rank 0
    Path("rank1.yaml").write_text("[{name: gradient_norm, every_n_steps: 3}]")

    class Late(SmallNet):
        def configure_model(self) -> None:
            pass

    found = {}
    for name in names:
        value = {**SCENARIOS, **ALONE}[name][rank]
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            install(patch, value and value.format(own="test_plugin_ranks_own.OnARank"))
            if name in ("full disk", "unwritable"):
                patch.setattr(Segment, "append" if name == "full disk" else "__init__", fails)
            logger: dict[str, Any] = {"logger": False} if name == "no folder" else {}
            made = trainer(name, strategy="ddp", devices=2, max_steps=STEPS, **logger)
            made.fit(Late() if "late" in name else SmallNet(), loader(320))
        said = [str(w.message) for w in caught if str(w.message).startswith("NORMZOO")]
        found[name] = {
            "said": said,
            "measured": [m.name for m in added(made)],
            "batches": made.fit_loop.epoch_loop.batch_progress.total.completed,
            "counts": [m.count for m in added(made) if hasattr(m, "count")],
        }
    Path(folder, f"rank{rank}.json").write_text(json.dumps(found))


OWN = '''
import os
import torch
from normzoo.callbacks import Column, Measurement

class OnARank(Measurement):
    """Fails in one of its methods, on one rank or on both."""

    name = "counting"
    columns = (Column("count", "int", "steps so far"),)

    def __init__(self, every_n_steps: int = 1, *, fails_in: str = "", rank: int = -1) -> None:
        super().__init__(every_n_steps)
        self.count, self.fails_in, self.rank = 0, fails_in, rank

    def _event(self, name: str) -> None:
        if name == self.fails_in and self.rank in (-1, int(os.environ["RANK"])):
            raise ValueError(f"refused in {name}")

    def check(self, run):
        self._event("check")

    def measure(self, step):
        self._event("measure")
        self.count += 1
        return {"count": torch.tensor(self.count)}

    def rows(self, sample, values):
        return [{"count": values["count"].item()}]
'''


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of the fits, and what came of them on each rank."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "test_plugin_ranks_own.py").write_text(OWN)
    run_function(folder, many_fits, 2, str(folder), *SCENARIOS)
    return folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", ALONE)
def test_a_rank_without_the_variable_is_found(name: str, tmp_path: Path) -> None:
    """By the other one, at setup: it has no callback that could take part in anything."""
    run_function(tmp_path, many_fits, 2, str(tmp_path), name)
    listed = {
        "only rank 0": '["gradient_tails", "divergence"] on rank 0, none on rank 1',
        "only rank 1": 'none on rank 0, ["gradient_tails"] on rank 1',
    }[name]
    for rank, value in enumerate(ALONE[name]):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())[name]
        assert (found["measured"], found["batches"]) == ([], STEPS)
        sentence = (
            f"NORMZOO differs between ranks, so nothing is measured: {listed}; set it alike on all of them, where"
        )
        assert [text.startswith(sentence) for text in found["said"]] == [True] * (value is not None)
    assert [*tmp_path.rglob("*.arrows")] == []


def test_the_same_on_all_ranks_is_measured(ranks: Any) -> None:
    folder, of_ranks = ranks
    names = ["counting", "divergence", "gradient_norm"]
    for found in of_ranks:
        assert found["same"] == {"said": [], "measured": names, "batches": STEPS, "counts": [STEPS]}
    counts = read_records(folder / "same" / "log")["counting"]["count"]
    assert counts.tolist() == [2, 4, 6]  # the sum over ranks


@pytest.mark.parametrize(
    ("name", "differences"),
    [
        ("other measurements", '["gradient_tails"] on rank 0, ["divergence"] on rank 1'),
        (
            "files differ",
            '["gradient_norm"] on rank 0, [{"name": "gradient_norm", "every_n_steps": 3}] on rank 1',
        ),
    ],
)
def test_ranks_that_differ_say_so_and_train_on(ranks: Any, name: str, differences: str) -> None:
    folder, of_ranks = ranks
    sentence = f"NORMZOO differs between ranks, so nothing is measured: {differences}; set it alike on all of them"
    for found in of_ranks:
        assert (found[name]["measured"], found[name]["batches"]) == ([], STEPS)
        assert [text.startswith(sentence) for text in found[name]["said"]] == [True]
    assert [*(folder / name).rglob("*.arrows")] == []


@pytest.mark.parametrize("name", [name for name in SCENARIOS if "check" in name or "both" in name])
def test_what_one_rank_refuses_all_leave_out(ranks: Any, name: str) -> None:
    folder, of_ranks = ranks
    where = "measure" if "measure" in name else "check"
    for rank, found in enumerate(of_ranks):
        assert found[name]["said"] == [f"NORMZOO: training goes on without OnARank: refused in {where}"] * (rank == 0)
        assert (found[name]["measured"], found[name]["batches"]) == (["gradient_norm"], STEPS)
    assert len(read_records(folder / name / "log")["gradient_norm"]["step"].unique()) == STEPS


def test_a_folder_that_rank_zero_cannot_make_keeps_no_rank_waiting(ranks: Any) -> None:
    for rank, found in enumerate(ranks[1]):
        assert (found["no folder"]["measured"], found["no folder"]["batches"]) == ([], STEPS)
        said = found["no folder"]["said"]
        assert len(said) == 2 * (rank == 0)
        assert all("training goes on without" in text and "FileExistsError" in text for text in said)


@pytest.mark.parametrize(
    ("name", "measurements"), [("full disk", ["OnARank"]), ("unwritable", ["OnARank", "Divergence"])]
)
def test_where_rank_zero_cannot_write_records_end_and_nothing_else(
    ranks: Any, name: str, measurements: list[str]
) -> None:
    why = "is not recorded from here on: OSError: [Errno 28] No space left on device"
    for rank, found in enumerate(ranks[1]):
        assert found[name]["said"] == [f"NORMZOO: {m} {why}" for m in measurements if rank == 0]
        assert found[name] | {"said": []} == found["same"] | {"measured": ["counting", "divergence"]}


def fails_alone(folder: str) -> None:
    """A fit in which rank 1 alone fails while it is measured."""
    import pytest
    from callbacks_small import SmallNet, loader, trainer
    from plugin_small import install

    import normzoo.callbacks._run.rerun as rerun

    rerun.PATIENCE = 0.2
    with pytest.MonkeyPatch.context() as patch:
        install(patch, "test_plugin_ranks_own.OnARank:fails_in=measure:rank=1")
        made = trainer(folder, strategy="ddp", devices=2, max_steps=6)
        try:
            made.fit(SmallNet(), loader(320))
        except ValueError as error:
            Path(folder, "error.txt").write_text(str(error))
            raise


def test_an_error_of_one_rank_alone_ends_the_run_rather_than_hang(tmp_path: Path) -> None:
    (tmp_path / "test_plugin_ranks_own.py").write_text(OWN)
    codes = exit_codes(tmp_path, fails_alone, 2, str(tmp_path), deadline=60)
    assert 0 not in codes
    assert (tmp_path / "error.txt").read_text() == "refused in measure"
