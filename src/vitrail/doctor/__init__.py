"""What is wrong with data or with a run, in plain words, and what to do about it: `vitrail doctor`."""

from __future__ import annotations

from pathlib import Path

from vitrail.data.sources import scan
from vitrail.doctor import appearance, classes, copies, files, labels, targets
from vitrail.doctor.finding import Diagnosis, Finding, by_certainty
from vitrail.doctor.opening import open_any
from vitrail.doctor.runs import examine_run, is_run
from vitrail.doctor.survey import COMPARED, Survey, survey
from vitrail.errors import UserError
from vitrail.train.folder import runs_below

__all__ = ["Diagnosis", "Finding", "examine", "examine_data", "examine_run"]


def examine(subject: str, images: int | None = None) -> Diagnosis:
    """All checks of a data set or of a run; `images` as in `examine_data`, for a data set only.

    Raises UserError if there is neither, or for `images` of a run.
    """
    if not is_run(subject):
        inner = runs_below(Path(subject))
        if inner and len(inner) == sum(each.is_dir() for each in Path(subject).iterdir()):
            raise UserError(f"{subject} holds runs in subfolders, as a grid does: give one of them, such as {inner[0]}")
        return examine_data(subject, labels.IMAGES if images is None else images)
    if images is not None:
        raise UserError(f"--images is for data sets, and {subject} is a run: leave it out")
    return examine_run(subject)


def examine_data(data: str, images: int = labels.IMAGES) -> Diagnosis:
    """All checks of a data set. The labels of at most `images` images are judged; of none if that is 0.

    Raises UserError if there is nothing to read.
    """
    splits, findings = open_any(data)
    found = survey(splits)
    for check in (
        *(files.broken, files.wrong_endings, appearance.appearance, copies.copies, classes.counts, classes.sources),
        *(targets.texts, targets.masks),
    ):
        findings += check(found)
    if (folder := classes.folder_of(data)) is not None:
        findings += files.left_out(folder)
        findings += classes.empty_folders(scan(folder), found)
    notes = _notes(found)
    judged = None
    if images and len(found.classes) > 1:  # a set without classes has no such labels
        reason = labels.refusal(found, images)
        if reason is None and (judged := labels.judge(found, images)) is None:
            reason = "those that were drawn are too few, or all of one class"
        if reason is not None:
            notes.append(f"the labels are not judged: {reason}")
    facts = {"images": {name: int((found.split == k).sum()) for k, name in enumerate(found.splits)}}
    if judged is not None:
        findings += judged.findings(found)
        notes += judged.notes(found)
        facts |= judged.facts()
    return Diagnosis(data, by_certainty(findings), facts, notes)


def _notes(found: Survey) -> list[str]:
    counts = ", ".join(f"{(found.split == k).sum():,} in {name}" for k, name in enumerate(found.splits))
    classes = f", {len(found.classes):,} classes" if found.classes else ""
    notes = [f"{len(found):,} images read: {counts}{classes}"]
    if len(found) > COMPARED:
        notes.append(f"near-duplicates are searched among {COMPARED:,} images, evenly spaced")
    return notes
