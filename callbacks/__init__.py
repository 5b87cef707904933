"""Measurements: Lightning callbacks that tell why a run is stable or not, and never disturb it."""

if __name__ != "normzoo.callbacks":
    raise ImportError(
        f"import normzoo.callbacks, not {__name__}: a second copy of its classes would not be the same classes"
    )

from normzoo.callbacks.actions import Action, Alarm, DivergenceError, DivergenceExit, Raise, Record, Stop
from normzoo.callbacks.channel_moments import ChannelMoments
from normzoo.callbacks.class_gradients import ClassGradients
from normzoo.callbacks.divergence import Divergence
from normzoo.callbacks.gradient_noise import GradientNoise
from normzoo.callbacks.gradient_norm import GradientNorm
from normzoo.callbacks.gradient_predictiveness import GradientPredictiveness
from normzoo.callbacks.gradient_sums import GradientSums
from normzoo.callbacks.gradient_tails import GradientTails
from normzoo.callbacks.measurement import Column, Figure, Measurement, Run, Sample, Step
from normzoo.callbacks.parameter_norms import ParameterNorms
from normzoo.callbacks.recorder import Recorder
from normzoo.callbacks.relative_loss import RelativeLoss
from normzoo.callbacks.rules import (
    ActivationsAbove,
    Flag,
    GradientNotFinite,
    GradientSpike,
    LossAbove,
    LossSpike,
    Rule,
    Seen,
    SkippedSteps,
)
from normzoo.callbacks.sample_ids import RecordingBatchSampler
from normzoo.callbacks.schedule import Every, LogSpaced, Warmup
from normzoo.callbacks.sharpness import Sharpness

__all__ = [
    "Action",
    "ActivationsAbove",
    "Alarm",
    "ChannelMoments",
    "ClassGradients",
    "Column",
    "Divergence",
    "DivergenceError",
    "DivergenceExit",
    "Every",
    "Figure",
    "Flag",
    "GradientNoise",
    "GradientNorm",
    "GradientNotFinite",
    "GradientPredictiveness",
    "GradientSpike",
    "GradientSums",
    "GradientTails",
    "LogSpaced",
    "LossAbove",
    "LossSpike",
    "Measurement",
    "ParameterNorms",
    "Raise",
    "Record",
    "Recorder",
    "RecordingBatchSampler",
    "RelativeLoss",
    "Rule",
    "Run",
    "Sample",
    "Seen",
    "Sharpness",
    "SkippedSteps",
    "Step",
    "Stop",
    "Warmup",
]
