"""How a suite runs its checks: what comes of each, and one error for all promises that are broken."""

from __future__ import annotations

import contextlib
import traceback
import unittest
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from normzoo._errors import UnknownNameError, unknown_name
from normzoo.testing._compare import BrokenError, NotApplicableError
from normzoo.testing._promises import Check, text_of


class CheckError(AssertionError):
    """Promises are broken; the message has each one in words, and the numbers."""


@dataclass(frozen=True)
class CheckResult:
    """What came of one check.

    Attributes:
        name: of the check.
        status: ``"passed"``, ``"skipped"`` (does not apply), or ``"excepted"`` (fails, as was declared).
        detail: why it was skipped or excepted, and how it failed.
    """

    name: str
    status: str
    detail: str = ""


@dataclass(frozen=True)
class Suite:
    """Checks of one kind of thing.

    Args:
        thing: what is checked, for messages.
        checks: by name.
        error: raised for broken promises.
    """

    thing: str
    checks: Mapping[str, Check]
    error: type[CheckError]

    def chosen(self, names: Iterable[str] | None) -> list[str]:
        """These names of checks, by default all.

        Raises:
            UnknownNameError: (a ValueError) for a name that no check has, with the nearest that one has.
        """
        chosen = list(self.checks) if names is None else list(names)
        for name in chosen:
            if name not in self.checks:
                raise UnknownNameError(unknown_name("check", name, self.checks))
        return chosen

    def run(self, subject: Any, names: Iterable[str] | None, exceptions: Mapping[str, str]) -> list[CheckResult]:
        """The results of some checks.

        Args:
            subject: what the checks are given.
            names: of the checks; None for all.
            exceptions: promises that need not be kept, as {check: reason}; such a check must fail.

        Raises:
            CheckError: that lists every broken promise.
        """
        declared = self._declared(exceptions)
        results, broken = [], []
        for name in self.chosen(names):
            try:
                results.append(self._run_one(name, subject, declared.get(name)))
            except BrokenError as error:
                broken.append(self._described(name, error))
        if broken:
            kept = ", ".join(f"{n} {s}" for s in ("passed", "excepted", "skipped") if (n := _count(results, s)))
            some = "1 promise" if len(broken) == 1 else f"{len(broken)} promises"
            raise self.error(f"{subject} breaks {some} ({kept or 'none passed'}):\n\n" + "\n\n".join(broken))
        return results

    def one_by_one(
        self, subject: Any, names: Iterable[str] | None, exceptions: Mapping[str, str]
    ) -> Iterator[tuple[str, Callable[[], CheckResult]]]:
        """(name, check) for each; ``check()`` returns a result, or raises :attr:`error` or ``unittest.SkipTest``."""
        declared = self._declared(exceptions)

        def bound(name: str) -> Callable[[], CheckResult]:
            def check() -> CheckResult:
                try:
                    result = self._run_one(name, subject, declared.get(name))
                except BrokenError as error:
                    raise self.error(f"{subject} breaks a promise:\n\n{self._described(name, error)}") from error
                if result.status == "skipped":
                    raise unittest.SkipTest(f"{subject}: {result.detail}")
                return result

            check.__name__ = name
            return check

        return iter([(name, bound(name)) for name in self.chosen(names)])

    def _declared(self, exceptions: Mapping[str, str]) -> Mapping[str, str]:
        return dict(zip(self.chosen(exceptions), exceptions.values(), strict=True))

    def _run_one(self, name: str, subject: Any, declared: str | None) -> CheckResult:
        """One check; an exception in it breaks the promise too, as does a declared failure that does not come."""
        try:
            with torch.random.fork_rng(devices=[]), torch.enable_grad(), _one_thread():
                torch.manual_seed(0)
                self.checks[name](subject)
        except NotApplicableError as reason:
            return CheckResult(name, "skipped", str(reason))
        except Exception as error:
            breach = error if isinstance(error, BrokenError) else BrokenError(where(error))
            if declared is None:
                raise breach from error
            return CheckResult(name, "excepted", f"{declared} ({breach})")
        if declared is not None:
            raise BrokenError(f"the {self.thing} keeps it, although it is declared an exception: {declared!r}")
        return CheckResult(name, "passed")

    def _described(self, name: str, error: BrokenError) -> str:
        numbers = str(error).replace("\n", "\n      ")
        return f"  {name}: {text_of(self.checks[name])}\n      {numbers}"


def where(error: BaseException) -> str:
    """An exception and the last lines that led to it."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    path = " > ".join(f"{f.filename.rpartition('/')[2]}:{f.lineno} in {f.name}" for f in frames)
    return f"{type(error).__name__}: {error} ({path})"


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """On inputs as small as these threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _count(results: list[CheckResult], status: str) -> int:
    return sum(result.status == status for result in results)
