"""What a value of the variable asks for, and what is said of one that asks for nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plugin_small import install

from normzoo._errors import RecipeError
from normzoo.callbacks import (
    ChannelMoments,
    Column,
    Divergence,
    Every,
    GradientNorm,
    GradientTails,
    Measurement,
    Stop,
    Warmup,
)
from normzoo.plugin import fabric_callbacks, trainer_callbacks
from normzoo.plugin.asking import asked_for


class BatchNumber(Measurement):
    """A measurement of a user's own."""

    name = "batch_number"
    columns = (Column("number", "int", "of the batch"),)
    reduce = None

    def __init__(self, every_n_steps: int = 1, *, factor: int = 1, label: str | None = None) -> None:
        super().__init__(every_n_steps, label=label)
        self.factor = factor

    def measure(self, step: Any) -> dict[str, torch.Tensor]:
        return {"number": torch.tensor(step.batch_idx * self.factor)}

    def rows(self, sample: Any, values: Any) -> list[dict[str, Any]]:
        return [{"number": values["number"].item()}]


def made(value: str) -> list[Measurement]:
    return [asked.make() for asked in asked_for(value)]


def test_names_and_options_are_those_of_a_recipe() -> None:
    tails, divergence = made("gradient_tails:every_n_steps=10:label=late, divergence")
    assert (type(tails), type(divergence)) == (GradientTails, Divergence)
    assert (tails.schedule, tails.label) == (Every(10), "late")
    assert (divergence.schedule, divergence.label) == (Every(1), None)


