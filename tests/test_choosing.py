"""Every figure of docs/choosing.md stands in the section that it names as its source."""

import re
from pathlib import Path

import pytest

from jaxnorm import inference, methods

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "choosing.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.split("|---|---|---|---|\n")[1].split("\n\n")[0].splitlines()
]
CLAIMS = (DOCS.parent / "benchmarks" / "CLAIMS.md").read_text()


def figures(text):
    """Numbers with a decimal, and the interval that belongs to them."""
    return re.findall(r"-?\d+\.\d+(?: ± \d+\.\d+)?", text)


def section(link):
    path, _, anchor = link.partition("#")
    parts = re.split(r"^## +(.*)$", (DOCS / path).read_text(), flags=re.M)
    named = {
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-"): text
        for heading, text in zip(parts[1::2], parts[2::2], strict=True)
    }
    return " ".join(named[anchor].split())


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_figures_stand_in_their_source(row):
    links = re.findall(r"\]\((\S+?)\)", row[3])
    assert links
    if links[0].startswith("https://arxiv.org"):
        assert figures(row[2]) == [] and "none measured here" in row[2]
    else:
        text = section(links[0])
        assert figures(row[2]) and [n for n in figures(row[2]) if n not in text] == []
        for verdict in ("seen", "seen (alone)", "mixed", "not seen"):
            if row[2].endswith(f", {verdict}"):
                assert f"| {verdict} |" in text


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_what_is_chosen_exists(row):
    found = re.findall(r"`(\S+?)`", row[1].replace("=...", "=0.5").replace(" ", ""))
    assert found
    names = vars(methods) | {"inference": inference, "G": 4, "D": 2, "devices": 2}
    for code in found:
        assert eval(code, names)


def test_figures_of_the_text_are_those_of_the_claims():
    text = PAGE.split("## What repairs")[1].split("## What a choice costs")[0]
    found = re.findall(r"\| Handwritten digits \| (.*?) \|", CLAIMS)
    errors = {n for cells in found for n in re.findall(r"1x1 \w+@\d+ (\d+\.\d)", cells)}
    assert len(figures(text)) == 8 and set(figures(text)) <= errors
