"""The deletion ledger at 10,000 requests, beside the same operations on PostgreSQL with `FOR UPDATE SKIP LOCKED`.

    make bench-ledger                        # some minutes
    .venv/bin/python -m benchmarks.ledger --requests 500 --sweeps 30

The ledger is our own code on a real S3 server on this machine; the model is a toy (the set of what it has forgotten),
so that no data set is read and nothing is trained. PostgreSQL keeps the same documents, and is left out, with the
reason, where it is not installed. Both are measured in one run, one after the other, on one disk. A commit of
PostgreSQL waits for the disk; SeaweedFS as it is started here answers before that.

1. Submit all requests by 16 threads; claim batches of 64 while all of them wait; take and scrape the exporter's gauges.
2. Claim batches while always 256 wait and none, 1,000 or nearly all of the requests are finished: the calls must not
   grow. Most of the finished ones were completed by moves alone. After each claim its run is published and settled.
3. Sweep a toy line again and again in one process of its own: its memory must not grow.

Prints a table and writes benchmarks/results/ledger.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.ledger_postgres import PostgresSide
from benchmarks.ledger_s3 import LINE, S3Side
from benchmarks.ledger_table import BATCH, LOOKED_AT, Figures, rows_of, table
from benchmarks.postgres_server import PostgresMissingError, postgres_server
from salun_core.requests.schema import Submission
from salun_core.telemetry.exporter import Exporter, serving
from tests import toy_line as toy

Side = S3Side | PostgresSide
ROOT = Path(__file__).parent.parent
WARM_UP = 50
SCRAPES = 300


def say(text: str) -> None:
    """Tell whoever waits."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


class Filler:
    """Makes submissions that no other one resembles: each names one sample of its own."""

    def __init__(self) -> None:
        self._made = 0

    def make(self, count: int) -> list[Submission]:
        """Make so many more."""
        numbers = range(self._made, self._made + count)
        self._made += count
        return [Submission(id=f"r-{n:06d}", model_line=LINE, target=toy.target(n)) for n in numbers]


def claim_once(side: Side) -> Figures:
    """Claim one batch and finish its run; return what the claim took and, on S3, what it sent."""
    waiting, finished = side.counts()
    run = f"run-{secrets.token_hex(6)}"
    found: Figures = {}

    def claim() -> None:
        used = time.process_time()
        found["seconds"] = seconds(lambda: found.update(record=side.claim(run, BATCH)))
        found["cpu_s"] = time.process_time() - used

    calls: dict[str, int] = {}
    if isinstance(side, S3Side):
        calls = side.calls.during(claim)
    else:
        claim()
    record = found["record"]
    side.erase(record)
    side.settle(record)
    return {
        "waiting": waiting,
        "finished": finished,
        "claimed": len(record.members),
        "seconds": found["seconds"],
        "cpu_s": found["cpu_s"],
        "calls": calls,
    }


def summary(claims: Sequence[Figures]) -> Figures:
    """Return the median of several claims, and the most calls that one of them sent."""
    times = [row["seconds"] for row in claims]
    most = max(claims, key=lambda row: sum(row["calls"].values()))
    return {
        "waiting": claims[0]["waiting"],
        "finished": claims[0]["finished"],
        "claimed": min(row["claimed"] for row in claims),
        "median_s": statistics.median(times),
        "max_s": max(times),
        "client_cpu_s": statistics.median(row["cpu_s"] for row in claims),
        "calls": sum(most["calls"].values()),
        "calls_by_kind": most["calls"],
    }


def claims_with(side: Side, filler: Filler, finished: int, rounds: int) -> Figures:
    """Claim while always the same number of requests wait, with so many finished already."""
    waiting, done = side.counts()
    missing = max(0, finished - done)
    side.submit(filler.make(max(0, missing + LOOKED_AT - waiting)))
    side.finish(missing)
    rows = []
    for _ in range(rounds):
        side.submit(filler.make(LOOKED_AT - side.counts()[0]))
        rows.append(claim_once(side))
    return summary(rows)


def refreshes(side: Side, rounds: int) -> Figures:
    """Return what the first snapshot took, which lists the settled requests too, and the median of later ones."""
    take = side.gauges()
    first = seconds(take)
    return {"first_s": first, "median_s": statistics.median(seconds(take) for _ in range(rounds))}


def scrapes(side: S3Side) -> Figures:
    """Scrape the exporter over HTTP; the first scrapes meet a refresh that is under way."""
    exporter = Exporter(side.gauges())
    exporter.refresh()
    times = []
    with serving(exporter, port=0) as url:
        for _ in range(SCRAPES):
            times.append(seconds(lambda: urllib.request.urlopen(url, timeout=30).read()))
            time.sleep(0.01)
    cuts = statistics.quantiles(times, n=100)
    return {"median_s": statistics.median(times), "p99_s": cuts[98], "max_s": max(times)}


