"""What README and docs name exists, and what they show is fresh."""

import ast
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest
from documented import PAGES, ROOT

from vitrail.data.decode import MAX_PIXELS
from vitrail.recipes import RECIPES
from vitrail.tasks.classify import task as classify
from vitrail.tasks.task import Task
from vitrail.tasks.values import Settings

FIRST = r"src|docs|tests|bench|results|deploy|\.ci"


def load_tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    inside = [link.partition("#")[0] for link in links if not link.startswith(("http", "#"))]
    assert [link for link in inside if not (page.parent / link).exists()] == []


def anchors(page: Path) -> set[str]:
    """The names that a code host and the site give to a page's headings."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#{1,4} (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_headings_lead_to_one(page: Path) -> None:
    found = re.findall(r"\]\(([\w./-]*\.md)?#([\w-]+)\)", page.read_text())
    assert [link for link in found if link[1] not in anchors(page.parent / link[0] if link[0] else page)] == []


def test_every_page_and_figure_is_reachable() -> None:
    """From the index and the gallery; a figure of the gallery has the command that draws it below it."""
    docs = ROOT / "docs"
    index, gallery = (docs / "index.md").read_text(), (docs / "gallery.md").read_text()
    links = {*re.findall(r"\]\(([\w.-]+)\)", index)}
    assert {path.name for path in [*docs.glob("*.md"), *docs.glob("*.ipynb")]} - links == {"index.md"}
    drawn = set()
    for figures, command in re.findall(r"((?:!\[[^\]]*\]\([\w.-]+\)\s+)+)```sh\n(.*?)\n```", gallery, re.DOTALL):
        assert re.fullmatch(r"python docs/figures\.py \w+( --data data)?", command)
        drawn |= {*re.findall(r"\(([\w.-]+)\)", figures)}
    assert drawn == {path.name for path in docs.iterdir() if path.suffix in (".jpg", ".png")}


class Links(HTMLParser):
    """What a page of the site links, what it loads, and its anchors."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.anchors |= {str(found["id"])} if "id" in found else set()
        if tag == "a" and found.get("href"):
            self.links.append(str(found["href"]))
        elif tag in ("img", "script", "iframe") and found.get("src"):
            self.loads.append(str(found["src"]))
        elif tag == "link" and found.get("rel") == "stylesheet":
            self.loads.append(str(found["href"]))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_site_builds_without_warnings_and_all_its_links_lead_somewhere(tmp_path: Path) -> None:
    pytest.importorskip("furo", reason="needs pip install 'vitrail[docs]'")
    site = tmp_path / "site"
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", str(tmp_path / "read")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([*command, "docs", str(site)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {path.relative_to(site).as_posix(): Links(path.read_text()) for path in site.rglob("*.html")}
    assert {"index.html", "quickstart.html", "api.html"} <= pages.keys()
    for name, page in pages.items():
        assert not [source for source in page.loads if source.startswith(("http", "//"))], f"{name} needs a network"
        for link in [*page.links, *page.loads]:
            if link.startswith(("http", "data:", "mailto:")):
                continue
            target, _, anchor = link.partition("#")
            path = (site / name).parent / unquote(target.partition("?")[0]) if target else site / name
            assert path.exists(), f"{name} links {link}"
            if anchor and path.suffix == ".html":
                assert unquote(anchor) in pages[path.resolve().relative_to(site.resolve()).as_posix()].anchors, link
    text = (site / "api.html").read_text()
    assert all(f'id="vitrail.{name}"' in text for name in ("zoo.create", "zoo.load", "tasks.task.Task.predict"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_in_prose_exist(page: Path) -> None:
    paths = re.findall(rf"`((?:{FIRST})/[\w./-]*)`", page.read_text())
    assert [path for path in paths if "NAME" not in path and not (ROOT / path).exists()] == []


def test_files_that_the_readme_says_to_read_come_with_their_room() -> None:
    rooms = re.findall(r"`(\w+(?:/|\.py))`", (ROOT / "CONTRIBUTING.md").read_text().partition("## Rules")[0])
    package = ROOT / "src" / "vitrail"
    assert rooms
    assert [room for room in rooms if not any((folder / room).exists() for folder in (package, package / "tasks"))] == [
        "bench/",
        "results/",
        "tests/",
    ]


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_says_its_command(name: str) -> None:
    assert f"\nCommand: vitrail train {name}" in (inspect.getdoc(RECIPES[name]) or "")


def test_tables_are_fresh(capsys: pytest.CaptureFixture[str]) -> None:
    code = load_tables().main(["--check"])
    assert code == 0, capsys.readouterr().err


def test_table_shows_what_a_results_file_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = load_tables()
    monkeypatch.setattr(tables.table_data, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    scores = (0.97, 1, 90.0), (0.9925, 2, 60.0), (0.97, 1, 120.0)
    runs = [{"top1": top1, "cores": cores, "wall_seconds": seconds} for top1, cores, seconds in scores]
    found = {"command": "python bench/digits.py", "commit": "0123456789abcdef", "machine": {"cores": 2}, "date": "d"}
    file = tmp_path / "results" / "digits.json"
    file.write_text(json.dumps({**found, "rows": {"mean_top1": 0.98125, "runs": runs}}))
    text = tables.fresh("a\n<!-- table:results -->\n| stale |\n<!-- /table -->\nb\n")
    score = "98.12% (97.00% to 99.25%), 3 seeds, 1.0 minutes on 2 cores, 1.5 to 2.0 minutes on one core"
    assert f"| {score} | `python bench/digits.py` |" in text
    assert "stale" not in text and "not measured" not in text, "docs/results.md says that"
    assert "| not measured |" in tables.fresh("<!-- table:goals -->\n<!-- /table -->\n")
    assert tables.fresh(text) == text
    rows = {"mean_top1": 0.98125, "runs": runs, "train": "vitrail train digits", "recipe": "of another version"}
    file.write_text(json.dumps({**found, "rows": rows}))
    assert f"| {score}, by an earlier version of the recipe |" in tables.fresh(text)
    rows["recipe"] = RECIPES["digits"](50_000).fingerprint
    file.write_text(json.dumps({**found, "rows": rows}))
    assert tables.fresh(text) == text


def test_table_of_transfer_shows_the_results_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = load_tables()
    monkeypatch.setattr(tables.table_data, "ROOT", tmp_path)
    page = "<!-- table:transfer -->\n<!-- /table -->\n"
    assert tables.fresh(page).count("not measured") == 2
    (tmp_path / "results").mkdir()
    row = {"settings": {"size": 48, "epochs": 9, "images": 0}, "weights_top1": 0.75, "scratch_top1": 0.5}
    row |= {"pairs": 15, "gain": 0.25, "gain_standard_error": 0.021, "runs": []}
    row["gain_corrected_standard_error"] = 0.046
    found = {"command": "python bench/transfer.py", "machine": {"cores": 1}, "rows": {"hymenoptera": row}}
    (tmp_path / "results" / "transfer.json").write_text(json.dumps(found))
    text = tables.fresh(page)
    assert "| ants and bees | 48 pixels, 9 epochs | from the bundled weights | 75.0% |" in text
    assert "gain, mean of the pairs | 25.0 points |" in text
    assert text.count("not measured") == 1
    told = "+25.0 points (standard error 2.1, corrected for overlapping folds 4.6, 15 pairs) (on one core)"
    assert any(told in row for row in tables.measure_tables.results())


def test_unknown_table_is_refused() -> None:
    with pytest.raises(SystemExit, match="no table 'nothing'"):
        load_tables().fresh("<!-- table:nothing -->\n<!-- /table -->")


@pytest.mark.parametrize("image", sorted((ROOT / "docs").glob("*.svg")), ids=lambda image: image.name)
def test_drawing_is_well_formed_and_draws_its_own_ground(image: Path) -> None:
    root = ElementTree.parse(image).getroot()
    space = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{space}svg"
    assert root.find(f"{space}title") is not None
    ground = root.find(f"{space}rect")
    assert ground is not None and ground.get("fill") == "#ffffff"


def test_the_page_of_the_contract_names_what_tasks_have() -> None:
    text = (ROOT / "docs" / "tasks.md").read_text()
    (example,) = ast.parse(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]).body
    assert isinstance(example, ast.ClassDef) and example.name == classify.Classify.__name__
    rows = re.findall(r"^\| (`.*?) \|", text.partition("Every other hook")[2].partition("## Rules")[0], re.MULTILINE)
    hooks = {name for row in rows for name in re.findall(r"`(\w+)", row)}
    for statement in example.body:
        if isinstance(statement, ast.FunctionDef):
            hooks.add(statement.name)
            continue
        assert isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
        hooks.add(statement.targets[0].id)
        there = vars(classify) | {"Labels": Task.target}
        assert {node.id for node in ast.walk(statement.value) if isinstance(node, ast.Name)} <= there.keys()
    assert hooks <= {*dir(Task), *Task.__annotations__, *Settings.__annotations__}
    every = {*vars(Task), *Task.__annotations__, *Settings.__annotations__} - {"train", "training"}  # of any module
    assert not [name for name in every if not name.startswith("_") and not re.search(rf"\b{name}\b", text)]


def test_the_limit_of_pixels_is_the_one_that_is_documented() -> None:
    assert f"{MAX_PIXELS:,} pixels" in (ROOT / "docs" / "images.md").read_text()


def test_the_whole_task_of_the_page_trains_and_is_scored(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    for name, code in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", page, re.DOTALL):
        (tmp_path / name).write_text(code.replace('"200"', '"2"'), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(tmp_path)])}
    done = subprocess.run(
        [sys.executable, "go.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout and (tmp_path / "runs" / "parity" / "report.html").is_file()
