"""Two hosts, one of which fails while they train: python bench/hosts.py [--tiny]

Two network namespaces, joined by a cable (veth), stand for two machines with a shared disk. On each, torchrun (c10d,
`--nnodes 1:2`) starts one process of the same `vitrail train digits` on the CPU. When the run has saved a state, every
process of one host is killed, and in one row the cable is cut first, as when a machine loses its power: nothing then
tells the other host. Compared with runs that nothing disturbs:

- a host that starts again: weights, log and scores must be the same to the bit;
- a host that is gone for good: the other one continues alone from the last state. One process rounds otherwise than
  two, and at the high learning rate of `digits` this changes losses by percents within 20 steps, as another seed would:
  its validation loss may differ from that of the undisturbed run by no more than three seeds differ from each other.

Without the right to make namespaces (root), two addresses of the loopback interface stand in, and the row says so.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness import Parser, Row, record
from kills import digests

from vitrail.train.folder import RunFolder

WORDS = ["train", "digits", "--eval-every", "1", "--save-every", "10", "--device", "cpu", "--workers", "0"]
MARK = "BENCH_HOST"
"""environment variable that marks every process of a host"""
LAST_CALL = 90
"""seconds for which torchrun waits for the second host: a host that starts again does so sooner"""
PATIENCE = 900.0
"""seconds for a whole run, on a busy machine"""


@dataclass
class Host:
    """A network namespace with a torchrun in it, or its stand-in."""

    name: str
    address: str
    interface: str
    namespace: str | None
    """None: the loopback interface"""
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def ip(self, *words: str) -> None:
        """A command of iproute2 in the namespace."""
        subprocess.run(["ip", "-n", str(self.namespace), *words], check=True)

    def start(self, words: Sequence[str], endpoint: str, log: Path) -> subprocess.Popen[bytes]:
        """torchrun with one process of `vitrail WORDS`; `endpoint` is the address and port where the hosts meet."""
        within = ["ip", "netns", "exec", self.namespace] if self.namespace else []
        holds = endpoint.startswith(f"{self.address}:")
        rendezvous = f"is_host={int(holds)},last_call_timeout={LAST_CALL},join_timeout={int(PATIENCE)}"
        torchrun = [sys.executable, "-m", "vitrail.cluster.torchrun", "--nnodes", "1:2", "--nproc-per-node", "1"]
        torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "hosts"]
        torchrun += ["--rdzv-conf", rendezvous, "--local-addr", self.address, "--max-restarts", "3"]
        environment = {**os.environ, MARK: f"{os.getpid()} {self.name}", "GLOO_SOCKET_IFNAME": self.interface}
        with log.open("ab") as file:
            command = [*within, *torchrun, "-m", "vitrail", *words]
            process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
        self.started.append(process)
        return process

    def kill(self) -> None:
        """End every process of the host at once."""
        mark = f"{MARK}={os.getpid()} {self.name}".encode()
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended meanwhile, or is another user's
                if mark in (place / "environ").read_bytes().split(b"\0"):
                    os.kill(int(place.name), signal.SIGKILL)
        for process in self.started:
            process.wait()


def parser() -> Parser:
    parser = Parser(__doc__, epochs=1.0, seeds=[0], rows=["restarted"])
    parser.add_argument("--epochs", type=float, default=8.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", choices=FAILURES, default=list(FAILURES))
    return parser


def main() -> int:
    args = parser().parse_args()
    rows: Row = {}
    with tempfile.TemporaryDirectory() as place, two_hosts() as hosts:
        os.chdir(place)
        words = [*WORDS, "--epochs", str(args.epochs)]
        undisturbed = {seed: trained(hosts, [*words, "--seed", str(seed)], Path(f"seed-{seed}")) for seed in args.seeds}
        losses = [loss(path) for path in undisturbed.values()]
        rows["hosts"] = "two network namespaces" if hosts[0].namespace else "two addresses of one machine"
        rows["undisturbed"] = {"validation loss of each seed": dict(zip(map(str, undisturbed), losses, strict=True))}
        whole = undisturbed[args.seeds[0]]
        failed = False
        for name in args.rows:
            out = Path(name)
            seeded = [*words, "--seed", str(args.seeds[0])]
            trained(hosts, seeded, out, FAILURES[name])
            rows[name] = compared(whole, out)
            apart = abs(rows[name]["validation loss"] - losses[0])
            rows[name]["within the spread of the seeds"] = apart <= max(losses) - min(losses)
            failed |= not rows[name]["within the spread of the seeds" if FAILURES[name].gone else "identical"]
            print(name, json.dumps(rows[name]), flush=True)
    record("hosts", rows, args.results)
    return int(failed)


@dataclass(frozen=True)
class Failure:
    """How a host fails."""

    host: int
    gone: bool = False
    """for good"""
    cut: bool = False
    """the cable is cut first, so that nothing tells the other host"""


# Rank 0, which writes the run's files, is on the host with the lower address. The hosts meet at the other one: torchrun
# itself does not survive the host at which it meets.
FAILURES = {
    "restarted": Failure(0),
    "killed for good": Failure(0, gone=True),
    "lost its power, for good": Failure(0, gone=True, cut=True),
}


def compared(whole: Path, out: Path) -> Row:
    """How a disturbed run differs from the undisturbed one, and where it was started in how many processes."""
    expected, found = digests(whole), digests(out)
    starts = [row for row in RunFolder(out).rows() if row["kind"] == "start"]
    return {
        "identical": expected == found,
        "different": [name for name in expected if expected[name] != found[name]],
        "started from the steps": [row["step"] for row in starts],
        "processes": [row["processes"] for row in starts],
        "validation loss": loss(out),
    }


def loss(out: Path) -> float:
    """The validation loss at the end."""
    return float(next(row["cross_entropy"] for row in reversed(RunFolder(out).rows()) if row["kind"] == "val"))


def trained(hosts: Sequence[Host], words: Sequence[str], out: Path, failure: Failure | None = None) -> Path:
    """The folder of a run on both hosts, one of which may fail after the first saved state."""
    log = Path(f"{out}.log")
    endpoint = f"{hosts[1].address}:{free_port()}"
    running = [host.start([*words, "--out", str(out)], endpoint, log) for host in hosts]
    try:
        if failure is not None:
            await_that(lambda: bool(RunFolder(out).states.steps()), running, log)
            host = hosts[failure.host]
            if failure.cut and host.namespace:
                host.ip("link", "set", host.interface, "down")
            host.kill()
            running.pop(failure.host)
            if not failure.gone:
                running.append(host.start([*words, "--out", str(out)], endpoint, log))
        await_that(lambda: all(process.poll() == 0 for process in running), running, log)
    finally:
        for host in hosts:
            host.kill()
            if failure is not None and failure.cut and host.namespace:
                host.ip("link", "set", host.interface, "up")
    return out


def await_that(holds: Callable[[], bool], running: Sequence[subprocess.Popen[bytes]], log: Path) -> None:
    """Wait until something holds. Raises RuntimeError with the log if a host fails before, or if it takes too long."""
    until = time.monotonic() + PATIENCE
    while not holds():
        if any(process.poll() for process in running) or time.monotonic() > until:
            raise RuntimeError(log.read_text()[-4000:])
        time.sleep(0.02)


def free_port() -> int:
    """A port that nothing on this machine uses."""
    with socket.socket() as opened:
        opened.bind(("", 0))
        port: int = opened.getsockname()[1]
        return port


@contextlib.contextmanager
def two_hosts() -> Iterator[list[Host]]:
    """Two network namespaces and the cable between them; or else two addresses of the loopback interface."""
    number = os.getpid()
    hosts = [Host(end, f"10.77.0.{i}", f"v{number}{end}", f"vitrail-{number}-{end}") for i, end in ((1, "a"), (2, "b"))]
    one, other = hosts
    cable = ["ip", "link", "add", one.interface, "type", "veth", "peer", "name", other.interface]
    made = [["ip", "netns", "add", str(host.namespace)] for host in hosts]
    with contextlib.ExitStack() as stack:
        if not all(quietly(command) for command in [*made, cable]):
            yield [Host(end, f"127.0.0.{i}", "lo", None) for i, end in ((1, "a"), (2, "b"))]
            return
        for host in hosts:
            stack.callback(quietly, ["ip", "netns", "del", str(host.namespace)])  # and its end of the cable
            subprocess.run(["ip", "link", "set", host.interface, "netns", str(host.namespace)], check=True)
            host.ip("address", "add", f"{host.address}/24", "dev", host.interface)
            for each in ("lo", host.interface):
                host.ip("link", "set", each, "up")
        yield hosts


def quietly(command: Sequence[str]) -> bool:
    """Whether a command succeeds."""
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:  # it is not installed
        return False


if __name__ == "__main__":
    raise SystemExit(main())
