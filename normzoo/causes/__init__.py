"""Causes of a divergence, from the evidence of a replay. Neither torch nor Lightning."""

from normzoo.causes.evidence import read_evidence, write_evidence
from normzoo.causes.finding import CAUSES, EvidenceError, Finding, Findings, read_findings
from normzoo.causes.judging import findings_of

__all__ = [
    "CAUSES",
    "EvidenceError",
    "Finding",
    "Findings",
    "findings_of",
    "read_evidence",
    "read_findings",
    "write_evidence",
]
