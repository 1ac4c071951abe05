"""The documentation of promises and cases names tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path


def test_every_test_that_the_documentation_names_is_there() -> None:
    root = Path(__file__).parent.parent
    named = re.findall(r"(tests/[\w/]+\.py)::(\w+)", (root / "docs/reliability.md").read_text("utf-8"))
    assert len(named) > 75
    there = {
        (file, node.name)
        for file in {file for file, _ in named}
        for node in ast.parse((root / file).read_text("utf-8")).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert set(named) - there == set()


def test_every_case_is_in_the_documentation_once() -> None:
    text = (Path(__file__).parent.parent / "docs/reliability.md").read_text("utf-8")
    cases = [int(number) for number in re.findall(r"^\| C(\d+) \|", text, re.MULTILINE)]
    assert cases == list(range(1, 76))
