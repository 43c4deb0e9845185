"""Prints the figures of docs/explanation/architecture.md: size of the core, and the path of one class request.

The request goes from `salun request submit` through `salun sweep --once` to `salun certificate` in this process. The S3
server, the key and the trained model line are made before counting starts.

    python -m lab.studies.structure
"""

from __future__ import annotations

import collections
import os
import sys
import tempfile
import threading
from pathlib import Path
from types import FrameType

import boto3.session
import botocore.client
import torch

import salun_core
from lab.seaweedfs import embedded_s3
from salun_core.certificates.keys import create_key
from salun_core.cli.app import app

CORE = Path(salun_core.__file__).parent
LOADERS = {"load_model": "model", "load_diffusion": "model", "load_data": "data"}


class Counter:
    """Counts files, functions, store calls and loads while it is active, in all threads."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.functions: set[tuple[str, str]] = set()
        self.counts: collections.Counter[str] = collections.Counter()

    def profile(self, frame: FrameType, event: str, _: object) -> None:
        """Note a call of the core; the signature is that of `sys.setprofile`."""
        code = frame.f_code
        # Code that runs at import is not part of the path: module and class bodies lack the flag of optimised locals.
        if event != "call" or not code.co_filename.startswith(str(CORE)) or not code.co_flags & 0x1:
            return
        self.files.add(code.co_filename)
        self.functions.add((code.co_filename, code.co_qualname))
        if code.co_name in LOADERS:
            self.counts[LOADERS[code.co_name]] += 1

    def __enter__(self) -> Counter:
        self._call = call = botocore.client.BaseClient._make_api_call

        def counted(client, operation, arguments):  # noqa: ANN001, ANN202 - of botocore
            self.counts["calls"] += 1
            return call(client, operation, arguments)

        botocore.client.BaseClient._make_api_call = counted
        threading.setprofile(self.profile)
        sys.setprofile(self.profile)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
        botocore.client.BaseClient._make_api_call = self._call


def count_clients(counts: collections.Counter[str]) -> None:
    """Count the S3 clients of the process; the training before the request shares its client with the request."""
    make = boto3.session.Session.client

    def counted(*args, **options):  # noqa: ANN002, ANN003, ANN202 - of boto3
        counts["clients"] += 1
        return make(*args, **options)

    boto3.session.Session.client = counted  # type: ignore[method-assign]


def salun(*words: str) -> None:
    """Run one command in this process."""
    try:
        app(list(words), standalone_mode=False)
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"salun {' '.join(words)} ended with {end.code}") from end


def request_path(folder: Path) -> Counter:
    """Count what one class request needs, from the filing to the certificate."""
    counter, key = Counter(), create_key(folder / "key")
    count_clients(counter.counts)
    with embedded_s3(folder / "store") as server:
        os.environ.update(server.environ, SALUN_STORE_URI="s3://salun/structure", SALUN_SIGNING_KEY=str(key.private))
        base = str(folder / "base")
        salun("train", "--data", "digits", "--arch", "resnet8", "--epochs", "10", "--out", base, "--line", "digits")
        with counter:
            salun("request", "submit", "--id", "r-1", "--line", "digits", "--class", "3")
            salun("sweep", "--once", "--line", "digits", "--min-requests", "1", "--work-dir", str(folder / "run"))
            salun("certificate", "r-1", "--out", str(folder / "r-1.json"))
    return counter


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    modules = {path: path.read_text(encoding="utf-8") for path in CORE.rglob("*.py")}
    packages = collections.Counter(path.parent for path in modules)
    largest, count = packages.most_common(1)[0]
    with tempfile.TemporaryDirectory(prefix="salun-structure-") as folder:
        found = request_path(Path(folder))
    print()
    for name, value in {
        "modules in the core": len(modules),
        "lines in the core": sum(text.count("\n") for text in modules.values()),
        f"most modules in one package ({largest.relative_to(CORE.parent)})": count,
        "files that a class request crosses": len(found.files),
        "functions that it runs": len(found.functions),
        "S3 clients that the process opens": found.counts["clients"],
        "store calls": found.counts["calls"],
        "times that the model is loaded": found.counts["model"],
        "times that the data are loaded": found.counts["data"],
    }.items():
        print(f"{value:7d}  {name}")


if __name__ == "__main__":
    main()
