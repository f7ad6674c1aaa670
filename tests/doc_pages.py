"""The pages for people, taken apart: their fenced blocks, and what a comment before a block says of its test.

A comment that no page shows, on a line of its own before a block, makes it fit for a test:

    <!-- test: --seeds 8 -> --seeds 1 -->   text that the test replaces; several are applied in turn
    <!-- test: first: COMMAND -->           run before the block
    <!-- test: file NAME -->                the block is saved under that name, for those after it
    <!-- test: not run: REASON -->          commands are parsed only

`$PORT1` to `$PORT9` are free ports in a row. `wwwserve up`, `node` and `emulator` run in the background, from when they
say that they are ready to the end of the page.
"""

import importlib.util
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", *sorted(str(each.relative_to(ROOT)) for each in ROOT.glob("docs/**/*.md"))]
SHELL = ("sh", "bash", "console")
FENCE = re.compile(r"((?:^<!-- test: [^\n]*? -->\n\n?)*)^( *)```([^\n]*)\n(.*?)^\2```$", re.MULTILINE | re.DOTALL)


@dataclass
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str
    not_run: str | None = None
    """Why its commands are parsed only."""
    first: list[str] = field(default_factory=list)
    file: str | None = None
    replaced: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def tested(self) -> str:
        """Its text as the test has it."""
        text = self.text
        for old, new in self.replaced:
            assert old in text, f"{self}: its comment replaces {old!r}, which is not there"
            text = text.replace(old, new)
        return text


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        comments, indent, language, content = match.groups()
        content = re.sub(rf"^{indent}", "", content, flags=re.MULTILINE)
        block = Block(page, text.count("\n", 0, match.start(3)) + 1, language, content)
        for said in re.findall(r"<!-- test: (.*?) -->", comments):
            if said.startswith("not run: "):
                block.not_run = said.removeprefix("not run: ")
            elif said.startswith("first: "):
                block.first.append(said.removeprefix("first: "))
            elif said.startswith("file "):
                block.file = said.removeprefix("file ")
            else:
                old, arrow, new = said.partition(" -> ")
                assert arrow, f"{block}: its comment says {said!r}"
                block.replaced.append((old, new))
        found.append(block)
    assert text.count("<!-- test: ") == sum(
        (each.not_run is not None) + len(each.first) + (each.file is not None) + len(each.replaced) for each in found
    ), f"{page}: a comment stands before no block"
    return found


def commands(text: str) -> list[str]:
    """The commands of a block, each with the lines that it goes on in; comments and prompts are left out."""
    found, begun = [], ""
    for line in text.splitlines():
        begun += line.removeprefix("$ ") + "\n"
        try:
            words = shlex.split(begun, comments=True)
        except ValueError:  # a quotation goes on, or a backslash ends the line
            continue
        if begun.endswith("\\\n"):
            continue
        if words:
            found.append(begun.strip())
        begun = ""
    assert not begun, f"no end of {begun!r}"
    return found


def generator() -> ModuleType:
    """docs/generate.py, which belongs to no package."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
