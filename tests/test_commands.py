"""Every command that README, docs and the notebook show is run unchanged, with stand-ins for what it names.

`--fast-dev-run` is added to what trains or scores. Commands of a page are run in order in one folder; those of a table
in one of their own. A new command in the docs is found automatically: see `stand_ins.py` if it names data or models
that are not there yet.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import re
import shlex
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import stand_ins
from documented import ROOT, Command, units, variants
from local_hub import Hub, server
from PIL import Image

import vitrail
from vitrail import cli
from vitrail.data.sets import open_data
from vitrail.errors import UserError
from vitrail.options import Parser
from vitrail.recipes import RECIPES
from vitrail.tasks.caption import scores
from vitrail.train.run import FAST_IMAGES

__all__ = ["server"]

for package in ("pycocoevalcap", "transformers", "timm", "fastapi"):
    pytest.importorskip(package, reason="needs pip install 'vitrail[all,dev]'")

UNITS = units()
FAST = {"quickstart", *(f"training: recipes, train {name}" for name in ("digits", "mlp-cifar10", "lstm-digits"))}
"""some of the units that take less than ten seconds"""

MEANT = {
    "FOLDER": "pets",
    "SOURCE": "google/vit-base-patch16-224",
    "CHECKPOINT": "google/vit-base-patch16-224",
    "IMAGENET": "imagenet",
    "RUN": "runs/caption-match-0",
    "RECIPE": "caption-vit",
    "OUT": "converted",
    "DIR": ".",
    "E": "2",
    "R": "1e-3",
    "S": "1",
}
"""what stands in for words in capitals"""
LEFT_OUT: dict[str, str] = {
    "vitrail cluster ray predict classify --data s3://bucket/photos --out rows --workers 16": "needs a bucket and Ray",
    "vitrail cluster ray train --workers 8 -- cifar10 --out /shared/runs/big": "needs a Ray cluster with GPUs",
    "RAY_ADDRESS=auto vitrail serve classify caption --ray --host 0.0.0.0 --api-keys keys.txt": "needs a Ray cluster",
    "vitrail serve --ray": "starts Ray: see cluster/test_ray_serve.py",
    "vitrail train --resume RUN": "the form of a command",
    "vitrail train folder --data hf://datasets/ethz/food101": "streams gigabytes: see data/test_hub_sets.py",
    "vitrail train folder --data pets --nproc 8": "starts eight processes: see train/test_parallel.py",
    "vitrail train --resume runs/pets --nproc 4": "the same",
}
"""commands that are not run, each with the reason"""
SHIPPING = ("aws", "docker", "scp", "ssh", "sudo")
"""of docs/deploy.md, which needs machines and accounts that no test has"""
LONG = ("train", "eval", "demo")


@pytest.fixture(scope="module")
def stood_in(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """The folder of the data sets, and the Hub's repositories."""
    root = tmp_path_factory.mktemp("stand-ins")
    stand_ins.data_sets(root / "data")
    return root / "data", stand_ins.hub(root / "hub")


@pytest.fixture
def here(stood_in: tuple[Path, dict[str, Path]], server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A reader's own folder, in which commands are run."""
    data, repositories = stood_in
    server.repositories |= {name: {"main": path} for name, path in repositories.items()}
    monkeypatch.setenv("VITRAIL_DATA", str(data))
    monkeypatch.setattr(scores, "shutil", SimpleNamespace(which=lambda name: None))  # Java takes seconds to start
    folder = tmp_path / "here"
    folder.mkdir()
    stand_ins.photos(folder)
    monkeypatch.setattr("vitrail.serve.server.run", ready)
    monkeypatch.chdir(folder)
    return folder


@dataclass
class Said:
    """What a command printed, and what it was."""

    words: list[str]
    out: str
    err: str
    made: list[Path]
    """run folders that were not there before"""

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]

    def option(self, name: str, default: str = "") -> str:
        return dict(zip(self.words, self.words[1:], strict=False)).get(name, default)


