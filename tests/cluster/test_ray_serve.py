"""`vitrail serve --ray`: its answers, its streams and its end are those of one server."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from serve.serving import captioner, classifier, client_of, form, near, photo, served

from vitrail.cli import main
from vitrail.errors import UserError
from vitrail.serve.models import Source

for package in ("fastapi", "httpx"):
    pytest.importorskip(package, reason="needs pip install 'vitrail[serve,dev]'")
RAY_SERVE = all(map(find_spec, ("ray", "grpc", "aiohttp")))
KEY = "a-key-of-a-test-0123"


class Ray:
    """What `plan_replicas` reads of a cluster."""

    def __init__(self, *machines: dict[str, float]) -> None:
        self.machines = machines

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": machine} for machine in self.machines] + [{"Alive": False}]

    def cluster_resources(self) -> dict[str, float]:
        names = {name for machine in self.machines for name in machine}
        return {name: sum(machine.get(name, 0) for machine in self.machines) for name in names}


@pytest.mark.parametrize(
    ("machines", "replicas", "device", "expected"),
    [
        ([{"CPU": 4}], None, None, (1, {"num_gpus": 0, "num_cpus": 4})),
        ([{"CPU": 4}, {"CPU": 8}], None, None, (2, {"num_gpus": 0, "num_cpus": 4})),
        ([{"CPU": 4}], 3, None, (3, {"num_gpus": 0, "num_cpus": 1})),
        ([{"CPU": 1}], 4, None, (4, {"num_gpus": 0, "num_cpus": 0.25})),
        ([{"CPU": 5}, {"CPU": 5}], 3, None, (3, {"num_gpus": 0, "num_cpus": 2})),
        ([{"CPU": 1}, {"CPU": 1}], 3, None, (3, {"num_gpus": 0, "num_cpus": 0.5})),
        ([{"CPU": 32}, {"CPU": 4, "GPU": 2}], None, None, (2, {"num_gpus": 1, "num_cpus": 2})),
        ([{"CPU": 16, "GPU": 2}, {"CPU": 16, "GPU": 2}], None, None, (4, {"num_gpus": 1, "num_cpus": 8})),
        ([{"CPU": 16, "GPU": 2}], 1, None, (1, {"num_gpus": 1, "num_cpus": 16})),
        ([{"CPU": 16, "GPU": 2}], None, "cpu", (1, {"num_gpus": 0, "num_cpus": 16})),
    ],
)
def test_replicas_share_the_cluster(
    machines: list[dict[str, float]], replicas: int | None, device: str | None, expected: Any
) -> None:
    """Each fits on every machine, since Ray would wait for ever for one that none has room for."""
    from vitrail.cluster.ray_serve import plan_replicas

    assert plan_replicas(Ray(*machines), replicas, device) == expected


def test_more_replicas_than_gpus_are_refused() -> None:
    from vitrail.cluster.ray_serve import plan_replicas

    with pytest.raises(UserError, match="3 replicas need a GPU each, and the cluster has 2: lower --replicas"):
        plan_replicas(Ray({"CPU": 8, "GPU": 2}), 3, None)


def test_a_source_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vitrail.cluster.ray_serve import with_absolute_path

    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    assert with_absolute_path(Source("a", "run")) == Source("a", str(tmp_path / "run"))
    assert with_absolute_path(Source("a", "classify")).source == "classify"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--replicas", "2"], "--replicas is for a Ray cluster: add --ray"),
        (["--ray", "--replicas", "0"], "--replicas must be at least 1"),
        (["./missing", "--ray"], "missing"),
        (["--ray"], "pip install 'vitrail[cluster]'"),
    ],
)
def test_what_is_wrong_is_refused_before_ray_starts(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["serve", *words]) == 2
    printed = capsys.readouterr()
    assert told in printed.err and printed.err.count("\n") == 1 and not printed.out


@pytest.mark.skipif(not RAY_SERVE, reason="needs pip install 'vitrail[cluster]'")
def test_a_port_in_use_is_refused_before_ray_starts(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["serve", "--ray", "--port", str(port)]) == 2
    assert f"port {port} is in use" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not RAY_SERVE, reason="needs pip install 'vitrail[cluster]'")
def test_replicas_answer_as_one_server_does(tmp_path: Path) -> None:
    import httpx

    models = {"classes": classifier(), "words": captioner()}
    for name, task in models.items():
        task.save(tmp_path / name)
    with client_of(*(served(name, task) for name, task in models.items())) as client:
        expected = client.post("/v1/predict", files=form(photo(), photo(1))).json()
        streamed = client.post("/v1/predict?stream=true", files=form(photo()), data={"model": "words"}).text
    command = [sys.executable, "-m", "vitrail", "serve", *(f"{name}={name}" for name in models), "--ray", "--port", "0"]
    command += ["--replicas", "2", "--engine", "eager", "--measure", "0", "--device", "cpu"]
    # Ray's processes are polite by default, and starve on a busy machine.
    known = {**os.environ, "RAY_ADDRESS": "local", "RAY_worker_niceness": "0", "VITRAIL_API_KEYS": KEY}
    with subprocess.Popen(
        command, cwd=tmp_path, env=known, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("vitrail is ready at http://127.0.0.1:"), process.communicate(timeout=600)
            headers = {"Authorization": f"Bearer {KEY}"}
            with httpx.Client(base_url=line.split()[-1], headers=headers, timeout=300) as there:
                post = "/v1/predict"
                with ThreadPoolExecutor(8) as several:  # over both replicas
                    jobs = [several.submit(there.post, post, files=form(photo(), photo(1))) for _ in range(16)]
                    found = [job.result() for job in jobs]
                assert all(answer.status_code == 200 and near(answer.json(), expected) for answer in found)
                stream = there.post(f"{post}?stream=true", files=form(photo()), data={"model": "words"})
                assert stream.headers["content-type"].startswith("text/event-stream")
                assert events(stream.text) == events(streamed)
                refused = there.post(post, files=form(photo()), data={"model": "no"})
                assert refused.status_code == 404 and refused.json()["error"]["code"] == "no_such_model"
                assert there.post(post, files=form(b"no image")).status_code == 415
                assert [row["name"] for row in there.get("/v1/models").json()["models"]] == [*models]
                assert there.get("/readyz").json() == {"status": "ready"}
                assert httpx.post(f"{there.base_url}{post}", files=form(photo())).status_code == 401
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=600)
        finally:
            process.kill()
    assert process.returncode == 0, err
    assert "vitrail: stopped" in err and "Traceback" not in err


def events(text: str) -> list[Any]:
    """The names of a stream's events and their values, with scores rounded."""
    blocks = [block.split("\n") for block in text.strip().split("\n\n") if block.startswith("event")]
    return [(block[0], rounded(json.loads(block[1].removeprefix("data: ")))) for block in blocks]


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return round(value, 3) if isinstance(value, float) else value
