"""The verdict on a run: rules asked in one order, and one alarm for one divergence."""

from __future__ import annotations

import copy
import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from normzoo.callbacks.actions import Alarm
from normzoo.callbacks.rules import Flag, LossSpike, Rule, Seen

QUIET_STEPS = 50  # without a flagged value, after which a divergence is another one
_OF_LOSSES = ("threshold", "not finite", "spike", "drop")


class Judge:
    """Asks rules about values as they come, and says which of those that they flag is an alarm.

    Args:
        rules: asked in this order; the first one that flags a value names the alarm.

    Attributes:
        rules: copies of those given, which remember what they have seen.
        step: steps made before the first value that diverged, or None.
        loss: of the mini-batch in which that was, or None.
        rule: that flagged it, or None.
    """

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._fresh = copy.deepcopy([*rules])
        windows = [rule.window for rule in rules if isinstance(rule, LossSpike)]
        self._losses_kept = max(windows, default=QUIET_STEPS)
        self.reset()

    def reset(self) -> None:
        """Forget all that was seen."""
        self.rules = copy.deepcopy(self._fresh)
        self.step: int | None = None
        self.loss: float | None = None
        self.rule: str | None = None
        self._flagged: int | None = None  # the step of the last value that a rule flagged
        self._largest: deque[float] = deque(maxlen=self._losses_kept)  # over ranks, of losses that no rule flagged
        self._smallest: deque[float] = deque(maxlen=self._losses_kept)

    def judge(self, seen: Seen) -> tuple[Alarm, float | None] | None:
        """Ask all rules, some of which count; an alarm if one flags a value, and none did in the steps before.

        Returns:
            the alarm, and the loss of the mini-batch: the largest over ranks, of a ``drop`` the smallest, where one
            that is not finite counts as infinite; None if values are no losses.
        """
        kinds = seen.kinds
        rules = [rule for rule in self.rules if rule.needs & kinds]
        flag = next(filter(None, [rule.judge(seen) for rule in rules]), None)
        losses = [loss for loss in seen.losses if loss is not None]
        if flag is None:
            for rule in rules:
                rule.passed(seen)
            if finite := [*filter(math.isfinite, losses)]:
                self._largest.append(max(finite))
                self._smallest.append(min(finite))
            return None
        goes_on = self._flagged is not None and seen.step - self._flagged <= QUIET_STEPS
        self._flagged = seen.step
        if goes_on:
            return None
        worst = min if flag.rule == "drop" else max
        loss = worst(loss if math.isfinite(loss) else math.inf for loss in losses) if losses else None
        if self.step is None:
            self.step, self.loss, self.rule = seen.step, loss, flag.rule
        return Alarm(seen.step, flag.rule, flag.value, flag.rank, why=self._why(flag, len(seen.losses))), loss

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: numbers, texts, lists and dictionaries by text."""
        return {
            "step": self.step,
            "loss": self.loss,
            "rule": self.rule,
            "recent": list(self._largest),
            "smallest": list(self._smallest),
            "flagged": self._flagged,
            "rules": [[type(rule).__name__, rule.state_dict()] for rule in self.rules],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned, in this version or the one before; rules may be others now."""
        self.reset()
        self.step, self.loss, self.rule = state["step"], state["loss"], state["rule"]
        largest, smallest = state["recent"], state.get("smallest", state["recent"])
        finite = [pair for pair in zip(largest, smallest, strict=True) if all(map(math.isfinite, pair))]
        self._largest.extend(high for high, _ in finite)
        self._smallest.extend(low for _, low in finite)
        self._flagged = state.get("flagged", self.step)
        windows = {"largest": list(self._largest), "smallest": list(self._smallest)}
        saved = [*state.get("rules", [[LossSpike.__name__, windows]])]
        for rule in self.rules:
            places = [i for i, (name, _) in enumerate(saved) if name == type(rule).__name__]
            if places:
                rule.load_state_dict(saved.pop(places[0])[1])

    def _why(self, flag: Flag, ranks: int) -> str:
        """The flag for people: the rank, if there are several, and which losses there were before."""
        rank = f" on rank {flag.rank}" if flag.rank is not None and ranks > 1 else ""
        recent = self._smallest if flag.rule == "drop" else self._largest
        before = ""
        if flag.rule in _OF_LOSSES and recent:
            before = f"; the median of the losses before it is {statistics.median(recent):.6g}"
        return f"{flag.why or f'{flag.rule}, {flag.value:.6g}'}{rank}{before}"
