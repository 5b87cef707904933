"""Lightning callbacks that measure why a run is stable or not, and never disturb it."""

if __name__ != "normzoo.callbacks":
    raise ImportError(
        f"import normzoo.callbacks, not {__name__}: a second copy of its classes would not be the same classes"
    )

from normzoo.callbacks._schedule import Every, LogSpaced, Warmup
from normzoo.callbacks.channel_moments import ChannelMoments
from normzoo.callbacks.divergence import Divergence
from normzoo.callbacks.gradient_noise import GradientNoise
from normzoo.callbacks.gradient_tails import GradientTails
from normzoo.callbacks.relative_loss import RelativeLoss

__all__ = [
    "ChannelMoments",
    "Divergence",
    "Every",
    "GradientNoise",
    "GradientTails",
    "LogSpaced",
    "RelativeLoss",
    "Warmup",
]
