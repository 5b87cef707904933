"""YAML text to plain data and back: text, numbers, true, false, null, lists and mappings, within bounds."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Hashable, Mapping
from typing import Any

import yaml

from normzoo._errors import RecipeError, one_line, shown

MAX_DEPTH = 32  # of lists and mappings in each other
MAX_VALUES = 20_000  # with what stands behind aliases counted each time
MAX_CHARACTERS = 2**20  # likewise
MAX_LENGTH = 2**18  # of the text, in characters
MAX_DUMPED = (
    2**25
)  # no text that dump writes of data within these bounds is longer, aliases and wrapped lines considered
_PREFIX = "tag:yaml.org,2002:"
_TUPLE = f"{_PREFIX}python/tuple"
_PLAIN_TAGS = {_TUPLE, *(_PREFIX + kind for kind in ("str", "int", "float", "bool", "null", "merge", "map", "seq"))}
_NUMBERS = {
    "int": r"[-+]?(?:0|[1-9][0-9_]*|0b[01][01_]*|0x[0-9a-fA-F][0-9a-fA-F_]*)",
    "float": (
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+"
        r"|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)"
    ),
}


class InvalidYamlError(yaml.YAMLError):
    """Text that is not YAML, or YAML that is not plain data; the message is a clause, ``line`` counts from one."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


def parse(text: str, longest: int = MAX_LENGTH, objects: bool = False) -> Any:
    """The data in one YAML document of at most ``longest`` characters; None for none.

    Numbers, booleans and null are those of YAML 1.1 without its dates, sexagesimals and octals, which are text; 1e-3 is
    a number. Merge keys (``<<``) are filled in, and no two parts of the result are the same object.
    With ``objects`` a value of another tag is text, the name of its class and what it is made from, and a tuple is a
    list; nothing is imported or called.

    Raises:
        InvalidYamlError: for what is not YAML, has a key twice, a tag of another kind, an alias within itself, or more
            depth, values or text than a recipe can need.
    """
    if len(text) > longest:
        raise InvalidYamlError(f"longer than {longest:,} characters")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else _Reader(loader, objects).read(node, 0)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise _invalid(f"not valid YAML: {', '.join(filter(None, (error.context, error.problem)))}", mark) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise InvalidYamlError(f"not valid YAML: it has the character {shown(chr(error.character))}", line) from None
    except (ValueError, OverflowError) as error:  # of numbers in escapes and directives, which PyYAML does not check
        raise InvalidYamlError(f"not valid YAML: {error}") from None


def dump(config: Mapping[str, Any]) -> str:
    """YAML text of a config, in its own order."""
    return yaml.dump(dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def load_value(text: str, source: str) -> Any:
    """The data in YAML text; a RecipeError names ``source`` and the line."""
    try:
        return parse(text)
    except InvalidYamlError as error:
        line = f", line {error.line}" if error.line and "\n" in text.strip() else ""
        raise RecipeError(f"{source}{line}: {error}") from None


def text_of(path: str, what: str = "the recipe") -> str:
    """The text of a file or pipe; ``what`` it is, for messages."""
    try:
        # Not waiting for a named pipe that nobody writes into
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            os.set_blocking(file.fileno(), True)
            data = file.read(4 * MAX_LENGTH + 1)
        if len(data) > 4 * MAX_LENGTH:
            raise ValueError(f"longer than {4 * MAX_LENGTH:,} bytes")
        utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        return data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"cannot read {what} {path}: not UTF-8 text, at byte {error.start}") from None
    except OSError as error:
        raise RecipeError(f"cannot read {what} {path}: {error.strerror}") from None
    except ValueError as error:  # also of a path with a null byte
        raise RecipeError(f"cannot read {what} {path}: {error}") from None


