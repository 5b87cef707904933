"""What counts as a divergence: rules that judge losses, norms of gradients, the loss scale and activations."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from normzoo.callbacks._run.facts import Run
from normzoo.callbacks._run.modules import SIDES, Site, find_modules, none_found
from normzoo.callbacks.schedule import is_number, is_whole
from normzoo.functional.spikes import modified_z_score

KINDS = ("loss", "gradient_norm", "scale", "activations")  # what a rule may need


@dataclass(frozen=True)
class Flag:
    """What a rule says of a value that has diverged.

    Attributes:
        rule: the text of the column ``rule``.
        value: that has diverged.
        rank: that had it; None for a value that all ranks share.
        why: the same for people, as part of a sentence: ``"the loss 2000 is above 1000"``.
    """

    rule: str
    value: float
    rank: int | None = None
    why: str = ""


@dataclass(frozen=True)
class Seen:
    """What there is to judge: losses, scale and activations of a micro-batch, or the norms of the gradient of a step.

    Values are on the host and the same on all ranks. What has not come is empty or None.

    Attributes:
        step: optimizer steps made before it.
        losses: of the micro-batch, for each rank; None where a rank had none.
        norms: Euclidean norms of the gradient before clipping, by the index of the optimizer.
        scale: of the GradScaler, after the micro-batch.
        activations: largest magnitudes by (name of the module, ``"input"`` or ``"output"``), for each rank; None where
            a rank did not call the module.
        scaler: whether a GradScaler skips steps whose gradients are not finite.
    """

    step: int
    losses: Sequence[float | None] = ()
    norms: Mapping[int, float] = field(default_factory=dict)
    scale: float | None = None
    activations: Mapping[Site, Sequence[float | None]] = field(default_factory=dict)
    scaler: bool = False

    @property
    def kinds(self) -> frozenset[str]:
        """Which kinds of values it holds, of ``"loss"``, ``"gradient_norm"``, ``"scale"`` and ``"activations"``."""
        held = (bool(_ranked(self.losses)), bool(self.norms), self.scale is not None, bool(self.activations))
        return frozenset(kind for kind, holds in zip(KINDS, held, strict=True) if holds)


class Rule:
    """Base of all rules, ours and anybody's: small objects that judge values as they come, alike on all ranks.

    A subclass says what it :attr:`needs` and defines :meth:`judge`. One that remembers values takes them in
    :meth:`passed`, which values that have diverged never reach, and saves them by :meth:`state_dict`. Its ``__init__``
    must not depend on the run; :class:`Divergence` judges by copies, made anew for each run.

    Attributes:
        needs: of ``"loss"``, ``"gradient_norm"``, ``"scale"`` and ``"activations"``; a rule is asked when one of those
            that it needs has come.

    Example:
        >>> class LossRises(Rule):
        ...     '''The loss has risen at so many micro-batches in a row.'''
        ...
        ...     def __init__(self, times: int) -> None:
        ...         self.times, self.last, self.rises = times, float("inf"), 0
        ...
        ...     def judge(self, seen):
        ...         loss = max(loss for loss in seen.losses if loss is not None)
        ...         self.rises = self.rises + 1 if loss > self.last else 0
        ...         self.last = loss
        ...         return Flag("loss rises", loss) if self.rises >= self.times else None
        ...
        ...     def state_dict(self):
        ...         return {"last": self.last, "rises": self.rises}
        ...
        ...     def load_state_dict(self, state):
        ...         self.last, self.rises = state["last"], state["rises"]
        >>> rule = LossRises(2)
        >>> [rule.judge(Seen(step, losses=[loss])) is not None for step, loss in enumerate([3.0, 1.0, 1.5, 2.0])]
        [False, False, False, True]
    """

    needs: ClassVar[frozenset[str]] = frozenset({"loss"})

    def judge(self, seen: Seen) -> Flag | None:
        """Say whether a value has diverged; called for all values, in order."""
        raise NotImplementedError

    def passed(self, seen: Seen) -> None:
        """Take in values that no rule of the :class:`Divergence` has flagged."""

    def sites(self, run: Run) -> dict[Site, nn.Module]:
        """The modules whose activations it needs, by (name, ``"input"`` or ``"output"``)."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: numbers, texts, lists and dictionaries by text."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""


