"""What a replay says: causes, likeliest first, and the facts that hold whatever the cause; JSON and text."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from normzoo._errors import one_line, unknown_name
from normzoo._files import write_whole
from normzoo.causes.titles import TITLES

CAUSES = {
    "data": "samples of the batch, or their labels",
    "learning_rate": "a learning rate too large for the weights",
    "warm_up": "a learning rate that is full from the first step on",
    "normalization": "a channel without variance in a normalization layer",
    "precision": "numbers beyond the range or resolution of half precision",
    "parameter": "one parameter that has grown",
    "hardware": "a value that the steps themselves do not give: memory, a race, or code beside the step",
    "innocent": "nothing that is broken: a hard batch",
    "error": "an error or a signal that ended the run",
    "undetermined": "evidence too weak, or contradictory",
}
CONFIDENCES = ("high", "low")
FILE = "findings.json"


class EvidenceError(ValueError):
    """A folder of a replay cannot be read; the message names the file, on one line."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


@dataclass(frozen=True)
class Finding:
    """A cause and what speaks for it.

    Attributes:
        cause: a key of ``CAUSES``.
        confidence: ``"high"`` if an intervention agrees with what was observed, else ``"low"``.
        sentence: the cause in plain words, with numbers and names.
        refuted_by: the observation that would refute it.
        figure: title of the figure or table on the page that shows it, one of :data:`normzoo.causes.titles.TITLES`.
        suggestion: what to do.
        score: points of the evidence for it; see docs/replay.md.

    Raises:
        ValueError: for a cause, confidence or figure that there is not.
    """

    cause: str
    confidence: str
    sentence: str
    refuted_by: str
    figure: str
    suggestion: str
    score: float

    def __post_init__(self) -> None:
        for kind, value, valid in (
            ("cause", self.cause, CAUSES),
            ("confidence", self.confidence, CONFIDENCES),
            ("title of a figure or table", self.figure, TITLES),
        ):
            if value not in valid:
                raise ValueError(unknown_name(kind, value, valid))

    def __str__(self) -> str:
        return f"{self.sentence} {self.refuted_by} {self.suggestion} ({self.confidence} confidence)"


@dataclass(frozen=True)
class Findings:
    """What a replay found.

    Attributes:
        causes: likeliest first; at least one, which may be ``"undetermined"``.
        facts: sentences that answer the five questions, whatever the cause.
        notes: what the replay could not compare or do.
        folder: where the replay is on disk; None if it was not written.

    ``str(findings)`` is what the command ``normzoo replay`` prints.
    """

    causes: list[Finding]
    facts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    folder: Path | None = None

    def __str__(self) -> str:
        first, *others = self.causes
        likeliest = f"Likeliest cause, {first.confidence} confidence: {first.sentence}"
        paragraph = [" ".join(filter(None, [likeliest, first.refuted_by, first.suggestion]))]
        paragraph += [f"Also possible, {f.confidence} confidence: {f.sentence} {f.refuted_by}" for f in others]
        paragraph += [f"- {fact}" for fact in self.facts]
        paragraph += [f"Note: {note}" for note in self.notes]
        return "\n".join(paragraph)

    def write(self, folder: Path) -> None:
        """Write ``findings.json`` into a folder.

        Raises:
            OSError: if it could not be written.
        """
        content = {"causes": [asdict(f) for f in self.causes], "facts": self.facts, "notes": self.notes}
        write_whole(folder / FILE, json.dumps(content, indent=1, ensure_ascii=False))


def read_findings(folder: Path) -> Findings:
    """The findings of a replay, of ``CAPSULE/replay``.

    Raises:
        EvidenceError: if the file is not there, cannot be read, or is none that is written.
    """
    content = read_json(folder / FILE)
    try:
        causes, facts, notes = ([*content[key]] for key in ("causes", "facts", "notes"))
        findings = Findings([Finding(**cause) for cause in causes], facts, notes, folder)
    except (KeyError, TypeError, ValueError) as error:
        raise EvidenceError(f"{folder / FILE} is not of a replay: {error}") from error
    texts = [*facts, *notes, *(text for f in findings.causes for text in (f.sentence, f.refuted_by, f.suggestion))]
    scored = all(isinstance(f.score, int | float) and math.isfinite(f.score) for f in findings.causes)
    if not (causes and scored and all(isinstance(text, str) for text in texts)):
        raise EvidenceError(f"{folder / FILE} is not of a replay: it has no causes, or what should be text is none")
    return findings


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; NaN, Infinity and -Infinity are numbers in it.

    Raises:
        EvidenceError: if the file is not there, cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise EvidenceError(f"{path.parent} is not a replay: it has no {path.name}") from error
    except OSError as error:
        raise EvidenceError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise EvidenceError(f"{path} is damaged: it is no JSON ({error})") from error
    if not isinstance(content, dict):
        raise EvidenceError(f"{path} is not of a replay: it holds no JSON object")
    return content
