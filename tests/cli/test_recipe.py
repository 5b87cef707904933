"""Recipes as text: finding, extending, merging, overriding and sweeping, without torch."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from normzoo._errors import RecipeError
from normzoo._yaml_text import dump
from normzoo.cli.main import main
from normzoo.cli.recipe import SECTIONS, _merge, find, header, is_experiment, label, read, shipped

SMALL = "model: {arch: a, norm: batch}\ndata: d\n"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)

    def to(name: str, text: str) -> str:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(text), encoding="utf-8")
        return name

    return to


# Finding


def test_a_shipped_recipe_is_found_by_name_and_a_file_by_its_path(write: Any, tmp_path: Path) -> None:
    source, text = find("quickstart")
    assert source == "quickstart.yaml"
    assert text == shipped()["quickstart"]
    for path in (write("mine.yaml", SMALL), write("mine.yml", SMALL), write("below/mine", SMALL)):
        assert find(path) == (path, SMALL)
        assert find(str(tmp_path / path))[1] == SMALL
    assert read("below/mine").name == "mine"


def test_a_bare_name_is_never_a_file_of_the_current_folder(write: Any) -> None:
    write("quickstart", "not a recipe")
    assert find("quickstart")[1] == shipped()["quickstart"]


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("quikstart", "'quickstart'"),
        ("Quickstart", "'quickstart'"),
        ("cifar10_resnet110_grop", "'cifar10_resnet110_group'"),
    ],
)
def test_unknown_names_bring_the_nearest(name: str, near: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(near)):
        read(name)


def test_nothing_near_lists_what_there_is() -> None:
    with pytest.raises(RecipeError, match="quickstart.*A file's name ends in .yaml."):
        read("zzz")


# Shipped recipes


@pytest.mark.parametrize("name", list(shipped()))
def test_shipped_recipes_say_what_they_ask_expect_and_take(name: str) -> None:
    fields = header(shipped()[name])
    [question] = fields[""]
    assert question.endswith("?")
    assert fields.keys() >= {"Command", "Expected", "Time"}
    assert all(fields.values())
    assert len(fields["Time"]) == 1, "normzoo list recipes shows it in one line"
    commands = re.findall(r"normzoo (run|sweep) (\w+)", "\n".join(fields["Command"]))
    assert {recipe for _, recipe in commands} == {name}
    recipe = read(name)
    assert recipe.grid or {command for command, _ in commands} == {"run"}
    needed = {"experiment"} if is_experiment(recipe.config) else {"model", "data", "trainer", "optimizer"}
    assert needed | {"seed"} <= set(recipe.config)
    assert "extends" not in recipe.config


def test_all_shipped_recipes_are_looked_at() -> None:
    files = {p.stem for p in (Path(__file__).parents[2] / "recipes").glob("*.yaml")}
    assert set(shipped()) == files
    assert len(files) >= 7


@pytest.mark.parametrize("name", list(shipped()))
def test_a_dumped_recipe_is_read_again_as_it_was(name: str, write: Any) -> None:
    recipe = read(name)
    again = read(write("again.yaml", dump(recipe.config)))
    assert again.config == recipe.config
    assert list(again.config) == list(recipe.config)
    assert again.grid == {}
    swept = read(write("sweep.yaml", dump({**recipe.config, "sweep": recipe.grid})))
    assert (swept.config, swept.grid) == (recipe.config, recipe.grid)


# Values


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E-3", 1e-3),
        ("-2.5e+10", -2.5e10),
        (".5e2", 50.0),
        ("5.e-1", 0.5),
        ("1e6", 1e6),
        ("'1e-3'", "1e-3"),
        ("1e", "1e"),
        ("e3", "e3"),
        ("resnet1e3", "resnet1e3"),
        ("0.1", 0.1),
        ("3", 3),
        ("true", True),
        ("null", None),
        ("", None),
        ("[1, 2e-1]", [1, 0.2]),
        ("{name: group, groups: 8}", {"name": "group", "groups": 8}),
        ("a=b", "a=b"),
        ("a: b", {"a": "b"}),
        ("späße", "späße"),
    ],
)
def test_a_value_on_the_command_line_is_what_it_is_in_a_file(text: str, value: Any, write: Any) -> None:
    given_ = read(write("small.yaml", SMALL), [f"trainer.x={text}"]).config["trainer"]["x"]
    assert given_ == value
    assert type(given_) is type(value)
    if text and text != "a: b":
        assert read(write("file.yaml", f"{SMALL}trainer:\n  x: {text}\n")).config["trainer"]["x"] == value


def test_floats_of_every_size_survive_a_round_trip(write: Any) -> None:
    values = [1e-3, 1e6, 1e22, 1.5e-300, 0.1, -0.0, 3.0, 1e16, 123456789.125]
    again = read(write("again.yaml", dump({"model": {"values": values}, "data": "d"}))).config["model"]["values"]
    assert again == values
    assert all(type(v) is float for v in again)


# Overrides


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.norm=group", {"arch": "a", "norm": "group"}),
        ("model.norm.groups=4", {"arch": "a", "norm": {"name": "batch", "groups": 4}}),
        ("model.norm={name: none}", {"arch": "a", "norm": {"name": "none"}}),
        ("model.more.deep=1", {"arch": "a", "norm": "batch", "more": {"deep": 1}}),
        ("model=b", "b"),
    ],
)
def test_overrides_set_dotted_keys(override: str, expected: Any, write: Any) -> None:
    assert read(write("small.yaml", SMALL), [override]).config["model"] == expected


def test_overrides_name_a_section_that_the_recipe_lacks(write: Any) -> None:
    config = read(write("small.yaml", SMALL), ["optimizer.lr=0.5", "seed=3"]).config
    assert config["optimizer"] == {"lr": 0.5}
    assert config["seed"] == 3


def test_the_last_of_two_overrides_holds(write: Any) -> None:
    assert read(write("small.yaml", SMALL), ["seed=1", "seed=2"]).config["seed"] == 2


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("callbacks.divergence.stop=true", ["tails", {"name": "divergence", "stop": True}, {"name": "loss", "n": 2}]),
        ("callbacks.loss.n=5", ["tails", "divergence", {"name": "loss", "n": 5}]),
        ("callbacks.2.n=5", ["tails", "divergence", {"name": "loss", "n": 5}]),
        ("callbacks.tails=other", ["other", "divergence", {"name": "loss", "n": 2}]),
        ("callbacks.0.every=7", [{"name": "tails", "every": 7}, "divergence", {"name": "loss", "n": 2}]),
    ],
)
def test_items_of_a_list_go_by_their_short_name_or_position(override: str, expected: Any, write: Any) -> None:
    path = write("small.yaml", SMALL + "callbacks: [tails, divergence, {name: loss, n: 2}]\n")
    assert read(path, [override]).config["callbacks"] == expected


def test_a_class_of_ones_own_in_a_list_goes_by_its_name(write: Any) -> None:
    path = write("own.yaml", SMALL + "callbacks: [divergence, {class_path: pack.mine.Own}]\n")
    assert read(path, ["callbacks.Own.n=3"]).config["callbacks"][1] == {
        "class_path": "pack.mine.Own",
        "init_args": {"n": 3},
    }
    with pytest.raises(RecipeError, match="'own' is not a known item of the list; did you mean 'Own'"):
        read(path, ["callbacks.own.n=3"])


def test_options_of_a_class_path_go_to_its_init_args(write: Any) -> None:
    text = "model: {class_path: m.Model, init_args: {width: 3}}\ndata: {class_path: m.Data}\n"
    config = read(write("own.yaml", text), ["model.width=5", "model.init_args.depth=2", "data.root=x"]).config
    assert config["model"] == {"class_path": "m.Model", "init_args": {"width": 5, "depth": 2}}
    assert config["data"] == {"class_path": "m.Data", "init_args": {"root": "x"}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "'seed' is not an override; write KEY=VALUE"),
        ("=3", "'=3' is not an override"),
        ("optimzer.lr=1", "override 'optimzer.lr=1': .*'optimizer'"),
        ("seed.x=1", "override 'seed.x=1': seed is 0 and has no key 'x'"),
        ("callbacks.divergnce.stop=true", "override .*callbacks.divergnce: .*'divergence'"),
        ("callbacks.7.stop=true", "override .*callbacks.7"),
        ("model={a: b", "override 'model={a: b'.*not valid YAML"),
        ("model={a: 1, a: 2}", "override .*'a' twice"),
    ],
)
def test_bad_overrides_are_quoted(override: str, message: str, write: Any) -> None:
    path = write("small.yaml", SMALL + "seed: 0\ncallbacks: [divergence]\n")
    with pytest.raises(RecipeError, match=message):
        read(path, [override])


# Extending


def test_a_recipe_adds_to_what_it_extends(write: Any) -> None:
    write("base.yaml", SMALL + "optimizer: {name: sgd, lr: 0.1}\ncallbacks: [a, b]\nseed: 1\n")
    child = read(write("child.yaml", "extends: base.yaml\noptimizer: {lr: 0.2}\ncallbacks: [c]\n"))
    assert child.config == {
        "model": {"arch": "a", "norm": "batch"},
        "data": "d",
        "optimizer": {"name": "sgd", "lr": 0.2},
        "callbacks": ["c"],
        "seed": 1,
    }
    assert (child.name, child.source) == ("child", "child.yaml")


def test_another_name_drops_the_options_of_the_first(write: Any) -> None:
    write("base.yaml", SMALL + "optimizer: {name: sgd, lr: 0.1, momentum: 0.9}\n")
    for over in ("optimizer: {name: adamw, lr: 0.1}", "optimizer: {class_path: m.O, init_args: {lr: 0.1}}"):
        made = read(write("child.yaml", f"extends: base.yaml\n{over}\n")).config["optimizer"]
        assert "momentum" not in made
        assert made == yaml.safe_load(over)["optimizer"]


def test_what_a_file_extends_lies_beside_it(write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("deep/base.yaml", SMALL)
    write("deep/middle.yaml", "extends: base.yaml\nseed: 1\n")
    write("deep/er/leaf.yaml", "extends: ../middle.yaml\nseed: 2\n")
    assert read("deep/er/leaf.yaml").config["seed"] == 2
    monkeypatch.chdir(tmp_path / "deep" / "er")
    assert read("leaf.yaml").config["model"]["arch"] == "a"
    (tmp_path / "absolute.yaml").write_text(f"extends: {tmp_path}/deep/middle.yaml\n")
    assert read(str(tmp_path / "absolute.yaml")).config["seed"] == 1


def test_a_file_extends_a_shipped_recipe(write: Any) -> None:
    path = write("mine.yaml", "extends: quickstart\nmodel: {norm: group}\n")
    config = read(path).config
    assert config["model"] == {**read("quickstart").config["model"], "norm": "group"}


@pytest.mark.parametrize("names", [["a.yaml"], ["a.yaml", "b.yaml"], ["a.yaml", "b.yaml", "c.yaml"]])
def test_a_circle_is_refused_with_its_path(names: list[str], write: Any) -> None:
    for name, base in zip(names, [*names[1:], names[0]], strict=True):
        write(name, f"extends: {base}\n")
    with pytest.raises(RecipeError, match="extends itself, through " + " -> ".join([*names, names[0]])):
        read("a.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: [a, b]\n", "extends: must be the name or path of one recipe"),
        ("extends: 3\n", "extends: must be the name or path of one recipe, not 3"),
        ("extends: quikstart\n", "'quickstart'"),
        ("extends: nowhere.yaml\n", "nowhere.yaml"),
        ("extend: quickstart\n", "'extends'"),
        ("[1]\n", "a recipe is a mapping"),
        ("", "a recipe is a mapping"),
        ("modle: {}\n", "'model'"),
        ("model: {}\nmodel: {}\n", "line 2.*'model' twice"),
        ("model: {arch: a, arch: b}\n", "'arch' twice"),
        ("model: {}\ndata:\n\t- x\n", "line 3"),
        ("model: !!python/object/apply:os.getcwd []\n", "the tag !!python/object/apply:os.getcwd is not for recipes"),
        ("model: {}\n", "'data' is missing"),
        ("data: {}\n", "'model' is missing"),
    ],
)
def test_recipes_that_are_not_right_name_the_file(text: str, message: str, write: Any) -> None:
    with pytest.raises(RecipeError, match=message) as error:
        read(write("bad.yaml", text))
    assert "bad.yaml" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


# Merging

keys = st.sampled_from(["a", "b", "c", "name", "class_path"])
scalars = st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["x", "y", "z"])
configs = st.recursive(
    scalars | st.lists(scalars, max_size=2), lambda inner: st.dictionaries(keys, inner, max_size=4), max_leaves=12
)
mappings = st.dictionaries(keys, configs, max_size=4)


def with_names_of_text(config: Any) -> Any:
    """Without a ``name`` or ``class_path`` that is anything but a text, which no recipe means."""
    if not isinstance(config, dict):
        return config
    odd = {k for k in ("name", "class_path") if not isinstance(config.get(k), str)}
    return {k: with_names_of_text(v) for k, v in config.items() if k not in odd}


@settings(max_examples=50)
@given(mappings)
def test_merging_with_nothing_or_with_itself_changes_nothing(config: dict[str, Any]) -> None:
    assert _merge(config, {}) == config
    assert _merge({}, config) == config or "name" in config or "class_path" in config
    assert _merge(config, config) == config


@given(mappings.map(with_names_of_text), mappings.map(with_names_of_text))
@settings(max_examples=50)
def test_merging_twice_is_merging_once(base: dict[str, Any], over: dict[str, Any]) -> None:
    once = _merge(base, over)
    assert _merge(once, over) == once


@settings(max_examples=50)
@given(mappings, mappings)
def test_what_is_written_over_is_in_the_result(base: dict[str, Any], over: dict[str, Any]) -> None:
    merged = _merge(base, over)
    for key, value in over.items():
        if not isinstance(value, dict):
            assert merged[key] == value
    assert set(over) <= set(merged) <= set(base) | set(over)


@settings(max_examples=50)
@given(mappings, mappings)
def test_merging_leaves_both_as_they_were(base: dict[str, Any], over: dict[str, Any]) -> None:
    before = dump({"base": base, "over": over})
    _merge(base, over)
    assert dump({"base": base, "over": over}) == before


# Without control characters and line separators, which PyYAML itself does not keep
ordinary = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Zl", "Zp"]), max_size=8)
texts = (
    ordinary
    | st.from_regex(r"[-+]?[0-9]+\.?[0-9]*[eE]-?[0-9]+", fullmatch=True)
    | st.sampled_from(["null", "no", "1", "~"])
)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@given(st.fixed_dictionaries({"model": values, "data": values}))
@settings(max_examples=60)
def test_any_config_is_read_again_as_it_was(tmp_path_factory: Any, config: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(dump(config), encoding="utf-8")
    assert read(str(path)).config == config


# Sweeps


def test_points_are_the_product_in_the_order_written(write: Any) -> None:
    text = (
        SMALL
        + "optimizer: {name: sgd}\nsweep: {model.norm: [batch, {name: group, groups: 8}], optimizer.lr: [1, 1e-3]}\n"
    )
    recipe = read(write("grid.yaml", text))
    points = list(recipe.points())
    assert [name for name, _ in points] == [
        "norm=batch,lr=1",
        "norm=batch,lr=0.001",
        "norm=group(groups=8),lr=1",
        "norm=group(groups=8),lr=0.001",
    ]
    assert points[3][1]["model"]["norm"] == {"name": "group", "groups": 8}
    assert points[3][1]["optimizer"] == {"name": "sgd", "lr": 1e-3}
    assert recipe.config["optimizer"] == {"name": "sgd"}
    points[0][1]["optimizer"]["lr"] = "spoilt"
    assert next(iter(recipe.points()))[1]["optimizer"]["lr"] == 1


def test_equal_last_parts_are_told_apart_by_their_whole_keys(write: Any) -> None:
    text = SMALL + "sweep: {optimizer.name: [sgd], lr_scheduler.name: [step], seed: [1]}\n"
    [(name, _)] = read(write("grid.yaml", text)).points()
    assert name == "optimizer.name=sgd,lr_scheduler.name=step,seed=1"


def test_a_recipe_without_a_sweep_has_no_grid(write: Any) -> None:
    assert read(write("small.yaml", SMALL)).grid == {}
    assert read(write("small.yaml", SMALL + "sweep: {}\n")).grid == {}


@pytest.mark.parametrize(
    ("override", "left"),
    [
        ("optimizer.lr=0.5", ["model.norm"]),
        ("model.norm=layer", ["optimizer.lr"]),
        ("model.norm.groups=4", ["optimizer.lr"]),
        ("optimizer={name: adamw, lr: 1}", ["model.norm"]),
        ("optimizer.lr_decay=1", ["model.norm", "optimizer.lr"]),
        ("seed=1", ["model.norm", "optimizer.lr"]),
        ("sweep.seed=[1, 2]", ["model.norm", "optimizer.lr", "seed"]),
        ("sweep={seed: [1, 2]}", ["seed"]),
    ],
)
def test_a_value_given_by_hand_drops_the_axis_it_fixes(override: str, left: list[str], write: Any) -> None:
    text = SMALL + "optimizer: {name: sgd, lr: 0.1}\nsweep: {model.norm: [batch, none], optimizer.lr: [1, 2]}\n"
    recipe = read(write("grid.yaml", text), [override])
    assert list(recipe.grid) == left


def test_an_overridden_axis_keeps_the_value_given(write: Any) -> None:
    path = write("grid.yaml", SMALL + "optimizer: {lr: 0.1}\nsweep: {optimizer.lr: [1, 2], seed: [1, 2]}\n")
    assert [config["optimizer"]["lr"] for _, config in read(path, ["optimizer.lr=0.5"]).points()] == [0.5, 0.5]


def test_a_sweep_takes_the_place_of_the_bases(write: Any) -> None:
    write("base.yaml", SMALL + "sweep: {seed: [1, 2, 3]}\n")
    assert read(write("same.yaml", "extends: base.yaml\n")).grid == {"seed": [1, 2, 3]}
    assert read(write("other.yaml", "extends: base.yaml\nsweep: {model.norm: [none]}\n")).grid == {
        "model.norm": ["none"]
    }
    assert read(write("none.yaml", "extends: base.yaml\nsweep: null\n")).grid == {}


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ("3", "list of values for each dotted key"),
        ("[1, 2]", "list of values for each dotted key"),
        ("{seed: 3}", "list of values for each dotted key"),
        ("{seed: []}", "list of values for each dotted key"),
        ("{sed: [1]}", "'seed'"),
        ("{1: [1]}", "sweep"),
    ],
)
def test_grids_that_are_not_right(grid: str, message: str, write: Any) -> None:
    with pytest.raises(RecipeError, match=message) as error:
        read(write("grid.yaml", f"{SMALL}sweep: {grid}\n"))
    assert "grid.yaml" in str(error.value)


COUPLED = """optimizer: {name: sgd, lr: 0.1}
sweep:
  "model.norm,optimizer.lr": [[batch, 0.1], [{name: group, groups: 8}, 0.003], [none, 1e-4]]
  seed: [1, 2]
