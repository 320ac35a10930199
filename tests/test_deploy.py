"""The files of deploy/: what they start is what vitrail takes, and what they do is what docs/deploy.md says.

`bench/deploy.py`, which test_bench.py runs, follows the Dockerfile's steps.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from documented import ROOT, units
from linters import lint

from vitrail import cli
from vitrail.options import Parser
from vitrail.serve.settings import MIN_KEY_LENGTH

DEPLOY = ROOT / "deploy"
SCRIPTS = [DEPLOY / "install", DEPLOY / "vitrail-idle"]
UNITS = sorted([*DEPLOY.glob("*.service"), *DEPLOY.glob("*.timer")])
yaml = pytest.importorskip("yaml")


class Parsed(Exception):
    """A command's arguments were understood."""


def takes(words: Sequence[str]) -> dict[str, Any]:
    """What `vitrail serve` understands of a command line; it refuses unknown flags and values."""
    found: dict[str, Any] = {}

    def parse_and_stop(parser: Parser, args: list[str]) -> None:
        options, rest = parser.parse_known_args(args)
        assert not rest, rest
        found.update(vars(options))
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parser, "parse_args", parse_and_stop)
        assert words[0] == "serve"
        with pytest.raises(Parsed):
            cli.COMMANDS["serve"](words[1:])
    return found


def entries(unit: Path) -> dict[str, list[str]]:
    """The settings of a unit, in their order."""
    found: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        if line and not line.startswith(("#", "[")):
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


# ---- the containers


def composed() -> dict[str, Any]:
    return dict(yaml.safe_load((DEPLOY / "compose.yaml").read_text()))


def filled(text: str) -> str:
    """The text with the default values of its variables."""
    return re.sub(r"\$\{\w+:-(.*?)\}", r"\1", text)


