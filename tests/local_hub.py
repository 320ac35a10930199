"""A Hub on this machine: folders served as huggingface_hub asks for them."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class LocalHub:
    """`folder` holds a folder `owner/name` a repository; `asked` is what was asked for, in order."""

    folder: Path
    cache: Path
    asked: list[str] = field(default_factory=list)
    status: int = 0
    """answers everything with this status, where it is not 0"""

    def listed(self, name: str) -> bytes:
        """What the Hub says of a repository."""
        files = [{"rfilename": path.name} for path in sorted((self.folder / name).glob("*"))]
        return json.dumps({"id": name, "sha": COMMIT, "siblings": files}).encode()

    def file(self, owner: str, name: str, _: str, revision: str, file: str) -> tuple[int, bytes, dict[str, str]]:
        """Status, content and headers of one file."""
        path, headers = self.folder / owner / name / file, {"X-Repo-Commit": COMMIT}
        if path.is_file() and revision in ("main", COMMIT):
            data = path.read_bytes()
            return 200, data, {**headers, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
        error = "RevisionNotFound" if path.is_file() else "EntryNotFound" if path.parent.is_dir() else "RepoNotFound"
        return 404, b"", {**headers, "X-Error-Code": error}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A server on 127.0.0.1 that huggingface_hub takes for the Hub, with an empty cache."""
    from huggingface_hub import close_session, constants

    place = LocalHub(tmp_path / "hub", tmp_path / "cache")
    place.folder.mkdir()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(False)

        def do_GET(self) -> None:
            self.answer(True)

        def answer(self, body: bool) -> None:
            place.asked.append(self.path)
            parts = self.path.split("?")[0].strip("/").split("/")
            status, data, headers = place.status or 404, b"", {}
            if not place.status and parts[:2] == ["api", "models"]:
                status, data = 200, place.listed("/".join(parts[2:4]))
            elif not place.status and len(parts) == 5:
                status, data, headers = place.file(*parts)
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    for variable in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place.cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    close_session()
    try:
        yield place
    finally:
        close_session()
        server.shutdown()
        server.server_close()
