"""Runs the reliability tests at full size and tabulates them.

    python -m tests.reliability [--only lineage] [--sweeps 1000]

A toy model line replaces the model: its weights are the set of samples that it has forgotten. Everything else is real:
the S3 server, the ledger, leases, publishing, the processes and their SIGKILLs. Prints a table, and writes
lab/results/reliability.json and docs/research/reliability.md; with --only the other rows are unchanged.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from lab.seaweedfs import embedded_s3, find_binary
from tests.reliability import faults, rows
from tests.reliability.figures import Figures
from tests.reliability.trials import killed_runs

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "lab" / "results" / "reliability.json"
PAGE = ROOT / "docs" / "research" / "reliability.md"
MEMORY = "memory"
OF_PYTEST = {
    "states of a request, 500 x 50 steps": ["tests/properties/test_request_states.py"],
    "damaged objects": ["tests/reliability/test_damage.py"],
    "fuzzed documents, masks, archives, pickles": [
        "tests/properties/test_fuzz_documents.py",
        "tests/properties/test_mask_file_fuzz.py",
    ],
    "privacy canary": ["tests/e2e/test_canary.py"],
    "deadlines by a fake clock": ["tests/unit/requests/test_deadlines.py", "tests/unit/telemetry/test_exporter.py"],
    "resuming, all methods": ["tests/unit/methods/test_resume.py"],
}
HEAD = """# Reliability

This page reports measurements: how the deletion ledger behaves when processes are killed, replies are lost and clocks
are wrong. `make reliability` runs all rows, first at a small size as tests, and rewrites this page.

A toy model is used: its weights are the set of samples that it has forgotten, so an auditor can check every sample in
every version. Everything else is real: an S3 server, the ledger, leases, claiming, publishing and settling, separate
processes, SIGKILL and SIGSTOP.

The row "killed runs of the pipeline" runs the real steps (claim, fetch, mask, unlearn, evaluate, gate, conclude, and
the exit handler), each in its own process, on a small autoencoder. Each of its trials has its own line with 3 to 5
requests, and one of the failures below. The seed of the trial selects the time of the failure: before a process, before
or after a call to the store, at the end of a step, or at any time.

| trial | what happens |
|---|---|
| recreated | a step is killed, and its pod is created again once or several times; another sweep may start in between |
| vanished | a step is killed, the Workflow is gone or its node is lost, and the exit handler never runs |
| retried | a step is killed and the exit handler runs; after Retry in the browser, it and all later steps run again |
| net killed | the exit handler is also killed, and is repeated or never runs again |
| suspended | a step is suspended until its lease expires, another run takes over, then the step and its run continue |
| pending | the run is terminated before the first step after its claim |

In half of the trials, sweeps can ask the Kubernetes API whether the holder of a lease still runs. In the other half,
only the time since the last renewal counts; the trial sets the clock of the store. After the failure a sweep runs to
its end. The auditor then also checks certificates and their signatures, outcomes, how long the line was blocked, and
that a purge 25 hours later leaves no scratch file.

- **lost**: a request that was filed and is not completed, or whose data HEAD still contains.
- **twice**: a request that was completed twice, a sample that two versions erased, an event that was written twice.
- **resurrected**: a sample that one HEAD had forgotten and a later one contains.
- **torn**: a read of HEAD with a manifest or files that were missing or did not match their digests.
- **other**: forks of the lineage, reads that went backwards, requests at no or at two index statuses, false
  certificates, own writes that were attributed to another writer, leases that were acquired too early, lines
  that were blocked for more than 15 minutes, outcomes that were untrue or changed, scratch files that outlived a purge,
  unexpected errors.