def test_the_containers_start_vitrail_with_flags_that_it_has() -> None:
    services = composed()["services"]
    options = takes(shlex.split(filled(services["vitrail"]["command"])))
    assert options["sources"] == ["classify", "caption"] and options["host"] == "0.0.0.0"
    assert str(options["api_keys"]) == "/run/secrets/keys" and options["rate_limit"] > 0
    (command,) = re.findall(r"^CMD (\[.*\])$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    options = takes(yaml.safe_load(command))
    # The port of the health check, of the proxy and of EXPOSE is the default one.
    assert options["port"] == 8000 and "EXPOSE 8000" in (DEPLOY / "Dockerfile").read_text()
    assert "{$UPSTREAM:vitrail:8000}" in (DEPLOY / "Caddyfile").read_text()
    assert entries(DEPLOY / "caddy.conf")["Environment"] == ["SITE=photos.example.org", "UPSTREAM=127.0.0.1:8000"]


def test_only_the_proxy_connects_to_vitrails_container_which_has_few_rights() -> None:
    whole = composed()
    vitrail, proxy = whole["services"]["vitrail"], whole["services"]["caddy"]
    assert "ports" not in vitrail and vitrail["networks"] == ["inside"] and whole["networks"]["inside"]["internal"]
    assert (
        vitrail["read_only"] and vitrail["cap_drop"] == ["ALL"] and "no-new-privileges:true" in vitrail["security_opt"]
    )
    assert {port.split(":")[1].split("/")[0] for port in proxy["ports"]} == {"80", "443"}
    used = {volume.split(":")[0] for volume in proxy["volumes"] if not volume.startswith(".")}
    assert used == whole["volumes"].keys()
    assert set(vitrail["secrets"]) == whole["secrets"].keys()
    for file in ("Caddyfile", "Dockerfile"):
        assert file in (DEPLOY / "compose.yaml").read_text() and (DEPLOY / file).is_file()


def test_the_images_process_is_not_root_and_dies_by_sigterm() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    for target in ("cpu", "cuda"):
        stage = text.partition(f"AS {target}\n")[2].partition("\nFROM")[0]
        assert stage.rstrip().endswith("USER 10001:10001")
    assert "--uid 10001" in text and "STOPSIGNAL SIGTERM" in text and "/readyz" in text


def test_the_gpu_changes_only_what_the_first_file_has() -> None:
    changes = yaml.safe_load((DEPLOY / "compose.cuda.yaml").read_text())
    assert changes.keys() == {"services"} and changes["services"].keys() == {"vitrail"}
    assert f"AS {changes['services']['vitrail']['build']['target']}\n" in (DEPLOY / "Dockerfile").read_text()


def test_compose_files_have_the_form_of_compose() -> None:
    files = [str(DEPLOY / name) for name in ("compose.yaml", "compose.cuda.yaml")]
    lint("check-jsonschema", "--builtin-schema", "vendor.compose-spec", *files)


def test_the_dockerfile_has_no_usual_mistake() -> None:
    lint("hadolint", str(DEPLOY / "Dockerfile"))


# ---- the service


def test_the_service_starts_vitrail_with_flags_that_it_has() -> None:
    found = entries(DEPLOY / "vitrail.service")
    (command,), models = found["ExecStart"], found["Environment"][0]
    assert command.startswith("/opt/vitrail/bin/vitrail serve $MODELS ") and models == '"MODELS=classify caption"'
    options = takes(shlex.split(command)[1:])
    assert options["host"] == "127.0.0.1", "the proxy alone is open to others"
    assert str(options["api_keys"]) == "%d/keys" and found["LoadCredential"] == ["keys:/etc/vitrail/keys.txt"]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_units_have_no_mistake_that_systemd_finds(unit: Path, tmp_path: Path) -> None:
    for each in UNITS:  # with a program that is there in the place of ours
        (tmp_path / each.name).write_text(re.sub(r"/opt/vitrail/bin/[\w-]+", "/bin/true", each.read_text()))
    lint("systemd-analyze", "verify", "--man=no", str(tmp_path / unit.name))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_have_no_usual_mistake(script: Path) -> None:
    assert os.access(script, os.X_OK)
    subprocess.run(["sh", "-n", str(script)], check=True)
    lint("shellcheck", str(script))


FAKE = """#!/bin/sh
echo "$(basename "$0") $*" >>"$CALLS"
[ "$(basename "$0")" = systemctl ] && exit 0
case "$*" in
    "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
    *secrets*) exec "$REAL" "$@" ;;
esac
"""


def test_installing_twice_keeps_keys_and_starts_the_service(tmp_path: Path) -> None:
    """With stand-ins for Python and systemd, which only write down how they were called."""
    bin, root, calls = tmp_path / "bin", tmp_path / "root", tmp_path / "calls"
    bin.mkdir()
    for name in ("python3", "systemctl", "curl"):
        (bin / name).write_text(FAKE)
        (bin / name).chmod(0o755)
    wheel = tmp_path / "vitrail-0.1.0-py3-none-any.whl"
    wheel.touch()
    known = {"PATH": f"{bin}:{os.environ['PATH']}", "DESTDIR": str(root), "CALLS": str(calls)}
    known["REAL"] = str(shutil.which("python3"))

    def install(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(DEPLOY / "install"), *words], env=known, capture_output=True, text=True)

    assert install(str(wheel)).returncode == 0
    keys = root / "etc" / "vitrail" / "keys.txt"
    first = keys.read_text()
    assert len(first.strip()) >= MIN_KEY_LENGTH and keys.stat().st_mode & 0o777 == 0o600
    assert "systemctl enable vitrail.service" in calls.read_text() and "vitrail-idle.timer" not in calls.read_text()
    assert f"-m pip install --upgrade {wheel}[serve]" in calls.read_text()
    assert install(str(wheel), "--idle", "20").returncode == 0
    assert keys.read_text() == first and calls.read_text().count("-m venv") == 1
    assert "systemctl enable --now vitrail-idle.timer" in calls.read_text()
    assert (root / "etc" / "vitrail" / "idle").read_text() == "IDLE_MINUTES=20\n"
    there = {path.name for path in (root / "etc" / "systemd" / "system").iterdir()}
    assert there == {unit.name for unit in UNITS} and os.access(
        root / "opt" / "vitrail" / "bin" / "vitrail-idle", os.X_OK
    )
    before = calls.read_text()
    for words, said in (["--idel", "20"], "no option --idel"), (["--idle"], "minutes"), (["--idle", "0"], "at least 1"):
        refused = install(str(wheel), *words)
        assert refused.returncode == 2 and said in refused.stderr and "systemctl" not in refused.stderr
    assert calls.read_text() == before, "nothing is installed or started"
    missing = install(str(tmp_path / "none.whl"))
    assert missing.returncode == 2 and "there is no wheel" in missing.stderr


