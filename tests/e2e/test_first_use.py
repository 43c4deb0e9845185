"""The first hour with a model and data of one's own: lab/studies/first_use.sh in an empty folder, and its page."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lab.seaweedfs import free_ports
from tests.docs.pages import DOCS, ROOT, console, matches
from tests.docs.test_tutorials import VARIES, plain

SCRIPT = ROOT / "lab" / "studies" / "first_use.sh"
PAGE = DOCS / "tutorials" / "own-model.md"
# Also keys, process ids, percentages and the folder of the reader.
DIFFERS = re.compile(rf"\b[0-9a-f]{{20}}\b|\b[0-9a-f]{{40}}\b|\bpid +\d+|\d+%|/\S+/store/\.env|{VARIES.pattern}")

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def printed(transcript):
    """The commands of the script, each with what it printed."""
    for part in re.split(r"^\$ ", transcript, flags=re.MULTILINE)[1:]:
        command, _, rest = part.partition("\n")
        yield command, "".join(f"{line}\n" for line in rest.splitlines() if line and not line.startswith("check: "))


def test_every_check_of_a_first_user_holds_and_the_page_shows_what_is_printed(
    tmp_path, s3_server, salun_path, python_path
):
    pytest.importorskip("onnxruntime")
    port = free_ports(None)["s3.port"]
    programs = salun_path, python_path, Path(sys.executable)
    path = os.pathsep.join([*(str(program.parent) for program in programs), os.environ["PATH"]])
    environ = {**os.environ, "PATH": path, "PORT": str(port), "TMPDIR": str(tmp_path)}
    done = subprocess.run([SCRIPT], env=environ, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    planned = [line for line in SCRIPT.read_text(encoding="utf-8").splitlines() if line.startswith("check ")]
    assert done.stdout.count("\ncheck: ") == len(planned) > 20
    body, _, end = done.stdout.rpartition("\n\n")
    assert end == "all checks hold\n"
    assert list(tmp_path.glob("tmp.*")) == []  # torch leaves caches there, the script nothing
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=10)
    walked, shown = list(printed(body)), console(PAGE.read_text(encoding="utf-8"))
    commands = [DIFFERS.sub("X", command) for command, _ in walked]
    assert [DIFFERS.sub("X", item.command) for item in shown] == commands
    for item, (command, text) in zip(shown, walked, strict=True):
        lines = "".join(f"{line}\n" for line in item.output.splitlines() if line)
        assert matches(plain(lines), plain(text), DIFFERS), f"$ {command}\n{text}"
