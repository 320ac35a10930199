"""The locks that the tests run on: they name every requirement, and the oldest one holds the floors themselves."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def requirements() -> dict[str, str]:
    """The floor of each package that `pyproject.toml` names, by its normalised name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    floors: dict[str, str] = {}
    for line in lines:
        name, _, floor = line.partition(";")[0].strip().partition(">=")
        if not name.startswith("vitrail["):
            assert floor, f"{line} has no floor"
            assert floors.setdefault(normalised(name.partition("[")[0]), floor) == floor, f"{name} has two floors"
    return floors


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def lock(name: str) -> dict[str, set[str]]:
    """The versions of each package in a lock; more than one where they differ between releases of Python."""
    versions: dict[str, set[str]] = {}
    for line in (ROOT / ".ci" / name).read_text().splitlines():
        package, version = line.partition(";")[0].strip().split("==")
        versions.setdefault(normalised(package), set()).add(version)
    return versions


def test_what_runs_is_locked() -> None:
    assert not requirements().keys() - lock("locked.txt").keys()


@pytest.mark.parametrize("name, floor", requirements().items())
def test_the_oldest_lock_holds_the_floor(name: str, floor: str) -> None:
    versions = {tuple(map(int, version.split("."))) for version in lock("oldest.txt")[name]}
    wanted = tuple(map(int, floor.split(".")))
    # Newer releases of Python may need newer releases of a package.
    assert min(versions)[: len(wanted)] == wanted


def test_the_lock_of_the_page_is_whole_and_names_no_address() -> None:
    text = (ROOT / "web" / "package-lock.json").read_text()
    packages = json.loads(text)["packages"]
    assert "resolved" not in text and "registry" not in text
    known = {place.rpartition("node_modules/")[2] for place in packages}
    # `npm ci` refuses a lock without an entry for each dependency, also for those of other systems.
    for place, package in packages.items():
        assert not {*package.get("dependencies", {}), *package.get("optionalDependencies", {})} - known, place
        assert place == "" or package["integrity"].startswith("sha512-"), place
    wanted = json.loads((ROOT / "web" / "package.json").read_text())
    for name, version in {**wanted["dependencies"], **wanted["devDependencies"]}.items():
        assert packages[f"node_modules/{name}"]["version"] == version, name
