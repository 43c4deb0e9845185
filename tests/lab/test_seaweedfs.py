import contextlib
import importlib.metadata
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from lab.seaweedfs import embedded_s3
from salun_core.errors import StoreError
from salun_core.storage import open_store

pytestmark = pytest.mark.s3
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(autouse=True)
def _binary(s3_server):
    """Skip where the binary is missing, and keep the variables of this session."""


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(pid, seconds=30):
    deadline = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pid)


def use(server, patch):
    for name, value in server.environ.items():
        patch.setenv(name, value)
    return open_store(f"{server.uri}/x")


@on_linux
def test_two_servers_are_isolated_and_end_with_their_blocks(tmp_path, monkeypatch):
    with embedded_s3(tmp_path / "a") as one, embedded_s3(tmp_path / "b") as two:
        assert one.endpoint != two.endpoint
        with monkeypatch.context() as patch:
            store = use(one, patch)
            store.put_new("doc", b"one")
            patch.setenv("AWS_ENDPOINT_URL_S3", two.endpoint)
            with pytest.raises(StoreError, match="access key"):
                open_store(store.uri).get("doc")
        with monkeypatch.context() as patch:
            assert use(two, patch).get("doc") is None
        assert alive(one.pid)
        assert alive(two.pid)
    assert not alive(one.pid)
    assert not alive(two.pid)
    assert not [path for path in Path("/tmp").glob("seaweedfs-*") if one.endpoint.rpartition(":")[2] in path.name]


def listeners(pid):
    """The local addresses (hex, as the kernel writes them) that a process listens on."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            inodes.add(os.readlink(link).removeprefix("socket:[").removesuffix("]"))
    rows = [
        line.split()
        for table in ("tcp", "tcp6")
        if Path(f"/proc/net/{table}").exists()
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes}


@on_linux
def test_it_listens_on_loopback_only_hides_its_account_and_ends_with_an_exception(tmp_path):
    def interrupted():
        with embedded_s3(tmp_path) as server:
            assert os.getsid(server.pid) == server.pid  # the terminal's Ctrl-C does not reach it
            assert listeners(server.pid) == {"0100007F"}
            assert stat.S_IMODE((tmp_path / "s3.json").stat().st_mode) == 0o600
            assert server.secret_key not in repr(server)
            assert server.secret_key not in Path(f"/proc/{server.pid}/cmdline").read_text()
            assert server.secret_key.encode() not in Path(f"/proc/{server.pid}/environ").read_bytes()
            pids.append(server.pid)
            raise KeyboardInterrupt

    pids = []
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not alive(pids[0])


def test_a_folder_keeps_its_data_and_allows_one_server(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, embedded_s3(tmp_path) as server:
        use(server, patch).put_new("doc", b"kept")
        with pytest.raises(StoreError, match="in use"), embedded_s3(tmp_path):
            pass
    with monkeypatch.context() as patch, embedded_s3(tmp_path) as server:
        assert use(server, patch).get("doc").data == b"kept"


def test_the_port_may_be_chosen(tmp_path, s3_server):
    taken = int(s3_server["AWS_ENDPOINT_URL_S3"].rpartition(":")[2])
    with pytest.raises(StoreError, match=f"{taken} is in use"), embedded_s3(tmp_path, port=taken):
        pass


def test_a_failed_start_shows_the_log(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "filerldb2").write_text("no database")
    with pytest.raises(StoreError, match="did not become ready") as caught, embedded_s3(tmp_path):
        pass
    assert "filerldb2" in caught.value.why
    assert "weed.log" in caught.value.remedy


def test_a_missing_binary_names_the_extra(tmp_path, monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", absent)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StoreError, match="not installed") as caught, embedded_s3(tmp_path / "s3"):
        pass
    assert "pip install 'salun[local]'" in caught.value.remedy


PARENT = """
    import pathlib, sys, time
    from lab.seaweedfs import embedded_s3
    with embedded_s3(pathlib.Path(sys.argv[1])) as server:
        print(server.pid, flush=True)
        time.sleep(600)
"""


@on_linux
@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGINT])  # SIGTERM ends Python at once, too
def test_a_killed_parent_leaves_no_server(tmp_path, death):
    command = [sys.executable, "-c", textwrap.dedent(PARENT), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as parent:
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.send_signal(death)
        parent.wait(60)
    assert wait_until_gone(pid)
