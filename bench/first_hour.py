"""The first hour with vitrail and with Ultralytics: what is typed and printed, the files, and the CPU time.

    python bench/first_hour.py --data DIR --yolo ENVIRONMENT/bin/yolo

DIR has the folders `train` and `val`, each with one folder per class. Both train from scratch, with their defaults but
for the number of epochs and the image size, on one thread and without a GPU; `yolo` builds its model from its .yaml.
CPU time is compared, since the wall time depends on what else the machine does. Without `--yolo`, vitrail alone is
measured.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import Parser, Row, record, tiny_images

EPOCHS, SIZE = "5", "64"
VITRAIL = {
    "train": "train folder --data pets --epochs {epochs} --image-size {size} --out runs/pets",
    "predict a folder": "predict pets/val/{name} --model runs/pets --out answers.csv",
    "explain one image": "explain {image} --model runs/pets --out seen",
}
YOLO = {
    "train": "classify train model=yolo11n-cls.yaml data={data} epochs={epochs} imgsz={size} device=cpu workers=0",
    "predict a folder": "classify predict model=runs/classify/train/weights/best.pt source=pets/val/{name} device=cpu",
}


def parser() -> Parser:
    parser = Parser(__doc__, needs=["data"], epochs="1")
    parser.add_argument("--data", type=Path, help="folders train and val, each with one folder per class")
    parser.add_argument("--yolo", type=Path, help="Ultralytics' program, in an environment of its own")
    parser.add_argument("--epochs", default=EPOCHS)
    return parser


def main() -> None:
    args = parser().parse_args()
    tools: dict[str, tuple[list[str], dict[str, str]]] = {"vitrail": ([sys.executable, "-m", "vitrail"], VITRAIL)}
    if args.yolo:
        tools["Ultralytics"] = ([str(args.yolo.absolute())], YOLO)
    rows: Row = {}
    for tool, (program, steps) in tools.items():
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            if args.data is None:
                for split in ("train", "val"):
                    tiny_images(folder / "pets" / split, ("ants", "bees"), 8)
            else:
                shutil.copytree(args.data, folder / "pets")  # Ultralytics writes into the data folder
            image = min((folder / "pets" / "val").rglob("*.jpg"))
            words = {"data": folder / "pets", "name": image.parent.name, "epochs": args.epochs, "size": SIZE}
            words["image"] = image.relative_to(folder)
            rows[tool] = {step: one(program, text.format(**words), folder) for step, text in steps.items()}
            print(tool, rows[tool], flush=True)
    record("first-hour", rows, args.results)


def one(program: list[str], words: str, folder: Path) -> Row:
    """Lines that a command prints, files that it makes, and its CPU seconds."""
    own = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "YOLO_CONFIG_DIR": str(folder), "MPLBACKEND": "Agg"}
    before, began = files(folder), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([*program, *words.split()], cwd=folder, env={**os.environ, **own}, capture_output=True)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(done.stderr.decode(errors="replace"))
    printed = (done.stdout + done.stderr).decode(errors="replace").splitlines()
    seconds = ended.ru_utime - began.ru_utime + ended.ru_stime - began.ru_stime
    return {
        "typed": words.replace(str(folder), "DIR"),
        "lines": sum(bool(line.strip()) for line in printed),
        "files": len(files(folder) - before),
        "CPU seconds": round(seconds, 1),
    }


def files(folder: Path) -> set[Path]:
    """The files below a folder, without Ultralytics' settings and caches."""
    return {path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".json5", ".cache")}


if __name__ == "__main__":
    main()
