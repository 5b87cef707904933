"""What every experiment promises: rows that depend on (seed, part) alone, and figures that can be drawn of them."""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pandas.testing
import pytest
from experiments_small import Draws, Forgetful

from normzoo.cli._experiment import Planned, plan, rows_of
from normzoo.experiments import Column, Experiment, Figure
from normzoo.names import SHORT_NAMES
from normzoo.records.reading import load_run
from normzoo.records.segments import Segment
from normzoo.report.figures import draw_records

# Of each short name the sections of a recipe with few small parts
FEW_IMAGES = {"class_path": "experiments_small.FewImages"}
CASES: dict[str, dict[str, Any]] = {
    "noise_bound": {
        "experiment": {"name": "noise_bound", "samples": 8, "batch_sizes": [2, 8], "draws": 20},
        "data": FEW_IMAGES,
        "model": {"class_path": "experiments_small.SmallTask", "init_args": {"norm": False}},
    },
    "random_matrices": {
        "experiment": {"name": "random_matrices", "factors": [1, 3], "size": 8, "smaller": [4], "products": 2},
    },
    "running_averages": {
        "experiment": {"name": "running_averages", "steps": 3, "batch_sizes": [1, 32], "draws": 2},
        "data": FEW_IMAGES,
        "model": {"class_path": "experiments_small.SmallTask"},
    },
}
OWN = {"draws": {"experiment": {"class_path": "experiments_small.Draws", "init_args": {"sizes": [1, 2, 3]}}}}


def planned(config: Mapping[str, Any]) -> Planned:
    return plan(copy.deepcopy({"seed": 3, **config}), "case")


def made(config: Mapping[str, Any], numbers: list[int]) -> dict[int, list[dict[str, Any]]]:
    """Some parts, in an order, by an experiment of their own."""
    of = planned(config)
    of.experiment.prepare()
    return {number: rows_of(of, number) for number in numbers}


def check_parts_stand_alone(config: Mapping[str, Any]) -> None:
    count = len(planned(config).parts)
    assert 2 <= count <= 6, "a case has few parts"
    forwards = made(config, [*range(count)])
    backwards = made(config, [*range(count)][::-1])
    for number in range(count):
        pandas.testing.assert_frame_equal(
            pd.DataFrame(forwards[number]), pd.DataFrame(backwards[number]), check_exact=True, obj=f"part {number}"
        )


def test_every_short_name_has_a_case() -> None:
    assert CASES.keys() == SHORT_NAMES["experiment"].keys()


def test_short_names_are_the_names_of_the_records() -> None:
    for name, path in SHORT_NAMES["experiment"].items():
        module, _, cls = path.rpartition(".")
        assert getattr(importlib.import_module(module), cls).name == name
        assert path == f"normzoo.experiments.{cls}"


@pytest.mark.parametrize("name", [*CASES, *OWN])
def test_a_part_does_not_depend_on_those_made_before(name: str) -> None:
    check_parts_stand_alone({**CASES, **OWN}[name])


@pytest.mark.parametrize("name", [*CASES, *OWN])
def test_the_figures_of_the_record_are_drawn(name: str, tmp_path: Path) -> None:
    config = {**CASES, **OWN}[name]
    parts = made(config, [*range(len(planned(config).parts))])
    schema = planned(config).experiment.schema
    segment = Segment(tmp_path, schema, 0)
    for rows in parts.values():
        segment.append(rows)
    [record] = load_run(tmp_path).values()
    assert record["step"].tolist() == [number for number, rows in parts.items() for _ in rows]
    assert set(draw_records({"": {schema.name: record}})) == {figure.title for figure in schema.figures}


@pytest.mark.parametrize("name", [*CASES, *OWN])
def test_parts_are_plain_data(name: str) -> None:
    parts = planned({**CASES, **OWN}[name]).parts
    assert [json.loads(json.dumps(part)) for part in parts] == parts


def test_an_experiment_that_remembers_is_caught() -> None:
    with pytest.raises(AssertionError, match="part 0"):
        check_parts_stand_alone({"experiment": {"class_path": f"experiments_small.{Forgetful.__name__}"}})


def test_seeds_differ() -> None:
    [(_, a)], [(_, b)] = (made({"seed": seed, **OWN["draws"]}, [1]).items() for seed in (0, 1))
    assert a[0]["total"] != b[0]["total"]
    assert a[0]["shared"] != b[0]["shared"]


def test_parts_draw_different_numbers() -> None:
    same = {"experiment": {"class_path": "experiments_small.Draws", "init_args": {"sizes": [2, 2]}}}
    first, second = made(same, [0, 1]).values()
    assert first[0]["total"] != second[0]["total"]
    assert first[0]["shared"] == second[0]["shared"]


def test_a_class_without_a_name_is_a_base() -> None:
    class Base(Experiment):
        pass

    assert not hasattr(Base, "schema")


@pytest.mark.parametrize(
    ("columns", "figures", "message"),
    [
        ((Column("x", "float", "x", logged=True),), (), "column 'x' has logged, but an experiment has no loggers"),
        (
            (Column("x", "float", "x"),),
            (Figure("X", "line", x="x", y="x", samples=True),),
            "figure 'X' has samples, but an experiment has no loggers",
        ),
        ((Column("x", "float", "x"),), (Figure("X", "line", x="x", y="z"),), "is drawn from z"),
        ((Column("step", "int", "x"),), (), "several columns of the name step"),
    ],
)
def test_classes_that_are_not_right(columns: Any, figures: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        type("Wrong", (Experiment,), {"name": "wrong", "row": "a row", "columns": columns, "figures": figures})


def test_the_first_column_is_the_number_of_the_part() -> None:
    assert Draws.schema.columns[0] == Column("step", "int", "number of the part, from 0")
