"""The mathematics, as pure functions of tensors; the classes elsewhere only add state."""

from normzoo.functional.batch import batch_norm, update_running
from normzoo.functional.group import group_norm, instance_norm, layer_norm
from normzoo.functional.relative_loss import learning_rate_headroom, relative_loss
from normzoo.functional.renorm import batch_renorm, piecewise_linear
from normzoo.functional.tails import excess_kurtosis, hill_estimator, stable_index

__all__ = [
    "batch_norm",
    "batch_renorm",
    "excess_kurtosis",
    "group_norm",
    "hill_estimator",
    "instance_norm",
    "layer_norm",
    "learning_rate_headroom",
    "piecewise_linear",
    "relative_loss",
    "stable_index",
    "update_running",
]
