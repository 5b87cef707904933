"""The two-by-two of a replay: whether the batch or the weights explain that the onset is out of line.

A loss, or the norm of a gradient where that is what is out of line, is known of the suspicious batch and of quiet ones,
at the onset's weights and at the first ones. What rises with the batch at the same weights is the batch's; what rises
with the weights, of quiet batches, is the weights'. Both may be.
"""

from __future__ import annotations

import math
import statistics

from normzoo.causes.view import View, is_broken

TIMES = 3.0  # a norm of a gradient this many times another one is out of line with it
APART = 3  # steps between weights that are not much the same
FAR = 0.05  # times the norm of a weight matrix: an update after which weights are not much the same
PART = 1 / 3  # of the whole rise, on a log scale, that what explains it makes up


class Blame:
    """What the batch explains and what the weights do, each True, False or None.

    Args:
        view: of the evidence.

    Attributes:
        of: ``"norm"`` or ``"loss"``, what is compared.
        steps_between: from the first weights to the onset's.
    """

    def __init__(self, view: View) -> None:
        self.view = view
        onset, first = (view.number("data_or_state", "weights", place) for place in (0, 1))
        self.steps_between = 0.0 if onset is None or first is None else onset - first
        by, rule = view.of("course", "onset_by"), view.of("about", "rule")
        loss_is_finite = not is_broken(self._at("loss", 0, 0))
        by_norm = by == "norm" or (by == "alarm" and rule == "gradient spike") or (by == "nonfinite" and loss_is_finite)
        self.of = "norm" if by_norm and self._at("norm", 0, 0) is not None else "loss"

    def batch_alone(self) -> bool | None:
        """Whether, at the onset's weights, the batch is out of line with quiet ones."""
        return self._explains(self._at(self.of, 0, 0), self._others())

    def batch_early(self) -> bool | None:
        """Whether, at the first weights, the batch is out of line with a quiet one; these have to be other weights.

        Weights of the steps right before are if an update has moved them far.
        """
        return None if not self._weights_differ() else self._explains(self._at(self.of, 0, 1), self._at(self.of, 1, 1))

    def by_weights(self) -> bool | None:
        """Whether the batch's loss is above that of a quiet one at the onset's weights, and not at the first."""
        if not self._weights_differ():
            return None
        now, early = (self.view.is_high(self._at("loss", 0, place), self._at("loss", 1, place)) for place in (0, 1))
        return None if now is None or early is None else now and not early

    def weights_alone(self) -> bool | None:
        """Whether quiet batches at the onset's weights are out of line with those at the first weights."""
        return None if not self.steps_between else self._explains(self._others(), self._quiet())

    def _weights_differ(self) -> bool:
        """Whether the onset's weights are others than the first: some steps later, or after a far update."""
        updates = self.view.series("relative_update")
        before = [x for step, x in updates.items() if self.view.onset is None or step < self.view.onset]
        moved = max((math.inf if math.isnan(x) else x for x in before), default=0.0)
        return self.steps_between >= APART or (self.steps_between > 0 and moved > FAR)

    def is_high(self, value: float | None, reference: float | None) -> bool | None:
        """Whether a value is out of line with another one."""
        if self.of == "loss":
            return self.view.is_high(value, reference)
        if value is None or reference is None:
            return None
        return not value <= TIMES * reference

    def _explains(self, value: float | None, reference: float | None) -> bool | None:
        high = self.is_high(value, reference)
        whole = _rise(self._at(self.of, 0, 0), self._quiet())
        own = _rise(value, reference)
        if not high or whole is None or own is None or not 0 < whole < math.inf:
            return high
        return own >= PART * whole

    def _quiet(self) -> float | None:
        """What is usual: at the first weights, or in the quiet steps if that is less."""
        known = [self._at(self.of, 1, 1), self.view.quiet_loss if self.of == "loss" else None]
        return min((x for x in known if x is not None and math.isfinite(x)), default=None)

    def _others(self) -> float | None:
        """Of quiet batches at the onset's weights."""
        others = self.view.numbers("data_or_state", "others") if self.of == "loss" else []
        known = [x for x in (self._at(self.of, 1, 0), *others) if x is not None]
        return statistics.median(math.inf if math.isnan(x) else x for x in known) if known else None

    def _at(self, of: str, batch: int, weights: int) -> float | None:
        return self.view.number("data_or_state", of, batch, weights)


def _rise(value: float | None, reference: float | None) -> float | None:
    """From a reference to a value, on a log scale; None where that cannot be told."""
    if value is None or reference is None or not 0 < reference < math.inf or value <= 0:
        return None
    return math.log(value / reference) if math.isfinite(value) else math.inf
