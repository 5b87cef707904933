"""The parameter that is most suspicious, by what was found of parameters before."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from normzoo.causes.suspects import running_away
from normzoo.causes.view import View

_BAD = 0.5  # times the loss with all parameters put back: a smaller rise has nothing to be put back for


def suspicious_parameter(evidence: Mapping[str, Any]) -> tuple[Mapping[str, Any] | None, bool]:
    """The most suspicious parameter, or module, and whether it runs away, or putting it back alone restores the loss.

    That is the one that runs away (:func:`normzoo.causes.suspects.running_away`); else of the fewest parameters which
    restore the loss the one with the smallest loss; if none does, the parameter that has grown most.

    Args:
        evidence: with the facts ``course`` and ``parameters``.

    Returns:
        an entry of ``put_back`` or ``growth``, with its ``name``; None without any.

    Example:
        >>> put_back = [{"name": "scale", "loss": [0.3, 2.0]}, {"name": "fc.weight", "loss": [9.0, 9.0]}]
        >>> facts = {"put_back": put_back, "loss_before": [9.5, 9.5], "loss_all_back": [0.2, 2.0]}
        >>> suspicious_parameter({"parameters": facts})[0]["name"]
        'scale'
    """
    if (away := running_away(View(evidence))) is not None:
        return away.evidence, True
    facts = evidence.get("parameters") or {}
    before, back = _first(facts.get("loss_before")), _first(facts.get("loss_all_back"))
    if before > back + _BAD * abs(back):
        limit = math.sqrt(before) * math.sqrt(back) if back > 0 and before < math.inf else back + _BAD * abs(back)
        restoring = [entry for entry in facts.get("put_back") or [] if _first(entry.get("loss")) <= limit]
        if restoring:
            return min(restoring, key=lambda entry: (len(entry.get("parameters") or "1"), _first(entry["loss"]))), True
    growth = facts.get("growth") or []
    return (growth[0] if growth else None), False


def _first(values: Any) -> float:
    """The first loss that is known; infinite for one that is not finite, and without any."""
    known = [x for x in values or [] if x is not None]
    return float(known[0]) if known and math.isfinite(known[0]) else math.inf
