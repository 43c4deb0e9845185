"""The commands of the manifests without a cluster: with another uid, in a read-only folder, with real servers."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import boto3.session
import pytest
from botocore.exceptions import ClientError

from lab import seaweedfs as weed
from salun_core.errors import StoreError
from tests.manifests.tree import ROOT, containers, default, everything, named, workloads


def container(name):
    (found,) = (item for found in workloads() for item in containers(found) if item["name"] == name)
    return found


def paths(item):
    return {item[probe]["httpGet"]["path"] for probe in ("readinessProbe", "livenessProbe")}


@contextmanager
def running(command, environment, folder, user=10001, group=10001):
    """Run it from `/`, as another uid where that is possible, so that it can write nowhere but in its folder."""
    reached = all(path.stat().st_mode & 1 for path in (Path(command[0]).resolve(), *Path(command[0]).resolve().parents))
    another = os.geteuid() == 0 and reached and Path(command[0]).read_bytes()[:2] != b"#!"
    as_user = {"user": user, "group": group, "extra_groups": []} if another else {}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd="/", env=environment, stdout=log, stderr=log, **as_user)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        finally:
            process.kill()
            process.wait()


def wait(url, process, folder):
    for _ in range(600):
        assert process.poll() is None, (folder / "log").read_text()
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url) as answer:
                return answer.status
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.05)
    raise AssertionError(f"{url} does not answer: {(folder / 'log').read_text()}")


@pytest.fixture
def folder():
    """A folder that every uid may enter and write; pytest's own lies under one that is for its user alone."""
    with tempfile.TemporaryDirectory(prefix="salun-pod-") as made:
        Path(made).chmod(0o777)
        yield Path(made)


@pytest.mark.s3
def test_the_dev_store_starts_with_its_buckets_and_keys(folder):
    try:
        binary = weed.find_binary()
    except StoreError as error:
        pytest.skip(str(error))
    (folder / "s3.json").write_text(named("Secret", "salun-seaweedfs", everything())["stringData"]["s3.json"])
    (folder / "data").mkdir(mode=0o777)
    (folder / "data").chmod(0o777)
    item, ports = container("seaweedfs"), weed.free_ports(None)
    args = [word.replace("/data", f"{folder}/data").replace("/etc/seaweedfs", str(folder)) for word in item["args"]]
    args = [word.replace("0.0.0.0", "127.0.0.1") for word in args if not word.startswith("-s3.port=")]
    command = [binary, *args, *(f"-{name}={number}" for name, number in ports.items())]
    address = f"http://127.0.0.1:{ports['s3.port']}"
    try:
        with running(command, {"PATH": os.defpath, "HOME": str(folder)}, folder) as process:
            assert {wait(address + path, process, folder) for path in paths(item)} == {200}
            keys = named("Secret", "salun-s3", everything())["stringData"]
            assert _names(address, keys, process, 2) == ["salun", "salun-artifacts"]
            with pytest.raises(ClientError, match="InvalidAccessKeyId"):
                _client(address, {"AWS_ACCESS_KEY_ID": "other", "AWS_SECRET_ACCESS_KEY": "other"}).list_buckets()
    finally:
        for number in ports.values():
            for left in Path("/tmp").glob(f"seaweedfs-*-{number}.sock"):
                left.unlink()


def _client(address, keys):
    lower = {name.lower(): value for name, value in keys.items()}
    return boto3.session.Session().client("s3", endpoint_url=address, region_name="us-east-1", **lower)


def _names(address, keys, process, count):
    names = []
    for _ in range(200):
        names = [bucket["Name"] for bucket in _client(address, keys).list_buckets()["Buckets"]]
        if len(names) >= count:
            return sorted(names)
        assert process.poll() is None
        time.sleep(0.05)
    return names


def test_the_pushgateway_starts_and_answers_its_probes(folder):
    binary = shutil.which("prometheus-pushgateway") or shutil.which("pushgateway")
    if binary is None:
        pytest.skip("prometheus-pushgateway is not installed")
    item, port = container("pushgateway"), weed.free_ports(None)["s3.port"]
    args = [word.replace(":9091", f"127.0.0.1:{port}").replace("/data", str(folder)) for word in item["args"]]
    with running([binary, *args], {"PATH": os.defpath}, folder) as process:
        assert {wait(f"http://127.0.0.1:{port}{path}", process, folder) for path in paths(item)} == {200}


@pytest.mark.s3
def test_the_exporter_starts_with_the_config_and_answers_its_probes(s3_server, folder):
    item, port = container("exporter"), weed.free_ports(None)["s3.port"]
    config = named("ConfigMap", "salun-config", default())["data"]
    (source,) = item["envFrom"]
    assert source["configMapRef"]["name"] == "salun-config"
    mounted = {one["name"] for one in item["env"]}
    assert mounted == {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    program, *rest = item["command"]
    args = [word.replace("0.0.0.0", "127.0.0.1").replace("9400", str(port)) for word in (*rest, *item["args"])]
    environment = {"PATH": os.defpath, "HOME": str(folder), **config, **s3_server}
    with running([Path(sys.executable).with_name(program), *args], environment, folder) as process:
        assert {wait(f"http://127.0.0.1:{port}{path}", process, folder) for path in paths(item)} == {200}


def settings_of_the_image(folder):
    """The variables that the Dockerfile sets, with a folder in place of /tmp."""
    block = re.search(r"^ENV PATH=.*?[^\\]$", (ROOT / "Dockerfile").read_text(), re.MULTILINE | re.DOTALL).group(0)
    pairs = (word.split("=", 1) for word in block.removeprefix("ENV ").replace("\\\n", " ").split())
    return {name: value.replace("/tmp", str(folder)) for name, value in pairs} | {"PATH": os.defpath}


WORK = """
import getpass, os, sys, tempfile

def watch(event, arguments):
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    if event == "os.mkdir" or (event == "open" and isinstance(arguments[2], int) and arguments[2] & writes):
        path = "/dev/fd" if isinstance(arguments[0], int) else os.path.realpath(os.fsdecode(arguments[0]))
        if not path.startswith((os.environ["HOME"], "/dev/")):
            print("WRITES", path, file=sys.stderr)

sys.addaudithook(watch)
import matplotlib.pyplot as plt
import torch._inductor.codecache as cache
from salun_core.cli.app import main

getpass.getuser()
cache.cache_dir()
plt.figure().savefig(tempfile.gettempdir() + "/figure.png")
sys.argv[1:] = ["train", "--data=digits", "--arch=resnet8", "--epochs=1", "--out=" + os.environ["HOME"] + "/model"]
main()
"""


def test_a_step_needs_no_uid_of_its_own_and_writes_below_tmp_only(folder):
    """OpenShift runs a pod as a uid of its own choice, in group 0; only /tmp is for everybody."""
    environment = settings_of_the_image(folder) | {
        "TMPDIR": str(folder),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    assert {"HOME", "LOGNAME", "MPLCONFIGDIR", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR"} <= environment.keys()
    with running([sys.executable, "-c", WORK], environment, folder, 1000710000, 0) as process:
        assert process.wait(300) == 0, (folder / "log").read_text()
    assert (folder / "model" / "model.json").is_file()
    assert "WRITES" not in (folder / "log").read_text()
