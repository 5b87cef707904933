"""Titles of the figures and tables of a replay on the report's page, which findings point at."""

SAME = "The same steps again"
COURSE = "Loss on the batch before and after its update"
GRADIENT = "Norm of the gradient at the replayed steps"
BATCH_AND_WEIGHTS = "The batch and the weights"
INPUTS = "Inputs of the batch"
SAMPLES = "Losses of single samples"
PARAMETERS = "Parameters put back"
FRACTIONS = "Loss along the update"
CHANNELS = "Variance of channels along the update"
DEPTH = "Activations over depth along the update"
MODULES = "Outputs of modules, the batch and a quiet one"
FIRST_BAD = "The first bad module"
NORM_LAYERS = "Channels of normalization layers"
TRIALS = "What would have held"

TITLES = (
    SAME,
    COURSE,
    GRADIENT,
    BATCH_AND_WEIGHTS,
    INPUTS,
    SAMPLES,
    PARAMETERS,
    FRACTIONS,
    CHANNELS,
    DEPTH,
    MODULES,
    FIRST_BAD,
    NORM_LAYERS,
    TRIALS,
)
"""All of them, in the order of the five questions."""