class _Loader(yaml.SafeLoader):
    """Composes nodes no deeper than MAX_DEPTH."""

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        if self._depth > MAX_DEPTH + 1:
            raise _too_deep(self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:  # noqa: N803
        # Composing starts only after many tokens, for which PyYAML takes time that grows with the square of the depth
        if self.flow_level > MAX_DEPTH:
            raise _too_deep(self.get_mark())
        super().fetch_flow_collection_start(TokenClass)


_Loader.yaml_implicit_resolvers = {}  # those of YAML 1.1 have dates and more


class _Dumper(yaml.SafeDumper):
    """Puts quotes around text which :class:`_Loader` would read as a number, and writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first in (
    ("bool", "yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF", "yYnNtTfFoO"),
    ("float", _NUMBERS["float"], "-+.0123456789"),
    ("int", _NUMBERS["int"], "-+0123456789"),
    ("merge", "<<", "<"),
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
):
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(_PREFIX + _tag, re.compile(f"^(?:{_pattern})$"), list(_first))


class _Reader:
    """Data from nodes, each time anew where an alias stands, so that nothing is shared and all is counted."""

    def __init__(self, loader: _Loader, objects: bool) -> None:
        self.loader, self.objects = loader, objects
        self.within: list[Any] = []  # the nodes whose parts are being read
        self.values = self.characters = 0

    def read(self, node: Any, depth: int) -> Any:
        if node in self.within:
            raise _invalid("an alias stands for a value that contains it", node.start_mark)
        if depth > MAX_DEPTH:
            raise _too_deep(node.start_mark)
        self.values += 1
        if self.values > MAX_VALUES:
            raise _invalid(f"more than {MAX_VALUES:,} values, aliases counted as what they stand for", node.start_mark)
        if self.objects and node.tag not in _PLAIN_TAGS:
            return _text_of_object(node)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        kind = "map" if isinstance(node, yaml.MappingNode) else "seq"
        if node.tag != _PREFIX + kind and not (self.objects and node.tag == _TUPLE):
            raise _unknown_tag(node)
        self.within.append(node)
        value = self._mapping(node, depth) if kind == "map" else [self.read(item, depth + 1) for item in node.value]
        self.within.pop()
        return value

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        text, kind = node.value, node.tag.removeprefix(_PREFIX)
        self.characters += len(text)
        if self.characters > MAX_CHARACTERS:
            raise _invalid(f"more than {MAX_CHARACTERS:,} characters, aliases expanded", node.start_mark)
        if kind in ("str", "merge"):  # << for anything but a key is text
            if any("\ud800" <= c <= "\udfff" for c in text):
                raise _invalid("text with half of a surrogate pair, which no file can hold", node.start_mark)
            return text
        if kind not in ("int", "float", "bool", "null"):
            raise _unknown_tag(node)
        try:
            if kind in _NUMBERS and not re.fullmatch("|".join(_NUMBERS.values()), text):
                raise ValueError
            value = self.loader.construct_object(node)
        except (ValueError, KeyError):  # a tag that the text does not fit, or more digits than Python reads
            raise _invalid(f"{shown(text)} cannot be read as {kind}", node.start_mark) from None
        if kind == "int" and not -(2**63) <= value < 2**64:
            raise _invalid(f"{shown(text)} has more than 64 bits", node.start_mark)
        return value

    def _mapping(self, node: yaml.MappingNode, depth: int) -> dict[Any, Any]:
        own: dict[Any, Any] = {}
        merged: dict[Any, Any] = {}
        merges = 0
        for key_node, value_node in node.value:
            if key_node.tag == f"{_PREFIX}merge":
                merges += 1
                if merges > 1:
                    raise _invalid("key '<<' twice; give one list, as in  <<: [*a, *b]", key_node.start_mark)
                merged = self._merged(value_node, depth + 1)
                continue
            key = self._key(key_node, depth)
            if key in own:
                raise _invalid(f"key {shown(key)} twice", key_node.start_mark)
            own[key] = self.read(value_node, depth + 1)
        return {**merged, **own}

    def _merged(self, node: Any, depth: int) -> dict[Any, Any]:
        """What a merge key brings: of several mappings the first that has a key."""
        value = self.read(node, depth)
        mappings = value if isinstance(value, list) else [value]
        if not all(isinstance(m, dict) for m in mappings):
            raise _invalid("<<: takes a mapping or a list of mappings", node.start_mark)
        return {k: v for mapping in reversed(mappings) for k, v in mapping.items()}

    def _key(self, node: Any, depth: int) -> Hashable:
        key = self.read(node, depth + 1) if isinstance(node, yaml.ScalarNode) else None
        if key is None or key != key:
            raise _invalid("a key must be text or a number", node.start_mark)
        return key


def _text_of_object(node: Any) -> str:
    """The class of an object of Python, and of one that is made from a few plain values, these."""
    name = node.tag.rpartition(":")[2]
    if isinstance(node, yaml.ScalarNode):
        return str(node.value or name)
    parts = node.value if isinstance(node, yaml.SequenceNode) else []
    if not parts or not all(isinstance(part, yaml.ScalarNode) for part in parts):
        return str(name)
    return one_line(f"{name}({', '.join(part.value for part in parts)})")


def _invalid(message: str, mark: Any) -> InvalidYamlError:
    return InvalidYamlError(message, mark.line + 1 if mark else None)


def _too_deep(mark: Any) -> InvalidYamlError:
    return _invalid(f"lists and mappings more than {MAX_DEPTH} deep in each other", mark)


def _unknown_tag(node: Any) -> InvalidYamlError:
    tag = node.tag.replace(_PREFIX, "!!")
    return _invalid(
        f"the tag {tag} is not for recipes, which hold text, numbers, true, false, null, lists and mappings",
        node.start_mark,
    )
