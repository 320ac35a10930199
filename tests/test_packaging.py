"""The wheel that `pip install .` builds, and the source distribution."""

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import vitrail

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "vitrail"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    # Without isolation pip would fetch the build backend: tests need no network.
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_wheel_holds_every_file_of_the_package(wheel: zipfile.ZipFile) -> None:
    kept = [path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {path.relative_to(PACKAGE.parent).as_posix() for path in kept} <= set(wheel.namelist())


def test_wheel_carries_the_digits_and_the_weights(wheel: zipfile.ZipFile) -> None:
    suffixes = {Path(name).suffix for name in wheel.namelist() if "dist-info" not in name}
    assert {".npz", ".json", ".safetensors", ".md"} <= suffixes


def test_wheel_holds_nothing_else_and_is_small(wheel: zipfile.ZipFile) -> None:
    roots = {name.partition("/")[0] for name in wheel.namelist()}
    assert roots == {"vitrail", "vitrail-0.1.0.dist-info"}
    size = {info.filename: info.compress_size for info in wheel.infolist()}
    weights = {
        name: size.pop(f"vitrail/zoo/weights/{name}/model.safetensors") for name in ("classify", "caption", "segment")
    }
    assert (
        weights["classify"] < 15e6
        and weights["caption"] < 25e6
        and weights["segment"] < 12e6
        and sum(size.values()) < 2e6
    )


def test_the_source_distribution_holds_the_package_and_no_photos_of_others(
    wheel: zipfile.ZipFile, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as packed:
        size = {member.name.partition("/")[2]: member.size for member in packed.getmembers() if member.isfile()}
    package = {f"src/{name}" for name in wheel.namelist() if name.startswith("vitrail/")}
    own = {*("pyproject.toml", "README.md", "LICENSE", "CREDITS.md", "CHANGELOG.md", "CITATION.cff"), ".gitignore"}
    assert size.keys() == package | own | {"PKG-INFO"}
    assert not [name for name in size if name.endswith((".jpg", ".jpeg"))]


def test_command_is_declared(wheel: zipfile.ZipFile) -> None:
    assert b"vitrail = vitrail.cli:main" in wheel.read("vitrail-0.1.0.dist-info/entry_points.txt")


def test_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited is not None and vitrail.__version__ == project["version"] == cited[1]
    # The newest entry is what is not released yet, or this version.
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None and newest[1] in ("Unreleased", vitrail.__version__)


def test_credits_name_every_file_of_data(wheel: zipfile.ZipFile) -> None:
    credits = (ROOT / "CREDITS.md").read_text()
    assert "vitrail-0.1.0.dist-info/licenses/CREDITS.md" in wheel.namelist()
    # The test split of digits, a mark for type checkers, the text of the example in an export, the page of explain, and
    # the names of recommended encoders, whose weights are not in the package.
    own = {"digits_test.json", "py.typed", "example.txt", "page.html", "page.js", "recommended.json"}
    for path in PACKAGE.rglob("*"):
        if path.is_dir() or path.suffix in (".py", ".pyc") or path.name in own:
            continue
        place = path.relative_to(PACKAGE)
        folder = f"weights `{place.parts[2]}`" if place.parts[1] == "weights" else f"`{place.parent.as_posix()}/`"
        assert folder in credits or f"`{place.as_posix()}`" in credits, place
