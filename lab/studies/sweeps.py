"""Compares a sweep with a pod for each step to the same sweep in one pod: steps, pods, seconds and memory.

    python -m lab.studies.sweeps

Both pipelines run on this machine with kfp's local runner, each step in a process of its own, which kfp's executor
starts as in a pod. Each run gets a fresh store with a small classifier of digits. Two kinds of request: no request is
due, and one class of ten is to be forgotten. The pipelines alternate; the table shows medians.

Processor seconds and peak memory are those of the steps' processes from their first import to their end. Pods are
counted in the compiled pipeline: a driver and an executor for each step that runs, and a driver for each group and each
condition. What a cluster adds to each pod (scheduling, image, start) is not in the seconds. Writes
lab/results/sweeps.json.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lab.bench.results import machine
from lab.seaweedfs import embedded_s3
from lab.studies.compared import RESULTS
from pipelines.local import LocalRun, run_compiled
from pipelines.packages import COMPILED, read_package
from salun_core.certificates.keys import create_key
from salun_core.data import DataSpec
from salun_core.data.targets import ClassTarget
from salun_core.methods.classification import UnlearnConfig
from salun_core.models import load_model
from salun_core.requests.ledger import Ledger
from salun_core.storage import open_store
from salun_core.tasks import register_model
from salun_core.tasks.classification.training import train_model
from salun_core.times import utc_clock

PIPELINES = {"a pod for each step": "deletion-sweep-cpu", "one pod": "deletion-sweep-compact-cpu"}
DUE = {"nothing is due": 0, "one request": 1}
# Python imports a module of this name at its start. It notes what a step's process used, as the last thing it does.
METER = """
import atexit, json, os, resource, sys
def note():
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    seconds, peak = sum(one.ru_utime + one.ru_stime for one in used), max(one.ru_maxrss for one in used)
    name = sys.orig_argv[sys.orig_argv.index("--function_to_execute") + 1]
    row = {"step": name, "seconds": seconds, "mib": peak / 1024, "torch": "torch" in sys.modules}
    with open(os.environ["STEP_METER"], "a") as file:
        file.write(json.dumps(row) + "\\n")
if "--function_to_execute" in sys.orig_argv:
    atexit.register(note)
"""


def run_sweep(model: Path, pipeline: str, due: int, folder: Path) -> tuple[LocalRun, float, list[dict[str, Any]]]:
    """Run a sweep on a fresh store; return the run, its wall-clock seconds and what each step used."""
    store, split = open_store(f"s3://salun/{secrets.token_hex(8)}"), load_model(model).split
    register_model(store, "digits", model, "train", len(split.train))
    for number in range(due):
        target = ClassTarget(dataset_digest=split.dataset_digest, class_id=3)
        Ledger(store, utc_clock).submit(f"r-{number}", "digits", target)
    meter = folder / "meter.jsonl"
    os.environ["STEP_METER"] = str(meter)
    form = {"model_line": "digits", "store_uri": store.uri, "min_requests": 1}
    form |= {"method": "salun", "method_config": '{"epochs": 1}'}
    started = time.perf_counter()
    run = run_compiled(COMPILED / f"salun-{pipeline}.yaml", form, folder)
    wall = time.perf_counter() - started
    assert run.exit_code == 0, run.error
    return run, wall, [json.loads(line) for line in meter.read_text(encoding="utf-8").splitlines()]


def groups(pipeline: str) -> int:
    """Return the number of groups and conditions of a pipeline, with the pipeline itself; each has a driver."""
    spec = read_package(COMPILED / f"salun-{pipeline}.yaml").spec
    return 1 + sum("dag" in component for component in spec["components"].values())


def measure(rounds: int, folder: Path) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """Return a row for each pipeline and kind of request, and one for each step of the sweep that erases."""
    config = UnlearnConfig(
        epochs=6, learning_rate=0.1, schedule="cosine", batch_norm="update", batch_size=64, device="cpu"
    )
    train_model(DataSpec(source="digits"), "resnet8", config, folder / "model")
    found: dict[tuple[str, str], list[tuple[LocalRun, float, list[dict[str, Any]]]]] = {}
    for turn in range(rounds):
        for due, count in DUE.items():
            for kind, pipeline in PIPELINES.items():
                work = folder / f"{pipeline}-{count}-{turn}"
                work.mkdir()
                found.setdefault((kind, due), []).append(run_sweep(folder / "model", pipeline, count, work))
    steps = [row for *_, used in found["a pod for each step", "one request"] for row in used]
    return [_row(kind, due, runs) for (kind, due), runs in found.items()], _by_step(steps)


def _row(kind: str, due: str, runs: list[tuple[LocalRun, float, list[dict[str, Any]]]]) -> dict[str, Any]:
    steps = len(runs[0][2])
    return {
        "pipeline": kind,
        "requests": due,
        "steps": steps,
        "pods": 2 * steps + groups(PIPELINES[kind]),
        "cpu_s": statistics.median(sum(row["seconds"] for row in used) for *_, used in runs),
        "wall_s": statistics.median(wall for _, wall, _ in runs),
        "peak_mib": max(row["mib"] for *_, used in runs for row in used),
    }


def _by_step(used: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "cpu_s": statistics.median(row["seconds"] for row in used if row["step"] == name),
            "peak_mib": max(row["mib"] for row in used if row["step"] == name),
            "torch": any(row["torch"] for row in used if row["step"] == name),
        }
        for name in dict.fromkeys(row["step"] for row in used)
    }


def table(rows: list[dict[str, Any]], steps: Mapping[str, Mapping[str, Any]]) -> str:
    """Return both tables as Markdown."""
    lines = [
        "| pipeline | requests | steps | pods | processor s | wall s | peak MiB |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        figures = f"{row['steps']} | {row['pods']} | {row['cpu_s']:.1f} | {row['wall_s']:.1f} | {row['peak_mib']:.0f}"
        lines.append(f"| {row['pipeline']} | {row['requests']} | {figures} |")
    lines += ["", "| step | processor s | peak MiB | imports torch |", "|---|--:|--:|---|"]
    for name, used in steps.items():
        torch_too = "yes" if used["torch"] else "no"
        lines.append(f"| `{name}` | {used['cpu_s']:.1f} | {used['peak_mib']:.0f} | {torch_too} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "meter").mkdir()
        (folder / "meter" / "sitecustomize.py").write_text(METER, encoding="utf-8")
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder / "meter"), before]))
        os.environ["SALUN_SIGNING_KEY"] = str(create_key(folder / "keys" / "salun").private)
        with embedded_s3(folder / "s3") as server:
            os.environ.update(server.environ)
            rows, steps = measure(arguments.rounds, folder)
    print(table(rows, steps))
    document = {"machine": machine(), "torch": torch.__version__, "rounds": arguments.rounds}
    text = json.dumps({**document, "rows": rows, "steps": steps}, indent=1, sort_keys=True)
    (RESULTS / "sweeps.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