class LossAbove(Rule):
    """The loss of a rank is above a threshold (``threshold``), or not finite (``not finite``).

    A GradScaler skips a step whose loss is not finite, which is then no divergence: see :class:`SkippedSteps`.

    Args:
        threshold: of the mini-batch loss.

    Raises:
        ValueError: for a threshold not above 0.

    Source: threshold of 10^3 from Bjorck et al. 2018, arXiv 1806.02375, their experiments on divergence.
    """

    def __init__(self, threshold: float = 1e3) -> None:
        self.threshold = _positive("threshold", threshold)

    def judge(self, seen: Seen) -> Flag | None:
        """The first loss that is not finite, else the largest if it is above the threshold."""
        odd, finite = _split(seen.losses)
        if odd and not seen.scaler:
            return _not_finite(*odd[0])
        loss, rank = max(finite, key=_value, default=(0.0, 0))
        if not loss > self.threshold:
            return None
        return Flag("threshold", loss, rank, f"the loss {loss:.6g} is above {self.threshold:g}")


class LossSpike(Rule):
    """The largest loss over ranks is far above those before it (``spike``), or, if asked for, far below (``drop``).

    The distance is from the median of the last ``window`` losses, in robust standard deviations of these, 1.4826 times
    the median absolute deviation (:func:`normzoo.functional.modified_z_score`), so it fits losses of either sign and of
    any scale. Nothing is a spike before there are ``window`` losses; a loss that is not finite always is a divergence
    (``not finite``), unless a GradScaler skips its step.

    Args:
        deviations: how many robust standard deviations are too many; 5 passes Gaussian noise, 15 skewed noise.
        window: how many losses the median is over, without losses that have diverged.
        two_sided: a loss as far below the median of the smallest losses over ranks has diverged too.

    Raises:
        ValueError: for ``deviations`` not above 0, or a window below 1.
    """

    def __init__(self, deviations: float = 15.0, window: int = 50, two_sided: bool = False) -> None:
        self.deviations, self.two_sided = _positive("deviations", deviations), two_sided
        self.window = _count("window", window)
        self._largest: deque[float] = deque(maxlen=window)
        self._smallest: deque[float] = deque(maxlen=window)

    def judge(self, seen: Seen) -> Flag | None:
        """Compare the largest and the smallest loss over ranks with those before them."""
        odd, finite = _split(seen.losses)
        if odd and not seen.scaler:
            return _not_finite(*odd[0])
        if len(self._largest) < self.window or not finite:
            return None
        loss, rank = max(finite, key=_value)
        if (score := modified_z_score(loss, self._largest)) > self.deviations:
            return Flag("spike", loss, rank, self._why(loss, score, "above"))
        loss, rank = min(finite, key=_value)
        if self.two_sided and (score := modified_z_score(loss, self._smallest)) < -self.deviations:
            return Flag("drop", loss, rank, self._why(loss, -score, "below"))
        return None

    def passed(self, seen: Seen) -> None:
        """Add the largest and the smallest loss to the windows."""
        losses = [loss for loss, _ in _split(seen.losses)[1]]
        if losses:
            self._largest.append(max(losses))
            self._smallest.append(min(losses))

    def state_dict(self) -> dict[str, Any]:
        """The losses in the windows."""
        return {"largest": list(self._largest), "smallest": list(self._smallest)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the losses in the windows."""
        self._largest, self._smallest = (deque(state[name], self.window) for name in ("largest", "smallest"))

    def _why(self, loss: float, score: float, side: str) -> str:
        return f"the loss {loss:.6g} is {score:.3g} robust standard deviations {side} the last {self.window}"


class GradientNotFinite(Rule):
    """The norm of a gradient is not finite (``gradient not finite``).

    A GradScaler skips such a step, which is then no divergence: see :class:`SkippedSteps`. Norms are accumulated in
    float32, so that one above about 1e19 is infinite.
    """

    needs = frozenset({"gradient_norm"})

    def judge(self, seen: Seen) -> Flag | None:
        """The first norm that is not finite."""
        odd = [norm for norm in seen.norms.values() if not math.isfinite(norm)]
        if not odd or seen.scaler:
            return None
        return Flag("gradient not finite", odd[0], why=f"the norm of the gradient is {odd[0]}")


class GradientSpike(Rule):
    """The norm of a gradient is far above those before it (``gradient spike``), of each optimizer for itself.

    It is far above if it passes both ``factor`` times the median of the last norms and ``deviations`` robust standard
    deviations above that median, 1.4826 times the median absolute deviation. ``factor`` keeps small rises from being
    flagged where norms vary little, ``deviations`` where norms vary by decades. A norm that is not
    finite is left to :class:`GradientNotFinite`, and after nothing but zeros no norm is a spike.

    The defaults are for alarms that are nearly always right. Of healthy norms, drawn anew at each step, they flag less
    than 1 in 100,000 if the norms are lognormal and their logarithm has a standard deviation of 0.5, 1 in 10,000 if it
    has 1, and 1 in 15,000 of the magnitudes of Student's t with 3 degrees of freedom or of the norms of vectors of such
    values; three to six times as many while there are 10 norms.

    Args:
        deviations: how many robust standard deviations above the median are too many.
        factor: how many times the median is too much.
        window: how many norms the median is over, without norms that have diverged.
        least: how many norms there have to be before one can be a spike.

    Raises:
        ValueError: for ``deviations`` or ``factor`` not above 0, for counts below 1, and for more ``least`` than
            ``window``.
    """

    needs = frozenset({"gradient_norm"})

    def __init__(self, deviations: float = 50.0, factor: float = 10.0, window: int = 50, least: int = 10) -> None:
        self.deviations, self.factor = _positive("deviations", deviations), _positive("factor", factor)
        self.window, self.least = _count("window", window), _count("least", least)
        if least > window:
            raise ValueError(f"least must be at most window, which is {window}, not {least}")
        self._recent: dict[int, deque[float]] = {}

    def judge(self, seen: Seen) -> Flag | None:
        """Compare each optimizer's norm with those before it."""
        for optimizer, norm in seen.norms.items():
            recent = self._recent.get(optimizer, ())
            if len(recent) < self.least or not math.isfinite(norm):
                continue
            median = statistics.median(recent)
            if 0 < self.factor * median < norm and modified_z_score(norm, recent) > self.deviations:
                why = f"the norm of the gradient is {norm:.6g}, {norm / median:.3g} times the median of the last"
                return Flag("gradient spike", norm, why=f"{why} {len(recent)}")
        return None

    def passed(self, seen: Seen) -> None:
        """Add the norms to the windows."""
        for optimizer, norm in seen.norms.items():
            if math.isfinite(norm):
                self._recent.setdefault(optimizer, deque(maxlen=self.window)).append(norm)

    def state_dict(self) -> dict[str, Any]:
        """The norms in the windows, by optimizer."""
        return {"recent": [[optimizer, list(norms)] for optimizer, norms in self._recent.items()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the norms in the windows."""
        self._recent = {optimizer: deque(norms, self.window) for optimizer, norms in state["recent"]}


class SkippedSteps(Rule):
    """A GradScaler skips steps in a row (``skipped steps``), or its scale falls below 1 (``scale``).

    A step is skipped where gradients are not finite, which is seen as a scale that has fallen. Some are skipped in a
    healthy run whenever the scale has grown, and at the start, while a scale is looked for: those before the first step
    that is made do not count. Weights that are not finite have all steps skipped.

    Args:
        steps: how many in a row are too many.

    Raises:
        ValueError: for ``steps`` below 1.
    """

    needs = frozenset({"scale"})

    def __init__(self, steps: int = 8) -> None:
        self.steps = _count("steps", steps)
        self._step = -1  # that was seen last, of which there may be several micro-batches
        self._scale = 0.0  # after it
        self._fell = False  # whether it was skipped; of the first one that is not known
        self._made = False  # whether there was one before it that was not
        self._skipped = 0  # steps in a row

    def judge(self, seen: Seen) -> Flag | None:
        """Count the steps in a row after which the scale had fallen."""
        assert seen.scale is not None
        if seen.step != self._step:
            self._made |= self._step >= 0 and not self._fell
            self._skipped = self._skipped if self._fell else 0
            self._step, self._fell = seen.step, self._step < 0
        fell, self._scale = seen.scale < self._scale, seen.scale
        if fell and not self._fell:
            self._fell, self._skipped = True, self._skipped + self._made
        if fell and self._skipped >= self.steps:
            why = f"the GradScaler skipped {self._skipped} steps in a row"
            return Flag("skipped steps", float(self._skipped), why=why)
        if seen.scale < 1:
            return Flag("scale", seen.scale, why=f"the scale of the GradScaler fell to {seen.scale:g}")
        return None

    def state_dict(self) -> dict[str, Any]:
        """The last step and scale, and how many steps in a row were skipped."""
        last = {"step": self._step, "scale": self._scale}
        return {**last, "fell": self._fell, "made": self._made, "skipped": self._skipped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the last step and scale."""
        self._step, self._scale, self._skipped = state["step"], state["scale"], state["skipped"]
        self._fell, self._made = state["fell"], state["made"]


class ActivationsAbove(Rule):
    """What a module is given or returns has a magnitude above a threshold, or not finite (``activations of MODULE``).

    Args:
        threshold: of the largest magnitude; float16 ends at 65504.
        sites: ``"norms"``, all normalization layers; or names of modules, with ``*`` as in a shell; or a list of these.
        where: ``"input"`` (the first argument that is a tensor) or ``"output"``.

    Raises:
        ValueError: for a threshold not above 0, no site, or another side; at setup if no module matches.
    """

    needs = frozenset({"activations"})

    def __init__(self, threshold: float, sites: str | Sequence[str] = "norms", where: str = "output") -> None:
        self.threshold = _positive("threshold", threshold)
        if not sites:
            raise ValueError("sites must be 'norms' or at least one name or pattern of modules; it is empty")
        if where not in SIDES:
            raise ValueError(f"where must be one of {', '.join(map(repr, SIDES))}, not {where!r}")
        self.patterns, self.where = sites, where
        self._sites: Collection[Site] = ()

    def sites(self, run: Run) -> dict[Site, nn.Module]:
        """The modules that are norms, or whose names match."""
        matching = find_modules(run.module, self.patterns)
        if not matching:
            raise ValueError(f"ActivationsAbove has nothing to follow: {none_found(run.module, self.patterns)}")
        sites = {(name, self.where): module for name, module in matching.items()}
        self._sites = [*sites]
        return sites

    def judge(self, seen: Seen) -> Flag | None:
        """The first site, in the order of the network, at which a rank is above the threshold."""
        for name, side in self._sites:
            values = _ranked(seen.activations.get((name, side), ()))
            for value, rank in values:
                if not value <= self.threshold:
                    why = f"the largest magnitude of the {side} of {name} is {value:.6g}, above {self.threshold:g}"
                    return Flag(f"activations of {name}", value, rank, why)
        return None


def _ranked(values: Iterable[float | None]) -> list[tuple[float, int]]:
    """(value, rank) of the ranks that have one."""
    return [(value, rank) for rank, value in enumerate(values) if value is not None]


def _split(values: Iterable[float | None]) -> tuple[list[tuple[float, int]], list[tuple[float, int]]]:
    """(value, rank) of values that are not finite, and of those that are."""
    ranked = _ranked(values)
    return [v for v in ranked if not math.isfinite(v[0])], [v for v in ranked if math.isfinite(v[0])]


def _value(pair: tuple[float, int]) -> float:
    return pair[0]


def _not_finite(loss: float, rank: int) -> Flag:
    return Flag("not finite", loss, rank, f"the loss is {loss}")


def _positive(name: str, value: float) -> float:
    if not (is_number(value) and value > 0):
        raise ValueError(f"{name} must be a number above 0, not {value!r}")
    return value


def _count(name: str, value: int) -> int:
    if not (is_whole(value) and value > 0):
        raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
    return value
