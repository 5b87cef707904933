"""Merging the states of two metrics."""

from typing import Any, Self

from torch import Tensor
from torchmetrics import Metric


class MergingMetric(Metric):
    """A metric whose states merge only with states of the same shape and meaning."""

    def merge_state(self, incoming_state: "dict[str, Any] | Metric") -> None:
        """Add the state of another metric, which may be on another device, to this one.

        Args:
            incoming_state: a metric of this class, made with the same sizes; or its states by name.

        Raises:
            ValueError: for a metric of another class, or of other sizes.
            RuntimeError: for one whose states cannot be added up, such as moving averages.
        """
        updates = 1
        if isinstance(incoming_state, type(self)):
            self._check_mergeable(incoming_state)
            updates = incoming_state._update_count
            incoming_state = incoming_state.metric_state
        if isinstance(incoming_state, dict):
            incoming_state = {name: state.to(self.device) for name, state in incoming_state.items()}
            for name, state in incoming_state.items():
                own = self.metric_state.get(name)
                if isinstance(own, Tensor) and state.shape != own.shape:  # which might be broadcast
                    raise ValueError(
                        f"{name} of shape {tuple(state.shape)} cannot be merged into that of a {type(self).__name__} "
                        f"of shape {tuple(own.shape)}"
                    )
        super().merge_state(incoming_state)
        self._computed = None  # which torchmetrics would go on returning
        self._update_count += updates

    def _check_mergeable(self, other: Self) -> None:
        """Raise a ValueError for a metric whose state has another meaning, though it may have the same shape."""
