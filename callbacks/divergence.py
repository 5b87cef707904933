"""When a run diverges, and whether to stop it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from torch import Tensor

from normzoo.callbacks.measurement import Column, Measurement, Run, Sample, Step
from normzoo.callbacks.schedule import Schedule, is_number, is_whole
from normzoo.functional.spikes import modified_z_score


class Divergence(Measurement):
    """Records, and on request stops, a run whose mini-batch loss passes a threshold or is not finite.

    It holds for the job if it holds on any rank: the largest loss over ranks is taken, so all ranks decide alike, at
    the same step. The loss is read one step late, so a stop comes one step after. Written to the record
    ``divergence``, and logged as ``divergence/loss`` at the step where it happened.

    Args:
        *when: a schedule; or a number, which is read as the threshold for one more version, with a warning.
        every_n_steps: judge the losses when the number of optimizer steps made is a multiple of this; or a schedule.
        threshold: of the mini-batch loss; above it, or not finite, the run has diverged.
        spike: also diverged if the loss is further than this above the median of the last ``window`` losses, in robust
            standard deviations of these, 1.4826 times the median absolute deviation
            (:func:`normzoo.functional.modified_z_score`); 5 passes Gaussian noise, 15 skewed noise. None
            leaves the rule out.
        window: how many losses the median is over; the rule waits until there are as many. Losses that are not finite
            or that a rule calls a divergence are left out.
        two_sided: a loss that is as far below the median has diverged too (the rule ``drop``).
        stop: end training once the run has diverged; otherwise it is only recorded.
        dirpath: folder of the record; by default that of the Trainer's first logger, else a new one.
        label: sets the callback apart from others of its class: the record goes to a folder of this name in that one,
            and log keys begin with it.

    Attributes:
        step: optimizer steps taken when the diverged loss was computed, or None.
        loss: that loss, or None.

    Raises:
        ValueError: for thresholds not above 0; at setup for unsupported strategies; at the first step if
            ``training_step`` returns no loss under manual optimization.

    Source: threshold from Bjorck et al. 2018, arXiv 1806.02375, their experiments on divergence.
    """

    name = "divergence"
    row = "the first divergence; no row if there was none"
    columns = (
        Column(
            "loss",
            "float",
            "loss of the mini-batch that diverged, largest over ranks, of a `drop` smallest; NaN counts as infinite",
            logged=True,
        ),
        Column("rule", "text", "`threshold`, `not finite`, `spike` or, with `two_sided`, `drop`"),
        Column("stopped", "bool", "whether the callback ended training"),
    )
    needs = frozenset({"loss"})
    unit = "micro-batch"
    reduce = "max"

    def __init__(
        self,
        *when: float | Schedule,
        every_n_steps: int | Schedule = 1,
        threshold: float = 1e3,
        spike: float | None = None,
        window: int = 50,
        two_sided: bool = False,
        stop: bool = False,
        dirpath: str | None = None,
        label: str | None = None,
    ) -> None:
        if len(when) > 1:
            raise TypeError(f"Divergence takes one argument without a name, a schedule, not {len(when)}")
        for first in when:
            if is_number(first):
                rank_zero_warn(
                    f"Divergence({first:g}) is read as its threshold; from the next version on the first argument says "
                    f"when to look, as for all measurements: pass threshold={first:g}, or every_n_steps=n"
                )
                threshold = first
            else:
                every_n_steps = first  # type: ignore[assignment]
        for argument, value in (("threshold", threshold), ("spike", 1.0 if spike is None else spike)):
            if not (is_number(value) and value > 0):
                raise ValueError(f"{argument} must be a number above 0, not {value!r}")
        if not (is_whole(window) and window > 0):
            raise ValueError(f"window must be a whole number of losses above 0, not {window!r}")
        if two_sided and spike is None:
            raise ValueError("two_sided=True is about the rule spike; pass spike=, how far a loss may be off")
        super().__init__(every_n_steps, dirpath=dirpath, label=label)
        self.threshold, self.spike, self.two_sided, self.stop = threshold, spike, two_sided, stop
        self.step: int | None = None
        self.loss: float | None = None
        self._rule: str | None = None
        self._recent: deque[float] = deque(maxlen=window)  # the largest over ranks
        self._smallest: deque[float] = deque(maxlen=window)

    def begin(self, run: Run) -> None:
        """Continue the record; a divergence between two optimizer steps may be older than a checkpoint at its step."""
        super().begin(run)
        if self.step is not None and self.step >= run.step and self._record is not None:
            self._record.append([self._row()])

    def measure(self, step: Step) -> dict[str, Tensor]:
        """The largest and the smallest loss over ranks; a rank whose step returned no loss takes part as well."""
        if step.loss is None:
            return {"extremes": torch.full((2,), -math.inf, dtype=torch.float32, device=step.run.device)}
        value = step.loss.float().reshape(())
        return {"extremes": torch.nan_to_num(torch.stack([value, -value]), math.inf, math.inf, math.inf)}

    def rows(self, sample: Sample, values: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """Judge a loss; a row if it is the first divergence."""
        largest, negated = values["extremes"].tolist()
        if largest == -math.inf:  # no rank had one
            return []
        rule = self.verdict(largest, -negated)
        if rule is None:
            self._recent.append(largest)
            self._smallest.append(-negated)
        if rule is None or self.step is not None:
            return []
        self.step, self.loss, self._rule = sample.step, -negated if rule == "drop" else largest, rule
        return [self._row()]

    def act(self, run: Run, rows: Sequence[Mapping[str, Any]]) -> None:
        """End training if that was asked for."""
        if rows and self.stop:
            run.stop()

    def verdict(self, loss: float, smallest: float | None = None) -> str | None:
        """Which rule says that a loss, after the recent ones, is a divergence; None if none does.

        Args:
            loss: the largest over ranks.
            smallest: the smallest over ranks; by default ``loss``.
        """
        if not math.isfinite(loss):
            return "not finite"
        if loss > self.threshold:
            return "threshold"
        if self.spike is None or len(self._recent) < self._recent.maxlen:  # type: ignore[operator]
            return None
        if modified_z_score(loss, self._recent) > self.spike:
            return "spike"
        lowest = loss if smallest is None else smallest
        return "drop" if self.two_sided and modified_z_score(lowest, self._smallest) < -self.spike else None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        recent = {"recent": list(self._recent), "smallest": list(self._smallest)}
        return {"step": self.step, "loss": self.loss, "rule": self._rule, **recent}

    def restore(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self.forget()
        self.step, self.loss, self._rule = state_dict["step"], state_dict["loss"], state_dict["rule"]
        largest = state_dict["recent"]
        smallest = state_dict.get("smallest", largest)
        kept = [pair for pair in zip(largest, smallest, strict=True) if all(map(math.isfinite, pair))]
        self._recent.extend(high for high, _ in kept)
        self._smallest.extend(low for _, low in kept)

    def forget(self) -> None:
        """Drop the verdict and the losses of another run."""
        self.step = self.loss = self._rule = None
        self._recent.clear()
        self._smallest.clear()

    def _row(self) -> dict[str, Any]:
        return {"step": self.step, "loss": self.loss, "rule": self._rule, "stopped": self.stop}
