"""Models of timm, transformers and torchvision against vitrail, with the same random weights, at several sizes.

    python bench/parity.py                         all models that have no row yet for this code and these releases
    python bench/parity.py "timm/vit_base*" ...    those whose names match, measured again

Names begin with the library: `timm/vit_base_patch16_224`, `huggingface/vit, classes`, `torchvision/vit_b_16`. The rows
go to `parity-timm.json`, `parity-huggingface.json` and `parity-torchvision.json`, one at a time, so that a stopped run
resumes. A row is measured again when the library's release, the encoder, the readers or the comparison has changed; a
change of comments or docstrings does not count. Ends with 1 where a difference, absolute or relative, is above 1e-4, or
where a comparison fails. `--tiny` compares the smallest models.
"""

from __future__ import annotations

import ast
import fnmatch
import gc
import hashlib
import logging
import sys
import time
import traceback
import warnings
from argparse import Namespace
from importlib.metadata import version
from types import ModuleType

from harness import ROOT, Parser, Row, code, record, recorded
from peers import huggingface, timm, torchvision
from peers.comparison import worst_of

LIMIT = 1e-4
PEERS: dict[str, ModuleType] = {"timm": timm, "huggingface": huggingface, "torchvision": torchvision}
MEASURED = ("src/vitrail/vit.py", "src/vitrail/ops.py", "src/vitrail/variants", "src/vitrail/zoo")
"""the code that a row depends on, beside the comparison itself"""


def parser() -> Parser:
    parser = Parser(__doc__, patterns=[f"{name}/{model}" for name, peer in PEERS.items() for model in peer.TINY])
    parser.add_argument("patterns", nargs="*", metavar="PATTERN", help='names of models, as "timm/vit_base*"')
    return parser


def main() -> int:
    options = parser()
    args = options.parse_args()
    chosen = {library: _matching(library, args.patterns) for library in PEERS}
    if not any(chosen.values()):
        options.error(f"no model's name matches {' or '.join(args.patterns)}")
    passed = [measure(library, models, args) for library, models in chosen.items() if models]
    return int(not all(passed))


def _matching(library: str, patterns: list[str]) -> list[str]:
    """Names of the library's models, all of them without patterns."""
    models: list[str] = PEERS[library].models()
    patterns = patterns or ["*"]
    return [name for name in models if any(fnmatch.fnmatchcase(f"{library}/{name}", pattern) for pattern in patterns)]


def measure(library: str, models: list[str], args: Namespace) -> bool:
    """Record the rows of these models, and print the largest difference. Returns whether all models pass."""
    peer, file, commit = PEERS[library], f"parity-{library}", code()
    versions = {"release": version(peer.LIBRARY), "code": fingerprint(library)}
    rows: Row = {} if args.tiny else recorded(file, args.results)
    wanted = models if args.patterns else [name for name in models if not is_current(rows.get(name), versions)]
    for number, name in enumerate(wanted, 1):
        start = time.perf_counter()
        rows.pop(name, None)
        try:
            rows[name] = versions | commit | peer.compare(name)
            outcome = f"{worst_of(rows[name]):.1e}"
        except Exception:  # one failure must not keep the others from being compared
            traceback.print_exc()
            outcome = "failed"
        record(file, {key: rows[key] for key in peer.models() if key in rows}, args.results)
        took = time.perf_counter() - start
        print(f"{number}/{len(wanted)} {library}/{name}: {outcome} in {took:.1f} s", file=sys.stderr, flush=True)
        gc.collect()
    found = [rows[name] for name in models if is_current(rows.get(name), versions)]
    worst = max(map(worst_of, found), default=0.0)
    print(f"{library}: {len(found)} of {len(models)} models compared, largest difference {worst:.1e}", flush=True)
    return len(found) == len(models) and worst <= LIMIT and all(row.get("same bits", True) for row in found)


def is_current(row: Row | None, versions: Row) -> bool:
    """Whether a row is there and was measured with this code and this release of the library."""
    return row is not None and versions.items() <= row.items()


def fingerprint(library: str) -> str:
    """A hash of the code that a library's rows depend on; comments, docstrings and layout do not count."""
    comparison = [ROOT / "bench" / "peers" / f"{name}.py" for name in ("comparison", library)]
    measured = [
        path
        for place in MEASURED
        for path in ([ROOT / place] if place.endswith(".py") else (ROOT / place).rglob("*.py"))
    ]
    digest = hashlib.sha256()
    for path in sorted([*comparison, *measured]):
        digest.update(ast.dump(_NoTexts().visit(ast.parse(path.read_text()))).encode())
    return digest.hexdigest()[:16]


class _NoTexts(ast.NodeTransformer):
    """Removes texts that stand alone: docstrings, and the texts below constants and fields."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if isinstance(node.value, ast.Constant) else node


if __name__ == "__main__":
    logging.getLogger("vitrail").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # of timm's own interpolation
    sys.exit(main())
