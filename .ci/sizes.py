"""Prints lines, lines of code and modules of each package; --check compares with .ci/sizes.txt, --write rewrites it.

Lines and modules of a package may only fall. A change that needs more raises the number with --write in its own commit
and gives the reason there. Lines of code are those without docstrings, comments and blank lines.
"""

from __future__ import annotations

import argparse
import ast
import io
import subprocess
import sys
import tokenize
from collections import defaultdict
from pathlib import Path

TABLE = Path(__file__).with_name("sizes.txt")
NO_CODE = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT),
    *(tokenize.ENCODING, tokenize.ENDMARKER),
}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def measured(text: str) -> tuple[int, int, int]:
    """Return (lines, lines of code, 1) of a module."""
    docs = set[int]()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            docs.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    code = set[int]()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE:
            code.update(range(token.start[0], token.end[0] + 1))
    return text.count("\n"), len(code - docs), 1


def sizes() -> dict[str, tuple[int, int, int]]:
    """Return {package: (lines, lines of code, modules)}; the packages of salun_core also have a row each."""
    listed = subprocess.run(["git", "ls-files", "*.py"], capture_output=True, text=True, check=True)  # noqa: S607
    names = listed.stdout.split()
    found: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
    for name in names:
        size = measured(Path(name).read_text("utf-8"))
        top, *inner = name.split("/")
        rows = [top] + ([f"{top}/{inner[0] if len(inner) > 1 else '*.py'}"] if top == "salun_core" else [])
        rows += ["all but tests"] if top != "tests" else []
        for row in rows:
            found[row].append(size)
    return {row: tuple(map(sum, zip(*found[row], strict=True))) for row in sorted(found)}  # type: ignore[misc]


def main() -> int:
    """Print, compare or write; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    now = sizes()
    text = f"{'':28}{'lines':>8}{'code':>8}{'modules':>9}\n"
    text += "".join(f"{row:28}{lines:8}{code:8}{modules:9}\n" for row, (lines, code, modules) in now.items())
    if asked.write:
        TABLE.write_text(text, "utf-8")
    if not asked.check:
        print(text, end="")
        return 0
    kept = {line[:28].strip(): line[28:].split() for line in TABLE.read_text("utf-8").splitlines()[1:]}
    grown = []
    for row, (lines, _, modules) in now.items():
        was = kept.get(row, ["0", "0", "0"])
        if lines > int(was[0]) or modules > int(was[2]):
            grown.append(f"{row} has {lines} lines and {modules} modules; {was[0]} and {was[2]} are allowed")
    for line in grown:
        print(line, file=sys.stderr)
    if grown:
        print("Take lines away, or run `.ci/sizes.py --write` and give the reason in the commit.", file=sys.stderr)
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())
