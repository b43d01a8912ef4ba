"""Every relative link in the project's pages leads to a file, and to a heading that is there."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
_LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} (?P<text>.+)$", re.MULTILINE)
_CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.MULTILINE | re.DOTALL)
_IGNORED = {".venv", ".git", "node_modules", ".build"}


def _pages() -> Iterator[Path]:
    for page in sorted(ROOT.rglob("*.md")):
        parts = page.relative_to(ROOT).parts
        if not any(part in _IGNORED or part.endswith("_cache") for part in parts):
            yield page


def _anchor(heading: str) -> str:
    """As the usual renderers make it: lower case, punctuation gone, blanks as hyphens."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def _anchors(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return {_anchor(heading["text"]) for heading in _HEADING.finditer(text)}


def _broken(page: Path) -> Iterator[str]:
    for link in _LINK.finditer(_CODE.sub("", page.read_text())):
        path, _, anchor = link["target"].partition("#")
        if ":" in path:
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists():
            yield f"{link['target']}: no such file"
        elif anchor and target.suffix == ".md" and anchor not in _anchors(target):
            yield f"{link['target']}: no such heading"


@pytest.mark.parametrize("page", list(_pages()), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    assert list(_broken(page)) == []