"""


def table(sweeps: int, trials: int = 200, workers: int = 4) -> Mapping[str, Callable[[str], Figures]]:
    """Return all rows at full size."""
    return {
        "ledger under kills": lambda uri: rows.ledger_under_kills(uri, 8, 4, 200, 80, 1000),
        "lineage under kills": lambda uri: rows.lineage_under_kills(uri, 8, 60, 15, 1000),
        "seeded defects": rows.seeded_defects,
        "lost replies": lambda uri: faults.lost_replies(uri, 100),
        "a faulty store": lambda uri: faults.faulty_store(uri, 12, 3),
        "late workers": lambda uri: rows.late_workers(uri, 100),
        "kills in a publish": lambda uri: rows.killed_publishes(uri, large=False),
        "kills in a publish, file in parts": lambda uri: rows.killed_publishes(uri, large=True),
        "kills in mid-training": lambda uri: rows.killed_training(20),
        "killed runs of the pipeline": lambda uri: killed_runs(uri, trials, workers),
        MEMORY: lambda uri: rows.flat_memory(uri, sweeps, min(200, sweeps // 2)),
        **{name: of_pytest(name, paths) for name, paths in OF_PYTEST.items()},
    }


def of_pytest(name: str, paths: list[str]) -> Callable[[str], Figures]:
    """Return a row that runs tests at full size."""

    def row(uri: str) -> Figures:
        there = [path for path in paths if (ROOT / path).exists()]
        if not there:
            return Figures(name, more="the tests do not exist", holds=False)
        begin = time.monotonic()
        command = [sys.executable, "-m", "pytest", "-q", "--no-header", *there]
        variables = {**os.environ, "SALUN_RELIABILITY": "full", "OMP_NUM_THREADS": "1"}
        ran = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
        last = re.sub(r" in [\d.]+s.*", "", (ran.stdout.strip().splitlines() or ["no output"])[-1]).strip("= ")
        return Figures(name, seconds=time.monotonic() - begin, more=f"tests: {last}", holds=ran.returncode == 0)

    return row


def run(chosen: Mapping[str, Callable[[str], Figures]], uri: str) -> Iterator[Figures]:
    """Run the rows in sequence, and the memory row in parallel, because it takes long and needs little."""
    with ThreadPoolExecutor(1) as pool:
        parallel = pool.submit(chosen[MEMORY], f"{uri}/{MEMORY}") if MEMORY in chosen else None
        for number, (name, row) in enumerate(chosen.items()):
            if name != MEMORY:
                yield _tried(name, partial(row, f"{uri}/row-{number}"))
        if parallel:
            yield _tried(MEMORY, parallel.result)


def _tried(name: str, row: Callable[[], Figures]) -> Figures:
    """Run a row; one that raises has failed, and the others still run."""
    try:
        figures = row()
    except Exception as error:  # noqa: BLE001 - of any kind
        return Figures(name, more=f"raised {type(error).__name__}: {error}", holds=False)
    figures.name = name
    return figures


def line_of(figures: Figures) -> str:
    """Return a row of the table."""
    faults, verdict = dict(figures.verdict.faults), figures.verdict
    for name in ("lost", "twice", "resurrected", "torn"):
        faults.pop(name, None)
    other = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in faults.items()) or "0"
    details = [f"{figures.versions} versions"] if figures.versions else []
    details += [f"{figures.polls:,} reads of HEAD"] if figures.polls else []
    details += [figures.more] if figures.more else []
    cells = [
        figures.name if figures.passed else f"**FAILED** {figures.name}",
        figures.workers,
        figures.kills,
        figures.requests,
        verdict.lost,
        verdict.twice,
        verdict.resurrected,
        verdict.torn,
        other,
        f"{figures.seconds:.0f}",
        "; ".join(details),
    ]
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def machine() -> str:
    """Describe the machine that this ran on."""
    weed = subprocess.run([str(find_binary()), "version"], capture_output=True, text=True).stdout
    weed_version = (re.search(r"\d+\.\d+", weed) or ["?"])[0]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("boto3", "torch", "hypothesis"))
    load = "idle" if os.getloadavg()[2] < 3 else "shared with other work"
    return (
        f"{os.cpu_count()} cores, {load}, {platform.system()} {platform.machine()}, "
        f"Python {platform.python_version()}, SeaweedFS {weed_version}, {versions}"
    )


def page(known: Mapping[str, Any]) -> str:
    """Return docs/research/reliability.md.

    Args:
        known: by name of a row: `row`, `passed`, and the `machine` that it ran on.
    """
    titles = "row | workers | kills | requests | lost | twice | resurrected | torn | other | seconds | more"
    lines = [f"| {titles} |", "|" + "---|" * len(titles.split("|")), *(item["row"] for item in known.values())]
    passed = sum(item["passed"] for item in known.values())
    machines = "\n".join(f"- {text}" for text in dict.fromkeys(item["machine"] for item in known.values()))
    end = f"\n{passed} of {len(known)} rows hold. It ran on:\n\n{machines}\n"
    return HEAD + "\n".join(lines) + "\n" + end


def main() -> None:
    """Run the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help="rows whose name contains this")
    parser.add_argument("--sweeps", type=int, default=1000, help="sweeps of the memory row")
    parser.add_argument("--trials", type=int, default=200, help="trials of the killed runs")
    parser.add_argument("--workers", type=int, default=4, help="processes that do these trials")
    args = parser.parse_args()
    every = table(args.sweeps, args.trials, args.workers)
    chosen = {name: row for name, row in every.items() if not args.only or any(text in name for text in args.only)}
    known = json.loads(RESULTS.read_text()) if args.only and RESULTS.exists() else {}
    failed = 0
    with tempfile.TemporaryDirectory(prefix="salun-reliability-") as folder, embedded_s3(Path(folder)) as server:
        os.environ.update(server.environ)
        for figures in run(chosen, server.uri):
            print(line_of(figures), flush=True)
            known[figures.name] = {"row": line_of(figures), "passed": figures.passed, "machine": machine()}
            failed += not figures.passed
    known = {name: known[name] for name in every if name in known}
    RESULTS.write_text(json.dumps(known, indent=1) + "\n")
    if len(known) == len(every):
        PAGE.write_text(page(known))
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
