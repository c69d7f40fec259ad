"""The pages of the documentation, and what can be found in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

_FENCE = re.compile(
    r"(?:<!-- test: (?P<mark>[^\n]*?) -->\n+)?^```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)")
_COMMAND = re.compile(r"(?:^|[\s/=])phalanx ((?:[^|<>#]|#(?! ))*)")


@dataclass(frozen=True)
class Block:
    """One fenced block: its page, the line it begins at, its language, what a comment before it says."""

    page: Path
    line: int
    language: str
    mark: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def pages() -> list[Path]:
    """README.md and all of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(*languages: str) -> list[Block]:
    """Every block in one of *languages*, in order."""
    found: list[Block] = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        for match in _FENCE.finditer(text):
            if match["language"] in languages:
                line = text.count("\n", 0, match.start("text"))
                found.append(Block(page, line, match["language"], match["mark"] or "", match["text"]))
    return found


def commands() -> list[tuple[Block, list[str]]]:
    """The arguments of every ``phalanx …`` in blocks that show a shell or a systemd unit."""
    found: list[tuple[Block, list[str]]] = []
    for block in blocks("console", "bash", "sh", "ini", ""):
        for line in block.text.replace("\\\n", " ").splitlines():
            command = line.removeprefix("$ ")
            if block.language in ("console", "") and command == line and not line.startswith("phalanx "):
                continue  # what a command prints, or no shell at all
            for match in _COMMAND.finditer(command if block.language != "ini" else _exec(command)):
                found.append((block, shlex.split(match[1])))
    return found


def _exec(line: str) -> str:
    return line if line.startswith("Exec") else ""


def links(page: Path) -> Iterator[str]:
    """The targets of the page's links that lead to a file of this repository."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in _LINK.findall(text):
        if "://" not in target:
            yield target


def anchors(page: Path) -> set[str]:
    """The anchors of the page's headings, as GitHub makes them."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.*)$", text, re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.add(slug)
    return found
