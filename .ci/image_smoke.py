"""Runs inside the image, as .ci/image starts it: checks what it promises, then runs one step as a cluster would."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml

from salun_core.data import DataSpec
from salun_core.methods.classification import UnlearnConfig
from salun_core.saliency import SaliencyMask
from salun_core.tasks.classification.training import train_model

COMPILED = Path("/opt/salun/pipelines/compiled/salun-unlearning.yaml")
DENSITY = 0.25


def main() -> None:
    """Check the surroundings, the command, and the mask step."""
    check_surroundings()
    subprocess.run(["salun", "--help"], check=True, stdout=subprocess.DEVNULL)  # noqa: S607 - found by PATH, as a pod does
    submit = [sys.executable, "-c", "import kfp.client, pipelines.runs"]  # what the cluster's schedule runs
    subprocess.run(submit, check=True, cwd="/opt/salun")  # noqa: S603
    with tempfile.TemporaryDirectory() as folder:
        mask = run_mask_step(Path(folder))
    print(f"smoke: Python {sys.version.split()[0]}, torch {torch.__version__}, mask {mask.digest[:12]}")


def check_surroundings() -> None:
    """Check the user, the read-only root, and that nothing is there that a step does not need."""
    assert os.getuid() == 10001, os.getuid()
    assert not os.access("/opt/salun", os.W_OK)
    assert not [name for name in ("pip", "pytest", "mypy", "lab") if importlib.util.find_spec(name)]
    assert not [name for name in ("cc", "gcc", "make") if shutil.which(name)]


def run_mask_step(folder: Path) -> SaliencyMask:
    """Run the compiled component by the very command that the pipeline carries."""
    torch.set_num_threads(1)
    model, forget, result = folder / "model", folder / "forget.json", folder / "executor_output.json"
    made = train_model(DataSpec(source="digits"), "resnet8", UnlearnConfig(epochs=1, batch_norm="update"), model)
    card = json.loads((model / "model.json").read_text(encoding="utf-8"))
    forget.write_text(json.dumps({"kind": "class", "dataset_digest": card["dataset_digest"], "class_id": 3}))
    pipeline = next(yaml.safe_load_all(COMPILED.read_text(encoding="utf-8")))
    given = {"forget_manifest_uri": str(forget), "density": DENSITY, "method": "salun", "model_line": "smoke"}
    task = executor_input(pipeline["components"]["comp-compute-mask"], given, {"model": model}, folder)
    container = pipeline["deploymentSpec"]["executors"]["exec-compute-mask"]["container"]
    command = [part.replace("{{$}}", json.dumps(task)) for part in [*container["command"], *container["args"]]]
    done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603 - the pipeline's own command
    assert done.returncode == 0, done.stdout + done.stderr
    assert result.is_file(), "the executor wrote no output file"
    files = [path for path in (folder / "mask", *(folder / "mask").glob("*")) if path.is_file()]
    mask = SaliencyMask.load(files[0])
    assert abs(mask.density - DENSITY) < 1e-4, mask.density
    assert mask.facts["model_digest"] == made.digest
    return mask


def executor_input(component: dict[str, Any], given: dict[str, Any], artifacts: dict[str, Path], out: Path) -> Any:  # noqa: ANN401 - JSON
    """Return what the launcher hands to the executor: parameters, artifacts, and where outputs go."""
    inputs, outputs = component["inputDefinitions"], component["outputDefinitions"]
    values = {name: spec["defaultValue"] for name, spec in inputs["parameters"].items() if "defaultValue" in spec}
    kinds = {**inputs.get("artifacts", {}), **outputs.get("artifacts", {})}

    def artifact(name: str, path: Path) -> dict[str, Any]:
        return {"artifacts": [{"name": name, "type": kinds[name]["artifactType"], "uri": str(path), "metadata": {}}]}

    return {
        "inputs": {
            "parameterValues": values | {name: value for name, value in given.items() if name in inputs["parameters"]},
            "artifacts": {name: artifact(name, path) for name, path in artifacts.items()},
        },
        "outputs": {
            "parameters": {name: {"outputFile": str(out / name)} for name in outputs.get("parameters", {})},
            "artifacts": {name: artifact(name, out / name) for name in outputs.get("artifacts", {})},
            "outputFile": str(out / "executor_output.json"),
        },
    }


if __name__ == "__main__":
    main()
