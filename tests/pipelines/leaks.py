"""What Kubeflow would keep of a run: artifacts, parameters, logs; and what must not be in it."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors.numpy import load

from pipelines.local import LocalRun
from salun_core.pods.reference import Reference

WINDOW = 48  # bytes of a tensor that are looked for, raw, in hex and in base64


def kept_by_kubeflow(run: LocalRun) -> Iterator[tuple[str, bytes]]:
    """Yield every file below the pipeline root, and the log of all pods, by name."""
    yield "the log", run.files["run.log"].read_bytes()
    yield "the last line of a pod", run.error.encode()
    for path in sorted(run.folder.glob("steps/**/*")):
        if path.is_file():
            yield str(path.relative_to(run.folder)), path.read_bytes()


def traces_of(weights: Iterable[bytes]) -> set[bytes]:
    """Return byte strings of which one would show that a file of weights or a mask was copied, whole or in part."""
    found = set()
    for data in weights:
        for tensor in load(data).values():
            raw = tensor.tobytes()
            for start in (0, len(raw) // 2, max(0, len(raw) - WINDOW)):
                piece = raw[start : start + WINDOW]
                if len(set(piece)) > 8:  # zeros and ones are everywhere
                    inner = [base64.b64encode(piece[shift : shift + 36]).rstrip(b"=")[:-2] for shift in range(3)]
                    found |= {piece, piece.hex().encode(), *inner}
    return found


def leaks(run: LocalRun, ids: Iterable[str], weights: Iterable[bytes]) -> list[str]:
    """List what is in Kubeflow's hands and must not be: sample ids, and bytes of weights or masks."""
    traces, names = traces_of(weights), [re.escape(name) for name in ids]
    assert traces
    assert names
    wanted = re.compile(rf"(?<![\w.-])({'|'.join(names)})(?![\w.-])".encode())
    found = []
    for place, data in kept_by_kubeflow(run):
        if match := wanted.search(data):
            found.append(f"{place}: the id {match[0].decode()}")
        found += [f"{place}: bytes of weights" for trace in traces if trace in data][:1]
    return found


def artifacts(run: LocalRun) -> dict[str, Path]:
    """Return the files that the steps handed to Kubeflow as artifacts, as `step/name`."""
    found = {}
    for path in run.folder.glob("steps/*/*/*/executor_output.json"):
        for name, item in json.loads(path.read_text(encoding="utf-8")).get("artifacts", {}).items():
            place = Path(item["artifacts"][0]["uri"])
            if place.is_file():
                found[f"{path.parent.name}/{name}"] = place
    return found


def references(run: LocalRun) -> dict[str, Reference]:
    """Return the artifacts that are references."""
    texts = {name: path.read_text(encoding="utf-8") for name, path in artifacts(run).items()}
    return {name: Reference.model_validate_json(text) for name, text in texts.items() if "salun.reference/v1" in text}
