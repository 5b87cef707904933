"""Runs with planted causes, for planted_divergences.py."""
