"""The first hour with a model and data of one's own: benchmarks/first_use.sh in an empty folder."""

from __future__ import annotations

import os
import socket
import subprocess

import pytest

from salun_core.storage.seaweedfs import free_ports
from tests.docs.pages import ROOT

SCRIPT = ROOT / "benchmarks" / "first_use.sh"

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.fixture(scope="module")
def walked(tmp_path_factory, s3_server):
    """What the script printed."""
    pytest.importorskip("onnxruntime")
    port, folder = free_ports(None)["s3.port"], tmp_path_factory.mktemp("walk")
    environ = {**os.environ, "PORT": str(port), "TMPDIR": str(folder)}
    done = subprocess.run([SCRIPT], env=environ, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(folder.glob("tmp.*")) == []  # torch leaves caches there, the script nothing
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=10)
    return done.stdout


def test_every_check_of_a_first_user_holds(walked):
    planned = [line for line in SCRIPT.read_text(encoding="utf-8").splitlines() if line.startswith("check ")]
    assert walked.count("\ncheck: ") == len(planned) > 20
    assert walked.endswith("\nall checks hold\n")
