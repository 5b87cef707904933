"""The suite: every promise checked, and one error for all that are broken."""

from __future__ import annotations

import contextlib
import traceback
import unittest
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from normzoo._errors import UnknownNameError, unknown_name
from normzoo.testing import _autograd, _distributed, _export, _formula, _layout, _memory, _modes, _precision, _torch
from normzoo.testing._compare import BrokenError, NotApplicableError
from normzoo.testing._promises import Check, text_of
from normzoo.testing._subject import Factory, Reference, Subject

CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        _formula.signature,
        _layout.ranks,
        _formula.reference,
        _formula.gradcheck,
        _formula.gradgradcheck,
        _layout.channel_dim,
        _layout.memory_format,
        _precision.half_precision,
        _precision.mixed_precision,
        _precision.autocast,
        _formula.large_offset,
        _layout.degenerate,
        _layout.one_value,
        _layout.empty,
        _layout.bad_input,
        _modes.train_eval,
        _modes.batch_dependence,
        _modes.running_statistics,
        _modes.num_batches_tracked,
        _modes.momentum_none,
        _torch.state_dict,
        _torch.copies,
        _torch.meta,
        _torch.functional_call,
        _torch.fx,
        _torch.output_overwritten,
        _torch.input_kept,
        _autograd.checkpointing,
        _autograd.batched_gradients,
        _memory.saved_memory,
        _formula.affine_false,
        _formula.activation,
        _memory.no_host_sync,
        _distributed.sync,
        _export.compile,
        _export.export,
        _export.export_dynamic,
        _export.onnx,
    )
}


class NormCheckError(AssertionError):
    """A layer breaks promises; the message has each one in words, and the numbers."""


@dataclass(frozen=True)
class CheckResult:
    """What came of one check.

    Attributes:
        name: of the check, as in ``CHECKS``.
        status: ``"passed"``, ``"skipped"`` (does not apply), or ``"excepted"`` (fails, as was declared).
        detail: why it was skipped or excepted, and how it failed.
    """

    name: str
    status: str
    detail: str = ""


def check_norm(
    factory: str | Factory,
    *,
    num_features: int = 6,
    reference: Reference | None = None,
    exceptions: Mapping[str, str] | None = None,
    checks: Iterable[str] | None = None,
    batch_statistics: bool | None = None,
) -> list[CheckResult]:
    """Hold a normalization layer to every promise of ``CHECKS``.

    Args:
        factory: a registered name such as ``"batch"``, or a callable
            ``factory(num_features, *, ..., device=None, dtype=None)``: a class, or one with options bound, as
            ``normzoo.get_norm("group", groups=2)`` returns it. A registered layer whose default ``groups`` does not
            divide the channels is made with the smallest number above one that does. Inputs are channels first; one
            whose ``channel_dim`` is -1 is made with 1, and the check of that name holds -1 to it.
        num_features: channels of the layers that are made, at least 2.
        reference: ``reference(layer, x) -> y``, the formula written in another way: ``x`` is float64, the layer is in
            training or evaluation and as it was before this input. ``(y, state)`` says as well what the layer holds
            afterwards, by name; names that are left out are not compared.
        exceptions: promises that the layer cannot keep by its nature, as {check: reason}; such a check must fail. By
            default what the registry declares.
        checks: names of the checks to run; by default all, which takes half a minute, most of it in the slow ones:
            ``[n for n, c in CHECKS.items() if not c.slow]`` leaves them out.
        batch_statistics: whether training output depends on the other samples of the batch. By default what the
            registry declares; of other layers it is only asked that evaluation does not, and that one whose samples
            are independent does the same in training as in evaluation.

    Returns:
        one result for each check that was run, in their order.

    Raises:
        NormCheckError: an AssertionError that lists every broken promise with the numbers.
        ValueError: for names that are not in ``CHECKS``, with the nearest that are.

    Example:
        >>> from normzoo.testing import check_norm
        >>> [result.status for result in check_norm("layer", checks=["signature", "momentum_none"])]
        ['passed', 'skipped']
    """
    subject = Subject(factory, num_features, reference, batch_statistics)
    declared = _declared(subject, exceptions)
    results, broken = [], []
    for name in _chosen(checks):
        try:
            results.append(_run(name, subject, declared.get(name)))
        except BrokenError as error:
            broken.append(_told(name, error))
    if broken:
        kept = ", ".join(f"{n} {s}" for s in ("passed", "excepted", "skipped") if (n := _count(results, s)))
        some = "1 promise" if len(broken) == 1 else f"{len(broken)} promises"
        raise NormCheckError(f"{subject} breaks {some} ({kept or 'none passed'}):\n\n" + "\n\n".join(broken))
    return results


