"""The table of points in docs/replay.md is that of the code; ``python tests/causes/test_replay_page.py`` writes it."""

from __future__ import annotations

import re
from pathlib import Path

from normzoo.causes.finding import CAUSES
from normzoo.causes.judging import JUDGES
from normzoo.causes.observations import OBSERVATIONS
from normzoo.causes.titles import TITLES

PAGE = Path(__file__).parents[2] / "docs" / "replay.md"
START, END = "<!-- criteria -->\n", "<!-- end of criteria -->\n"


def tables() -> str:
    """A table for each cause: what is observed, and the points if it is so and if it is not."""
    text = []
    for judge in JUDGES:
        criteria = judge.CRITERIA
        text += [
            f"\n{judge.__name__.rpartition('.')[2].replace('_', ' ')}:\n",
            "| observation | so | not so |",
            "|---|---|---|",
        ]
        for name, points in criteria.points.items():
            said = " ".join((OBSERVATIONS[name].__doc__ or "").split("\n\n")[0].split())
            said = f"**{said}**" if name in criteria.interventions else said
            numbers = [f"{number:+d}".replace("-", "−") if number else "" for number in points]
            text.append(f"| {said}{' *' * (name in criteria.needs)} | {numbers[0]} | {numbers[1]} |")
    return "\n".join([*text, "\n"]).lstrip("\n")


def with_tables(page: str) -> str:
    before, rest = page.split(START)
    return f"{before}{START}\n{tables()}{END}{rest.split(END)[1]}"


def test_the_tables_of_points_are_those_of_the_code():
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_tables(page), "python tests/causes/test_replay_page.py writes the tables"
    assert all(set(judge.CRITERIA.needs) <= set(judge.CRITERIA.points) for judge in JUDGES)
    assert all(set(judge.CRITERIA.interventions) <= set(judge.CRITERIA.points) for judge in JUDGES)


def test_the_page_has_a_section_for_each_cause_and_names_titles_of_the_report():
    page = PAGE.read_text(encoding="utf-8")
    sections = {" ".join(re.findall(r"[a-z]+", line.lower())) for line in re.findall(r"^### (.*)", page, re.M)}
    assert len(sections) == len(CAUSES)
    words = {cause.replace("_", " ").replace("warm up", "warm up") for cause in CAUSES}
    assert all(any(section.startswith(word) for section in sections) for word in words), sections
    named = {t for row in re.findall(r"^\| [^|]*\? \|[^|]*\| ([^|]*) \|", page, re.M) for t in row.split(", ")}
    assert len(named) > 8
    assert {title for title in named if title not in " ".join(TITLES)} == set()


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
