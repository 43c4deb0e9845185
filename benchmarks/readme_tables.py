"""Writes the measured tables from benchmarks/results/*.json into README.md and docs/speed.md, between their markers.

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
PAGES = {"README.md": ("cifar10-random10", "masked-step"), "docs/speed.md": ("speed", "speed-machines")}
COMPARED = {  # by the name of the results: the script that writes them
    "mask": "benchmarks/mask.py",
    "masked-step": "benchmarks/masked_step.py",
    "masked-epoch": "benchmarks/masked_epoch.py",
    "loading": "benchmarks/loading.py",
    "attack": "benchmarks/attack.py",
}


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


def speed_table(documents: dict[str, Any]) -> str:
    """Render every comparison with its target, as the scripts printed them."""
    lines = ["| what | usual procedure | here | found | target |", "|---|---|---|---|---|"]
    for name in COMPARED:
        for item in documents[name]["comparisons"]:
            lines.append("| " + " | ".join(item[key] for key in ("what", "usual", "ours", "ratio", "target")) + " |")
    return "\n".join(lines)


def machines(documents: dict[str, Any]) -> str:
    """Say on what each comparison ran."""
    lines = ["| script | rounds | threads | torch | processor |", "|---|---|---|---|---|"]
    for name, script in COMPARED.items():
        facts = documents[name]
        rounds = f"{facts['rounds']}{', quick' if facts['quick'] else ''}"
        lines.append(f"| `{script}` | {rounds} | {facts['threads']} | {facts['torch']} | {facts['machine']} |")
    return "\n".join(lines)


def tables() -> dict[str, str]:
    """Return each marker's table."""
    documents = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    return {
        "cifar10-random10": documents["cifar10-random10"]["table"],
        "masked-step": cost_table(documents["masked-step"], documents["mask"]),
        "speed": speed_table(documents),
        "speed-machines": machines(documents),
    }


def filled(page: str, text: str) -> str:
    """Return a page with the tables between their markers."""
    found = tables()
    for name in PAGES[page]:
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"{page} has no marker {name}")
        text = pattern.sub(lambda match, name=name: f"{match[1]}{found[name]}\n{match[2]}", text)  # type: ignore[misc]
    return text


def main() -> None:
    """Rewrite the pages, or check them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; fail when one is out of step")
    arguments = parser.parse_args()
    for page in PAGES:
        path = ROOT / page
        before = path.read_text(encoding="utf-8")
        after = filled(page, before)
        if arguments.check and before != after:
            sys.exit(f"{page} is out of step with benchmarks/results: run `make generated`")
        if before != after:
            path.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
