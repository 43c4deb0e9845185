"""The notebook `examples/own_model.ipynb`, executed in a kernel of its own: what its calls computed."""

import json
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from lab.seaweedfs import find_binary
from salun_core.errors import StoreError

NOTEBOOK = Path(__file__).parents[3] / "examples" / "own_model.ipynb"

CHECK = """
import json

from salun_core.models.checkpoint import model_digest

before, after = (dict(one.named_parameters()) for one in (model, result.model))
images, labels = next(iter(DataLoader(Subset(train, gone), batch_size=len(gone))))


def accuracy(network):
    return (network.eval()(images).argmax(1) == labels).double().mean().item()


print(json.dumps({
    "frozen": sum(int((~mask.tensor(name)).sum()) for name in before),
    "frozen_changed": sum(int((after[name] != before[name])[~mask.tensor(name)].sum()) for name in before),
    "forget_before": accuracy(model),
    "forget_after": accuracy(result.model),
    "published": current.digest == model_digest(result.model),
    "passed": published.decision.passed,
    "dropped": len(original.split.train) - len(current.split.train) == len(gone),
    "report": Path("run", "report.html").is_file(),
}))
"""


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_stored_without_outputs(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]

    assert all(not cell.outputs and cell.execution_count is None for cell in code)


@pytest.mark.slow
@pytest.mark.s3
def test_it_forgets_and_publishes(notebook, tmp_path, monkeypatch):
    try:
        find_binary()
    except StoreError as error:
        pytest.skip(str(error))
    for name in [*os.environ]:
        if name.startswith(("AWS_", "SALUN_")):
            monkeypatch.delenv(name)
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook.cells.append(nbformat.v4.new_code_cell(CHECK))
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    found = json.loads(notebook.cells[-1].outputs[-1].text)

    assert found["frozen"] > 1000
    assert found["frozen_changed"] == 0
    assert found["forget_before"] > 0.9
    assert found["forget_after"] < 0.1
    assert found["published"]
    assert found["passed"]
    assert found["dropped"]
    assert found["report"]
    assert {f"{name} {'━' * 30}" for name in ("mask", "salun_adaptive", "publish")} <= _bars(notebook)


def _bars(notebook):
    """Every bar as its last update left it, without the text behind it."""
    texts = [
        output.data.get("text/plain", "")
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type == "display_data"
    ]
    return {" ".join(text.split(" ")[:2]) for text in texts if "━" in text}
