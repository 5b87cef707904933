"""The normalization layers, one family a file."""

from normzoo.layers.batch import BatchNorm
from normzoo.layers.group import GroupNorm, InstanceNorm, LayerNorm
from normzoo.layers.none import NoNorm
from normzoo.layers.renorm import BatchRenorm

__all__ = ["BatchNorm", "BatchRenorm", "GroupNorm", "InstanceNorm", "LayerNorm", "NoNorm"]
