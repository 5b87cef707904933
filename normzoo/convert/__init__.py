"""Any model, any norm: conversion that keeps what the model knows."""

from normzoo.changes import LeftSite
from normzoo.convert._convert import convert_norms
from normzoo.convert._report import ConversionReport, ConvertedSite, FoldedSite, FoldReport, Movement

__all__ = ["ConversionReport", "ConvertedSite", "FoldReport", "FoldedSite", "LeftSite", "Movement", "convert_norms"]
