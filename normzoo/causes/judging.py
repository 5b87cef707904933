"""From evidence to findings: every cause is weighed, and the likeliest come first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from normzoo.causes import (
    data,
    error,
    hardware,
    innocent,
    learning_rate,
    normalization,
    parameter,
    precision,
    undetermined,
    warm_up,
)
from normzoo.causes.facts import facts_of
from normzoo.causes.finding import Finding, Findings
from normzoo.causes.observations import observe
from normzoo.causes.view import View

JUDGES = (data, learning_rate, warm_up, normalization, precision, parameter, hardware, innocent, error)
ENOUGH = 3.0  # points of a cause that is named
SECOND = 0.5  # of the points of the likeliest cause: others with fewer are not named
SURE = 4.0  # points that high confidence takes
LEAD = 2.0  # points before the next cause that it takes, too


def findings_of(evidence: Mapping[str, Any]) -> Findings:
    """The causes that the evidence of a replay speaks for, likeliest first; ``"undetermined"`` if it does for none.

    Args:
        evidence: as :func:`normzoo.causes.read_evidence` returns it; what is missing or None is not known.
    """
    view = View(evidence)
    seen = observe(view)
    judged = [finding for judge in JUDGES if (finding := judge.judge(view, seen)) is not None]
    judged.sort(key=lambda finding: finding.score, reverse=True)
    named = [f for f in judged if f.score >= max(ENOUGH, SECOND * judged[0].score)]
    notes = view.texts("about", "notes")
    causes = _with_lead(named) or [undetermined.judge(view, seen, [f for f in judged if f.score > 0])]
    return Findings(causes, facts_of(view, seen), notes)


def _with_lead(named: list[Finding]) -> list[Finding]:
    """The findings, of which none but one that leads clearly, with points enough, has high confidence."""
    leads = len(named) == 1 or (len(named) > 1 and named[0].score - named[1].score >= LEAD)
    sure = leads and named[0].score >= SURE
    return [f if sure and place == 0 else replace(f, confidence="low") for place, f in enumerate(named)]
