"""The process that runs a compiled pipeline on this machine: reads what to run from standard input."""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import yaml


def main() -> int:
    """Run the pipeline that standard input describes; its log goes to standard output.

    Returns:
        0, or 1 when a step failed.
    """
    given = json.load(sys.stdin)
    warnings.filterwarnings("ignore", module="kfp")  # of images and resources, which mean nothing here
    from kfp import components, local

    local.init(runner=local.SubprocessRunner(use_venv=False), pipeline_root=given["root"])
    pipeline = components.load_component_from_text(without_retries(given["pipeline"]))
    try:
        pipeline(**given["arguments"])
    except RuntimeError as error:  # kfp's way to say that a step failed
        print(error)
        return 1
    return 0


def without_retries(text: str) -> str:
    """Return a compiled pipeline whose steps are not repeated: here somebody waits for the first answer."""
    documents: list[dict[str, Any]] = list(yaml.safe_load_all(text))
    spec = documents[0]
    for component in [spec["root"], *spec["components"].values()]:
        for task in component.get("dag", {}).get("tasks", {}).values():
            task.pop("retryPolicy", None)
    return yaml.safe_dump_all(documents)


if __name__ == "__main__":
    sys.exit(main())
