"""torchmetrics classes for what normzoo measures; no Lightning in them."""

from normzoo.metrics.channel_moments import ChannelMoments
from normzoo.metrics.log_histogram import LogHistogram
from normzoo.metrics.noise_scale import NoiseScale

__all__ = ["ChannelMoments", "LogHistogram", "NoiseScale"]
