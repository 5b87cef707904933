"""Replays capsules: makes the steps before a divergence again, tries things on them, and names the cause."""

from normzoo.replaying.replay import replay
from normzoo.replaying.steps import ReplayError

__all__ = ["ReplayError", "replay"]
