"""docs/reference/: every page is what the code says now, and nothing is left out."""

import re

import pytest
from doc_pages import ROOT, generator

REFERENCE = ROOT / "docs/reference"
PAGES = generator().PAGES


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_the_code_says(name: str) -> None:
    assert (REFERENCE / name).read_text(encoding="utf-8") == PAGES[name](), "run make reference"


def test_there_are_no_other_pages() -> None:
    assert {each.name for each in REFERENCE.iterdir()} == set(PAGES)


@pytest.mark.parametrize("name", PAGES)
def test_everything_has_a_meaning(name: str) -> None:
    rows = re.findall(r"^\| `(.*)\| *\|$", (REFERENCE / name).read_text(encoding="utf-8"), re.MULTILINE)
    assert [row for row in rows if not re.match(r"[\w.]*kind`", row)] == []
