"""Experiments that are no training runs: from parameters to the rows of a record, part by part."""

from normzoo.experiments.experiment import Column, Experiment, Figure

__all__ = ["Column", "Experiment", "Figure"]
