"""A pt2 file is a program: look at what it calls before PyTorch reads it.

PyTorch resolves names of operators to any function below `torch`, evaluates expressions of sizes as Python, and loads
native code that an archive holds. vitrail runs files whose programs call tensor operators alone, as its own do.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vitrail.errors import UserError

OPERATORS = (
    r"torch\.ops\.(aten|prims)\.(?!from_file\b)\w+(\.\w+)?|torch\.ops\.higher_order\.wrap_\w+"
    r"|_operator\.(add|sub|mul|floordiv|truediv|mod|neg|pow|getitem|eq|ne|lt|le|gt|ge|and_|or_|not_)"
    r"|math\.(ceil|floor|trunc|sqrt)"
    r"|torch\.(sym_\w+|_sym_sqrt)"
)
"""names of what a program may call; `from_file` would write into a file of its choice"""
FUNCTIONS = frozenset(
    """
    Mod PythonMod FloorDiv CleanDiv CeilDiv IntTrueDiv FloatTrueDiv ToFloat TruncToInt FloorToInt CeilToInt RoundToInt
    Max Min Eq Ne Lt Le Gt Ge And Or Not Where Identity PowByNatural FloatPow floor ceiling VR IntInfinity int_oo oo
    True False Symbol Mul Add Pow Integer Rational Float Half One Zero NegativeOne Equality Unequality GreaterThan
    LessThan StrictGreaterThan StrictLessThan BooleanTrue BooleanFalse precision positive negative nonnegative nonzero
    integer real finite zero even odd
    """.split()  # noqa: SIM905
)
"""names in expressions of sizes, beside symbols such as s0"""
ENTRIES = r"models/[\w\-]+\.json|(data/(weights|constants|sample_inputs)|extra|extra_files|\.data)/[\w.\-]+|[\w.\-]+"
"""names in an archive, below its first folder: anything else may be native code"""


def check_program(file: Path) -> None:
    """UserError for a pt2 file that calls, evaluates or loads anything but tensor operators."""
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        # Readers of archives differ in which of two equal names they take, and some ignore case.
        doubled = [name for name in names if sum(each.lower() == name.lower() for each in names) > 1]
        for name in names:
            inner = name.partition("/")[2] or name
            entry = re.fullmatch(ENTRIES, inner, re.ASCII) and "custom_obj" not in inner and "opaque" not in inner
            if not entry or name in doubled:
                raise UserError(f"{file} holds {name}, which is no program of vitrail's: export the model again")
            if name.endswith(".json") and not inner.startswith(("extra/", "extra_files/")):
                _check(json.loads(archive.read(name)), file)


def _check(program: Any, file: Path) -> None:
    for key, value in _entries(program):
        if key == "target" and isinstance(value, str) and not re.fullmatch(OPERATORS, value, re.ASCII):
            raise UserError(f"{file} calls {value[:80]}, which is no tensor operator: do not use it")
        expressions = [value] if key == "expr_str" else list(value or ()) if key == "range_constraints" else ()
        for text in expressions:
            words = {*re.findall(r"[A-Za-z_]\w*", str(text), re.ASCII)} - FUNCTIONS
            strange = [word for word in words if not re.fullmatch(r"[suz]f?[0-9]+", word)]
            if strange or re.search(r"[^\w\s+\-*/%(),.<>=!&|~']", str(text), re.ASCII):
                raise UserError(f"{file} has the expression {str(text)[:80]!r}, which is no size: do not use it")


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key of nested objects, with its value."""
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            yield from found.items()
            waiting += found.values()
        elif isinstance(found, list):
            waiting += found
