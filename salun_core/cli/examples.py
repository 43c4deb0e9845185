"""The example at the end of each verb's help, read from examples.md when it is shown."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

_SECTION = re.compile(r"^## (?P<verb>.+)\n\n```console\n(?P<lines>(?:.*\n)+?)```$", re.MULTILINE)


@cache
def load_examples() -> dict[str, str]:
    """Return the example of each verb: the command and its output, perhaps after a comment."""
    text = Path(__file__).with_name("examples.md").read_text(encoding="utf-8")
    return {found["verb"]: found["lines"].rstrip() for found in _SECTION.finditer(text)}
