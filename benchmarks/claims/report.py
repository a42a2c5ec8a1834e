"""What is known of each claim, in Markdown, from the cells that are there."""

import statistics
import textwrap
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from benchmarks.cells import Map
from benchmarks.claims.record import Claim
from benchmarks.claims.verdicts import (
    MISSING,
    MIXED,
    Difference,
    Finding,
    holm,
    judge,
    together,
)
from benchmarks.datasets import SOURCES
from benchmarks.results import Interval, markdown_table

LIMITS = (
    "All of it is one small residual network of ten convolutions on small images, trained for a "
    "short time without tuning any method. A claim that is not seen here may well hold at the "
    "scale of its paper, and one that is seen need not."
)


class Tried(NamedTuple):
    """A claim with its findings on all data sets, and which of them hold in all tests together."""

    claim: Claim
    findings: list[Finding]
    held: list[bool]

    @property
    def verdict(self) -> str:
        """Of each check by itself."""
        return together(finding.verdict for finding in self.findings)

    @property
    def verdict_together(self) -> str:
        """Where checks that do not hold in all tests together are mixed."""
        return together(
            MIXED if finding.decided and not held else finding.verdict
            for finding, held in zip(self.findings, self.held, strict=True)
        )


def tried(result: Map, claims: Iterable[Claim]) -> list[Tried]:
    """What the cells say about each claim; the correction for many tests is over all of them."""
    found = [
        (claim, [judge(check, result.cells) for data in result.data for check in claim.tried(data)])
        for claim in claims
    ]
    ps = [finding.p for _, findings in found for finding in findings if finding.p is not None]
    held = iter(holm(ps))
    return [
        Tried(claim, findings, [f.p is not None and next(held) for f in findings])
        for claim, findings in found
    ]


def markdown(result: Map, claims: Iterable[Claim]) -> str:
    """The whole report."""
    all_tried = tried(result, claims)
    machine = ", ".join(map(str, result.machine.values()))
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    parts = [
        "# Claims of the papers, tried",
        f"Measured by `python -m benchmarks.claims` on {machine}; {versions}.",
        *_settings(result),
        "Each claim is tried by differences of test errors in points, paired by seed, with their "
        "95 % t-interval, and a region in which the claim has them. A check is *seen* where the "
        "interval lies wholly inside of the region, *not seen* where it lies wholly outside, and "
        "else *mixed*; so is a claim whose checks differ.",
        "In tables `2x2 batch@4` is the method `batch` on last maps of 2x2 positions with 4 images "
        "that share statistics, of the 32 of a step, spread over simulated devices; further words "
        "say what else is unlike that, and in brackets what was measured beside the plain test "
        "error.",
        _comparisons(all_tried),
        LIMITS,
        markdown_table(
            ["claim", "verdict", "all tests together", "source"],
            [[_linked(t), t.verdict, t.verdict_together, t.claim.source] for t in all_tried],
        ),
        *(section(t, result) for t in all_tried if t.verdict != MISSING),
    ]
    return "\n\n".join(map(_wrapped, parts)) + "\n"


def section(one: Tried, result: Map) -> str:
    """A claim with its source, its figures and its verdict."""
    claim = one.claim
    measured = [(f, h) for f, h in zip(one.findings, one.held, strict=True) if f.verdict != MISSING]
    rows = [
        [
            SOURCES[finding.check.difference[0].key.data].title,
            _described(finding.check.difference, result),
            finding.check.region,
            _signed(finding.interval),
            finding.seeds,
            "–" if finding.p is None else f"{finding.p:.2g}",
            f"{finding.verdict} (alone)" if finding.decided and not held else finding.verdict,
        ]
        for finding, held in measured
    ]
    left = len(one.findings) - len(measured)
    head = ["data", "error in %", "claimed", "difference", "seeds", "p", "verdict"]
    return "\n\n".join(
        _wrapped(part)
        for part in [
            f"## {claim.name}",
            f"**{claim.text}** {claim.source}.",
            f"Verdict: **{one.verdict}**; in all tests together {one.verdict_together}."
            + (f" {left} of {len(one.findings)} checks were not measured." if left else ""),
            markdown_table(head, rows),
            f"The paper: {claim.paper or 'no figure of it was read'}.",
            *([f"Limits: {claim.limits}"] if claim.limits else []),
        ]
    )


def _wrapped(part: str) -> str:
    """A paragraph in lines of at most 100 characters; tables and sections as they are."""
    return part if part.startswith(("#", "|")) else textwrap.fill(part, 100)


def _settings(result: Map) -> Iterable[str]:
    for data in result.data:
        cells = [cell for key, cell in result.cells.items() if key.data == data]
        usual = min((cell.settings for cell in cells), key=lambda settings: settings.epochs)
        yield (
            f"{SOURCES[data].title}: {usual.train_images} training images, {usual.epochs} epochs "
            f"({len(cells)} trainings of several seeds each)."
        )


def _comparisons(all_tried: Sequence[Tried]) -> str:
    """The sentence on multiple comparisons."""
    tests = [finding for t in all_tried for finding in t.findings if finding.p is not None]
    decided = sum(finding.decided for finding in tests)
    held = sum(sum(t.held) for t in all_tried)
    return (
        f"{len(tests)} checks were tested, and {decided} of them are decided at 95 % each. Of so "
        f"many, about {0.05 * len(tests):.1f} would be decided wrongly if every difference lay at "
        f"the end of its region; Holm's correction, which holds the chance of a single wrong one "
        f'at 5 %, leaves {held}. The others are marked "(alone)", and count as mixed in "all '
        f'tests together".'
    )


def _described(difference: Difference, result: Map) -> str:
    """The terms with the means of their errors."""
    parts = []
    for term in difference:
        name = str(term.key._replace(data="")).strip()
        value = "" if term.measure is None else f" ({term.value})"
        values = term.of(result.cells[term.key]) or []
        sign = "-" if term.sign < 0 else "+" if parts else ""
        parts.append(f"{sign} {name}{value} {abs(statistics.fmean(values)):.1f}".strip())
    return " ".join(parts)


def _signed(found: Interval | None) -> str:
    if found is None or found.half_width is None:
        return "–"
    return f"{found.mean:+.2f} ± {found.half_width:.2f}"


def _linked(one: Tried) -> str:
    """The claim, with a link to its section where it has one."""
    claim = one.claim
    return claim.text if one.verdict == MISSING else f"[{claim.text}](#{claim.name})"
