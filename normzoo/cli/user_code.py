"""Objects of a user's code by ``package.module:Name`` or ``train.py:Name``, without training that a script starts."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import sys
import threading
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, NoReturn

from normzoo._components import reason
from normzoo._errors import RecipeError, shown, unknown_name

_STARTS = ("fit", "validate", "test", "predict")  # of a Trainer
_SLOW = 20.0  # seconds of an import after which it is said what is waited for


_left: set[str] = set()  # the names of modules whose code was left where it would train


class _TrainingError(BaseException):
    """Leaves a script at the place where it would train; no ``except Exception`` of the script stops it."""


def load_object(path: str, option: str, kind: type | None) -> Any:
    """An object from a user's code, which is imported.

    A script that trains when it is imported, as its training does not stand under ``if __name__ == "__main__":``, is
    left where it would start: what it has defined by then is at hand.

    Args:
        path: ``package.module:Name``, importable from the present folder, or ``folder/train.py:Name``; of a file with
            one class of ``kind`` the file alone.
        option: of the command, for messages.
        kind: of the classes that messages name; None for functions.

    Raises:
        RecipeError: if it cannot be imported, or has no such name.
    """
    place, _, name = path.rpartition(":")
    if not place and path.endswith(".py"):
        place, name = path, ""
    elif not place:
        place, _, name = path.rpartition(".")
    if not place or (not name and not place.endswith(".py")):
        raise RecipeError(f"{option}: expected package.module:Name or train.py:Name, not {shown(path)}")
    module = _from_file(Path(place), option) if place.endswith(".py") else _from_name(place, option)
    own, what = _names(module, kind), "function" if kind is None else kind.__name__
    if not name:
        if len(own) != 1:
            has = f"it has {', '.join(own)}" if own else "it has none"
            raise RecipeError(f"{option}: {place}: expected a file with one {what}, and {has}; give {place}:Name")
        name = own[0]
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            trains = " It trains before; put that under if __name__ == '__main__':" if module.__name__ in _left else ""
            raise RecipeError(f"{option}: {place}: {unknown_name(what, name, own)}{trains}")
        found = getattr(found, part)
    return found


def load_recorded(path: str, file: str | None, option: str, kind: type) -> Any:
    """An object of a class path that was recorded where the class was in use, and the file that it was in then.

    Raises:
        RecipeError: if the file is not there any more, or as for :func:`load_object`.
    """
    place, _, name = path.partition(":")
    if "<locals>" in name:
        raise RecipeError(f"{option}: the run's module is of the class {path}, defined in a function; give --module")
    if place == "__main__" or not place.replace(".", "").isidentifier():  # of a script, or of one run by runpy
        if file is None or not Path(file).is_file():
            gone = f"{file}, which is not there" if file else "a session, such as a notebook"
            raise RecipeError(
                f"{option}: the run's module is of the class {name} of {gone}; give --module FILE.py:{name}"
            )
        return load_object(f"{file}:{name}", option, kind)
    if file is not None and Path(file).is_file() and _spec(place) is None:
        sys.path.append(str(Path(file).parents[place.count(".") + (Path(file).stem == "__init__")]))
    return load_object(path, option, kind)


def _from_name(name: str, option: str) -> ModuleType:
    if os.getcwd() not in sys.path:  # a user's own module, as with python -m
        sys.path.append(os.getcwd())
    if name in sys.modules:
        return sys.modules[name]
    spec = _spec(name, option)
    if spec is None or spec.loader is None:
        there = " (the file is there: give its path)" if Path(f"{name}.py").is_file() else ""
        raise RecipeError(f"{option}: there is no module {shown(name)} to import from {os.getcwd()}{there}")
    module = _executed(spec, option)
    parent, _, last = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], last, module)
    return module


def _from_file(file: Path, option: str) -> ModuleType:
    if not file.is_file():
        raise RecipeError(f"{option}: {file} is {'not a file' if file.exists() else 'not there'}")
    folder = str(file.absolute().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # as for a script
    name = re.sub(r"\W", "_", file.stem)
    known = sys.modules[name].__spec__ if name in sys.modules else _spec(name)
    if known is not None and known.origin != str(file.absolute()):  # another module of this name
        name = re.sub(r"\W", "_", str(file.absolute()))
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file.absolute())
    assert spec is not None
    return _executed(spec, option)


def _spec(name: str, option: str = "") -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except ModuleNotFoundError:  # its package
        return None
    except Exception as error:  # a user's package may fail in any way while it is imported
        if not option:
            return None
        raise RecipeError(f"{option}: cannot import {shown(name)}: {reason(error)}") from error


def _executed(spec: ModuleSpec, option: str) -> ModuleType:
    """The module of a spec, all of it or as far as it goes without training."""
    module = importlib.util.module_from_spec(spec)
    assert spec.loader is not None
    sys.modules[spec.name] = module
    place = spec.origin or spec.name
    arguments, sys.argv = sys.argv, [place]  # a script reads its own
    waiting = threading.Timer(_SLOW, _tell_slow, [place])
    waiting.daemon = True
    waiting.start()
    try:
        with _no_training(spec):
            spec.loader.exec_module(module)
    except _TrainingError:
        _left.add(spec.name)
    except (Exception, SystemExit) as error:  # a user's module may fail in any way while it is imported
        del sys.modules[spec.name]
        what = "it ends the program" if isinstance(error, SystemExit) else reason(error)
        raise RecipeError(f"{option}: cannot import {place}: {what}") from error
    finally:
        waiting.cancel()
        sys.argv = arguments
    return module


@contextlib.contextmanager
def _no_training(spec: ModuleSpec) -> Iterator[None]:
    """Inside, a Trainer that is to train leaves the code that asks it."""
    import lightning.pytorch

    owners: list[Any] = [lightning.pytorch.Trainer]
    other = "pytorch_lightning"  # has a Trainer of its own, and takes a second to import
    source = str(spec.origin)
    text = Path(source).read_text(errors="replace") if source.endswith(".py") else ""
    if other in sys.modules or other in text:
        owners.append(importlib.import_module(other).Trainer)
    before = [(owner, name, vars(owner)[name]) for owner in owners for name in _STARTS]
    for owner, name, _ in before:
        setattr(owner, name, _refuse)
    try:
        yield
    finally:
        for owner, name, method in before:
            setattr(owner, name, method)


def _refuse(*args: Any, **options: Any) -> NoReturn:
    """Stands in for ``Trainer.fit``."""
    raise _TrainingError


def _tell_slow(place: str) -> None:
    print(
        f"normzoo: importing {place} has taken {_SLOW:.0f} s; what it does outside of functions and of "
        "if __name__ == '__main__': is done when it is imported",
        file=sys.stderr,
        flush=True,
    )


def _names(module: ModuleType, kind: type | None) -> list[str]:
    """The names of the classes of a kind, or of the functions, that a module defines."""

    def fits(value: Any) -> bool:
        return isinstance(value, FunctionType) if kind is None else isinstance(value, type) and is_of(value, kind)

    defined = {name: value for name, value in vars(module).items() if fits(value)}
    return [name for name, value in defined.items() if value.__module__ == module.__name__]


def is_of(cls: type, kind: type) -> bool:
    """Whether a class is of a kind, known by the kind's name: each of the packages of Lightning has its own."""
    return any(base.__name__ == kind.__name__ for base in cls.__mro__)
