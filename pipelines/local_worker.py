"""The process that runs a compiled pipeline on this machine: reads what to run from standard input."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import yaml

_JOB_ID = "{{$.pipeline_job_uuid}}"  # dsl.PIPELINE_JOB_ID_PLACEHOLDER


def main() -> int:
    """Run the pipeline that standard input describes; its log goes to standard output.

    Returns:
        0, or 1 when a step failed.
    """
    given = json.load(sys.stdin)
    warnings.filterwarnings("ignore", module="kfp")  # of images and resources, which mean nothing here
    from kfp import components, local

    local.init(runner=local.SubprocessRunner(use_venv=False), pipeline_root=given["root"])
    pipeline = components.load_component_from_text(for_this_machine(given["pipeline"], given["run"], os.environ))
    try:
        pipeline(**given["arguments"])
    except RuntimeError as error:  # kfp's way to say that a step failed
        print(error)
        return 1
    return 0


def for_this_machine(text: str, run: str, environ: Mapping[str, str]) -> str:
    """Return a compiled pipeline as it runs here.

    Its steps are not repeated, for somebody waits for the first answer; a variable of the environment wins over
    the one that names a place in the image; and the id of the run is unique, while that of kfp.local is one of
    eight digits.

    Args:
        text: the compiled pipeline.
        run: id of the run.
        environ: the environment of the steps.
    """
    documents: list[dict[str, Any]] = list(yaml.safe_load_all(text.replace(_JOB_ID, run)))
    spec = documents[0]
    for component in [spec["root"], *spec["components"].values()]:
        for task in component.get("dag", {}).get("tasks", {}).values():
            task.pop("retryPolicy", None)
            _mend_condition(task)
    for executor in spec["deploymentSpec"]["executors"].values():
        container = executor["container"]
        if given := container.pop("env", None):
            container["env"] = [item for item in given if item["name"] not in environ]
    return yaml.safe_dump_all(documents)


def _mend_condition(task: Mapping[str, Any]) -> None:
    """Spell the condition of a task so that kfp.local finds what it asks for.

    It takes every output of a step for the one named `Output`, and silently skips the task where that is not so,
    but for a second hyphen before the output's name.
    """
    policy = task.get("triggerPolicy", {})
    if "condition" not in policy:
        return
    for name, value in task["inputs"]["parameters"].items():
        if made := value.get("taskOutputParameter"):
            channel = f"pipelinechannel--{made['producerTask']}--{made['outputParameterKey']}"
            policy["condition"] = policy["condition"].replace(f"'{name}'", f"'{channel}'")


if __name__ == "__main__":
    sys.exit(main())
