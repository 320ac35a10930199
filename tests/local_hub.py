"""A server on this machine that answers as the Hub does, for tests of several rooms."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest


class Hub(ThreadingHTTPServer):
    """Repositories `owner/name` of models and data sets, each with files at revisions.

    A handler a request, all in daemon threads.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.repositories: dict[str, dict[str, Path]] = {}
        self.requests: list[str] = []
        self.token: dict[str, str] = {}
        """what a private repository asks for"""
        self.gated: set[str] = set()
        self.status = 0
        """answers everything with this code, where it is one"""
        self.silent = False
        self.failures = 0
        """answers so many requests for bytes of a file with 503 before the others"""
        self.sent = 0
        """bytes of files"""
        self.cards: dict[str, dict[str, Any]] = {}
        self.storage = ""
        """sends those who want bytes of a file to this host, as the Hub does"""
        Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fall_silent(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Answer nothing from now on, with time limits that a test can wait for."""
        self.silent = True
        for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", 1)


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        if self.server.silent:
            time.sleep(3)  # longer than the time limits of `fall_silent`
            return
        if self.server.status:
            self.answer(self.server.status, b"", {}, body)
            return
        pieces = [unquote(piece) for piece in urlsplit(self.path).path.lstrip("/").split("/")]
        if stored := pieces[0] == "storage":
            del pieces[0]
        if api := pieces[0] == "api":
            del pieces[0]
        if pieces[0] in ("models", "datasets"):
            del pieces[0]
        name, rest = "/".join(pieces[:2]), pieces[2:]
        revisions = self.server.repositories.get(name)
        token = self.server.token.get(name)
        if revisions is None or (token and not stored and self.headers.get("Authorization") != f"Bearer {token}"):
            self.answer(401, b"", {"X-Error-Code": "RepoNotFound"}, body)
        elif name in self.server.gated:
            self.answer(403, b"", {"X-Error-Code": "GatedRepo"}, body)
        elif (at := self.place(revisions, rest[1] if len(rest) > 1 else "main")) is None:
            self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"}, body)
        else:
            self.files(at, commit_of(at), name, "/".join(rest[2:]), api, body, stored)

    def place(self, revisions: dict[str, Path], revision: str) -> Path | None:
        commits = {commit_of(place): place for place in revisions.values()}
        return revisions.get(revision) or commits.get(revision)

    def files(self, at: Path, commit: str, name: str, file: str, api: bool, body: bool, stored: bool) -> None:
        if api:
            paths = sorted(path for path in at.rglob("*") if path.is_file())
            siblings = [{"rfilename": path.relative_to(at).as_posix(), "size": path.stat().st_size} for path in paths]
            said = {"id": name, "sha": commit, "siblings": siblings, "cardData": self.server.cards.get(name)}
            self.answer(200, json.dumps(said).encode(), {}, body)
        elif (at / file).is_file() and "Range" in self.headers:
            self.range(at / file, stored)
        elif (at / file).is_file():
            content = (at / file).read_bytes()
            tag = hashlib.sha1(content).hexdigest()
            self.answer(200, content, {"ETag": f'"{tag}"', "X-Repo-Commit": commit}, body)
        else:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, body)

    def range(self, file: Path, stored: bool) -> None:
        if self.server.storage and not stored:
            self.answer(302, b"", {"Location": f"{self.server.storage}/storage{self.path}"}, body=False)
        elif stored and "Authorization" in self.headers:
            self.answer(400, b"", {}, body=False)
        elif self.server.failures > 0:
            self.server.failures -= 1
            self.answer(503, b"", {}, body=False)
        else:
            first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            content = file.read_bytes()[first : last + 1]
            self.server.sent += len(content)
            self.answer(206, content, {}, body=True)

    def answer(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def commit_of(place: Path) -> str:
    return hashlib.sha1(str(place).encode()).hexdigest()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that everything here asks, and an empty cache."""
    import huggingface_hub
    from huggingface_hub import constants

    # Before its release 1.0 it had another name and place.
    close_session: Callable[[], None] = (
        huggingface_hub.close_session
        if hasattr(huggingface_hub, "close_session")
        else huggingface_hub.utils.reset_sessions
    )

    server = Hub()
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    for name, value in {
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_TOKEN_PATH": str(tmp_path / "no-token"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_ETAG_TIMEOUT": 60,  # so that a busy machine fails no test
        "HF_HUB_DOWNLOAD_TIMEOUT": 60,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.chdir(tmp_path)
    close_session()
    yield server
    close_session()
    server.shutdown()
    server.server_close()
