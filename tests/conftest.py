"""Settings of the whole suite."""

import atexit
import gc

from hypothesis import HealthCheck, settings

# How fast an example runs depends on what else the machine does.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


def pytest_collection_finish() -> None:
    """Keep the collected tests out of the garbage collector, of which each full run would walk millions of objects."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # extension modules report what is not collected at exit
