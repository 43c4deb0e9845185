"""Writes the measured tables from benchmarks/results/*.json into the README, between their markers.

python benchmarks/readme_tables.py [--check]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def cost_table(step: dict[str, Any], mask: dict[str, Any]) -> str:
    """Render what masks and masked steps cost, ours beside the usual procedure."""
    usual, ours = mask["rows"]["usual, ten densities"], mask["rows"]["ours, ten densities"]
    one = mask["rows"]["ours, one density"]
    lines = [
        "| ResNet-18, 11.2 M weights | usual procedure | here |",
        "|---|---|---|",
        f"| masks of ten densities, CPU s | {usual['cpu_s']:.1f} | {ours['cpu_s']:.2f} (one: {one['cpu_s']:.2f}) |",
        f"| added peak memory, MB | {usual['peak_mb']:.0f} | {ours['peak_mb']:.0f} |",
        f"| mask file, MB | {usual['file_bytes'] / 1e6:.1f} | {ours['file_bytes'] / 1e6:.2f} |",
    ]
    for name, row in step["rows"].items():
        cells = f"{row['mask and restore / plain']:.2f} x | {row['masked / plain']:.2f} x"
        lines.append(f"| step of {name}, against the unmasked step | {cells} |")
    return "\n".join(lines)


def tables() -> dict[str, str]:
    """Return each marker's table."""
    documents = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    return {
        "cifar10-random10": documents["cifar10-random10"]["table"],
        "masked-step": cost_table(documents["masked-step"], documents["mask"]),
    }


def filled(text: str) -> str:
    """Return a document with the tables between their markers."""
    for name, table in tables().items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"README.md has no marker {name}")
        text = pattern.sub(lambda found, table=table: f"{found[1]}{table}\n{found[2]}", text)  # type: ignore[misc]
    return text


def main() -> None:
    """Rewrite the README, or check it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; fail when it is out of step")
    arguments = parser.parse_args()
    path = ROOT / "README.md"
    before = path.read_text(encoding="utf-8")
    after = filled(before)
    if arguments.check and before != after:
        sys.exit("README.md is out of step with benchmarks/results: run `make generated`")
    path.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
