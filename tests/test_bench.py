"""Measuring scripts: each runs from end to end on tiny input, whose figures mean nothing; and what they share."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"
SCRIPTS = sorted(path.stem for path in BENCH.glob("*.py") if path.stem != "harness")
SLOW = pytest.mark.slow
"""on scripts that start or train so much that they take about ten seconds of one core, or more"""
MARKS = {
    **dict.fromkeys(("damaged", "deploy", "dispatch", "doctor", "engines", "exports"), (SLOW,)),
    **dict.fromkeys(("first_hour", "folder", "fuzz"), (SLOW,)),
    **dict.fromkeys(("gpu", "hostile", "kills", "ladder", "match", "memory", "merging", "predict", "ranks"), (SLOW,)),
    **dict.fromkeys(("seeds", "segment", "serving", "shard_memory", "shards", "transfer"), (SLOW,)),
    "hosts": (SLOW, pytest.mark.skipif(sys.platform != "linux", reason="ends its processes by their mark in /proc")),
    "ray_predict": (
        SLOW,
        pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: pip install 'vitrail[cluster]'"),
        pytest.mark.skipif(sys.platform != "linux", reason="reads its processes from /proc"),
    ),
    "page": (
        SLOW,
        pytest.mark.skipif(
            not Path("/usr/bin/chromium").exists() or importlib.util.find_spec("playwright") is None,
            reason="needs Debian's chromium, and pip install 'vitrail[dev]'",
        ),
    ),
    "load": (pytest.mark.skipif(sys.platform != "linux", reason="reads its memory from /proc"),),
}
RUNS = [
    *(pytest.param(name, (), marks=MARKS.get(name, ()), id=name) for name in SCRIPTS),
    pytest.param("bundled", ("caption",), marks=SLOW, id="bundled-caption"),
    pytest.param("bundled", ("segment",), marks=SLOW, id="bundled-segment"),
]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script by name."""
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module


