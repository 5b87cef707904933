"""Settings of the whole suite."""

import atexit
import functools
import gc
import importlib.metadata
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

# How fast an example runs depends on what else the machine does.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")

# Each Trainer looks for callbacks among the entry points of all installed packages: a tenth of a small fit.
importlib.metadata.entry_points = functools.cache(importlib.metadata.entry_points)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Collect tests, which leaves hardly any garbage, without the garbage collector: it takes a third of the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish() -> None:
    """Keep the collected tests out of the garbage collector, of which each full run would walk millions of objects."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # extension modules report what is not collected at exit


@pytest.fixture(scope="module", autouse=True)
def _earlier_modules_are_not_walked() -> None:
    """Keep objects of earlier test modules out as well: folding collects garbage, 0.2 s each time late in the suite."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _settings_of_torch_end_with_the_test() -> Iterator[None]:
    """Put back what ``Trainer(deterministic=True, benchmark=True)`` sets for the rest of the process."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.backends.cudnn.benchmark = benchmark