def test_a_machine_that_cannot_ask_the_server_is_not_told_to_power_off(tmp_path: Path) -> None:
    """Without curl every minute would count as one without an answer."""
    (tmp_path / "dirname").symlink_to(str(shutil.which("dirname")))
    wheel = tmp_path / "vitrail-0.1.0-py3-none-any.whl"
    wheel.touch()
    known = {"PATH": str(tmp_path), "DESTDIR": str(tmp_path / "root")}
    words = [str(DEPLOY / "install"), str(wheel), "--idle", "20"]
    found = subprocess.run(words, env=known, capture_output=True, text=True)
    assert found.returncode == 2 and "curl" in found.stderr and not (tmp_path / "root").exists()


# ---- the machine that powers itself off


@pytest.fixture
def metrics() -> Iterator[tuple[str, dict[str, Any]]]:
    """A server's address, and what its `/metrics` counts; it wants a key."""
    told: dict[str, Any] = {"count": 0, "refused": 0}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            right = self.headers["Authorization"] == "Bearer 0123456789abcdef" and self.path == "/metrics"
            row = 'vitrail_requests_total{endpoint="%s",status="%d"} %.1f\n'
            rows = [("/v1/predict", 200, told["count"]), ("/v1/predict", 401, told["refused"]), ("/readyz", 200, 99)]
            self.send_response(200 if right else 401)
            self.end_headers()
            self.wfile.write("".join(row % each for each in rows).encode() * right)

        def log_message(self, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", told
        server.shutdown()
        thread.join()


def test_an_idle_machine_is_powered_off(metrics: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    """Answers keep it up, and refusals do not; the first look never powers off."""
    if shutil.which("curl") is None or not Path("/proc/uptime").exists():
        pytest.skip("needs curl and Linux")
    address, told = metrics
    keys, state = tmp_path / "keys.txt", tmp_path / "state"
    keys.write_text("\n0123456789abcdef\nanother-key-0123456\n")
    bin = tmp_path / "bin"
    bin.mkdir()
    (bin / "loginctl").write_text("#!/bin/sh\n")
    (bin / "loginctl").chmod(0o755)

    def look(minutes: int = 0, at: str = address) -> bool:
        """Whether it powers off."""
        known = {"PATH": f"{bin}:{os.environ['PATH']}", "VITRAIL_ADDRESS": at, "VITRAIL_KEYS": str(keys)}
        known |= {"RUNTIME_DIRECTORY": str(tmp_path), "POWER_OFF": "echo OFF", "IDLE_MINUTES": str(minutes)}
        done = subprocess.run([str(DEPLOY / "vitrail-idle")], env=known, capture_output=True, text=True, check=True)
        assert not done.stderr
        return "OFF" in done.stdout.splitlines()

    told["count"] = 3
    assert not look() and state.read_text().startswith("3 ")
    told["refused"] = 50
    assert not look(minutes=30) and look()
    told["count"] = 4
    assert not look() and state.read_text().startswith("4 ")
    assert look()
    (bin / "loginctl").write_text("#!/bin/sh\necho '1 1000 someone'\n")
    assert not look(), "somebody is logged in"
    (bin / "loginctl").write_text("#!/bin/sh\n")
    assert not look(at="http://127.0.0.1:9") and look(at="http://127.0.0.1:9"), "a server that has failed is idle"


# ---- the commands of the page


def commands(program: str) -> list[str]:
    return [command.text for command in units()["deploy"] if command.program == program and command.whole]


@pytest.mark.parametrize("text", commands("aws"))
def test_the_command_line_of_aws_takes_the_pages_commands(text: str) -> None:
    """awscli checks its parameters without a network, where it is installed."""
    words = shlex.split(text)
    words = words[: words.index(">")] if ">" in words else words
    assert words[1] in ("ec2", "pricing", "service-quotas")
    if shutil.which("aws") is None:
        pytest.skip("needs awscli")
    known = {**os.environ, "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
    skeleton = [word for word in words if word != "--output" and word not in ("text", "table")]
    done = subprocess.run([*skeleton, "--generate-cli-skeleton", "output"], env=known, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("text", commands("docker"))
def test_the_commands_of_docker_name_files_and_stages_that_exist(text: str) -> None:
    words = shlex.split(text)
    named = [words[i + 1] for i, word in enumerate(words) if word == "-f"]
    assert all((ROOT / name).is_file() for name in named)
    if "--target" in words:
        assert f"AS {words[words.index('--target') + 1]}\n" in (DEPLOY / "Dockerfile").read_text()


def test_the_page_names_every_file() -> None:
    page = (ROOT / "docs" / "deploy.md").read_text()
    assert [path.name for path in DEPLOY.iterdir() if f"`deploy/{path.name}`" not in page] == []
