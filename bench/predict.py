"""`vitrail predict` on many photos against a plain script with timm and a DataLoader: whole commands, in turns.

    python bench/predict.py --photos DIR

Both answer links to the photos with `vit_tiny_patch16_224` and the same random weights, and write labels and scores per
image. The plain script is what timm's documentation shows: its own transform, batches of 32 and one worker per core, in
float32 and, as a second row, in bf16. `images per second` count the whole command, `answering` what it takes above the
same command for one batch. Peak memory is that of the command's first process, for 2,000 images and ten times as many.
`--tiny` answers a few made-up images.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import timm
from harness import Parser, Row, record, tiny_images

from vitrail.process import cores

MODEL = "vit_tiny_patch16_224"
BATCH = 32
PLAIN = """
import csv, json, sys
from pathlib import Path
import timm, torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

folder, weights, out, precision = sys.argv[1:]
model = timm.create_model(MODEL, checkpoint_path=weights).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
paths = sorted(Path(folder).iterdir())

class Photos(Dataset):
    def __len__(self):
        return len(paths)
    def __getitem__(self, i):
        return transform(Image.open(paths[i]).convert("RGB"))

with open(out, "w") as file, torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, precision == "bf16"):
    rows = csv.writer(file)
    done = 0
    for images in DataLoader(Photos(), batch_size=BATCH, num_workers=WORKERS):
        for scores, labels in zip(*model(images).float().softmax(1).topk(5)):
            rows.writerow([paths[done], json.dumps([labels.tolist(), scores.tolist()])])
            done += 1
"""


def parser() -> Parser:
    parser = Parser(__doc__, needs=["photos"], images=8, repeats=1)
    parser.add_argument("--photos", type=Path, help="a folder of photos")
    parser.add_argument("--images", type=int, default=2_000)
    parser.add_argument("--repeats", type=int, default=3)
    return parser


def main() -> None:
    args = parser().parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        photos = sorted((args.photos or tiny_images(folder / "made", ("a",), 3)).rglob("*.*"))
        sets = {count: links(folder / f"{count}", photos, count) for count in (BATCH, args.images, 10 * args.images)}
        weights = folder / "model"
        timm.models.save_for_hf(timm.create_model(MODEL), str(weights), safe_serialization=True)
        on_cpu = ["--device", "cpu", "--model", str(weights)]  # as the plain script
        commands = {
            "vitrail": lambda images: ["-m", "vitrail", "predict", str(images), *on_cpu, "--out"],
            **{name: plain(weights, name.split()[-1]) for name in ("timm fp32", "timm bf16")},
        }
        times: dict[str, dict[int, list[float]]] = {name: {count: [] for count in sets} for name in commands}
        memory: dict[str, dict[int, float]] = {name: {} for name in commands}
        for _ in range(args.repeats):
            for name, command in commands.items():
                for count in (BATCH, args.images):
                    seconds, peak = run(command(sets[count]), folder / "out.csv")
                    times[name][count].append(seconds)
                    memory[name][count] = max(peak, memory[name].get(count, 0))
        memory["vitrail"][10 * args.images] = run(commands["vitrail"](sets[10 * args.images]), folder / "out.csv")[1]
        rows = {name: row(times[name], memory[name], args.images) for name in commands}
    ratios = [a / b for a, b in zip(times["timm fp32"][args.images], times["vitrail"][args.images], strict=True)]
    record("predict", {**rows, "times as fast as timm fp32": [round(ratio, 2) for ratio in ratios]}, args.results)
    print(rows, ratios)


def links(folder: Path, photos: list[Path], count: int) -> Path:
    folder.mkdir()
    for i in range(count):
        photo = photos[i % len(photos)]
        (folder / f"{i:06d}{photo.suffix.lower()}").symlink_to(photo.resolve())
    return folder


def plain(weights: Path, precision: str) -> Callable[[Path], list[str]]:
    """The command of the plain script, for a folder of images."""
    code = f"MODEL, BATCH, WORKERS = {MODEL!r}, {BATCH}, {cores()}\n{PLAIN}"

    def command(images: Path) -> list[str]:
        return ["-c", code, str(images), str(weights / "model.safetensors"), "OUT", precision]

    return command


def run(words: list[str], out: Path) -> tuple[float, float]:
    """The seconds of a whole command, and the peak memory of its largest process in MB."""
    out.unlink(missing_ok=True)
    words = [str(out) if word == "OUT" else word for word in words]
    words = [*words, str(out)] if words[-1] == "--out" else words
    began = time.monotonic()
    running = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(running.pid, 0)
    if status or not out.exists():
        sys.exit(f"{words[:3]} ended with {os.waitstatus_to_exitcode(status)}")
    return time.monotonic() - began, usage.ru_maxrss / 1e3


def row(times: dict[int, list[float]], memory: dict[int, float], count: int) -> Row:
    whole, start = statistics.median(times[count]), statistics.median(times[BATCH])
    return {
        "seconds": [round(each, 1) for each in times[count]],
        "images per second": round(count / whole, 1),
        "answering": round((count - BATCH) / max(whole - start, 1e-3), 1),
        "peak MB": {f"{images:,}": round(most) for images, most in memory.items()},
    }


if __name__ == "__main__":
    main()