"""


def test_keys_that_move_together_are_one_axis(write: Any) -> None:
    recipe = read(write("grid.yaml", SMALL + COUPLED))
    points = list(recipe.points())
    assert [name for name, _ in points] == [
        "norm=batch,lr=0.1,seed=1",
        "norm=batch,lr=0.1,seed=2",
        "norm=group(groups=8),lr=0.003,seed=1",
        "norm=group(groups=8),lr=0.003,seed=2",
        "norm=none,lr=0.0001,seed=1",
        "norm=none,lr=0.0001,seed=2",
    ]
    assert [(c["model"]["norm"], c["optimizer"]["lr"], c["seed"]) for _, c in points][3:5] == [
        ({"name": "group", "groups": 8}, 0.003, 2),
        ("none", 1e-4, 1),
    ]
    again = read(write("sweep.yaml", dump({**recipe.config, "sweep": recipe.grid})))
    assert list(again.points()) == points


def test_keys_of_equal_last_parts_that_move_together_are_told_apart(write: Any) -> None:
    text = SMALL + 'sweep: {"optimizer.name, lr_scheduler.name": [[sgd, step]], seed: [1]}\n'
    [(name, _)] = read(write("grid.yaml", text)).points()
    assert name == "optimizer.name=sgd,lr_scheduler.name=step,seed=1"


@pytest.mark.parametrize(
    ("override", "left"),
    [
        ("optimizer.lr=0.5", ["seed"]),
        ("model={arch: x}", ["seed"]),
        ("model.norm.groups=2", ["seed"]),
        ("seed=3", ["model.norm, optimizer.lr"]),
        ("optimizer.momentum=0.9", ["model.norm, optimizer.lr", "seed"]),
    ],
)
def test_a_value_given_by_hand_drops_the_axis_of_all_its_keys(override: str, left: list[str], write: Any) -> None:
    recipe = read(write("grid.yaml", SMALL + COUPLED), [override])
    assert list(recipe.grid) == left
    told = f"sweep: the axis 'model.norm,optimizer.lr' is left out, as {override.partition('=')[0]} is given"
    assert list(recipe.notices) == [told] * (left == ["seed"])


def test_an_axis_left_out_is_told_by_the_commands(write: Any, capsys: pytest.CaptureFixture[str]) -> None:
    small = (
        "model: {arch: resnet20_cifar, norm: batch}\ndata: fashion_mnist\ntrainer: {max_steps: 1, accelerator: cpu}\n"
    )
    path = write("grid.yaml", small + COUPLED)
    told = "grid.yaml: sweep: the axis 'model.norm,optimizer.lr' is left out, as optimizer.lr is given\n"
    assert main(["validate", path, "optimizer.lr=0.5"]) == 0
    assert told in capsys.readouterr().err
    assert main(["sweep", path, "optimizer.lr=0.5", "seed=1"]) == 2  # no axis is left
    assert told in (error := capsys.readouterr().err)
    assert "there is no sweep: section" in error


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ('{"seed, model.norm": [[1, batch], [2]]}', r"seed, model.norm are 2 keys that move together.*not \[2\]"),
        ('{"seed, model.norm": [1, 2]}', "a list of 2, as in .*, not 1"),
        ('{"seed, model.norm": [batch]}', "a list of 2, as in .*, not 'batch'"),
        ('{"seed, model.norm": [[1, batch, 3]]}', "a list of 2"),
        ('{"seed, model.norm": []}', "list of values for each dotted key"),
        ('{"seed, seed": [[1, 2]]}', "seed is swept over twice"),
        ('{"seed, model.norm": [[1, 2]], seed: [1]}', "seed is swept over twice"),
        ('{"seed, model.norm": [[1, 2]], "seed,model.norm": [[1, 2]]}', "seed is swept over twice"),
        ('{"seed, ": [[1, 2]]}', "'' is not a known section"),
        ('{"seed, sweep.seed": [[1, 2]]}', "cannot be swept over"),
        ('{"seed, modle.norm": [[1, 2]]}', "did you mean 'model'"),
    ],
)
def test_keys_that_move_together_wrongly_are_told(grid: str, message: str, write: Any) -> None:
    with pytest.raises(RecipeError, match=message):
        read(write("grid.yaml", f"{SMALL}sweep: {grid}\n"))


# Labels


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.1, "0.1"),
        (1e-5, "1e-05"),
        (None, "None"),
        (True, "True"),
        ("batch", "batch"),
        ("../../x y", ".._.._x_y"),
        ({"name": "group", "groups": 8}, "group(groups=8)"),
        ({"name": "none"}, "none"),
        ({"class_path": "mine.norms.Own"}, "Own"),
        ({"class_path": "mine.Own", "init_args": {"width": 3}}, "Own(width=3)"),
        ([1, 2], "_1,_2_"),
    ],
)
def test_labels(value: Any, expected: str) -> None:
    assert label(value) == expected


@given(values)
def test_no_label_holds_a_separator_of_folders(value: Any) -> None:
    assert not set(label(value)) & set('/\\:*?"<>|\0\n')


def test_the_sections_are_what_the_recipes_use() -> None:
    used = {section for name in shipped() for section in yaml.safe_load(shipped()[name])}
    assert used <= {*SECTIONS, "extends"}
