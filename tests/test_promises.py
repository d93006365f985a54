"""The page of promises names tests; they have to be there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/promises.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`(tests/\w+\.py::\w+)`", PAGE)))


@pytest.mark.parametrize("name", NAMED)
def test_a_test_that_is_named_exists(name: str) -> None:
    path, _, function = name.partition("::")
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert function in {each.name for each in tree.body if isinstance(each, ast.FunctionDef)}


def test_every_promise_names_one() -> None:
    """Also those that are said in a paragraph: what is not promised is said to be so."""
    sections = PAGE.split("\n## ")[1:]
    assert len(sections) >= 8
    for section in sections:
        promises = re.split(r"\n- ", section.partition("\nNot promised")[0])
        for each in promises[1:] or promises:
            assert "::test_" in each or "nothing is shared between processes" in each, each
    assert len(NAMED) > 40
