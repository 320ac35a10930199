"""The command: what it refuses, and a whole process from its start to its end."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from serve.serving import PATIENCE, photo, texts

from vitrail import cli


@pytest.mark.parametrize(
    "words, said",
    [
        (["nothere"], "no model 'nothere'"),
        (["classify", "classify"], "two models are called classify"),
        (["--host", "no.such.host.invalid"], "is not an address"),
        (["--timeout", "5"], "--timeout must be at least 30"),
        (["--engine", "fast"], "--engine must be one of auto"),
        (["--api-keys", "nothere"], "nothere cannot be read as API keys"),
        (["--max-batches", "3"], "did you mean --max-batch?"),
        (["http://example.org/model"], "http://example.org/model"),
        (["nothere", "--allow-origin", "https://example.org"], "no model 'nothere'"),
        (["nothere", "--allow-origin", "example.org"], "'example.org' is not an origin"),
        (["nothere", "--allow-origin", "https://"], "'https://' is not an origin"),
        (["nothere", "--allow-origin", "https://*"], "'https://*' has a wildcard"),
        (["nothere", "--allow-origin", "*"], "'*' has a wildcard"),
        (["nothere", "--allow-origin", "https://Example.org"], "browsers send as https://example.org: write that"),
        (["nothere", "--allow-origin", "https://example.org:443"], "browsers send as https://example.org: write that"),
        (["nothere", "--allow-origin", "http://example.org:443"], "no model 'nothere'"),
        (["nothere", "--max-upload-mb", "inf"], "--max-upload-mb must be a number above 0, got inf"),
        (["nothere", "--max-megapixels", "nan"], "--max-megapixels must be a number above 0, got nan"),
        (["nothere", "--max-wait-ms", "-5"], "--max-wait-ms must be at least 0 and below 10,000, got -5"),
        (["--port", "70000"], "--port must be from 0 to 65535, got 70000"),
        (["--port", "-1"], "--port must be from 0 to 65535, got -1"),
    ],
)
def test_what_is_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", *words]) == 2
    printed = capsys.readouterr()
    assert not printed.out and said in printed.err and len(printed.err.splitlines()) == 1


def test_a_port_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert cli.main(["serve", "classify", "--port", str(port)]) == 2
    assert f"port {port} is in use: choose another --port" in capsys.readouterr().err


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("vitrail.commands.serve.find_spec", lambda name: None if name == "uvicorn" else find_spec(name))
    assert cli.main(["serve"]) == 2
    assert "pip install 'vitrail[serve]'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_answers_until_a_signal_and_finishes_what_it_took(number: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vitrail", "serve", "--port", "0", "--measure", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (tmp_path / "err").open("wb") as err:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err, env=environment, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("vitrail is ready at http://127.0.0.1:"), (tmp_path / "err").read_text()
        address = urlsplit(line.split()[-1])
        found: list[tuple[int, Any]] = []

        def ask(count: int) -> None:
            connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=4 * PATIENCE)
            body = json.dumps(texts(*[photo(i) for i in range(count)]))
            connection.request("POST", "/v1/predict", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            found.append((response.status, json.loads(response.read())))

        ask(3)
        assert found[0][0] == 200 and len(found[0][1]["predictions"]) == 3
        threads = [threading.Thread(target=ask, args=(64,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        metrics = ""
        while "vitrail_images_waiting 128.0" not in metrics and len(found) < 3:  # a quick machine has answered them
            connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=PATIENCE)
            connection.request("GET", "/metrics")
            metrics = connection.getresponse().read().decode()
            connection.close()
        process.send_signal(number)
        for thread in threads:
            thread.join(4 * PATIENCE)
        assert process.wait(4 * PATIENCE) == 0
        assert [status for status, _ in found] == [200] * 3
        assert [len(body["predictions"]) for _, body in found] == [3, 64, 64]
        printed = (tmp_path / "err").read_text()
        assert "Traceback" not in printed and all(row.startswith("vitrail: ") for row in printed.splitlines())
        assert printed.splitlines()[-1] == "vitrail: stopped"
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
