"""Measures each step of the pipeline and a whole sweep by the number of rows and of forgotten images.

    python -m lab.studies.scale --write      # or make bench-scale

Generated bitmaps of 8 x 8 pixels, in Parquet files of 100,000 rows in an S3 server on this machine, and a network of
two layers, so that most of the cost is that of the data. One model is trained for each number of rows. Each step runs
in a process of its own by the code of the pods (`salun_core.pods`), with one thread and streamed images.

- rows: how many images the data set has; 72 % of them are in training
- forgotten: how many of those a request names; a number below 1 is a share
- unlearning trains for one epoch, on all forgotten images and on 5,000 retained ones
- CPU s: processor time of the process, with Python and its imports, which the row *imports* shows alone
- peak: the largest resident memory of the process
- read: the bodies of all answers of the S3 server

A sweep is `salun sweep --now` for one request of 20 images. The gate has a policy that every model passes: the cost is
measured, and not what was forgotten. The work folder keeps data, models and the store, so that
`--work DIR` measures single steps again without making them. Writes lab/results/scale.json, which keeps the
rows of earlier calls. `make generated` makes the tables in docs/research/speed.md from it.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from torch import nn

from lab.bench.results import machine
from lab.seaweedfs import embedded_s3
from salun_core.certificates.keys import create_key
from salun_core.storage import open_store

SIZES, FORGOTTEN = (10_000, 100_000, 1_000_000), (10.0, 1_000.0, 0.1)
SWEPT = 20  # images that the request of a sweep names
FILE_ROWS, GROUP_ROWS, CLASSES = 100_000, 1_000, 10
NETWORK = "lab.studies.scale:small"
TRAINING = {"epochs": 1, "batch_size": 256, "learning_rate": 0.05, "device": "cpu"}
METHOD, DENSITY = "salun", 0.5
POLICY = {"name": "cost", "rules": [{"metric": "RA", "op": ">=", "value": 0, "reason": "every model is published"}]}
CONFIG = {"epochs": 1, "batch_size": 256, "learning_rate": 0.001, "device": "cpu"}
RETAINED = 5_000  # images of D_r that the epoch trains on, for each number of rows
RESULTS = Path(__file__).parents[1] / "results" / "scale.json"


def small(num_classes: int) -> nn.Module:
    """Return a network of two layers."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes)
    )


def generate(size: int, folder: Path) -> None:
    """Write images of noise around the brightness of their class, as Parquet files of bitmaps; `size` is rows."""
    import numpy as np
    import pyarrow
    import pyarrow.parquet
    from PIL import Image

    rng, file = np.random.default_rng(0), io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "BMP")
    header = np.frombuffer(file.getvalue()[: -8 * 8 * 3], np.uint8)
    folder.mkdir(parents=True)
    for start in range(0, size, FILE_ROWS):
        count = min(FILE_ROWS, size - start)
        labels = rng.integers(0, CLASSES, count)
        pixels = (rng.integers(0, 128, (count, 8 * 8 * 3)) + 12 * labels[:, None]).astype(np.uint8)
        images = np.hstack([np.tile(header, (count, 1)), pixels])
        rows = pyarrow.FixedSizeBinaryArray.from_buffers(
            pyarrow.binary(images.shape[1]), count, [None, pyarrow.py_buffer(images.tobytes())]
        )
        table = pyarrow.table({"image": rows.cast(pyarrow.binary()), "label": labels})
        path = folder / f"part-{start // FILE_ROWS:04d}.parquet"
        pyarrow.parquet.write_table(table, path, row_group_size=GROUP_ROWS)


class Case:
    """What the processes of one case share: the addresses in the store, and the folder of their files.

    `forgotten` is a number of images, or their share. The model line is that of the run alone, since a run that
    publishes moves it.
    """

    def __init__(self, size: int, forgotten: float, run: str, work: Path) -> None:
        self.size, self.forgotten, self.run, self.work = size, forgotten, run, work
        self.data, self.model = f"s3://salun/data/{size}", work / f"model-{size}"
        self.folder, self.store, self.line = work / run, "s3://salun/lines", f"line-{run}"
        self.policy = str(work / "policy.json")

    def file(self, name: str) -> str:
        """Return the path of a file of the case."""
        return str(self.folder / name)

    @property
    def config(self) -> dict[str, Any]:
        """The settings of the method."""
        trained = 0.72 * self.size
        kept = trained - (self.forgotten if self.forgotten >= 1 else self.forgotten * trained)
        return {**CONFIG, "retain_fraction": min(1.0, RETAINED / kept)}

    @property
    def form(self) -> dict[str, Any]:
        """The parameters of a run."""
        recipe = {"method": METHOD, "density": DENSITY, "method_config": json.dumps(self.config)}
        places = {"store_uri": self.store, "model_line": self.line, "policy_uri": self.policy}
        return {**recipe, **places, "forget_manifest_uri": self.file("forget")}