def norm_checks(
    factory: str | Factory,
    *,
    num_features: int = 6,
    reference: Reference | None = None,
    exceptions: Mapping[str, str] | None = None,
    checks: Iterable[str] | None = None,
    batch_statistics: bool | None = None,
) -> Iterator[tuple[str, Callable[[], CheckResult]]]:
    """The checks one by one, for ``pytest.mark.parametrize``; arguments as for :func:`check_norm`.

    Yields:
        (name, check); ``check()`` returns a :class:`CheckResult`, raises :class:`NormCheckError` if the promise is
        broken, and ``unittest.SkipTest``, which pytest reports as skipped, if it does not apply.

    Example:
        >>> for name, check in norm_checks("layer", checks=["signature", "affine_false"]):
        ...     print(name, check().status)
        signature passed
        affine_false passed
    """
    subject = Subject(factory, num_features, reference, batch_statistics)
    declared = _declared(subject, exceptions)

    def bound(name: str) -> Callable[[], CheckResult]:
        def check() -> CheckResult:
            try:
                result = _run(name, subject, declared.get(name))
            except BrokenError as error:
                raise NormCheckError(f"{subject} breaks a promise:\n\n{_told(name, error)}") from error
            if result.status == "skipped":
                raise unittest.SkipTest(f"{subject}: {result.detail}")
            return result

        check.__name__ = name
        return check

    return iter([(name, bound(name)) for name in _chosen(checks)])


def _run(name: str, subject: Subject, declared: str | None) -> CheckResult:
    """One check; what the layer raises in it breaks the promise too, as does a declared failure that does not come."""
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), _one_thread():
            torch.manual_seed(0)
            CHECKS[name](subject)
    except NotApplicableError as reason:
        return CheckResult(name, "skipped", str(reason))
    except Exception as error:
        told = error if isinstance(error, BrokenError) else BrokenError(_where(error))
        if declared is None:
            raise told from error
        return CheckResult(name, "excepted", f"{declared} ({told})")
    if declared is not None:
        raise BrokenError(f"the layer keeps it, although it is declared an exception: {declared!r}")
    return CheckResult(name, "passed")


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """On inputs as small as these threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _where(error: Exception) -> str:
    """An exception and the last lines that led to it."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    path = " > ".join(f"{f.filename.rpartition('/')[2]}:{f.lineno} in {f.name}" for f in frames)
    return f"{type(error).__name__}: {error} ({path})"


def _told(name: str, error: BrokenError) -> str:
    numbers = str(error).replace("\n", "\n      ")
    return f"  {name}: {text_of(CHECKS[name])}\n      {numbers}"


def _count(results: list[CheckResult], status: str) -> int:
    return sum(result.status == status for result in results)


def _declared(subject: Subject, exceptions: Mapping[str, str] | None) -> Mapping[str, str]:
    if exceptions is None:
        exceptions = subject.info.exceptions if subject.info else {}
    return dict(zip(_chosen(exceptions), exceptions.values(), strict=True))


def _chosen(names: Iterable[str] | None) -> list[str]:
    chosen = list(CHECKS) if names is None else list(names)
    for name in chosen:
        if name not in CHECKS:
            raise UnknownNameError(unknown_name("check", name, CHECKS))
    return chosen
