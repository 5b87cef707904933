"""torchmetrics classes for what normzoo measures; no Lightning in them."""

from normzoo.metrics.log_histogram import LogHistogram

__all__ = ["LogHistogram"]
