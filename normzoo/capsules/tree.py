"""Trees of plain containers, numbers, text, tensors and arrays as JSON, beside the tensors by their names.

Nothing is pickled, and nothing that is read can run code. What JSON has stands for itself: objects for dictionaries
whose keys are text, lists, text, numbers, true, false, null. All else is an object with a key that begins with ``$``:

| JSON | value |
|---|---|
| ``{"$tensor": NAME, ...}``, ``{"$array": NAME, ...}`` | tensor, NumPy array; other keys as ``tensors.parts`` says |
| ``{"$bytes": NAME}`` | bytes, stored as a tensor |
| ``{"$tuple": [...]}``, ``$set``, ``$frozenset``, ``$list`` | that container; ``class`` says another one's class |
| ``{"$dict": [[KEY, VALUE], ...]}`` | dictionary with other keys; ``class`` says another mapping's, or a dataclass |
| ``{"$int": "0x2a"}`` | whole number beyond 2^53 |
| ``{"$float": "nan"}``, ``inf``, ``-inf``, 16 hexadecimal digits | the number; the bits of another NaN |
| ``{"$scalar": [DTYPE, DIGITS]}`` | NumPy scalar, its bytes in hexadecimal digits |
| ``{"$dtype": "float32"}``, ``{"$device": "cpu"}``, ``{"$size": [...]}`` | ``torch.dtype``, ``device``, ``Size`` |
| ``{"$left_out": REASON}`` | :class:`LeftOut`: what no file of numbers and text can hold |
"""

from __future__ import annotations

import math
import struct
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from normzoo._errors import one_line
from normzoo.capsules.arrays import dtype_of, from_bytes, has_bytes

if TYPE_CHECKING:
    from torch import Tensor

MAX_DEPTH = 64
_LONGEST = 40_000_000  # characters of JSON, roughly
_EACH = 20  # characters of a number, or around something else
_EXACT = 2**53  # whole numbers up to which every reader of JSON keeps
_PLAIN_DICTS = (dict, OrderedDict, defaultdict)
_SEQUENCES: dict[str, Callable[[Iterable[Any]], Any]] = {
    "$list": list,
    "$tuple": tuple,
    "$set": set,
    "$frozenset": frozenset,
}


@dataclass(frozen=True)
class LeftOut:
    """Stands in a tree for a value that was left out.

    Attributes:
        reason: the class of the value, or why it was left out.
    """

    reason: str


class Encoded(NamedTuple):
    """A tree as JSON data, the tensors by the names in it, and why what is left out at a path is left out."""

    skeleton: Any
    tensors: dict[str, Tensor]
    left_out: dict[str, str]


def encode(tree: Any) -> Encoded:
    """A tree as JSON data and dense tensors, which are not copied and share the memory of the tree's.

    Tensors of the same values in the same memory have one name. Left out are objects of other classes; tensors of
    which safetensors cannot hold the values (sparse, quantized, nested, without memory); what contains itself, is more
    than 64 levels deep, or no longer fits into 40 million characters.
    """
    encoder = _Encoder()
    return Encoded(encoder.value(tree, ""), encoder.tensors, encoder.left_out)


