"""The page of all results: one section a suite and size, between markers, made from the results' JSON alone."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from salun_core.bench.plot import digest, plot
from salun_core.bench.results import FORMAT, Results
from salun_core.bench.table import choices, table
from salun_core.config import parse, read_document
from salun_core.errors import ConflictError, UsageError
from salun_core.storage.local_files import write_whole

RESULTS, IMAGES = Path("benchmarks", "results"), "images"
_BEGIN = re.compile(r"<!-- suite:([a-z0-9-]+):(cpu|paper) -->")


def results_json(results: Results) -> bytes:
    """Return the bytes of a results file."""
    return (json.dumps(results.model_dump(mode="json"), indent=1, sort_keys=True) + "\n").encode()


def read_results(folder: Path) -> list[Results]:
    """Read all results of suites in a folder, by name; other JSON there is passed over.

    Raises:
        UsageError: one has faults.
    """
    documents = {path: read_document(path) for path in sorted(folder.glob("*.json"))}
    return [
        parse(Results, data, str(path))
        for path, data in documents.items()
        if isinstance(data, dict) and data.get("format") == FORMAT
    ]


def section(results: Results) -> str:
    """Render what stands between the markers of a suite: words, table, picture, how to measure it again."""
    picture = f"{IMAGES}/{picture_name(results)}"
    seeds = len({item.seed for row in results.rows for item in row.figures})
    lines = [f"### {results.title} ({results.size})", ""]
    lines += [*results.about.strip().splitlines(), ""] if results.about else []
    lines += [table(results), "", *([choices(results), ""] if results.searched else []), _meaning(results), ""]
    lines += [f"![{results.title}: distance from the goal against cost]({picture})", ""]
    lines += [f"{seeds} seed{'s' if seeds != 1 else ''}; {results.machine}; {_versions(results)}. Measured by:", ""]
    lines += [f"    {results.command}"]
    if results.missing:
        lines += ["", f"Not measured: {', '.join(results.missing)}."]
    return "\n".join(lines)


def _versions(results: Results) -> str:
    facts = results.environment
    names = [name for name in ("salun", "python", "torch", "diffusers", "device") if name in facts]
    threads = f", {facts['threads']} threads" if "threads" in facts else ""
    return ", ".join(f"{name} {facts[name]}" for name in names) + threads


def _meaning(results: Results) -> str:
    if results.kind == "classification":
        return (
            "UA, RA, TA, MIA and gap in percent, mean ± standard deviation over the seeds; in parentheses the distance "
            "to Retrain. RTE: wall-clock seconds of mask and unlearning." + _of_search(results)
        )
    whose = (results.extractor or "").partition(":")[0]
    features = {"judge": "of the judging classifier", "inception": "of Inception-v3"}.get(whose, "of nothing")
    count = f" ({results.images:,} images a model)" if results.images else ""
    return (
        f"UA: images asked for as forgotten that the judge does not recognise; RA: images of the other classes that it "
        f"does; both in percent{count}. FID and KID compare features {features} with held-out real images. "
        "RTE: wall-clock seconds of mask and unlearning. Mean ± standard deviation over the seeds."
    )


def _of_search(results: Results) -> str:
    if not results.searched:
        return ""
    search = results.settings.get("search", {})
    policy = search.get("policy", "none")
    bound = "no policy bounds it" if policy == "none" else f"bounded by the policy {policy}"
    return (
        f" Each row's settings were searched for with the same budget, {search.get('budget', '?')}, on held-out data; "
        f"{bound}. RTE and passes are of the whole search. Rows as written were not searched."
    )


def picture_name(results: Results) -> str:
    """Return the name of the picture's file."""
    return f"bench-{results.suite}-{results.size}.svg"


def filled(text: str, found: Sequence[Results]) -> str:
    """Return a page with each section between its markers; one that the page lacks is added at its end.

    Args:
        text: the page.
        found: the results.

    Raises:
        UsageError: a marker is not closed, or occurs twice.
    """
    for results in found:
        name = f"suite:{results.suite}:{results.size}"
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if text.count(begin) == 0:
            text = text.rstrip("\n") + f"\n\n{begin}\n{end}\n"
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
            raise UsageError(f"the markers of {name} are broken", "each must stand once, in order", "correct the page")
        head, rest = text.split(begin)
        text = f"{head}{begin}\n{section(results)}\n{end}{rest.split(end)[1]}"
    return text


def write_page(page: Path, folder: Path, check: bool = False) -> list[str]:
    """Write the page of all results in a folder, with its pictures, or check that it is in step.

    Args:
        page: Markdown file; it is made if it is not there.
        folder: of the results' JSON.
        check: write nothing.

    Returns:
        The names of the sections.

    Raises:
        ConflictError: `check`, and the page or a picture is out of step.
        UsageError: results or markers are broken.
    """
    found = read_results(folder)
    before = page.read_text(encoding="utf-8") if page.is_file() else "# Results\n"
    after = filled(before, found)
    names = [f"{results.suite}:{results.size}" for results in found]
    if check:
        strange = sorted({":".join(match) for match in _BEGIN.findall(after)} - set(names))
        stale = strange + [name for results, name in zip(found, names, strict=True) if not _drawn(page, results)]
        if before != after or stale:
            what = ", ".join(stale) or "a section"
            raise ConflictError(f"{page} is out of step with {folder}", what, f"run `salun bench render --into {page}`")
        return names
    for results in found:
        if not _drawn(page, results):
            write_whole(page.parent / IMAGES / picture_name(results), plot(results).encode())
    if before != after:
        write_whole(page, after.encode())
    return names


def _drawn(page: Path, results: Results) -> bool:
    """Whether the picture is of these results; its bytes may differ with the version of matplotlib."""
    path = page.parent / IMAGES / picture_name(results)
    return path.is_file() and f"<!-- {digest(results)} -->" in path.read_text(encoding="utf-8")
