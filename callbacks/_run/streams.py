"""The random streams of a process, as plain data."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def random_streams(device: torch.device) -> dict[str, Any]:
    """The states of torch's, NumPy's and Python's global generators, without waiting for a GPU.

    Args:
        device: whose generator of torch is saved beside that of the CPU.

    Returns:
        ``torch`` and ``cuda`` (None on a CPU), uint8 tensors; ``numpy`` and ``python``, dicts and tuples of numbers.
    """
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": np.random.get_state(legacy=False),
        "python": random.getstate(),
    }


def set_random_streams(streams: dict[str, Any], device: torch.device) -> None:
    """Go on from what :func:`random_streams` returned."""
    torch.set_rng_state(streams["torch"])
    if streams["cuda"] is not None:
        torch.cuda.set_rng_state(streams["cuda"], device)
    np.random.set_state(streams["numpy"])
    random.setstate(streams["python"])
