"""The normalization layers, one family a file."""

from normzoo.layers.batch import BatchNorm, FrozenBatchNorm, GhostBatchNorm, L1BatchNorm
from normzoo.layers.elementwise import Affine, DynamicErf, DynamicTanh
from normzoo.layers.evo import EvoNormB0, EvoNormS0
from normzoo.layers.filter_response import FilterResponseNorm
from normzoo.layers.group import GroupNorm, InstanceNorm, LayerNorm
from normzoo.layers.local import DivisiveNorm, LocalResponseNorm
from normzoo.layers.mixed import BatchGroupNorm, BatchInstanceNorm, SwitchableNorm
from normzoo.layers.none import NoNorm
from normzoo.layers.online import OnlineNorm
from normzoo.layers.position import ChannelLayerNorm, PositionalNorm, RMSNorm
from normzoo.layers.power import PowerNorm
from normzoo.layers.proxy import ProxyNorm
from normzoo.layers.renorm import BatchRenorm
from normzoo.layers.whitening import IterNorm

__all__ = [
    "Affine",
    "BatchGroupNorm",
    "BatchInstanceNorm",
    "BatchNorm",
    "BatchRenorm",
    "ChannelLayerNorm",
    "DivisiveNorm",
    "DynamicErf",
    "DynamicTanh",
    "EvoNormB0",
    "EvoNormS0",
    "FilterResponseNorm",
    "FrozenBatchNorm",
    "GhostBatchNorm",
    "GroupNorm",
    "InstanceNorm",
    "IterNorm",
    "L1BatchNorm",
    "LayerNorm",
    "LocalResponseNorm",
    "NoNorm",
    "OnlineNorm",
    "PositionalNorm",
    "PowerNorm",
    "ProxyNorm",
    "RMSNorm",
    "SwitchableNorm",
]
