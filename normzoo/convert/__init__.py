"""Any model, any norm: conversion that keeps what the model knows."""

from normzoo.convert._convert import convert_norms
from normzoo.convert._report import ConversionReport, ConvertedSite, Movement

__all__ = ["ConversionReport", "ConvertedSite", "Movement", "convert_norms"]
