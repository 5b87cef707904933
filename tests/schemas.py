"""The schemas of the package's own records, by name."""

from __future__ import annotations

from normzoo import callbacks
from normzoo.callbacks import Measurement

MEASUREMENTS: dict[str, type[Measurement]] = {
    c.name: c for c in map(callbacks.__dict__.get, callbacks.__all__) if getattr(c, "name", "") and c is not Measurement
}
SCHEMAS = {name: measurement.schema for name, measurement in MEASUREMENTS.items()}
