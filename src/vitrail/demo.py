"""`vitrail demo`: the whole pipeline on bundled data, without a download."""

from __future__ import annotations

import shutil
from pathlib import Path

from PIL import Image

from vitrail import zoo
from vitrail.data.sets import open_data
from vitrail.errors import UserError
from vitrail.explain.command import explain
from vitrail.files import write_atomic
from vitrail.predictions import answer_files
from vitrail.recipes import RECIPES
from vitrail.start import begin
from vitrail.train.folder import RunFolder

SAMPLES = Path(__file__).parent / "zoo" / "samples"
MARKER = "made-by-demo.txt"
"""marks the run of a demo: only a run with this file is removed"""


def run_demo(out: Path, device: str | None, fast_dev_run: bool = False) -> None:
    """Train on digits, test, draw attention, classify sample images, and print what to do next."""
    make_room(out)
    print("1. Training a Vision Transformer on handwritten digits of 8x8 pixels", flush=True)
    scores = begin(RECIPES["digits"], "digits", None, {"fast_dev_run": fast_dev_run}, out / "digits", device).scores
    task = zoo.load(out / "digits")
    assert task.score is not None
    right = task.score.text(scores[task.score.name])
    print(f"2. Test: {right} of {scores['count']} digits not in training, after {scores['seconds']:.0f} s")
    test = open_data("digits").test
    assert test is not None
    image = Image.fromarray(test.image(0, 1)[0].numpy())
    explained, truth = explain(task, image, out / "attention"), test.classes[int(test.labels[0])]
    print(f"3. How the model comes to its answer for an image of a {truth}: {explained['text']}")
    print(f"   {explained['files']['index.html']}")
    print("4. Sample images, classified with the bundled weights (CIFAR-10's ten classes):")
    for path, _, prediction, _ in answer_files(zoo.load("classify"), sorted(SAMPLES.glob("*.png"))):
        assert prediction is not None
        print(f"   {path.stem:<12} {prediction.text()}")
    print(f"Learning curves and the confusion matrix: {out / 'digits' / 'report.html'}")
    print(
        "Next: vitrail predict YOUR.jpg · vitrail train folder --data YOUR_FOLDER · vitrail train (lists the recipes)"
    )


def make_room(out: Path) -> None:
    """Remove the run of an earlier demo, and nothing else, and mark the folder for the new one.

    Raises UserError if the folder `out` holds anything but a demo's run.
    """
    run = out / "digits"
    if (run / MARKER).is_file() and not run.is_symlink():
        with RunFolder(run).alone():  # not while another demo is running
            for entry in run.iterdir():
                if entry.name not in (MARKER, "lock"):
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not the folder of a demo: choose another --out")
    # Before the run, so that an interrupted demo can be started again.
    write_atomic(run / MARKER, "`vitrail demo` created this run, and removes it when it runs again.")
