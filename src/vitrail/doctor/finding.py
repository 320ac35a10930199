"""Findings: what is wrong, where, how sure that is, and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from vitrail.standard_error import printable

Sure = Literal["certain", "likely", "possible"]
"""certain: counted or compared exactly; likely: rarely wrong; possible: look at it first"""

MAX_NAMED = 5
"""names of a finding that people see; JSON has all"""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with data or a run."""

    check: str
    """its name, such as `near-duplicates`"""
    what: str
    """what is wrong, in one sentence"""
    remedy: str
    sure: Sure = "certain"
    groups: Sequence[Sequence[str]] = ()
    """the images, files or classes; those that belong together, such as copies, are in one group"""

    @property
    def where(self) -> list[str]:
        """The names of all groups, each once."""
        return list(dict.fromkeys(name for group in self.groups for name in group))

    def row(self) -> dict[str, Any]:
        """Plain data for JSON. `groups` is there only if names belong together."""
        together = {"groups": [list(group) for group in self.groups]} if any(len(g) > 1 for g in self.groups) else {}
        where = self.where
        return {
            "check": self.check,
            "sure": self.sure,
            "what": self.what,
            "count": len(self.groups),
            "where": where,
            **together,
            "remedy": self.remedy,
        }

    def text(self) -> str:
        """The lines for a terminal."""
        groups = self.groups[:MAX_NAMED]
        shown = [printable(" = ".join(group[:3])) + " = ..." * (len(group) > 3) for group in groups]
        more = len(self.groups) - len(shown)
        lines = [f"{self.check} ({self.sure}): {self.what}"]
        lines += [f"    {name}" for name in shown] + [f"    and {more:,} more"] * (more > 0)
        return "\n".join([*lines, f"  what to do: {self.remedy}"])


@dataclass
class Diagnosis:
    """What `vitrail doctor` found, and what it knows beside that."""

    subject: str
    """the data or the run"""
    findings: list[Finding] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    """plain data: how many images were read, baselines, ..."""
    notes: list[str] = field(default_factory=list)
    """the facts in words, and which checks saw a sample only"""

    def row(self) -> dict[str, Any]:
        findings = [finding.row() for finding in self.findings]
        return {"subject": self.subject, "facts": self.facts, "notes": self.notes, "findings": findings}

    def text(self) -> str:
        """The report for a terminal: the findings, those that are certain first."""
        blocks = [finding.text() for finding in self.findings]
        count = len(blocks)
        blocks.append(f"{count} finding{'s' * (count != 1)}" if count else "nothing found")
        return "\n\n".join(blocks)


ORDER: tuple[Sure, ...] = ("certain", "likely", "possible")


def by_certainty(findings: Sequence[Finding]) -> list[Finding]:
    """The findings, those that are more certain first."""
    return sorted(findings, key=lambda finding: ORDER.index(finding.sure))


def a_few(names: Sequence[str], most: int = 3) -> str:
    """A few of many names, in a sentence."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more:,} more" if more > 0 else "")


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """`1 image`, `2,000 images`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
