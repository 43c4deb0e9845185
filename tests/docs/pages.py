"""The commands of the documentation's pages, and what the pages show that they print."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"


@dataclass
class Shown:
    """A command of a page, and the output that the page shows."""

    command: str
    output: str


def console(text):
    """Every command after a prompt in the `console` blocks of a page, in order."""
    found = []
    for block in re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for part in re.split(r"^\$ ", block.replace("\\\n    ", ""), flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            found.append(Shown(command, output))
    return found


def matches(shown, printed, varies):
    """Whether a page's lines are what was printed: `...` is any number of lines, `varies` any text of its kind."""
    pattern = "".join(
        r"(?:.*\n)*" if line == "..." else re.escape(varies.sub("X", line)) + r"\n" for line in shown.splitlines()
    )
    return re.fullmatch(pattern, varies.sub("X", printed)) is not None
