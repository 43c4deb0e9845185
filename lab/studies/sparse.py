"""Compares the cost of storing a version as its difference to its parent with storing it whole: ResNet-18, 44.7 MB.

    python -m lab.studies.sparse

Half of the child's weights differ from its parent's (density 0.5). The store is a real S3 server on this machine, so
the network costs almost nothing: the seconds show the cost of the difference itself. "Deepest" is the last version
before the next full copy: it depends on seven differences. The variants alternate, each in its own process to measure
its peak memory. Prints a table and writes lab/results/sparse.json.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from salun_core.digest import sha256_file
from salun_core.storage import open_store
from salun_core.storage.blobs import FULL_COPY_EVERY, fetch_blob, put_blob, put_sparse

DENSITY = 0.5
VARIANTS = {"whole": 0, "difference": 1, "difference, deepest": FULL_COPY_EVERY - 1}


def make_versions(folder: Path) -> None:
    """Write a model of ResNet-18's shapes, and children whose weights differ by half from one to the next."""
    import torch
    from safetensors.torch import save_file

    from salun_core.models import build_classifier
    from salun_core.saliency import SaliencyMask

    torch.manual_seed(0)
    model = build_classifier("resnet18", 10)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for number in range(FULL_COPY_EVERY):
        if number:
            masks = SaliencyMask.random(shapes, DENSITY, seed=number).tensors()
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter += torch.randn(parameter.shape) * 1e-3 * masks[name]
        save_file(model.state_dict(), folder / f"{number}.safetensors")


def memory(what: str) -> float:
    """Return a figure of the process's memory from /proc in MB: VmRSS (now) or VmHWM (peak)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) / 1024


def timed(work: Callable[[], object]) -> tuple[float, float, float]:
    """Return wall seconds, CPU seconds and added peak memory in MB."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, started, used = memory("VmRSS"), time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - started, time.process_time() - used, memory("VmHWM") - before


def child(variant: str, action: str, uri: str, folder: Path) -> None:
    """Store the last version of a chain, or fetch it, and print the cost."""
    store, depth = open_store(uri), VARIANTS[variant]
    last = max(depth, 1)  # the whole variant stores the same file as the difference does
    files = [folder / f"{number}.safetensors" for number in range(last + 1)]
    digest = sha256_file(files[last])

    def put(number: int) -> None:
        put_sparse(store, files[number], files[number - 1], sha256_file(files[number - 1]), FULL_COPY_EVERY)

    if action == "prepare":
        put_blob(store, files[0])
        for number in range(1, last):
            put(number)
        return
    list(store.list(""))  # the connection is open, and boto3 has read its models
    if action == "store":
        cost = timed((lambda: put(last)) if depth else (lambda: put_blob(store, files[last])))
    else:
        with tempfile.TemporaryDirectory() as out:
            cost = timed(lambda: fetch_blob(store, digest, Path(out) / "file", files[last].stat().st_size))
            assert sha256_file(Path(out) / "file") == digest
    stored = sum(entry.size for entry in store.list("") if entry.key.endswith(digest))
    print(json.dumps(dict(zip(("seconds", "cpu_s", "peak_mb"), cost, strict=True)) | {"bytes": stored}))


def run_child(*arguments: str) -> dict[str, float]:
    """Run one action in its own process."""
    command = [sys.executable, os.path.abspath(__file__), "--child", *arguments]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output) if output else {}


def measure(rounds: int, folder: Path) -> dict[str, dict[str, float]]:
    """Return the medians of each variant and action."""
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(rounds):
        for variant in VARIANTS:
            uri = f"s3://salun/{secrets.token_hex(6)}"
            run_child(variant, "prepare", uri, str(folder))
            for action in ("store", "fetch"):
                found.setdefault(f"{variant}: {action}", []).append(run_child(variant, action, uri, str(folder)))
    return {name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()}


def main() -> None:
    """Measure every variant in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", nargs=4)
    arguments = parser.parse_args()
    if arguments.child:
        return child(*arguments.child[:3], Path(arguments.child[3]))
    from lab.seaweedfs import embedded_s3

    with tempfile.TemporaryDirectory() as folder, embedded_s3(Path(folder) / "s3") as server:
        os.environ.update(server.environ)
        make_versions(Path(folder))
        whole = (Path(folder) / "1.safetensors").stat().st_size
        rows = measure(arguments.rounds, Path(folder))
    print("| stored as | MB | of whole | store, s (CPU) | added peak, MB | fetch, s (CPU) | added peak, MB |")
    print("|---|---|---|---|---|---|---|")
    for variant in VARIANTS:
        put, got = rows[f"{variant}: store"], rows[f"{variant}: fetch"]
        print(
            f"| {variant} | {put['bytes'] / 1e6:.1f} | {put['bytes'] / whole:.3f} | "
            f"{put['seconds']:.2f} ({put['cpu_s']:.2f}) | {put['peak_mb']:.0f} | "
            f"{got['seconds']:.2f} ({got['cpu_s']:.2f}) | {got['peak_mb']:.0f} |"
        )
    document = {"rounds": arguments.rounds, "density": DENSITY, "full_every": FULL_COPY_EVERY, "whole_bytes": whole}
    target = Path(__file__).parents[1] / "results" / "sparse.json"
    target.write_text(json.dumps(document | {"rows": rows}, indent=1, sort_keys=True) + "\n")
    return None


if __name__ == "__main__":
    main()
