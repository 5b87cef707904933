"""The mathematics, as pure functions of tensors; the classes elsewhere only add state."""

from normzoo.functional.batch import batch_norm, update_running
from normzoo.functional.batch_draws import draw_batches, squared_deviations
from normzoo.functional.channel_moments import (
    channel_moments,
    dead_channels,
    merge_moments,
    moment_drift,
    moments_variance,
)
from normzoo.functional.class_gradients import images_led
from normzoo.functional.elementwise import channel_scale_shift, dynamic_erf, dynamic_tanh
from normzoo.functional.evo import evonorm_b0, evonorm_s0
from normzoo.functional.filter_response import filter_response_norm
from normzoo.functional.fuss_catalan import fuss_catalan_cdf, fuss_catalan_density, fuss_catalan_edge
from normzoo.functional.ghost import ghost_batch_norm
from normzoo.functional.gradient_changes import gradient_changes, gradient_predictiveness
from normzoo.functional.gradient_sums import channel_means, convolution_gradient_sums
from normzoo.functional.group import group_norm, instance_norm, layer_norm
from normzoo.functional.kolmogorov_smirnov import kolmogorov_smirnov
from normzoo.functional.l1 import l1_batch_norm
from normzoo.functional.lanczos import Ritz, lanczos, ritz_values
from normzoo.functional.local import divisive_norm, local_response_norm
from normzoo.functional.mixed import batch_group_norm, batch_instance_norm, switchable_norm
from normzoo.functional.noise import gradient_noise, noise_scale, update_noise_bound
from normzoo.functional.online import online_norm
from normzoo.functional.position import channel_layer_norm, positional_norm, rms_norm
from normzoo.functional.power import power_norm
from normzoo.functional.proxy import proxy_norm
from normzoo.functional.relative_loss import (
    Headroom,
    bounded_headroom,
    learning_rate_headroom,
    relative_loss,
)
from normzoo.functional.renorm import batch_renorm, piecewise_linear
from normzoo.functional.spikes import modified_z_score
from normzoo.functional.stability import adam_bound, adam_preconditioner, sgd_bound
from normzoo.functional.tails import (
    excess_kurtosis,
    hill_estimator,
    moment_estimator,
    power_law_fit,
    quantile_ratio,
    stable_index,
)
from normzoo.functional.weight import scale_weight, standardize_weight
from normzoo.functional.whitening import iter_norm

__all__ = [
    "Headroom",
    "Ritz",
    "adam_bound",
    "adam_preconditioner",
    "batch_group_norm",
    "batch_instance_norm",
    "batch_norm",
    "batch_renorm",
    "bounded_headroom",
    "channel_layer_norm",
    "channel_means",
    "channel_moments",
    "channel_scale_shift",
    "convolution_gradient_sums",
    "dead_channels",
    "divisive_norm",
    "draw_batches",
    "dynamic_erf",
    "dynamic_tanh",
    "evonorm_b0",
    "evonorm_s0",
    "excess_kurtosis",
    "filter_response_norm",
    "fuss_catalan_cdf",
    "fuss_catalan_density",
    "fuss_catalan_edge",
    "ghost_batch_norm",
    "gradient_changes",
    "gradient_noise",
    "gradient_predictiveness",
    "group_norm",
    "hill_estimator",
    "images_led",
    "instance_norm",
    "iter_norm",
    "kolmogorov_smirnov",
    "l1_batch_norm",
    "lanczos",
    "layer_norm",
    "learning_rate_headroom",
    "local_response_norm",
    "merge_moments",
    "modified_z_score",
    "moment_drift",
    "moment_estimator",
    "moments_variance",
    "noise_scale",
    "online_norm",
    "piecewise_linear",
    "positional_norm",
    "power_law_fit",
    "power_norm",
    "proxy_norm",
    "quantile_ratio",
    "relative_loss",
    "ritz_values",
    "rms_norm",
    "scale_weight",
    "sgd_bound",
    "squared_deviations",
    "stable_index",
    "standardize_weight",
    "switchable_norm",
    "update_noise_bound",
    "update_running",
]
