"""Rooms that are being built: their tests run, and those that fail are shown as expected failures."""

from __future__ import annotations

import pytest

UNFINISHED = ("tests/zoo/", "tests/recipes/", "tests/test_docs.py", "tests/test_cli.py", "tests/train/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.startswith(UNFINISHED):
            item.add_marker(pytest.mark.xfail(reason="issues 4 and 5 are under way", strict=False))
