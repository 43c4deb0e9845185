"""`salun store serve`: a store of one's own, its settings, and its end."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from contextlib import contextmanager

import pytest

from lab.seaweedfs import free_ports
from tests.lab.test_seaweedfs import wait_until_gone

pytestmark = [pytest.mark.s3, pytest.mark.slow]
COMMAND = [sys.executable, "-m", "salun_core.cli", "store", "serve", "my store"]


@pytest.fixture(autouse=True)
def _binary(s3_server):
    """Skip where the binary is missing."""


@contextmanager
def served(folder, port):
    process = subprocess.Popen(
        [*COMMAND, "--port", str(port)], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "until Ctrl-C" in line:
                break
        else:
            pytest.fail(f"the server did not start: {process.stderr.read()}")
        yield process, "".join(lines)
    finally:
        process.kill()
        process.communicate()


def shell(folder, script):
    """Run a script in a shell that has nothing but the settings of the store."""
    environ = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "HOME") if name in os.environ}
    script = f"set -e; set -a; . 'my store/.env'; set +a; {script}"
    return subprocess.run(["sh", "-c", script], cwd=folder, env=environ, capture_output=True, text=True, check=False)


def test_the_settings_lead_to_the_store_now_and_after_a_new_start(tmp_path):
    port = free_ports(None)["s3.port"]
    salun = f"{sys.executable} -m salun_core.cli"
    with served(tmp_path, port) as (process, said):
        settings = tmp_path / "my store" / ".env"
        assert stat.S_IMODE(settings.stat().st_mode) == 0o600
        for text in ("s3://salun", f"http://127.0.0.1:{port}", "access key", "secret key", f". '{settings}'"):
            assert text in said
        filed = shell(tmp_path, f"{salun} model list --json")
        assert (filed.returncode, json.loads(filed.stdout)) == (0, []), filed.stderr
        put = "from salun_core.storage import open_store; open_store('s3://salun').put_new('a/b', b'kept')"
        assert shell(tmp_path, f'{sys.executable} -c "{put}"').returncode == 0
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert "the store has stopped" in errors
        assert "Traceback" not in errors
        assert all(wait_until_gone(int(pid)) for pid in children.stdout.split())
    before = settings.read_text()
    with served(tmp_path, port):
        assert settings.read_text() == before
        read = "from salun_core.storage import open_store; print(open_store('s3://salun').get('a/b').data)"
        found = shell(tmp_path, f'{sys.executable} -c "{read}"')
        assert "kept" in found.stdout, found.stderr


def test_a_port_in_use_is_one_line_and_leaves_no_settings(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [*COMMAND, "--port", str(port)], cwd=tmp_path, capture_output=True, text=True, check=False
        )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert f"{port} is in use" in done.stderr
    assert not (tmp_path / "my store" / ".env").exists()