def run(words: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> Said:
    """Run a command of ours as shown, within seconds."""
    before = set(runs())
    if words[0] == "serve":
        words = [*words, "--port", "0", "--measure", "0"]  # the documented one may be in use
    fast = ["--fast-dev-run"] if words[0] in LONG and len(words) > 1 and not {"--resume", "--help"} & {*words} else []
    capsys.readouterr()
    try:
        ended = cli.main([*words, *fast])
    except SystemExit as end:  # of --help
        ended = end.code if isinstance(end.code, int) else 1
    printed = capsys.readouterr()
    assert ended == code, printed.err
    return Said(words, printed.out, printed.err, [path for path in runs() if path not in before])


def runs() -> list[Path]:
    return sorted(path.parent for path in Path("runs").rglob("recipe.json"))


def flat(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        yield from flat(value) if isinstance(value, dict) else [(name, value)]


def check_train(said: Said) -> None:
    """The scores, and a run folder that holds what a run leaves, made as the options say."""
    if "--resume" in said.words:
        assert not said.made and re.match(r"(test|val) \w+ \d", said.out)
        return
    if "--json" in said.words:
        [row] = said.rows
        assert row["split"] in ("test", "val") and row["fast_dev_run"]
    else:
        score = r"\d+\.\d\d %|-?\d+\.\d{3}|none"  # R² may be negative
        first, last = said.out.splitlines()
        assert re.fullmatch(rf"(test|val) \w+ ({score}) in \d+ s \(fast dev run\)", first), said.out
        assert f"best weights: {said.made[0]}/best, report: {said.made[0]}/report.html" == last
    [folder] = said.made
    recipe = json.loads((folder / "recipe.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["kind"] == "done" and (folder / "report.html").stat().st_size > 1000
    for place in ("best", "last"):
        vitrail.load(folder / place)
    name = said.words[1]
    if name.endswith(".json"):
        name = json.loads(Path(name).read_text())["recipe"]
    elif "--init" in said.words:
        name = {"folder": "finetune", "tag": "finetune-tag", "regress": "finetune-regress"}.get(name, name)
    assert recipe["recipe"] == name and recipe["fast_dev_run"]
    place = re.escape(said.option("--out")) or rf"runs/{name}-{recipe['seed']}(-\d)?"  # numbered, the second time
    assert re.fullmatch(place, str(folder))
    fields = dict(flat(recipe))
    for option, values in options_of(said.words).items():
        if option not in ("--out", "--json"):
            chosen = fields[option.removeprefix("--").removeprefix("no-").replace("-", "_")]
            assert plain(chosen) == plain(values if len(values) > 1 or isinstance(chosen, list) else values[0]), option


def options_of(words: list[str]) -> dict[str, list[str]]:
    """The values of each option."""
    found: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            found[last := word] = []
        elif found:
            found[last].append(word)
    return found


def plain(value: Any) -> Any:
    """A value, or what a command line has for it, as numbers where these can be."""
    if isinstance(value, list):
        return [plain(one) for one in value]
    try:
        return float(str(value))
    except ValueError:
        return str(value)


def check_eval(said: Said) -> None:
    """The split, the number of images and scores that are numbers."""
    if "--json" in said.words:
        [row] = said.rows
        split, count, scores = row["split"], row["count"], {k: v for k, v in row.items() if isinstance(v, float)}
    else:
        first, *lines = said.out.splitlines()
        split, count = re.match(r"(\w+): (\d+) ", first).groups()  # type: ignore[union-attr]
        scores = {name.strip(): float(value) for name, value in (line.rsplit(maxsplit=1) for line in lines)}
    assert split == said.option("--split", split) and 0 < int(count) <= FAST_IMAGES
    assert scores and all(value >= 0 for name, value in scores.items() if not name.startswith("r2"))
    expected = {"knn_top1", "linear_top1"} if "--probe" in said.words else {"top1", "cider", "mean_ap", "mae"}
    assert expected & scores.keys(), scores


def check_predict(said: Said) -> None:
    """One answer for each image."""
    valued = ("--model", "--top", "--threshold", "--out", "--merge")
    given = [word for i, word in enumerate(said.words[1:]) if not word.startswith("--") and said.words[i] not in valued]
    images = [
        str(file) for word in given for file in ([*sorted(Path(word).iterdir())] if Path(word).is_dir() else [word])
    ]
    if "--out" in said.words:
        out = Path(said.words[said.words.index("--out") + 1])
        if out.is_dir():
            assert all((out / Path(image).with_suffix(".png").name).is_file() for image in images)
        else:  # a segmenter writes one row per class
            rows = [line.split(",")[0] for line in out.read_text().splitlines()[1:]]
            assert [*dict.fromkeys(rows)] == images
    elif "--json" in said.words:
        assert [row["image"] for row in said.rows] == images
        assert all(row.keys() & {"labels", "caption", "embedding"} for row in said.rows)
    else:
        lines = said.out.splitlines()
        assert [line.partition(": ")[0] for line in lines] == images and not any("no answer" in line for line in lines)


def check_explain(said: Said) -> None:
    """The answer, and the page in the folder of figures."""
    out = Path(said.option("--out"))
    assert said.out.endswith(f"\n{out / 'index.html'}\n") and said.out.count("\n") == 2
    figures = [*out.glob("*.png")]
    assert figures and (out / "index.html").is_file()
    for figure in figures:
        with Image.open(figure) as image:
            image.load()


def check_compare(said: Said) -> None:
    """A row for each run."""
    header, *rows = said.out.splitlines()
    assert header.split()[:2] == ["run", "recipe"]
    assert [row.split()[0] for row in rows] == [Path(word).name for word in said.words[1:]]


def check_convert(said: Said) -> None:
    """A checkpoint that loads."""
    out = said.words[2]
    assert f"written to {out} ({said.option('--to', 'vitrail')})" in said.out
    if "--verify" in said.words:
        assert "every weight with the same bits" in said.out
        assert re.search(r"differ by at most \d|outputs +not compared: \w", said.out)
    vitrail.load(out)


def check_export(said: Said) -> None:
    """An export that loads."""
    assert re.search(r"largest difference [\d.e-]+ .* over \d+ pairs of size and batch", said.out)
    vitrail.load(said.words[2])


def check_data(said: Said) -> None:
    """A set with as many images as before."""
    out = said.option("--out")
    assert said.out.splitlines()[-1] == out
    assert [len(open_data(path).train) for path in (out, said.words[2])] == [len(open_data(out).train)] * 2


def check_doctor(said: Said) -> None:
    """Findings, each with what to do, or none."""
    assert said.out == "nothing found\n" or re.search(r"\n\n\d+ findings?\n$", said.out)
    findings = re.findall(r"^[\w-]+ \((?:certain|likely|possible)\): ", said.out, re.MULTILINE)
    assert said.out.count("\n  what to do: ") == len(findings)


def check_demo(said: Said) -> None:
    folder = Path(said.option("--out", "runs/demo"))
    assert any(folder.rglob("report.html")) and any(folder.rglob("rollout.png")), "it trains and draws"
    assert len(re.findall(r"^   \w+ +\w+ +\d+%$", said.out, re.MULTILINE)) >= 3, "it classifies sample images"


def check_serve(said: Said) -> None:
    assert said.out == "ready\n"


def ready(app: Any, listener: socket.socket, settings: Any) -> None:
    """In the place of answering until a signal."""
    from starlette.testclient import TestClient

    print(TestClient(app).get("/readyz").json()["status"])


def check_grid(said: Said) -> None:
    """A finished run per combination, in a folder named after it, and a table of them and of their settings."""
    names = [Path(str(path)).name for path in said.made]
    values = [word.partition("=")[2].count(",") + 1 for word in options_of(said.words)["--grid"]]
    assert len(names) == math.prod(values) and all(path.parent == Path(said.option("--out")) for path in said.made)
    lines = [line.split() for line in said.out.splitlines() if line]
    assert [line[0] for line in lines if line[0] in names] == names and ["setting", "seeds"] in [
        line[:2] for line in lines
    ]


def check_cluster(said: Said) -> None:
    """A script that bash can read."""
    assert said.words[1] == "slurm"
    [script] = said.out.splitlines()
    subprocess.run(["bash", "-n", script], check=True)


def check_models(said: Said) -> None:
    for word in ("facebook/dinov2-small", "Apache-2.0", "segment", "torchvision"):
        assert word in said.out


CHECKS: dict[str, Callable[[Said], None]] = {
    "train": check_train,
    "eval": check_eval,
    "predict": check_predict,
    "explain": check_explain,
    "compare": check_compare,
    "convert": check_convert,
    "export": check_export,
    "data": check_data,
    "doctor": check_doctor,
    "models": check_models,
    "demo": check_demo,
    "cluster": check_cluster,
    "serve": check_serve,
}


def ours(command: Command, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Run `vitrail ...` and check what it gives."""
    words = [MEANT.get(word, word) for word in words[1:]]
    if words == ["train"]:
        said = run(words, capsys)
        assert [line.split()[0] for line in said.out.splitlines()] == [*RECIPES]
        return
    if {"--help", "--help-all"} & {*words}:
        said = run(words, capsys)
        assert f"vitrail {words[0]}".removesuffix(" --help") in said.out and ("--weight-decay" in said.out) == (
            words[0] == "train"
        )
        return
    if not command.whole and named_alone(words):
        return
    make_what_came_before(words, capsys)
    said = run(words, capsys)
    (check_grid if "--grid" in words and words[0] == "train" else CHECKS[words[0]])(said)
    inputs = [word for word in words if not word.startswith("--")]
    for line in said.err.splitlines():
        assert line.startswith("vitrail") or any(word in line for word in inputs), line


def named_alone(words: list[str]) -> bool:
    """Whether prose only names a command or its options, which have to be there all the same."""
    assert words[0] in cli.COMMANDS
    if words[0] == "train":  # a recipe for anybody's data, without any
        return RECIPES[words[1]](1).data == "folder" and "--data" not in words

    def parse_and_stop(parser: Parser, args: list[str], task: object = None) -> None:
        _, rest = parser.parse_known_args(args)
        raise Unknown(rest) if rest else Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parser, "parse_args", parse_and_stop)
        with pytest.raises((Parsed, UserError)) as ended:
            cli.COMMANDS[words[0]](words[1:])
    if ended.type is Parsed:
        return False
    assert re.search("are required|expected (one|at least one) argument", str(ended.value)), ended.value
    return True


class Parsed(Exception):
    """A command's arguments were understood."""


class Unknown(Exception):
    """They were not."""


def make_what_came_before(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Train the runs that a command names by their default place, and that no command before it made."""
    for word in words:
        found = re.fullmatch(r"runs/([\w-]+)-0", word)
        if found and found[1] in RECIPES and not Path(word).exists() and words != ["--out", word]:
            data = ["--data", "flickr8k"] if found[1].startswith("caption-") else []
            run(["train", found[1], *data], capsys)


def theirs(words: list[str]) -> None:
    """The options of other programs exist."""
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
    elif words[0] == "pip":
        extras = re.search(r"\[(.+)\]", words[-1])
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert words[1] == "install" and {*(extras[1].split(",") if extras else [])} <= known.keys(), words
    elif words[0] == "curl":
        paths = importlib.import_module("vitrail.serve.guard").ENDPOINTS
        shown = re.fullmatch(r"http://127\.0\.0\.1:8000(/[\w/]*)(\?stream=true)?", words[-1])
        assert shown is not None and shown[1] in paths, words
    elif words[0] in SHIPPING:
        pass  # test_deploy.py checks them
    elif words[1] == "exported/example.py":
        pass  # an export writes it, and export/test_example.py runs it
    elif words[0] == "torchrun" or words[1:3] == ["-m", "vitrail.cluster.torchrun"]:
        from torch.distributed.run import get_args_parser

        options = get_args_parser().parse_args(words[1 if words[0] == "torchrun" else 3 :])
        assert options.module and options.training_script == "vitrail" and options.training_script_args[0] == "train"
        assert options.training_script_args[1] in RECIPES, words
    elif words[1] == "-m":
        assert all((ROOT / word).exists() for word in words[3:] if "/" in word)
    else:
        load_script(ROOT / words[1]).parser().parse_args([MEANT.get(word, word) for word in words[2:]])


def load_script(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"shown_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path.parent)  # scripts import what stands beside them
        patch.setitem(sys.modules, spec.name, module)  # where dataclasses look for it
        spec.loader.exec_module(module)
    return module


def marked(name: str) -> Any:
    return pytest.param(name, id=name, marks=[] if name in FAST else [pytest.mark.slow, pytest.mark.timeout(1800)])


OURS = {
    name: [c for c in commands if c.program == "vitrail" and c.text not in LEFT_OUT] for name, commands in UNITS.items()
}
THEIRS = [c for commands in UNITS.values() for c in commands if c.program != "vitrail"]


@pytest.mark.parametrize("name", [marked(name) for name, commands in OURS.items() if commands])
def test_commands_do_what_the_docs_say(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failures = []
    for command in OURS[name]:
        for words in variants(command):
            try:
                ours(command, words, capsys)
            except Exception as error:
                failures.append(f"{shlex.join(words)}\n  {type(error).__name__}: {error}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("command", {c.text: c for c in THEIRS}.values(), ids=lambda command: command.text)
def test_commands_of_other_programs_are_there(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VITRAIL_DATA", str(tmp_path))  # which some scripts need, with or without the data
    if command.program == ".":
        return  # the environment's own script, which `make demo` makes
    assert command.program in ("make", "pip", "python", ".venv/bin/python", "torchrun", "curl", *SHIPPING), (
        "teach the test what to look for"
    )
    for words in variants(command):
        theirs(words)


def test_what_is_left_out_is_shown_and_has_a_reason() -> None:
    assert all(LEFT_OUT.values())
    assert LEFT_OUT.keys() <= {command.text for commands in UNITS.values() for command in commands}


def test_commands_are_found_wherever_they_are_shown() -> None:
    found = {name: [command.text for command in commands] for name, commands in UNITS.items()}
    assert found.keys() >= FAST
    assert (
        "vitrail train folder --data pets --out runs/pets" in found["README"]
        and "vitrail train digits" in found["quickstart"]
    )
    assert "vitrail train caption-cnn-lstm --data flickr8k --init runs/resnet-cifar10-0" in found["captioning_hub"]
    names = {f"training: recipes, train {name}" for name in RECIPES}
    assert all(any(unit.startswith(name) for unit in found) for name in names)
