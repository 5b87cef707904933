"""YAML as recipes have it: merge keys and aliases as PyYAML reads them, and an error for all that is not plain data."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from normzoo._yaml_text import MAX_DEPTH, MAX_VALUES, InvalidYamlError, dump, parse
from normzoo.cli.recipe import read


@pytest.mark.parametrize(
    "text",
    [
        "{<<: {a: 1}, b: 2}",
        "{<<: {a: 1, b: 1}, b: 2}",
        "{b: 2, <<: {a: 1, b: 1}}",
        "{<<: [{a: 1}, {a: 2, b: 2}], c: 3}",
        "{<<: []}",
        "{<<: {<<: {a: 1}, b: 2}, c: 3}",
        "a: &a {x: 1, y: [1]}\nb: &b {<<: *a, y: 2}\nc: {<<: [*b, *a], z: 3}\n",
        "a: &a [1, &b {c: 2}]\nb: [*a, *b]\n",
        "{'<<': 1}",
        "{!!str 1: 2, 1: 3, 1.5: 4, .inf: 5}",
        "!!map {a: !!seq [!!int '1', !!float 3, !!null null, !!bool yes, !!str 4]}",
        "[yes, No, on, OFF, true, ~, null, '', 0b11, 0x1F, -0x1f, 1_000, +1, -0, 0, 1., .5, 1.5e+3, -.inf, 1_0.0_1]",
    ],
)
def test_what_is_plain_is_as_pyyaml_has_it(text: str) -> None:
    assert parse(text) == yaml.safe_load(text)
    assert repr(parse(dump({"a": parse(text)}))) == repr({"a": parse(text)})


texts = st.text(st.sampled_from("0123456789abfxEeo_.:+-~<=yn"), max_size=6)


@given(texts)
@settings(max_examples=300)
def test_text_written_is_read_as_text(text: str) -> None:
    assert parse(dump({"a": text})) == {"a": text}


@given(st.text(st.sampled_from("0123456789abfx_.+-"), min_size=1, max_size=6))
@settings(max_examples=300)
def test_a_number_is_the_one_that_pyyaml_reads(text: str) -> None:
    try:
        value = parse(f"a: {text}")["a"]
    except InvalidYamlError:
        return
    if not isinstance(value, str):
        theirs = yaml.safe_load(f"a: {text}")["a"]
        assert repr(value) == repr(theirs) or (isinstance(theirs, str) and value == float(text))


@pytest.mark.parametrize(
    "text", ["2001-01-01", "2001-99-99", "1:30", "10:00:00:00", "1:30.5", "010", "0x_", "0b_", "=", "<<"]
)
def test_dates_and_other_spellings_of_numbers_are_text(text: str) -> None:
    assert parse(f"a: {text}") == {"a": text}


@pytest.mark.parametrize(
    ("text", "message", "line"),
    [
        ("a: 1\nb: !!timestamp 2001-01-01", "tag !!timestamp", 2),
        ("!!set {a, b}", "tag !!set", 1),
        ("!!omap [a: 1]", "tag !!omap", 1),
        ("!!pairs [a: 1]", "tag !!pairs", 1),
        ("!!binary aaaa", "tag !!binary", 1),
        ("!!str {a: 1}", "tag !!str", 1),
        ("!own x", "tag !own", 1),
        ("!!python/object/apply:os.getcwd []", "tag !!python", 1),
        ("!!int ''", "'' cannot be read as int", 1),
        ("!!int 1.5", "cannot be read as int", 1),
        ("!!float x", "cannot be read as float", 1),
        ("!!bool x", "cannot be read as bool", 1),
        ("9" * 5000, "cannot be read as int", 1),
        ("0x" + "f" * 5000, "64 bits", 1),
        (str(2**64), "64 bits", 1),
        (str(-(2**63) - 1), "64 bits", 1),
        ("{a: 1, a: 2}", "key 'a' twice", 1),
        ("{1: 1, true: 2}", "key True twice", 1),
        ("{<<: {}, <<: {}}", "'<<' twice", 1),
        ("<<: 3", "takes a mapping", 1),
        ("<<: [{}, 3]", "takes a mapping", 1),
        ("{null: 1}", "a key must be", 1),
        ("{.nan: 1}", "a key must be", 1),
        ("? [a]\n: 1", "a key must be", 1),
        ("? {a: 1}\n: 1", "a key must be", 1),
        ("- &a [*a]", "contains it", 1),
        ("- &a [[1], {b: 2}, *a]", "contains it", 1),
        ("&a {b: {<<: *a}}", "contains it", 1),
        ("a: *b", "undefined alias", 1),
        ("a\n---\nb", "single document", 2),
        ("a: [", "not valid YAML", 1),
        ("a: \x07", r"'\x07'", 1),
        ("a: 1\nb: \0", r"'\x00'", 2),
        ('"\\U00110000"', "not valid YAML", None),
        ('"\\UFFFFFFFF"', "not valid YAML", None),
        ('"\\ud800"', "surrogate", 1),
        ("%YAML 1." + "9" * 5000 + "\n--- a", "not valid YAML", None),
        ("# " + "x" * 2**18, "longer than", None),
    ],
)
def test_what_is_not_plain_data_is_refused(text: str, message: str, line: int | None) -> None:
    with pytest.raises(InvalidYamlError) as error:
        parse(text)
    assert message in str(error.value)
    assert error.value.line == line


@pytest.mark.parametrize("form", ["[{}]", "{{a: {}}}", "[{{a: {}}}]", "- {}", "? {}"])
def test_depth_is_bounded(form: str) -> None:
    text = "1"
    for _ in range(1000):
        text = form.format(text)
    with pytest.raises(InvalidYamlError, match=f"more than {MAX_DEPTH} deep"):
        parse(text)


def test_depth_up_to_the_bound_is_read_and_written() -> None:
    value: Any = 1
    for _ in range(MAX_DEPTH):
        value = {"a": value}
    assert parse(dump(value)) == value
    with pytest.raises(InvalidYamlError, match="deep"):
        parse(dump({"a": value}))


def test_aliases_count_as_what_they_stand_for() -> None:
    laughs = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
    )
    with pytest.raises(InvalidYamlError, match="more than 20,000 values"):
        parse(laughs)
    with pytest.raises(InvalidYamlError, match="more than 1,048,576 characters"):
        parse(f"a: &a {'x' * 200_000}\nb: [*a, *a, *a, *a, *a]\n")
    chain = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: *a{i - 1}, y{i}: 1}}\n" for i in range(1, 100))
    with pytest.raises(InvalidYamlError, match="deep"):
        parse(chain)
    assert len(parse(f"[{'1,' * (MAX_VALUES - 1)}]")) == MAX_VALUES - 1


def test_what_an_alias_stands_for_is_not_shared(tmp_path: Any) -> None:
    path = tmp_path / "shared.yaml"
    path.write_text("model: &m {arch: a, norm: &n {name: batch}}\ndata: {name: d, copy: *m, norm: *n}\n")
    config = read(str(path), ["model.norm.eps=1"]).config
    assert config["data"] == {"name": "d", "copy": {"arch": "a", "norm": {"name": "batch"}}, "norm": {"name": "batch"}}


def test_merge_keys_in_files_and_overrides_and_what_is_extended(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text("model: {<<: {arch: a, norm: batch}, norm: group}\ndata: d\n")
    (tmp_path / "child.yaml").write_text("extends: base.yaml\n<<: [{seed: 1}, {seed: 2, data: e}]\n")
    config = read("child.yaml", ["trainer={<<: {max_steps: 1, devices: 1}, devices: 2}"]).config
    assert config == {
        "model": {"arch": "a", "norm": "group"},
        "data": "e",
        "seed": 1,
        "trainer": {"max_steps": 1, "devices": 2},
    }


@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings(codec: str, tmp_path: Any) -> None:
    path = tmp_path / "coded.yaml"
    path.write_bytes("model: {arch: späße}\ndata: d\n".encode(codec))
    assert read(str(path)).config["model"] == {"arch": "späße"}


def test_a_local_file_may_extend_the_shipped_recipe_of_its_name(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart.yaml").write_text("extends: quickstart\nseed: 77\n")
    assert read("quickstart.yaml").config["seed"] == 77


def test_a_long_chain_of_recipes_is_refused(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for i in range(200):
        (tmp_path / f"r{i}.yaml").write_text(f"extends: r{i + 1}.yaml\n")
    with pytest.raises(ValueError, match="more than 32 recipes"):
        read("r0.yaml")


def test_a_section_without_content_takes_overrides(tmp_path: Any) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("model: {arch: a}\ndata: d\ntrainer:\n")
    assert read(str(path), ["trainer.max_steps=1"]).config["trainer"] == {"max_steps": 1}