def imports(case: Case) -> None:
    """Import what a step does, and do nothing."""
    import salun_core.cli.app
    import salun_core.pods.steps  # noqa: F401


def data(case: Case) -> None:
    """Generate the data and upload them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "data")
        generate(case.size, folder)
        for path in sorted(folder.iterdir()):
            open_store(case.data).upload(path, path.name)


def train(case: Case) -> None:
    from salun_core.data import DataSpec
    from salun_core.tasks.classification.training import train_model, training_config

    made = train_model(DataSpec(source=case.data), NETWORK, training_config(TRAINING), case.model)
    print(f"accuracy on the test images: {made.test_accuracy:.4f}", file=sys.stderr)


def register(case: Case) -> None:
    """Make the model the first version of the case's line, and write the forget target."""
    from salun_core.data.split import read_split
    from salun_core.tasks import register_model

    split = read_split(case.model)
    register_model(open_store(case.store), case.line, case.model, "train", len(split.train))
    count = int(case.forgotten if case.forgotten >= 1 else case.forgotten * len(split.train))
    case.folder.mkdir(parents=True)
    target = {"kind": "samples", "ids": split.ids("train")[:count]}
    Path(case.file("forget")).write_text(json.dumps(target), encoding="utf-8")


def step(name: str) -> Callable[[Case], None]:
    """Return the function that does a step as its pod does."""

    def work(case: Case) -> None:
        from salun_core.pods import steps
        from salun_core.pods.pod import Pod
        from salun_core.pods.reference import Kind, Reference, write_reference

        pod, file, config = Pod(case.store, case.line, case.run), case.file, json.dumps(case.config)
        made: Reference
        if name == "fetch":
            made = steps.fetch_model(pod, case.form)[0]
        elif name == "mask":
            made = steps.compute_mask(pod, file("fetch"), METHOD, DENSITY, config)
        elif name == "unlearn":
            made = steps.unlearn(pod, file("mask"), METHOD, config, 0)
        elif name == "evaluate":
            made, _ = steps.evaluate(pod, file("unlearn"), file("report.html"))
        else:
            made = steps.gate_publish(pod, file("evaluate"), case.policy, file("report.html"), file("summary.md"))
        if made.kind is Kind.NOTHING:
            raise SystemExit(f"{name} ended the run: see {case.store}/runs/{case.run}")
        write_reference(made, file(name))

    return work


def sweep(case: Case) -> None:
    """File a request, and sweep as the command does."""
    from salun_core.cli.app import app
    from salun_core.data.targets import read_targets
    from salun_core.registry.lookup import require_head
    from salun_core.requests.ledger import Ledger
    from salun_core.times import utc_clock

    (target,), store = read_targets(Path(case.file("forget"))), open_store(case.store)
    Ledger(store, utc_clock).submit(f"r-{case.run}", case.line, target)
    settings = [word for name, value in case.config.items() for word in ("--set", f"{name}={value}")]
    options = ["--store", case.store, "--line", case.line, "--method", METHOD, "--work-dir", case.file("sweep")]
    options += ["--policy-uri", case.policy]
    before = require_head(store, case.line).version
    app(["sweep", "--now", *options, *settings], standalone_mode=False)
    if require_head(store, case.line).version == before:
        raise SystemExit("the sweep published nothing")


STEPS = ("fetch", "mask", "unlearn", "evaluate", "publish")
ACTIONS: dict[str, Callable[[Case], None]] = {
    **{"imports": imports, "data": data, "train": train, "register": register, "sweep": sweep},
    **{name: step(name) for name in STEPS},
}


@contextmanager
def counted() -> Iterator[list[int]]:
    """Count the bytes of the S3 server's answers in this process, by what their headers announce."""
    from botocore.awsrequest import AWSPreparedRequest, AWSResponse
    from botocore.httpsession import URLLib3Session

    found, send = [0], URLLib3Session.send

    def counting(self: URLLib3Session, request: AWSPreparedRequest) -> AWSResponse:
        answer = send(self, request)
        length = answer.headers.get("Content-Length")
        if request.method != "HEAD":  # without a length, as in listings, the body is in memory already
            found[0] += int(length) if length is not None else len(answer.content)
        return answer

    with mock.patch.object(URLLib3Session, "send", counting):
        yield found


