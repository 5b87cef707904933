"""Settings of the whole suite."""

from hypothesis import HealthCheck, settings

# How fast an example runs depends on what else the machine does.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")
