"""Conformance suites: what every layer and every measurement of the package promises, for your own too.

:func:`check_norm` and :func:`check_measurement` run all checks and list every broken promise in one error;
:func:`norm_checks` and :func:`measurement_checks` give them one by one to a test runner; ``CHECKS`` and
``MEASUREMENT_CHECKS`` have them by name, the promise as docstring. The suite for measurements, and
:class:`FaultInjector`, a callback that breaks a run on purpose, import Lightning when they are used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from normzoo.testing._promises import Check
from normzoo.testing._running import CheckError, CheckResult
from normzoo.testing._subject import Subject
from normzoo.testing._suite import CHECKS, NormCheckError, check_norm, norm_checks

if TYPE_CHECKING:
    from normzoo.testing.faults import FAULTS, FaultInjector, InjectedFaultError
    from normzoo.testing.measurements import (
        MEASUREMENT_CHECKS,
        MeasurementCheckError,
        check_measurement,
        measurement_checks,
    )

__all__ = [
    "CHECKS",
    "FAULTS",
    "MEASUREMENT_CHECKS",
    "Check",
    "CheckError",
    "CheckResult",
    "FaultInjector",
    "InjectedFaultError",
    "MeasurementCheckError",
    "NormCheckError",
    "Subject",
    "check_measurement",
    "check_norm",
    "measurement_checks",
    "norm_checks",
]
_OF_MEASUREMENTS = ("MEASUREMENT_CHECKS", "MeasurementCheckError", "check_measurement", "measurement_checks")
_OF_FAULTS = ("FAULTS", "FaultInjector", "InjectedFaultError")


def __getattr__(name: str) -> Any:
    if name in _OF_FAULTS:
        return getattr(importlib.import_module("normzoo.testing.faults"), name)
    if name in _OF_MEASUREMENTS:
        return getattr(importlib.import_module("normzoo.testing.measurements"), name)
    raise AttributeError(f"module 'normzoo.testing' has no attribute {name!r}")
