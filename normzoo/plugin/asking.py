"""What the environment variable asks for: names of measurements with their options, or a file that lists them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from normzoo._components import component, split_spec
from normzoo._errors import RecipeError, near_matches, shown, unknown_name
from normzoo._variable import VARIABLE
from normzoo._yaml_text import InvalidYamlError, load_value, parse, text_of
from normzoo.callbacks import Measurement
from normzoo.callbacks._run.loop import default_measurements
from normzoo.names import SHORT_NAMES

DEFAULT = "default"  # the measurements that normzoo.watch takes by default
_ENDINGS = (".yaml", ".yml")
_NAMES = [name for name, path in SHORT_NAMES["callbacks"].items() if path.startswith("normzoo.")]
_CLOSING = {"[": "]", "{": "}", "(": ")"}


@dataclass(frozen=True)
class Asked:
    """A measurement that was asked for, as plain data, of which each Trainer gets an instance of its own.

    Attributes:
        key: where it was asked for, in messages.
        spec: a name, or a mapping with a name or a class_path and options, as in a recipe.
        source: the variable, or the file, in messages.
        by_default: whether the measurement comes from ``default``; one that refuses the run is then left out without a
            warning.
    """

    key: str
    spec: Any
    source: str
    by_default: bool = False

    def make(self) -> Measurement:
        """An instance.

        Raises:
            RecipeError: naming what is wrong and what is accepted.
        """
        name = split_spec(self.key, self.spec, self.source)[0]
        if name is not None and name not in SHORT_NAMES["callbacks"]:
            where = self.source if self.key == name else f"{self.source}: {self.key}"
            raise RecipeError(f"{where}: {_unknown(name)}")
        found = component(self.key, self.spec, self.source, kind="callbacks")
        if not issubclass(found.cls, Measurement):
            raise RecipeError(
                f"{self.source}: {self.key}: {found.cls.__name__} is no measurement, and {VARIABLE} adds nothing else; "
                "give it to the Trainer in the script"
            )
        made: Measurement = found.make()
        return made


def asked_for(value: str) -> list[Asked]:
    """The measurements that a value of the variable asks for, each of which can be made.

    Args:
        value: ``gradient_tails,divergence``, with options as in ``gradient_tails:every_n_steps=10``; or the path of a
            YAML file with a list of callbacks, as a recipe has it.

    Raises:
        RecipeError: naming what is wrong and what is accepted.
    """
    if value.endswith(_ENDINGS) and ("," not in value or os.path.exists(value)):
        found = _of_file(value)
    else:
        found = [_of_text(part.strip(), value) for part in _split(value, ",")]
    named = {split_spec(a.key, a.spec, a.source)[0] for a in found}
    defaults = [name for name in default_measurements() if name not in named]
    asked = [
        one
        for a in found
        for one in ([Asked(a.key, name, a.source, by_default=True) for name in defaults] if a.spec == DEFAULT else [a])
    ]
    _check_apart(asked)
    return asked


def _unknown(name: str) -> str:
    """The sentences on a name that is none: the nearest ones, or all of them, since a message has to be short."""
    names = [*_NAMES, DEFAULT]
    if near_matches(name, names):
        nearest = unknown_name("measurement", name, names).partition(" Valid:")[0]
        return f"{nearest} normzoo list callbacks shows all of them."
    return f"{unknown_name('measurement', name, names)} Your own: package.module.Class."


def _of_file(path: str) -> list[Asked]:
    source = f"{VARIABLE}: {path}"
    try:
        text = text_of(path, "the file")
    except RecipeError as error:
        raise RecipeError(f"{VARIABLE}: {error}") from None
    content = load_value(text, source)
    if isinstance(content, dict):
        if content.keys() != {"callbacks"}:
            others = ", ".join(shown(key) for key in content if key != "callbacks") or "no callbacks"
            raise RecipeError(f"{source}: expected the key callbacks: alone, with a list of measurements; got {others}")
        content = content["callbacks"]
    if not isinstance(content, list) or not content:
        raise RecipeError(
            f"{source}: expected a list of measurements, each item a name, or a mapping; got {shown(content)}"
        )
    return [Asked(f"callbacks[{i}]", spec, source) for i, spec in enumerate(content)]


def _of_text(text: str, whole: str) -> Asked:
    """The measurement in ``name:option=value:option=value``."""
    name, *pairs = map(str.strip, _split(text, ":"))
    if not name:
        raise RecipeError(
            f"{VARIABLE}: expected names of measurements with commas between them, as in gradient_tails,divergence, or "
            f"the path of a YAML file; not {shown(whole)}"
        )
    if name.endswith(_ENDINGS):
        raise RecipeError(f"{VARIABLE}: a file stands alone, as in {VARIABLE}={name}; not {shown(whole)}")
    options: dict[str, Any] = {}
    for pair in pairs:
        option, equals, value = map(str.strip, pair.partition("="))
        if not equals or not option:
            raise RecipeError(
                f"{VARIABLE}: {name}: expected options as in {name}:every_n_steps=10, with a colon before each; not "
                f"{shown(pair)}"
            )
        if option in options:
            raise RecipeError(f"{VARIABLE}: {name}.{option}: given twice")
        try:
            options[option] = parse(value)
        except InvalidYamlError as error:
            raise RecipeError(f"{VARIABLE}: {name}.{option}: {shown(value)} is {error}") from None
    if name == DEFAULT and options:
        raise RecipeError(f"{VARIABLE}: {DEFAULT} takes no options; name the measurements to give them some")
    if "." in name:
        return Asked(name, {"class_path": name, "init_args": options}, VARIABLE)
    return Asked(name, {"name": name, **options} if options else name, VARIABLE)


def _split(text: str, separator: str) -> Iterator[str]:
    """The parts of a text between separators that stand outside of brackets and quotes.

    Example:
        >>> [*_split("a:x=[1,2],b:y='3,4',c", ",")]
        ['a:x=[1,2]', "b:y='3,4'", 'c']
    """
    part, within = "", [""]  # the brackets and quotes that are open
    for character in text:
        if character == separator and len(within) == 1:
            yield part
            part = ""
            continue
        part += character
        if character == within[-1]:
            within.pop()
        elif within[-1] not in ("'", '"'):
            if character in _CLOSING:
                within.append(_CLOSING[character])
            elif character in "'\"" and re.search(r"[=\[{,:(]\s*.$", part):  # else an apostrophe
                within.append(character)
    yield part


def _check_apart(asked: Sequence[Asked]) -> None:
    """Make each once, and refuse two that would write the same record or have the same state."""
    seen: dict[tuple[str, str | None], Asked] = {}
    for one in asked:
        made = one.make()
        for name in {made.name, type(made).__qualname__}:
            if (name, made.label) in seen:
                raise RecipeError(
                    f"{one.source}: {one.key}: {type(made).__name__} is asked for twice; give one of the two a label "
                    f"of its own, as in {made.name}:label=late"
                )
            seen[name, made.label] = one
