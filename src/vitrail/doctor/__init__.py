"""What is wrong with data or with a run, in plain words, and what to do about it: `vitrail doctor`."""

from __future__ import annotations

from vitrail.data.sources import scan
from vitrail.doctor import classes, copies, files, labels, looks, targets
from vitrail.doctor.finding import Diagnosis, Finding, in_order
from vitrail.doctor.opening import open_any
from vitrail.doctor.runs import examine_run, is_run
from vitrail.doctor.survey import COMPARED, Survey, survey

__all__ = ["Diagnosis", "Finding", "examine", "examine_data", "examine_run"]


def examine(subject: str, images: int = labels.IMAGES) -> Diagnosis:
    """All checks of a data set or of a run. UserError if there is neither."""
    return examine_run(subject) if is_run(subject) else examine_data(subject, images)


def examine_data(data: str, images: int = labels.IMAGES) -> Diagnosis:
    """All checks of a data set. The labels of at most `images` images are judged.

    Raises UserError if there is nothing to read.
    """
    splits, findings = open_any(data)
    found = survey(splits)
    for check in (
        *(files.broken, files.wrong_endings, looks.looks, copies.copies, classes.counts, classes.sources),
        *(targets.texts, targets.masks),
    ):
        findings += check(found)
    if (folder := classes.folder_of(data)) is not None:
        findings += files.left_out(folder)
        findings += classes.empty_folders(scan(folder), found)
    judged = labels.judge(found, images)
    notes = _notes(found)
    facts = {"images": {name: int((found.split == k).sum()) for k, name in enumerate(found.splits)}}
    if judged is not None:
        findings += judged.findings(found)
        notes += judged.notes(found)
        facts |= judged.facts()
    return Diagnosis(data, in_order(findings), facts, notes)


def _notes(found: Survey) -> list[str]:
    counts = ", ".join(f"{(found.split == k).sum():,} in {name}" for k, name in enumerate(found.splits))
    classes = f", {len(found.classes):,} classes" if found.classes else ""
    notes = [f"{len(found):,} images read: {counts}{classes}"]
    if len(found) > COMPARED:
        notes.append(f"near-duplicates are searched among {COMPARED:,} images, evenly spaced")
    return notes
