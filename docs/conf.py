"""How Sphinx builds the pages of this folder as a site: `make docs`. Nothing is downloaded.

The pages are plain Markdown, so that they read as well on a code host. What they leave to the site:

- `index.md` links the pages by section; its links become the site's navigation. Pages that it does not link follow.
- `<!-- api: function vitrail.load -->` becomes the documentation of that name, from its docstring.
- Notebooks are read with the outputs that are stored in them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from myst_parser.parsers.sphinx_ import MystParser
from sphinx.application import Sphinx

import vitrail

HERE = Path(__file__).parent

project = "vitrail"
author = "vitrail contributors"
project_copyright = author
version = release = vitrail.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown", ".ipynb": "notebook"}
exclude_patterns = ["_build"]
suppress_warnings = ["misc.highlighting_failure"]  # examples of JSON with "..." in it
myst_heading_anchors = 4
myst_enable_extensions = ["html_image"]

autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
add_module_names = False

html_theme = "furo"
html_title = f"vitrail {release}"
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#6a3fa0", "color-brand-content": "#5a3590"},
    "dark_css_variables": {"color-brand-primary": "#c7a6f2", "color-brand-content": "#c7a6f2"},
}

LINK = re.compile(r"\]\(([\w-]+)\.(?:md|ipynb)\)")
OUTSIDE = re.compile(r"\[([^\]`]+|`[^`]+`)\]\((\.\./[\w./-]+\.md)\)")
API = re.compile(r"<!-- api: (\w+) ([\w.]+)((?: [\w-]+)*) -->")


def _navigation(text: str) -> str:
    """A hidden table of contents for each section of `index.md`, from its links to pages, and one of all others."""
    there = sorted(path.stem for path in HERE.iterdir() if path.suffix in source_suffix and path.stem != "index")
    left, trees = list(there), list[str]()
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        title = section.partition("\n")[0]
        pages = [name for name in dict.fromkeys(LINK.findall(section)) if name in left]
        left = [name for name in left if name not in pages]
        trees.append(_toctree(title, pages))
    return "\n".join([text, *trees, _toctree("More", left)])


def _toctree(title: str, pages: list[str]) -> str:
    return "\n".join(["```{toctree}", ":hidden:", f":caption: {title}", "", *pages, "```", ""]) if pages else ""


def _documented(match: re.Match[str]) -> str:
    """The directive of autodoc that a comment stands for; of a class, with the named members."""
    kind, name, members = match.groups()
    lines = ["```{eval-rst}", f".. auto{kind}:: {name}"]
    if members:
        lines.append(f"   :members: {', '.join(members.split())}")
    return "\n".join([*lines, "```"])


def read_source(app: Sphinx, name: str, source: list[str]) -> None:
    """Change the text of a page before it is parsed."""
    text = _navigation(source[0]) if name == "index" else source[0]
    # Pages outside of this folder are no pages of the site: they are files to open, as code and results are.
    text = OUTSIDE.sub(lambda link: f"{{download}}`{link[1].strip('`')} <{link[2]}>`", text)
    source[0] = API.sub(_documented, text)


def as_rst(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Docstrings have code in single backticks, as Markdown does, and no other markup."""
    lines[:] = [re.sub(r"(?<!`)`([^`]+)`(?!`)", r"``\1``", line).replace("*", r"\*") for line in lines]


class NotebookParser(MystParser):  # type: ignore[misc, unused-ignore]
    """Parse a notebook as the Markdown of its cells, with their stored outputs."""

    supported = ("notebook",)

    def parse(self, inputstring: str, document: nodes.document) -> None:
        super().parse("\n\n".join(_cells(json.loads(inputstring))), document)


def _cells(notebook: dict[str, Any]) -> Iterator[str]:
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        yield source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```"
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            images = [kind for kind in ("image/png", "image/jpeg") if kind in data]
            if images:
                yield f"![output](data:{images[0]};base64,{''.join(data[images[0]].split())})"
            else:
                text = "".join(output.get("text") or data.get("text/plain") or [])
                yield f"```text\n{text.rstrip()}\n```"


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_source_parser(NotebookParser)
    app.connect("source-read", read_source)
    app.connect("autodoc-process-docstring", as_rst)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
