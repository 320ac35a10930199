"""The steps of `deploy/Dockerfile` in a clean virtual environment, and how soon `vitrail serve` answers after them.

    python bench/deploy.py
    python bench/deploy.py --target cuda

The files that `.dockerignore` lets through are copied, and the `COPY` and `RUN` of the build are followed, with another
folder in the place of /opt/vitrail. Then the image's own command is started, its health check is waited for, and one
image is answered. `--tiny` takes the packages of this environment, without a network.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from harness import ROOT, Parser, Row, record

PREFIX = "/opt/vitrail"
PATIENCE = 280
"""seconds after which a server that does not answer has failed"""


def parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--target", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--torch-index", default="", help="package index with PyTorch's wheels for the CPU")
    return parser


@dataclass
class Stage:
    """A stage of a Dockerfile."""

    parent: str
    steps: list[tuple[str, str]] = field(default_factory=list)
    """instructions and their arguments, in order"""


def stages(text: str) -> dict[str, Stage]:
    """The stages of a Dockerfile, by name."""
    found: dict[str, Stage] = {}
    current = Stage("")
    for line in re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE)).splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            parent, _, name = rest.split()
            current = found[name] = Stage(parent)
        elif word:
            current.steps.append((word, rest.strip()))
    return found


def steps_of(found: Mapping[str, Stage], name: str) -> list[tuple[str, str]]:
    """The instructions of a stage, after those of what it is made from."""
    stage = found[name]
    return [*(steps_of(found, stage.parent) if stage.parent in found else []), *stage.steps]


def argument(found: Mapping[str, Stage], name: str, word: str) -> list[str]:
    """The last instruction of a kind, as a list in JSON."""
    (*_, text) = (rest for kind, rest in steps_of(found, name) if kind == word)
    words: list[str] = json.loads(text[text.index("[") :])
    return words


def context(folder: Path) -> Path:
    """What `docker build` sends: the files that `.dockerignore` names after its `*`."""
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line.startswith("!"):
            source, place = ROOT / line[1:], folder / line[1:]
            place.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, place, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, place)
    return folder


def build(found: Mapping[str, Stage], target: str, sent: Path, folder: Path, index: str, offline: bool) -> Row:
    """Follow a build. Returns the seconds of each `RUN`."""
    prefix, source, seconds = folder / "vitrail", folder / "source", {}
    source.mkdir()
    known = {**os.environ, "TORCH_INDEX": index, "PATH": f"{prefix}/bin:{os.environ['PATH']}"}
    known = {name: value for name, value in known.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    if offline:
        (sent / ".ci" / "locked.txt").write_text("")  # the environment may have other releases
        known |= {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_CONFIG_FILE": os.devnull}
    for kind, rest in steps_of(found, f"build-{target}"):
        if kind == "COPY":
            *names, place = rest.split()
            for name in names:
                to = source / place / (Path(name).name if place.endswith("/") else "")
                to.parent.mkdir(parents=True, exist_ok=True)
                if (sent / name).is_dir():
                    shutil.copytree(sent / name, to)
                else:
                    shutil.copy(sent / name, to)
        elif kind == "RUN":
            began = time.monotonic()
            command = rest.replace(PREFIX, str(prefix))
            subprocess.run(["sh", "-euc", command], cwd=source, env=known, check=True, stdout=sys.stderr)
            seconds[rest] = round(time.monotonic() - began, 1)
            if offline and "venv" in rest:  # its packages in the place of those that pip would fetch
                own = next((prefix / "lib").glob("python*/site-packages"))
                for path in own.glob("setuptools*"):  # of Python 3.11's venv, older than what PyTorch needs
                    shutil.rmtree(path)
                (own / "environment.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return seconds


def started(found: Mapping[str, Stage], target: str, prefix: Path, folder: Path) -> Row:
    """Start the image's command on a free port, wait for its health check and ask it once; then SIGTERM."""
    words = [*argument(found, target, "ENTRYPOINT"), *argument(found, target, "CMD")]
    words = ["127.0.0.1" if word == "0.0.0.0" else word for word in words]  # nobody else needs to reach it
    known = {"PATH": f"{prefix}/bin:/usr/bin:/bin", "HOME": str(folder), "TMPDIR": str(folder)}
    known |= {name: os.environ[name] for name in ("OMP_NUM_THREADS",) if name in os.environ}
    command = [str(prefix / "bin" / words[0]), *words[1:], "--port", "0"]
    began = time.monotonic()
    process = subprocess.Popen(command, cwd=folder, env=known, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().split()[-1]
        check = [word.replace("http://127.0.0.1:8000", address) for word in argument(found, target, "HEALTHCHECK")]
        while subprocess.run(check, env=known, stderr=subprocess.DEVNULL).returncode:
            assert process.poll() is None and time.monotonic() - began < PATIENCE, "the server does not answer"
            time.sleep(0.2)
        ready = time.monotonic() - began
        body = json.dumps({"images": [PIXEL]}).encode()
        request = urllib.request.Request(f"{address}/v1/predict", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            labels = json.load(answer)["predictions"][0]["labels"]
        return {
            "command": shlex.join(words),
            "ready_seconds": round(ready, 1),
            "first_answer_seconds": round(time.monotonic() - began, 1),
            "labels": len(labels),
        }
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0, "SIGTERM must end it with exit code 0"


PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
"""a PNG of one pixel, in base64"""


def main() -> None:
    args = parser().parse_args()
    found = stages((ROOT / "deploy" / "Dockerfile").read_text())
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        sent = context(folder / "context")
        seconds = build(found, args.target, sent, folder, args.torch_index, args.tiny)
        prefix = folder / "vitrail"
        size = sum(path.lstat().st_size for path in prefix.rglob("*") if path.is_file())
        rows: Row = {"target": args.target, "packages": "this environment's" if args.tiny else "installed"}
        rows |= {"seconds": seconds, "megabytes": round(size / 1e6), **started(found, args.target, prefix, folder)}
    print(json.dumps(rows, indent=1))
    print(record("deploy", rows, args.results))


if __name__ == "__main__":
    main()