@pytest.mark.parametrize("name, words", RUNS)
def test_script_runs_on_tiny_input(name: str, words: tuple[str, ...], tmp_path: Path) -> None:
    """Without real data, a network or a GPU, and away from the folder of the repository."""
    here = {key: value for key, value in os.environ.items() if key != "VITRAIL_DATA"}
    here |= {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCH / f"{name}.py"), *words, "--tiny", "--results", str(tmp_path / "results")]
    done = subprocess.run(command, cwd=tmp_path, env=here, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    files = sorted((tmp_path / "results").glob("*.json"))
    assert files
    for file in files:
        found = json.loads(file.read_text())
        assert found["command"] == shlex.join(["python", f"bench/{name}.py", *words, "--tiny", "--results", "results"])
        assert not (ROOT / ".git").exists() or re.fullmatch("[0-9a-f]{40}", found["commit"])
        assert found["machine"].keys() >= {"cpu", "cores", "load", "system", "python", "torch"}
        assert found["date"] and isinstance(found["changed"], bool)
        numbers = [value for value in leaves(found["rows"]) if isinstance(value, int | float)]
        assert numbers and all(map(math.isfinite, numbers))


@pytest.mark.slow
def test_a_series_that_is_killed_resumes_the_run(tmp_path: Path) -> None:
    """And counts the seconds that the first command spent."""
    words = ["digits", "--results", "results", "--", "--epochs", "4", "--width", "16", "--depth", "1", "--heads", "2"]
    command = [sys.executable, str(BENCH / "seeds.py"), *words, "--save-every", "1", "--device", "cpu"]
    here = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    metrics = tmp_path / "runs" / "bench" / "digits-0" / "metrics.jsonl"
    first = subprocess.Popen(command, cwd=tmp_path, env=here, start_new_session=True, stderr=subprocess.DEVNULL)
    while not metrics.exists() or '"train"' not in metrics.read_text():
        assert first.poll() is None
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    with metrics.open("a") as log:
        log.write('{"kind": "train", "step": 1, "seconds": 5000.0}\n')
    done = subprocess.run(command, cwd=tmp_path, env=here, capture_output=True, text=True, timeout=200, check=True)
    assert "is started again, so that run is resumed" in done.stderr
    (run,) = json.loads((tmp_path / "results" / "digits.json").read_text())["rows"]["runs"]
    assert 5000 < run["wall_seconds"] < 5200


@pytest.mark.slow
def test_other_engines_run_the_network_that_they_are_given(bench: Any) -> None:
    """In float32 the outputs are those of timm; in bf16 and int8 they are near."""
    timm, engines = pytest.importorskip("timm"), bench("peers.engines")
    network = timm.create_model("test_vit", img_size=32, num_classes=5).eval()
    images = list(torch.randn(8, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    x = torch.cat(images[:2])
    with torch.no_grad():
        expected = network(x)
        found = {name: torch.from_numpy(step()[0]) for name, step in engines.steps(network, x, images)}
    apart = {name: float((other - expected).norm() / expected.norm()) for name, other in found.items()}
    assert list(found) == ["timm in ONNX Runtime fp32", *(f"timm in OpenVINO {each}" for each in engines.PRECISIONS)]
    for name, each in apart.items():
        assert each < (1e-4 if name.endswith("fp32") else 0.3), apart


def test_a_model_of_random_weights_has_outputs_to_compare(bench: Any) -> None:
    """The head of a new model is zero, and so were all outputs: every export was right."""
    with torch.no_grad():
        first, second = bench("harness").random_model("nano/2")(torch.randn(2, 3, 8, 8))
    assert first.std() > 0.5 and (first - second).abs().max() > 0.1


def leaves(value: Any) -> Iterator[Any]:
    """All values that are not dicts or lists."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from leaves(item)
    else:
        yield value


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_has_the_options_of_all(name: str, bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    parser = bench(name).parser()
    tiny = parser.parse_args(["--tiny"])
    assert tiny.tiny and tiny.results == ROOT / "runs" / "tiny"
    with pytest.raises(SystemExit):
        bench(name).parser().parse_args(["--tiny", "--results", str(ROOT / "results")])
    assert "--tiny writes no published results" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        parser.parse_args(["--help"])
    assert end.value.code == 0 and f"bench/{name}.py" in capsys.readouterr().out


def test_words_after_two_hyphens_are_for_the_training(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["digits", "--seeds", "0", "1", "--name", "plain", "--", "--stem", "--seed", "3"]
    args = bench("seeds").parser().parse_args(words)
    assert (args.recipe, args.seeds, args.name, args.train) == (
        "digits",
        [0, 1],
        "plain",
        ["--stem", "--seed", "3"],
    )
    assert args.results == ROOT / "results" and not args.words
    assert bench("seeds").parser().parse_args(["--tiny", "--seeds", "4"]).recipe == "digits"
    for script, needed in (("seeds", "recipe"), ("ladder", "data"), ("ideas", "runs"), ("folder", "data")):
        with pytest.raises(SystemExit):
            bench(script).parser().parse_args([])
        assert f"{needed} is needed" in capsys.readouterr().err


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_that_are_no_results_are_not_written(bad: float, bench: Any, tmp_path: Path) -> None:
    harness = bench("harness")
    with pytest.raises(ValueError, match="rows, a, 1, b is"):
        harness.record("x", {"a": [1.0, {"b": bad}]}, tmp_path)
    assert not list(tmp_path.iterdir())
    assert harness.recorded("x", tmp_path) == {}
    harness.record("x", {"a": [1.0, {"b": 2}]}, tmp_path)
    assert harness.recorded("x", tmp_path) == {"a": [1.0, {"b": 2}]}


def test_steps_take_turns(bench: Any) -> None:
    made: list[str] = []
    steps = {name: lambda name=name: made.append(name) for name in "ab"}
    times = bench("harness").in_turns(steps, rounds=2, warm_up=1, calls=2)
    assert "".join(made) == "ab" + "aabb" * 2
    assert {name: len(readings) for name, readings in times.items()} == {"a": 2, "b": 2}


@pytest.fixture
def ladder(bench: Any) -> ModuleType:
    return bench("ladder")


def test_rungs_of_the_ladder_get_the_same_time(
    ladder: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With trainings whose first three fifths of steps take a second and the others two, on one core."""
    made: list[dict[str, str]] = []

    def train(*words: str) -> tuple[dict[str, Any], float]:
        options = {name: value for name, value in itertools.pairwise(words) if name.startswith("--")}
        made.append({"recipe": words[1], **options})
        an_epoch = ladder.IMAGES[Path(options["--data"]).name] // ladder.recipe_of(words[1]).batch_size
        steps = round(float(options["--epochs"]) * an_epoch)
        marks = {*range(20, steps, 20), steps}
        rows = [{"kind": "train", "step": s, "seconds": s + max(0.0, s - 0.6 * steps)} for s in sorted(marks)]
        rows.append({"kind": "val", "cider": 1 / float(options["--lr"]), "bleu4": 0.1})
        Path(options["--out"]).mkdir(parents=True)
        (Path(options["--out"]) / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {"parameters": 5, "cider": -1}, 1.0

    def measure(name: str, *seeds: int) -> dict[str, Any]:
        args = Namespace(core_minutes=40.0, try_core_minutes=10.0, rates=ladder.RATES, seeds=seeds, results=tmp_path)
        ladder.measure(name, ladder.Climb(ladder.RUNGS[name], Path("data"), tmp_path / name), args)
        return json.loads((tmp_path / f"ladder-{name}.json").read_text())["rows"]

    monkeypatch.setattr(ladder, "vitrail", train)
    monkeypatch.setattr(ladder, "machine", lambda: {"cores": 1, "bf16": False})
    for name in ladder.RUNGS:
        row = measure(name, 0)
        assert row["rate"] == 0.5, "the rate with the best score on validation"
        assert [tried["training_seconds"] for tried in row["tries"]] == pytest.approx([600] * 3, rel=0.03)
        assert [run["training_seconds"] for run in row["runs"]] == pytest.approx([2400], rel=0.03)
    assert all("--init" in command for command in made if command["recipe"] == "caption-coca"), "timed too"
    # What is there is not made again, and another seed takes as many epochs.
    before = len(made)
    row = measure("f", 0, 1)
    first, second = made[before:]
    assert (first["recipe"], second["recipe"], second["--init"]) == ("caption-match", "caption-coca", first["--out"])
    assert row["runs"][0]["epochs"] == row["runs"][1]["epochs"] and second["--seed"] == "1"
    # A faster kind of processor trains for more epochs in the same time, so nothing of the slower one is kept.
    monkeypatch.setattr(ladder, "machine", lambda: {"cores": 1, "bf16": True})
    before = len(made)
    measure("e", 0)
    assert len(made) == before + 5, "its speed, three tries and the run"


@pytest.mark.parametrize("left", ["stopped", "done", "no state", "another rate"])
def test_a_stopped_training_of_the_ladder_is_resumed(
    ladder: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    """One that is done, that has saved nothing or that was another command begins anew."""
    climb, out = ladder.Climb(ladder.RUNGS["e"], Path("data"), tmp_path), tmp_path / "caption-vit"
    commands: list[tuple[str, ...]] = []

    def train(*words: str) -> tuple[dict[str, Any], float]:
        commands.append(words)
        kind = "done" if left == "done" else "train"
        rows = [
            {"kind": "start", "command": shlex.join(["vitrail", *commands[0], "--json"])},
            {"kind": "train", "seconds": 1},
        ]
        rows += [{"kind": "val", "cider": 0.2}, {"kind": kind, "seconds": 2}]
        (out if left == "no state" else out / "state").mkdir(parents=True, exist_ok=True)
        torn = '{"kind": "tr' if left == "stopped" else ""  # by the kill
        (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)
        return {"parameters": 5}, 1.0

    monkeypatch.setattr(ladder, "vitrail", train)
    climb.train("caption-vit", 2.0, 1.0, 0)
    climb.train("caption-vit", 2.0, 0.5 if left == "another rate" else 1.0, 0)
    first, second = commands
    assert first[:2] == ("train", "caption-vit")
    if left == "stopped":
        assert second == ("train", "--resume", str(out))
    else:
        assert second[:2] == ("train", "caption-vit")


# ---- parity


@pytest.fixture
def parity(bench: Any, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """bench/parity.py with one made-up library, whose three models all differ by 1e-6."""
    module: ModuleType = bench("parity")
    row = {"sizes": {"32x32": {"tokens": 1e-6, "output": 0.0, "relative": 1e-7}}, "note": ""}
    peer = Namespace(LIBRARY="timm", TINY=("a",), models=lambda: ["a", "b, c", "d"], compare=lambda name: row)
    monkeypatch.setattr(module, "PEERS", {"timm": peer})
    monkeypatch.setattr(module, "MEASURED", ("src/vitrail/vit.py",))
    return module


def run_parity(parity: ModuleType, folder: Path, *patterns: str) -> tuple[int, dict[str, Any]]:
    sys.argv[1:] = ["--results", str(folder), *patterns]
    status = parity.main()
    return status, json.loads((folder / "parity-timm.json").read_text())["rows"]


def test_parity_resumes_after_the_last_row(parity: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []
    peer = parity.PEERS["timm"]
    whole = peer.compare

    def compare(name: str) -> dict[str, Any]:
        if name == "b, c" and not compared.count("stopped"):
            compared.append("stopped")
            raise KeyboardInterrupt
        compared.append(name)
        return whole(name)

    monkeypatch.setattr(sys, "argv", ["parity.py"])
    monkeypatch.setattr(peer, "compare", compare)
    with pytest.raises(KeyboardInterrupt):
        run_parity(parity, tmp_path)
    status, rows = run_parity(parity, tmp_path)
    assert compared == ["a", "stopped", "b, c", "d"] and list(rows) == ["a", "b, c", "d"] and status == 0
    assert run_parity(parity, tmp_path)[0] == 0 and len(compared) == 4, "nothing is left to compare"
    run_parity(parity, tmp_path, "timm/b*")
    assert compared[4:] == ["b, c"], "what is named is measured again"
    monkeypatch.setattr(parity, "fingerprint", lambda library: "other code")
    run_parity(parity, tmp_path, "timm/a")
    assert compared[5:] == ["a"]
    run_parity(parity, tmp_path)
    assert compared[6:] == ["b, c", "d"], "rows of other code are measured again"


def test_parity_fails_where_a_model_differs_or_cannot_be_compared(
    parity: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = parity.PEERS["timm"].compare("a")
    bad = {
        "a": good | {"sizes": {"32x32": {"tokens": 2e-4, "output": 0.0, "relative": 1e-7}}},
        "b, c": good | {"written": {"tokens": 0.0, "output": 0.0, "relative": 2e-4}},
        "d": good | {"same bits": False},
    }
    monkeypatch.setattr(sys, "argv", ["parity.py"])
    monkeypatch.setattr(parity.PEERS["timm"], "compare", bad.__getitem__)
    assert [run_parity(parity, tmp_path, f"timm/{name}")[0] for name in bad] == [1, 1, 1]
    del bad["b, c"]
    status, rows = run_parity(parity, tmp_path, "*")
    assert status == 1 and list(rows) == ["a", "d"] and "KeyError: 'b, c'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        run_parity(parity, tmp_path, "vit")
    assert end.value.code == 2 and "no model's name matches vit" in capsys.readouterr().err


def test_parity_rows_depend_on_code_and_not_on_comments(
    parity: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bench" / "peers").mkdir(parents=True)
    for name in ("comparison", "timm"):
        (tmp_path / "bench" / "peers" / f"{name}.py").write_text("")
    monkeypatch.setattr(parity, "ROOT", tmp_path)
    monkeypatch.setattr(parity, "MEASURED", ("vit.py",))
    code = tmp_path / "vit.py"

    def hashed(text: str) -> str:
        code.write_text(text)
        return parity.fingerprint("timm")

    before = hashed('"""Docs."""\nX = 1\n"""one"""\ndef f():\n    """Twice."""\n    return 2 * X\n')
    assert before == hashed("X = 1  # one\n\n\ndef f():\n    return (2 * X)\n")
    assert before != hashed("X = 1\ndef f():\n    return 3 * X\n")


def test_parity_sizes_are_rounded_to_whole_patches(bench: Any) -> None:
    comparison = bench("peers.comparison")
    expected = {8: ((304, 304), (208, 336)), 14: ((308, 308), (210, 336)), 32: ((320, 320), (224, 352))}
    for patch, sizes in expected.items():
        assert tuple(comparison.rounded(size, patch) for size in comparison.OTHERS) == sizes
    assert comparison.note_on(comparison.OTHERS, 16) == ""
    assert comparison.note_on(comparison.OTHERS, 14) == "sizes in whole patches of 14"


@pytest.mark.parametrize("ours", [math.nan, math.inf])
def test_parity_refuses_values_that_are_not_finite(ours: float, bench: Any) -> None:
    comparison = bench("peers.comparison")
    one, two = torch.ones(1, 2), torch.tensor([[1.0, -4.0]])
    assert comparison.differences((one, two), (two, two)) == {"tokens": 5.0, "output": 0.0, "relative": 1.25}
    with pytest.raises(ValueError, match="not finite"):
        comparison.differences((one, two), (torch.full((1, 2), ours), two))
    with pytest.raises(ValueError, match="shape"):
        comparison.differences((one, two), (one, two[0]))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_stage_on_a_gpu_that_hangs_or_crashes_costs_no_other(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What it measured before stays in its row."""
    gpu = bench("gpu")

    def hang(own: Any) -> None:
        own.keep("hang", {"before": 1})
        subprocess.run(["sleep", "100"], check=True)

    def fail(own: Any) -> None:
        raise RuntimeError("out of memory")

    def work(own: Any) -> None:
        own.keep("work", {"a": 2})

    stages = {"hang": hang, "crash": lambda own: os._exit(9), "fail": fail, "work": work}
    monkeypatch.setattr(gpu, "STAGES", {name: gpu.Stage(run, 0.4) for name, run in stages.items()})
    assert gpu.run_stages(gpu.Bench(True, None, tmp_path), list(stages)) == ["hang", "crash", "fail"]
    assert json.loads((tmp_path / "gpu.json").read_text())["rows"] == {
        "hang": {"before": 1, "failed": "stopped at its time limit"},
        "fail": {"failed": "RuntimeError: out of memory"},
        "work": {"a": 2},
    }
    assert "out of memory" in capfd.readouterr().err


def test_each_of_the_two_calls_on_a_gpu_takes_less_than_six_minutes(bench: Any) -> None:
    gpu = bench("gpu")
    for stages in gpu.CALLS.values():
        assert sum(gpu.STAGES[name].seconds for name in stages) <= 345
    assert "first 340 s, second 340 s" in gpu.plan([*gpu.STAGES])


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_stage_on_a_gpu_may_use_what_those_before_it_have_left(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = bench("gpu")
    stages = {name: gpu.Stage(lambda own, name=name: own.keep(name, {"left": own.left()}), 1) for name in ("a", "b")}
    monkeypatch.setattr(gpu, "STAGES", stages)
    assert gpu.run_stages(gpu.Bench(True, None, tmp_path), ["a", "b"]) == []
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert rows["a"]["left"] <= 10 < rows["b"]["left"] < 20


@pytest.mark.parametrize(
    "graphs, wanted",
    [
        ({}, None),  # not measured
        ({"plain": {"milliseconds": 10.0}}, 109),  # 95 seconds of 87 steps per epoch
        ({"plain": {"milliseconds": 7.0}}, None),  # the recipe's 150 epochs fit
        ({"plain": {"milliseconds": 7.0}, "CUDA graphs": {"milliseconds": 1.0}}, None),
        (
            {
                "plain": {"milliseconds": 40.0},
                "CUDA graphs": {"milliseconds": 20.0},
                "CUDA graphs are used in the recipes": True,
            },
            54,
        ),
    ],
)
def test_the_recipe_trains_for_the_epochs_that_fit(graphs: Any, wanted: int | None, bench: Any, tmp_path: Path) -> None:
    own = bench("gpu").Bench(False, None, tmp_path)
    own.keep("graphs", graphs)
    assert bench("gpu_stages.recipes").epochs_that_fit(own, 95.0) == wanted
