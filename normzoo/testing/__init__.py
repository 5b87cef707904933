"""A conformance suite for normalization layers: what every layer of the zoo promises, for layers of your own too.

:func:`check_norm` runs all checks and lists every broken promise in one error; :func:`norm_checks` gives them one by
one to a test runner; ``CHECKS`` has them by name, the promise as docstring.
"""

from normzoo.testing._promises import Check
from normzoo.testing._subject import Subject
from normzoo.testing._suite import CHECKS, CheckResult, NormCheckError, check_norm, norm_checks

__all__ = ["CHECKS", "Check", "CheckResult", "NormCheckError", "Subject", "check_norm", "norm_checks"]