@pytest.mark.parametrize(
    ("text", "option", "expected"),
    [
        ("of=[gradient,update]", "of", ["gradient", "update"]),
        ("of=[gradient, update] ", "of", ["gradient", "update"]),
        ("label='a-b'", "label", "a-b"),
        ('dirpath="a:b,c"', "dirpath", "a:b,c"),
        ("dirpath=it's", "dirpath", "it's"),
        ("dirpath=a=b", "dirpath", "a=b"),
    ],
)
def test_commas_and_colons_within_brackets_and_quotes_are_part_of_a_value(
    text: str, option: str, expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tails, norm = made(f"gradient_tails:{text}:every_n_steps=3,gradient_norm")
    value = getattr(tails, option)
    assert (list(value) if isinstance(expected, list) else value) == expected
    assert tails.schedule == Every(3)
    assert type(norm) is GradientNorm


def test_a_schedule_is_given_as_in_a_recipe() -> None:
    schedule = "{class_path: normzoo.callbacks.Warmup, init_args: {start: 3, inner: 2}}"
    assert made(f"gradient_norm:every_n_steps={schedule}")[0].schedule == Warmup(3, Every(2))


def test_default_is_what_watch_takes_by_default() -> None:
    assert [type(m) for m in made("default")] == [GradientNorm, GradientTails, ChannelMoments]
    several = made("divergence,default,gradient_tails:every_n_steps=7")
    assert [type(m) for m in several] == [Divergence, GradientNorm, ChannelMoments, GradientTails]
    assert several[3].schedule == Every(7)
    assert {a.by_default for a in asked_for("default")} == {True}
    assert {a.by_default for a in asked_for("gradient_norm")} == {False}


def test_a_class_of_ones_own() -> None:
    [own] = made(f"{__name__}.BatchNumber:factor=3:every_n_steps=2")
    assert type(own).__name__ == "BatchNumber"
    assert (own.factor, own.schedule) == (3, Every(2))  # type: ignore[attr-defined]


@pytest.mark.parametrize("nested", [False, True])
def test_a_file_lists_measurements_as_a_recipe_does(nested: bool, tmp_path: Path) -> None:
    items = f"""
- gradient_norm
- {{name: gradient_tails, every_n_steps: 10}}
- name: divergence
  action: {{class_path: normzoo.callbacks.Stop, init_args: {{exit_code: 7}}}}
- class_path: {__name__}.BatchNumber
  init_args: {{factor: 3}}
"""
    path = tmp_path / "watch.yaml"
    path.write_text(f"callbacks:\n{items}" if nested else items)
    norm, tails, divergence, own = made(str(path))
    assert [type(m).__name__ for m in (norm, tails, own)] == ["GradientNorm", "GradientTails", "BatchNumber"]
    assert tails.schedule == Every(10)
    assert isinstance(divergence, Divergence)
    assert isinstance(divergence.action, Stop)
    assert divergence.action.exit_code == 7
    assert own.factor == 3  # type: ignore[attr-defined]


def test_each_trainer_gets_instances_of_its_own_down_to_the_parts(tmp_path: Path) -> None:
    path = tmp_path / "watch.yml"
    path.write_text("- {name: divergence, recorder: {class_path: normzoo.callbacks.Recorder, init_args: {steps: 4}}}")
    [asked] = asked_for(str(path))
    first, second = asked.make(), asked.make()
    assert first is not second
    assert first.recorder is not second.recorder  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "gradient_tials",
            "NORMZOO: 'gradient_tials' is not a known measurement; did you mean 'gradient_tails' or 'gr",
        ),
        ("gradient_tials", "? normzoo list callbacks shows all of them."),
        (
            "nonsense",
            "NORMZOO: 'nonsense' is not a known measurement. Valid: channel_moments, class_gradients, default, di",
        ),
        ("nonsense", "relative_loss, sharpness. Your own: package.module.Class."),
        ("gradient_tails:every_n_step=1", "gradient_tails.every_n_step: 'every_n_step' is not a known option of Grad"),
        ("gradient_tails:every_n_step=1", "did you mean 'every_n_steps'"),
        ("gradient_tails:every_n_steps=often", "gradient_tails.every_n_steps: expected int"),
        ("gradient_tails:every_n_steps=0", "NORMZOO: gradient_tails: "),
        ("gradient_tails:every_n_steps=", "gradient_tails.every_n_steps: expected a value, not null"),
        ("gradient_tails:every_n_steps", "expected options as in gradient_tails:every_n_steps=10, with a colon before"),
        ("gradient_tails:=10", "expected options as in gradient_tails:every_n_steps=10"),
        ("gradient_tails every_n_steps=10", "'gradient_tails every_n_steps=10' is not a known measurement"),
        ("gradient_tails:label=a:label=b", "gradient_tails.label: given twice"),
        ("gradient_tails:label=[a", "gradient_tails.label: '[a' is not valid YAML"),
        ("gradient_tails,,divergence", "expected names of measurements with commas between them"),
        (",", "expected names of measurements with commas between them, as in gradient_tails,divergence, or the path"),
        ("gradient_tails,gradient_tails", "GradientTails is asked for twice; give one of the two a label of its own"),
        ("divergence:label=a,divergence:label=a", "as in divergence:label=late"),
        ("model_checkpoint", "model_checkpoint: ModelCheckpoint is no measurement, and NORMZOO adds nothing else"),
        ("torch.nn.ReLU", "torch.nn.ReLU: ReLU is no measurement"),
        ("no_such_module.Own", "no_such_module.Own: cannot import 'no_such_module.Own': ModuleNotFoundError"),
        ("default:every_n_steps=1", "default takes no options; name the measurements to give them some"),
        ("missing.yaml", "NORMZOO: cannot read the file missing.yaml: No such file or directory"),
        ("watch.yaml,divergence", "a file stands alone, as in NORMZOO=watch.yaml; not 'watch.yaml,divergence'"),
        ("divergence,watch.yaml", "a file stands alone, as in NORMZOO=watch.yaml"),
    ],
)
def test_a_malformed_value_is_told_with_what_is_accepted(value: str, message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)) as caught:
        asked_for(value)
    assert str(caught.value).startswith("NORMZOO: ")
    assert "\n" not in str(caught.value)
    assert " ... " not in str(caught.value)  # nothing is cut out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "watch.yaml: expected a list of measurements, each item a name, or a mapping; got null"),
        ("[]", "expected a list of measurements"),
        ("gradient_tails", "expected a list of measurements, each item a name, or a mapping; got 'gradient_tails'"),
        ("{callbacks: {name: divergence}}", "expected a list of measurements"),
        ("{callbacks: [divergence], model: {}}", "expected the key callbacks: alone, with a list of measurements; got"),
        ("[gradient_tails", "watch.yaml: not valid YAML"),
        ("- gradient_norm\n- {name: gradient_tails, every: 3}", "callbacks[1].every: 'every' is not a known option"),
        ("- gradient_nrom", "callbacks[0]: 'gradient_nrom' is not a known measurement; did you mean 'gradient_norm'"),
        ("- 3", "callbacks[0]: expected a name, a mapping with name: and options"),
        ("- early_stopping: {}", "callbacks[0]: expected a name"),
        ("- {name: early_stopping, monitor: loss}", "callbacks[0]: EarlyStopping is no measurement"),
        ("- class_path: torch.nn.ReLU", "callbacks[0]: 'torch.nn.ReLU' is not a subclass of Callback"),
    ],
)
def test_a_malformed_file_is_told_with_the_place(
    content: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("watch.yaml").write_text(content)
    with pytest.raises(RecipeError, match=re.escape(message)) as caught:
        asked_for("watch.yaml")
    assert str(caught.value).startswith("NORMZOO: watch.yaml: ")


def test_the_values_and_the_file_of_the_page_are_accepted(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "plugin.md").read_text(encoding="utf-8")
    page = page.replace("my_package.MyMeasurement", f"{__name__}.BatchNumber").replace("option", "factor")
    values = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(values) == 7
    path = tmp_path / "watch.yaml"
    [text] = re.findall(r"^```yaml\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    path.write_text(text)
    counts = [len(asked_for(str(path) if value == path.name else value)) for value in values]
    assert counts == [1, 2, 1, 3, 4, 1, 3]


WORDS = ["gradient_tails", "divergence", "default", "every_n_steps", "label", "of", "rules", "normzoo.callbacks.Stop"]
MARKS = [
    *":,=[]{}()'\"~.-#&*!",
    ": ",
    "- ",
    "<<",
    "\n",
    "\x00",
    "\ud800",
    "é",
    "1",
    "-1",
    "1e9",
    ".inf",
    "null",
    ".yaml",
]


@given(st.lists(st.sampled_from([*WORDS, *MARKS]), min_size=1, max_size=9).map("".join))
def test_whatever_the_value_is_one_line_says_what_is_wrong(value: str) -> None:
    found, message = [], ""
    try:
        found = asked_for(value)
    except RecipeError as error:
        message = str(error)
    assert bool(found) != message.startswith("NORMZOO: ")
    assert message.isprintable()
    assert len(message) <= 290


def test_a_malformed_value_stops_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, "gradient_tials")
    with pytest.raises(SystemExit) as stopped:
        trainer_callbacks()
    assert stopped.value.code == 2
    told = capsys.readouterr()
    assert told.err.startswith(
        "normzoo: NORMZOO: 'gradient_tials' is not a known measurement; did you mean 'gradient_tails' or"
    )
    assert (told.err.count("\n"), told.out) == (1, "")


@pytest.mark.parametrize("value", [None, "", "  "])
def test_an_unset_or_empty_variable_adds_nothing(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, value)
    assert trainer_callbacks() == []
    assert fabric_callbacks() == []
