"""Running statistics after training: estimated anew, frozen; and which parameters take weight decay."""

from normzoo.statistics._freeze import freeze_norms
from normzoo.statistics._groups import param_groups
from normzoo.statistics._reestimate import ReestimatedSite, ReestimationReport, reestimate_statistics

__all__ = ["ReestimatedSite", "ReestimationReport", "freeze_norms", "param_groups", "reestimate_statistics"]
