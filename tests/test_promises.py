"""``tests/README.md`` names a test for every entry of ``docs/reliability.md`` and for every case."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
INDEX = (ROOT / "tests/README.md").read_text("utf-8")
PROMISES = (ROOT / "docs/reliability.md").read_text("utf-8")


def sections(text: str) -> dict[str, str]:
    """Return the text under each heading of the second level."""
    titles = re.split(r"^## (.*)$", text, flags=re.MULTILINE)[1:]
    return dict(zip(titles[::2], titles[1::2], strict=True))


def test_index_every_named_test_exists() -> None:
    named = re.findall(r"(tests/[\w/]+\.py)::(\w+)", INDEX)
    assert len(named) > 75
    defined = {
        (file, node.name)
        for file in {file for file, _ in named}
        for node in ast.parse((ROOT / file).read_text("utf-8")).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert set(named) - defined == set()


def test_index_every_promise_has_a_test() -> None:
    promised = {
        title: re.findall(r"^- \*\*(.*)\.\*\*", text, re.MULTILINE) for title, text in sections(PROMISES).items()
    }
    del promised["Not guaranteed"]
    tested = {
        title: re.findall(r"^\| (.*?) \| .*`tests/", text, re.MULTILINE) for title, text in sections(INDEX).items()
    }
    del tested["Cases"]
    assert tested == promised


def test_index_every_case_is_listed_once() -> None:
    cases = [int(number) for number in re.findall(r"^\| C(\d+) \|", INDEX, re.MULTILINE)]
    assert cases == list(range(1, 80))