class _Encoder:
    def __init__(self) -> None:
        import torch

        from normzoo.capsules import tensors

        self.tensors: dict[str, Tensor] = {}
        self.left_out: dict[str, str] = {}
        self._names: dict[tuple[Any, ...], str] = {}
        self._problems: dict[Any, str | None] = {}  # of devices
        self._ancestors: set[int] = set()
        self._room = _LONGEST
        self._of_torch = tensors
        self._methods: tuple[tuple[Any, Callable[[Any, str], Any]], ...] = (
            ((bool, type(None)), lambda value, path: value),
            (str, self._text),
            (bytes, self._bytes),
            (np.generic, self._numpy_scalar),  # of which float64 is a float
            (int, self._int),
            (float, lambda value, path: _float(float.__float__(value))),
            (torch.Tensor, self._tensor),
            (np.ndarray, self._array),
            (torch.dtype, lambda value, path: {"$dtype": str(value).removeprefix("torch.")}),
            (torch.device, lambda value, path: {"$device": str(value)}),
            (torch.Size, lambda value, path: {"$size": list(value)}),
            ((Mapping, list, tuple, set, frozenset, deque), self._container),
            (LeftOut, lambda value, path: self._without(path, value.reason)),
        )

    def value(self, value: Any, path: str) -> Any:
        """A value as JSON data."""
        self._room -= _EACH
        if self._room < 0:
            return self._without(path, f"{_class(value)} beyond the {_LONGEST} characters that a tree may have")
        for classes, method in self._methods:
            if isinstance(value, classes):
                return method(value, path)
        if is_dataclass(value) and not isinstance(value, type):
            return self._container(value, path)
        return self._without(path, _class(value))

    def _without(self, path: str, reason: str) -> dict[str, str]:
        self.left_out[_unused(path or "/", self.left_out)] = reason
        return {"$left_out": reason}

    def _fits(self, characters: int) -> bool:
        if characters > self._room:
            return False
        self._room -= characters
        return True

    def _text(self, value: str, path: str) -> Any:
        text = str.__str__(value)  # of an enumeration, its value
        return text if self._fits(len(text)) else self._without(path, f"text of {len(text)} characters")

    def _int(self, value: int, path: str) -> Any:
        number = int.__index__(value)
        if abs(number) <= _EXACT:
            return number
        fits = self._fits(number.bit_length() // 4)
        return {"$int": hex(number)} if fits else self._without(path, f"number of {number.bit_length()} bits")

    def _numpy_scalar(self, value: np.generic, path: str) -> Any:
        if not has_bytes(value.dtype) or not self._fits(2 * value.nbytes):
            return self._without(path, _class(value))
        return {"$scalar": [value.dtype.str, value.tobytes().hex()]}

    def _bytes(self, value: bytes, path: str) -> Any:
        return self._stored("$bytes", (self._of_torch.bytes_tensor(bytes(value)), {}), path)

    def _array(self, value: np.ndarray, path: str) -> Any:
        if type(value) not in (np.ndarray, np.memmap) or not has_bytes(value.dtype):
            return self._without(path, f"{_class(value)} of {value.dtype}")
        return self._stored("$array", self._of_torch.array_parts(value), path)

    def _tensor(self, value: Tensor, path: str) -> Any:
        reason = self._of_torch.why_not(value) or self._problem(value.device)
        return self._without(path, reason) if reason else self._stored("$tensor", self._of_torch.parts(value), path)

    def _problem(self, device: Any) -> str | None:
        if device not in self._problems:
            self._problems[device] = self._of_torch.unreadable(device)
        return self._problems[device]

    def _stored(self, tag: str, parts: tuple[Tensor, dict[str, Any]], path: str) -> Any:
        dense, about = parts
        alias = self._of_torch.alias(dense)
        name = self._names.get(alias)
        if name is None:
            name = _unused(path or "/", self.tensors)
        if not self._fits(10 * _EACH + 3 * len(name)):
            return self._without(path, "a tensor, as there are too many")
        self._names[alias] = name
        self.tensors.setdefault(name, dense)
        return {tag: name, **about}

    def _container(self, value: Any, path: str) -> Any:
        if id(value) in self._ancestors:
            return self._without(path, f"{_class(value)} that contains itself")
        if len(self._ancestors) == MAX_DEPTH:
            return self._without(path, f"{_class(value)} more than {MAX_DEPTH} levels deep")
        is_sequence = isinstance(value, list | tuple | set | frozenset | deque)
        content = value if is_sequence or isinstance(value, Mapping) else _fields(value)
        if len(content) * _EACH > self._room:
            return self._without(path, f"{_class(value)} of {len(content)} items")
        self._ancestors.add(id(value))
        encoded = self._sequence(value, path) if is_sequence else self._mapping(content, value, path)
        self._ancestors.remove(id(value))
        return encoded

    def _sequence(self, value: Any, path: str) -> Any:
        items = [self.value(item, f"{path}/{index}") for index, item in enumerate(value)]
        if type(value) is list:
            return items
        tag = next((tag for tag, kind in _SEQUENCES.items() if isinstance(value, kind)), "$list")  # type: ignore[arg-type]
        return {tag: items} if type(value) is _SEQUENCES[tag] else {tag: items, "class": _class(value)}

    def _mapping(self, content: Mapping[Any, Any], value: Any, path: str) -> Any:
        pairs = []
        for key, item in content.items():
            if _is_key(key):
                below = f"{path}/{_label(key)}"
                pairs.append((self.value(key, below), self.value(item, below)))
            else:
                self._without(f"{path}/{_class(key)}", f"{_class(key)} as a key")
        if type(value) in _PLAIN_DICTS and all(type(key) is str and key[:1] != "$" for key, _ in pairs):
            return dict(pairs)
        about = {} if type(value) in _PLAIN_DICTS else {"class": _class(value)}
        return {"$dict": pairs, **about}


def _fields(value: Any) -> dict[str, Any]:
    """The fields of a dataclass that are set."""
    return {field.name: getattr(value, field.name) for field in fields(value) if hasattr(value, field.name)}


def _is_key(key: Any) -> bool:
    """Whether a key of a dictionary is kept."""
    if isinstance(key, tuple):
        return all(map(_is_key, key))
    return key is None or isinstance(key, str | int | float | np.number)


def _label(key: Any) -> str:
    """A key in a path."""
    if isinstance(key, tuple):
        return f"({', '.join(map(_label, key))})"
    text = (
        str.__str__(key)
        if isinstance(key, str)
        else hex(key)
        if isinstance(key, int) and abs(key) > _EXACT
        else str(key)
    )
    return text if len(text) <= 100 and text.isprintable() else one_line(text, longest=100)


def _unused(path: str, names: Mapping[str, Any]) -> str:
    while path in names:
        path += "~"
    return path


def _class(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def _float(value: float) -> Any:
    if math.isfinite(value):
        return value
    bits = struct.pack(">d", value)
    known = {struct.pack(">d", float(text)): text for text in ("nan", "inf", "-inf")}
    return {"$float": known.get(bits, bits.hex())}


def decode(skeleton: Any, leaf: Callable[[str, Mapping[str, Any]], Any]) -> Any:
    """The tree of a skeleton; nothing of it is executed.

    Args:
        skeleton: JSON data, as :func:`encode` makes it.
        leaf: called for tensors, arrays and bytes, with their tag and the object, such as ``tensors.leaf`` with a
            ``load``.

    Returns:
        the tree: OrderedDict and defaultdict are dictionaries, containers of classes of their own (namedtuples) are of
        the class that they are based on, of a DTensor there is the rank's part, and a :class:`LeftOut` stands for each
        value that is left out.

    Raises:
        ValueError: if the skeleton is none that :func:`encode` makes.
    """
    try:
        return _decoded(skeleton, leaf, 0)
    except (TypeError, KeyError, IndexError, AttributeError, RuntimeError, OverflowError) as error:  # nothing was run
        raise ValueError(f"no tree of plain data ({type(error).__name__}: {error})") from error


def _decoded(value: Any, leaf: Callable[[str, Mapping[str, Any]], Any], depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise ValueError(f"no tree of plain data (more than {MAX_DEPTH} levels deep)")
    if isinstance(value, list):
        return [_decoded(item, leaf, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value
    tag = next((key for key in value if key[:1] == "$"), None)
    if tag is None:
        return {key: _decoded(item, leaf, depth + 1) for key, item in value.items()}
    if tag in ("$tensor", "$array", "$bytes"):
        return leaf(tag, value)
    content = value[tag]
    if tag == "$dict":
        return {_decoded(key, leaf, depth + 1): _decoded(item, leaf, depth + 1) for key, item in content}
    if tag in _SEQUENCES:
        return _SEQUENCES[tag]([_decoded(item, leaf, depth + 1) for item in content])
    return _SCALARS[tag](content) if tag in _SCALARS else _of_torch(tag, content)


def _of_torch(tag: str, content: Any) -> Any:
    from normzoo.capsules import tensors

    return tensors.plain_object(tag, content)


def _float_from(text: str) -> float:
    if text in ("nan", "inf", "-inf"):
        return float(text)
    number: float = struct.unpack(">d", int(text, 16).to_bytes(8, "big"))[0]
    return number


def _scalar_from(content: Sequence[str]) -> Any:
    dtype, digits = content
    return from_bytes(bytes.fromhex(digits), dtype_of(dtype), ())[()]


_SCALARS: dict[str, Callable[[Any], Any]] = {
    "$int": lambda text: int(text, 16),
    "$float": _float_from,
    "$scalar": _scalar_from,
    "$left_out": lambda reason: LeftOut(str(reason)),
}
