"""Steps that are forks of one process: what they print, how they end, and that they share nothing."""

import json
import os
import signal

import pytest

from pipelines.forked_steps import EXECUTOR, Nursery

SOURCE = """
from kfp import dsl
from kfp.dsl import *
from typing import *
import os, signal, sys

def step(how: str) -> str:
    print("how:", how, os.environ.get("SALUN_PIPELINE"))
    print("to standard error", file=sys.stderr)
    if how == "exit":
        sys.exit(3)
    if how == "raise":
        raise ValueError("this is wrong")
    if how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    left = getattr(sys, "left_by_a_step", "") + os.environ.pop("LEFT", "")
    sys.left_by_a_step = how
    return str(os.getpid()) + left
"""


def command(folder, how):
    (folder / how).mkdir()
    outputs = {"outputFile": str(folder / how / "output.json"), "parameters": {}}
    outputs["parameters"] = {"Output": {"outputFile": str(folder / how / "value")}}
    given = json.dumps({"inputs": {"parameterValues": {"how": how}}, "outputs": outputs})
    shell = f'program_path=$(mktemp -d)\n_KFP_RUNTIME=true python3 -m {EXECUTOR} --component_module_path x "$@"\n'
    return ["sh", "-ec", shell, SOURCE, "--executor_input", given, "--function_to_execute", "step"]


@pytest.fixture(scope="module")
def nursery():
    return Nursery(modules=[EXECUTOR, "no.such.module"])


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [("succeed", 0, "how: succeed toy"), ("exit", 3, "how: exit"), ("raise", 1, "ValueError: this is wrong"),
     ("die", 1, "")],
)  # fmt: skip
def test_a_step_prints_and_ends_as_a_process_of_its_own_does(nursery, tmp_path, capsys, how, code, said):
    assert nursery.start(command(tmp_path, how), {"SALUN_PIPELINE": "toy"}) == code
    printed = capsys.readouterr().out
    assert said in printed
    assert ("to standard error" in printed) or how == "die"
    assert ("Traceback" in printed) == (how == "raise")


def test_steps_share_no_memory(nursery, tmp_path):
    found = []
    for how in ("first", "second"):
        assert nursery.start(command(tmp_path, how), {"LEFT": " variable"} if how == "first" else None) == 0
        found.append(json.loads((tmp_path / how / "output.json").read_text())["parameterValues"]["Output"])
    assert found[0].endswith(" variable")
    assert found[1].isdigit()  # neither the variable nor what the first one left in a module
    assert len({found[0].split()[0], found[1], str(os.getpid())}) == 3


def test_a_command_of_another_form_gets_a_process_of_its_own(nursery, monkeypatch):
    asked = []
    monkeypatch.setattr(nursery, "otherwise", lambda *given: asked.append(given) or 7)
    for other in (["true"], ["sh", "-c", "true"], ["sh", "-ec", "pip install x", "source"]):
        assert nursery.start(other, {"A": "b"}) == 7
    assert asked[0] == (["true"], {"A": "b"})
    assert len(asked) == 3


def test_without_its_nursery_a_step_gets_a_process_of_its_own(tmp_path, monkeypatch):
    nursery = Nursery(modules=[])
    os.kill(nursery.process, signal.SIGKILL)
    os.waitpid(nursery.process, 0)
    monkeypatch.setattr(nursery, "otherwise", lambda *given: 7)
    assert nursery.start(command(tmp_path, "succeed"), None) == 7
