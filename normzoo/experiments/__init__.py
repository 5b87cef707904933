"""Experiments that are no training runs: from parameters to the rows of a record, part by part."""

from normzoo.experiments.experiment import Column, Experiment, Figure
from normzoo.experiments.noise_bound import NoiseBound
from normzoo.experiments.random_matrices import RandomMatrices
from normzoo.experiments.running_averages import RunningAverages

__all__ = ["Column", "Experiment", "Figure", "NoiseBound", "RandomMatrices", "RunningAverages"]
