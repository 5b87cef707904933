"""Every registered layer keeps what the suite promises, or declares why it cannot."""

from __future__ import annotations

import pytest

import normzoo
from normzoo.testing import CHECKS, check_norm, norm_checks

SLOW_FOR = "batch_renorm"  # the layer whose slow checks are run with the fast ones


def _cases() -> list:
    cases = []
    for layer in normzoo.list_norms():
        for name, check in norm_checks(layer):
            slow = CHECKS[name].slow and layer != SLOW_FOR
            cases.append(pytest.param(check, id=f"{layer}-{name}", marks=[pytest.mark.slow] if slow else []))
    return cases


@pytest.mark.parametrize("check", _cases())
def test_registered_layer(check):
    check()


OPTIONS = [
    ("batch", {"affine": False, "momentum": None}),
    ("batch_renorm", {"r_max": 1.0, "d_max": 0.0, "average": "variance"}),
    ("ghost_batch", {"ghost_size": 32, "channel_dim": -1}),
    ("group", {"groups": 3, "eps": 1e-3}),
    ("layer_channel", {"channel_dim": -1}),
    ("rms", {"bias": True}),
    ("power", {"groups": 3}),
]


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_registered_layer_with_options(name, options):
    fast = [n for n, check in CHECKS.items() if not check.slow and n != "sync"]
    results = check_norm(normzoo.get_norm(name, **options), checks=fast)
    assert sum(result.status == "passed" for result in results) > 18


class FlatGhostBatchNorm(normzoo.norm_info("ghost_batch").layer_class):
    def normalize(self, x):
        if x.ndim > 2:
            raise ValueError(f"no maps: {tuple(x.shape)}")
        return super().normalize(x)


def test_the_variance_of_samples_without_space_is_not_kept():
    (result,) = check_norm(FlatGhostBatchNorm, checks=["saved_memory"])
    assert result.status == "passed"