def measure(side: Side, small: Side, requests: int, rounds: int) -> Figures:
    """Measure one side.

    Args:
        side: an empty ledger, which is filled with all requests.
        small: another empty ledger, for the claims with few finished requests.
        requests: how many.
        rounds: how many claims and snapshots the medians rest on.
    """
    levels: Figures = {}
    filler = Filler()
    for finished in (0, requests // 10):
        say(f"{side.name}: claims with {finished} finished")
        levels[str(finished)] = claims_with(small, filler, finished, rounds)
    if isinstance(small, PostgresSide):
        small.empty()
    say(f"{side.name}: submitting {requests} requests")
    filler = Filler()
    submissions = filler.make(requests)
    used = time.process_time()
    took = seconds(lambda: side.submit(submissions))
    used = time.process_time() - used
    figures: Figures = {"submit": {"seconds": took, "per_second": requests / took, "client_cpu_s": used}}
    figures["refresh, all wait"] = refreshes(side, rounds)
    if isinstance(side, S3Side):
        figures["scrape"] = scrapes(side)
    say(f"{side.name}: claims while all wait")
    figures["claim, all wait"] = summary([claim_once(side) for _ in range(rounds)])
    say(f"{side.name}: finishing most of them")
    waiting = side.counts()[0]
    side.finish(waiting - LOOKED_AT)
    done = side.counts()[1]
    levels[str(done)] = claims_with(side, filler, done, rounds)
    figures["refresh, most finished"] = refreshes(side, rounds)
    return figures | {"claim, 256 wait": levels}


def resident() -> float:
    """Return the process's memory in MB."""
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def sweep_child(name: str, where: str, sweeps: int) -> Figures:
    """Sweep again and again in this process: submit one or two requests, claim, erase, settle."""
    side: Side = S3Side(where) if name == S3Side.name else PostgresSide(where)
    filler = Filler()
    memory: list[float] = []
    times: list[float] = []
    warm_up = min(WARM_UP, sweeps)
    for number in range(warm_up + sweeps):
        run = f"sweep-{number}"
        found: Figures = {}
        submissions = filler.make(1 + number % 2)
        took = seconds(lambda: side.submit(submissions))  # noqa: B023 - called at once
        took += seconds(lambda: found.update(record=side.claim(run, BATCH)))  # noqa: B023
        side.erase(found["record"])
        took += seconds(lambda: side.settle(found["record"]))  # noqa: B023
        times.append(took)
        if number >= warm_up - 1 and (number + 1 - warm_up) % max(1, sweeps // 20) == 0:
            memory.append(resident())
    side.close()
    growth = memory[-1] / memory[0] - 1
    return {"ledger_s": statistics.median(times), "growth": growth, "rss_mb": memory, "warm_up": warm_up}


def sweeping(name: str, where: str, sweeps: int) -> Figures:
    """Run `sweep_child` in a process of its own."""
    say(f"{name}: {sweeps} sweeps")
    command = [sys.executable, "-m", "benchmarks.ledger", "--sweeps", str(sweeps), "--child", name, where]
    output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: Figures = json.loads(output)
    return found


def measure_s3(arguments: argparse.Namespace, stack: contextlib.ExitStack) -> Figures:
    from salun_core.storage.seaweedfs import embedded_s3

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    server = stack.enter_context(embedded_s3(folder))
    os.environ.update(server.environ)
    full, small = S3Side(f"{server.uri}/full"), S3Side(f"{server.uri}/small")
    figures = measure(full, small, arguments.requests, arguments.rounds)
    return figures | {"sweeps": sweeping(S3Side.name, f"{server.uri}/sweeps", arguments.sweeps)}


def measure_postgres(arguments: argparse.Namespace, stack: contextlib.ExitStack) -> Figures:
    try:
        where = stack.enter_context(postgres_server())
    except PostgresMissingError as error:
        say(f"PostgreSQL is left out: {error}")
        return {"left out": str(error)}
    with contextlib.closing(PostgresSide(where)) as side:
        figures = measure(side, side, arguments.requests, arguments.rounds)
        side.empty()
        sweeps = sweeping(PostgresSide.name, where, arguments.sweeps)
        return figures | {"sweeps": sweeps, "version": side.version()}


def main() -> None:
    """Measure both sides and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000, help="at least 500")
    parser.add_argument("--sweeps", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=3, help="claims and snapshots that a median rests on")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "ledger.json")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # `timeout` ends us: the servers end too
    if arguments.child:
        print(json.dumps(sweep_child(arguments.child[0], arguments.child[1], arguments.sweeps)))
        return
    load, started = os.getloadavg()[0], time.perf_counter()
    document: Figures = {"requests": arguments.requests, "sweeps": arguments.sweeps, "rounds": arguments.rounds}
    with contextlib.ExitStack() as stack:  # the quick one first: should it break, little is lost
        document["postgres"] = measure_postgres(arguments, stack)
    with contextlib.ExitStack() as stack:
        document["s3"] = measure_s3(arguments, stack)
    document |= {"cores": os.cpu_count(), "load_before": load, "load_after": os.getloadavg()[0]}
    rows = rows_of(document)
    print(table(rows))
    say(f"done in {time.perf_counter() - started:.0f} s; load {load:.1f} before, {document['load_after']:.1f} after")
    arguments.out.write_text(json.dumps(document | {"rows": rows}, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
