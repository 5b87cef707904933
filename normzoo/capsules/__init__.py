"""Capsules: what is needed to explain a divergence, in a folder of JSON, safetensors and records."""

from normzoo.capsules.reading import Capsule, load_capsule
from normzoo.capsules.sealed import CapsuleError

__all__ = ["Capsule", "CapsuleError", "load_capsule"]
