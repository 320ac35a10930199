"""The wheel that `pip install .` builds."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

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
    weights = {name: size.pop(f"vitrail/zoo/weights/{name}/model.safetensors") for name in ("classify", "caption")}
    assert weights["classify"] < 15e6 and weights["caption"] < 25e6 and sum(size.values()) < 2e6


def test_command_is_declared(wheel: zipfile.ZipFile) -> None:
    assert b"vitrail = vitrail.cli:main" in wheel.read("vitrail-0.1.0.dist-info/entry_points.txt")
