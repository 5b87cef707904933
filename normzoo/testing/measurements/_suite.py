"""The suite for measurements: every promise checked, and one error for all that are broken."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from normzoo.testing._promises import Check
from normzoo.testing._running import CheckError, CheckResult, Suite
from normzoo.testing.measurements import _loop, _path, _perturbation, _ranks, _record, _runs
from normzoo.testing.measurements._fits import Factory, Net, Subject

MEASUREMENT_CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        _record.record,
        _runs.schedule,
        _perturbation.zero_perturbation,
        _perturbation.interruption,
        _path.no_host_read,
        _path.cost,
        _runs.accumulation,
        _runs.grad_scaler,
        _runs.manual_optimization,
        _runs.several_optimizers,
        _runs.resume,
        _runs.second_fit,
        _runs.two_of_a_class,
        _runs.copies,
        _loop.watch,
        _ranks.ranks,
        _ranks.sharded_gradients,
        _ranks.perturbation_on_ranks,
        _record.state_keys,
        _record.elsewhere,
    )
}


class MeasurementCheckError(CheckError):
    """A measurement breaks promises; the message has each one in words, and the numbers."""


SUITE = Suite("measurement", MEASUREMENT_CHECKS, MeasurementCheckError)


def check_measurement(
    factory: Factory,
    *,
    net: Net | None = None,
    union: str = "batch",
    exceptions: Mapping[str, str] | None = None,
    checks: Iterable[str] | None = None,
) -> list[CheckResult]:
    """Hold a measurement to every promise of ``MEASUREMENT_CHECKS``.

    Args:
        factory: ``factory(every_n_steps=..., dirpath=..., label=...)``, which makes a
            :class:`normzoo.callbacks.Measurement`: its class, or that with options bound by ``functools.partial``. It
            has to leave rows in a fit of 8 steps of which each is sampled.
        net: makes the network that is trained, of (N, 3, 6, 6) to (N, 4), without dropout and batch statistics; by
            default one of two residual blocks with group normalization.
        union: what one rank has in the place of two: ``"batch"``, batches twice as large; or ``"micro-batches"``, twice
            as many of them in a step, for a measurement that compares micro-batches.
        exceptions: promises that the measurement cannot keep by its nature, as {check: reason}; such a check must fail.
        checks: names of the checks to run; by default all. The slow ones start a new process, which imports torch:
            ``[n for n, c in MEASUREMENT_CHECKS.items() if not c.slow]`` leaves them out.

    Returns:
        one result for each check that was run, in their order. A check is ``"skipped"`` where the measurement refuses a
        run as it may: by a ValueError before the first batch, of one line that names the class.

    Raises:
        MeasurementCheckError: an AssertionError that lists every broken promise with the numbers.
        TypeError: for a factory that cannot be called.
        ValueError: for names that are not in ``MEASUREMENT_CHECKS``, with the nearest that are; and for a ``union``
            that there is not.

    Example:
        >>> from normzoo.callbacks import GradientTails
        >>> from normzoo.testing import check_measurement
        >>> [result.status for result in check_measurement(GradientTails, checks=["record"])]
        ['passed']
    """
    return SUITE.run(Subject(factory, net, union), checks, exceptions or {})


def measurement_checks(
    factory: Factory,
    *,
    net: Net | None = None,
    union: str = "batch",
    exceptions: Mapping[str, str] | None = None,
    checks: Iterable[str] | None = None,
) -> Iterator[tuple[str, Callable[[], CheckResult]]]:
    """The checks one by one, for ``pytest.mark.parametrize``; arguments as for :func:`check_measurement`.

    Yields:
        (name, check); ``check()`` returns a :class:`CheckResult`, raises :class:`MeasurementCheckError` if the promise
        is broken, and ``unittest.SkipTest``, which pytest reports as skipped, if it does not apply. Checks of one call
        share their fits.
    """
    return SUITE.one_by_one(Subject(factory, net, union), checks, exceptions or {})
