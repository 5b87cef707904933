"""The conformance suite for measurements. It needs Lightning, and is imported when it is used."""

from normzoo.testing.measurements._suite import (
    MEASUREMENT_CHECKS,
    MeasurementCheckError,
    check_measurement,
    measurement_checks,
)

__all__ = ["MEASUREMENT_CHECKS", "MeasurementCheckError", "check_measurement", "measurement_checks"]