def child(action: str, case: Case) -> dict[str, float]:
    """Do one action in this process, and return what it cost."""
    started = time.perf_counter()
    with counted() as read:
        ACTIONS[action](case)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    status = Path("/proc/self/status").read_text()  # ru_maxrss begins with the memory of the process that forked
    peak = int(status.partition("VmHWM:")[2].split()[0])
    return {
        "cpu_s": sum(one.ru_utime + one.ru_stime for one in used),
        "wall_s": time.perf_counter() - started,
        "peak_mb": max(peak, used[1].ru_maxrss) / 1024,
        "read_mb": read[0] / 1e6,
    }


def measured(action: str, case: Case) -> dict[str, float]:
    """Run one action in its own process."""
    command = [sys.executable, "-m", "lab.studies.scale", "--child", action]
    command += ["--sizes", str(case.size), "--forget", str(case.forgotten), "--run", case.run, "--work", str(case.work)]
    environment = {**os.environ, "SALUN_IMAGE_MEMORY": "0", "SALUN_PLUGINS": NETWORK, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2])
    if done.returncode:
        raise SystemExit(f"{action} failed:\n{done.stdout}{done.stderr}")
    cost: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    shown = f"{cost['cpu_s']:8.1f} s {cost['peak_mb']:7.0f} MB {cost['read_mb']:9.2f} MB read"
    print(f"{case.size:>10,} {case.forgotten:>7g} {action:<9}{shown}", flush=True)
    return cost


def measure(sizes: Sequence[int], forgotten: Sequence[float], sweeps: bool, work: Path) -> Iterator[dict[str, Any]]:
    """Yield a row for each case: its number of rows, what was forgotten, and the cost of each step."""
    stamp = f"{time.time_ns():x}"[-9:]
    for size in sizes:
        case = Case(size, 0, f"run-{stamp}-{size}", work)
        made = ["data", "train"] if not case.model.is_dir() else []
        yield {"rows": size, "forgotten": 0, "costs": {name: measured(name, case) for name in ("imports", *made)}}
        for count in forgotten:
            case = Case(size, count, f"run-{stamp}-{size}-{count:g}".replace(".", ""), work)
            measured("register", case)
            yield {"rows": size, "forgotten": count, "costs": {name: measured(name, case) for name in STEPS}}
        if sweeps:
            case = Case(size, SWEPT, f"run-{stamp}-{size}-sweep", work)
            measured("register", case)
            yield {"rows": size, "forgotten": SWEPT, "costs": {"sweep": measured("sweep", case)}}


def write(measured: dict[str, Any]) -> None:
    """Write a row to the results, which keep the rows of earlier calls."""
    import pyarrow
    import torch

    known: dict[tuple[int, float], dict[str, Any]] = {}
    kept = json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else []
    for row in [*kept, measured]:
        known.setdefault((row["rows"], row["forgotten"]), {}).update(row["costs"])
    document = {
        **{"machine": machine(), "torch": torch.__version__, "pyarrow": pyarrow.__version__},
        "rows": [{"rows": key[0], "forgotten": key[1], "costs": known[key]} for key in sorted(known)],
    }
    RESULTS.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def main() -> None:
    """Measure every case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of rows")
    parser.add_argument("--forget", type=float, nargs="*", default=FORGOTTEN, help="forgotten images, or a share")
    parser.add_argument("--no-sweep", action="store_true", help="measure the steps alone")
    parser.add_argument("--write", action="store_true", help="write lab/results/scale.json")
    parser.add_argument("--work", type=Path, help="folder that keeps data, models and the store")
    parser.add_argument("--child", choices=ACTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(child(given.child, Case(given.sizes[0], given.forget[0], given.run, given.work))))
        return
    with tempfile.TemporaryDirectory() as name:
        work = given.work or Path(name)
        key = work / "keys" / "salun.pem"
        if not key.is_file():
            create_key(key.with_suffix(""))
        (work / "policy.json").write_text(json.dumps(POLICY), encoding="utf-8")
        with embedded_s3(work / "s3", keep_account=True) as server:
            os.environ.update(server.environ | {"SALUN_SIGNING_KEY": str(key)})
            for row in measure(given.sizes, given.forget, not given.no_sweep, work):
                if given.write:
                    write(row)


if __name__ == "__main__":
    main()
