"""The file of a shard: safetensors with a tensor per node and parameter, and a header that identifies the shard."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from salun_core.config import Document
from salun_core.digest import canonical_json, check_digest
from salun_core.errors import IntegrityError, UsageError
from salun_core.saliency.scores import CHUNK, PartialSums, Shard, layout
from salun_core.storage.local_files import write_whole

_HEADER, _DIGEST = "header", "digest"


class ShardHeader(Document):
    """Identifies the model, the forget set and the part of it that a shard's sums belong to."""

    format: Literal["salun.saliency-shard/v1"] = "salun.saliency-shard/v1"
    index: int = Field(ge=0, description="of the shard, from 0")
    count: int = Field(ge=1, description="of all shards")
    samples: int = Field(ge=1, le=10**9, description="of the whole forget set")
    chunk: int = Field(default=CHUNK, ge=1, description="samples a chunk")
    shapes: dict[str, list[int]] = Field(description="of the parameters, by name")
    order: list[str] = Field(description="names of the parameters, in the model's order")
    model_digest: str
    forget_set_digest: str
    engine: str = Field(description="versions and device that computed it")
    seconds: float = Field(ge=0, allow_inf_nan=False)

    @property
    def shard(self) -> Shard:
        """Index and count of the shard."""
        return Shard(self.index, self.count)


def write_shard(path: Path, sums: PartialSums, header: ShardHeader) -> None:
    """Write the sums of a shard atomically.

    Args:
        path: the file to write.
        sums: sums of the shard.
        header: identifies the shard.

    Raises:
        StoreError: the file cannot be written.
    """
    tensors = {
        f"{level}.{index}/{name}": value.cpu().contiguous()
        for (level, index), values in sums.nodes.items()
        for name, value in values.items()
    }
    text = canonical_json(header.model_dump(mode="json")).decode()
    write_whole(path, serialise(tensors, metadata={_HEADER: text, _DIGEST: _digest(text, tensors)}))


def read_header(path: Path) -> ShardHeader:
    """Read the header of a shard and check the names and shapes of its tensors, without reading their content.

    Raises:
        UsageError: the file does not exist.
        IntegrityError: the file is not a shard, or is damaged.
    """
    return _read(path, whole=False)[0]


def read_shard(path: Path) -> tuple[ShardHeader, PartialSums]:
    """Read a shard and check it against its digest, its header and the tree's layout.

    Raises:
        UsageError: the file does not exist.
        IntegrityError: the file is not a shard, or is damaged.
    """
    header, tensors, expected = _read(path, whole=True)
    text = canonical_json(header.model_dump(mode="json")).decode()
    check_digest(f"the shard {path.name}", expected, _digest(text, tensors))
    if any(not tensor.is_floating_point() for tensor in tensors.values()):
        raise _no_shard(path, "a sum is not floating point")
    nodes = {
        (level, index): {name: tensors[f"{level}.{index}/{name}"] for name in header.order}
        for level, index in layout(header.samples, header.shard)
    }
    return header, PartialSums(header.samples, nodes)


def _read(path: Path, whole: bool) -> tuple[ShardHeader, dict[str, Tensor], str]:
    if not path.is_file():
        raise UsageError(f"there is no shard {path}", "the file does not exist", "make it with `salun mask --shard`")
    try:
        with safe_open(str(path), framework="pt") as file:
            facts = file.metadata() or {}
            header = ShardHeader.model_validate_json(facts.get(_HEADER, ""))
            found = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a dict
            if found != _expected(header):
                raise _no_shard(path, "its tensors do not match its header")
            tensors = {name: file.get_tensor(name) for name in found} if whole else {}
    except (SafetensorError, ValidationError, ValueError, OSError, RuntimeError) as error:
        raise _no_shard(path, f"it cannot be read ({type(error).__name__})") from error
    return header, tensors, facts.get(_DIGEST, "")


def _no_shard(path: Path, why: str) -> IntegrityError:
    return IntegrityError(f"{path.name} is not a shard of a saliency", why, "score this shard again")


def merge_shards(paths: Sequence[Path], of: Mapping[str, str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Add the shards of a forget set in the order of its chunks; the order of the files is irrelevant.

    Args:
        paths: one file per shard.
        of: required digests of each shard: model_digest and forget_set_digest.

    Returns:
        (scores by parameter name, facts for the mask: shards, engine, seconds of all shards together).

    Raises:
        UsageError: a shard is missing, duplicated, or from another division.
        IntegrityError: a file is damaged, or belongs to another model or forget set.
        ModelError: a score is NaN or infinite.
    """
    headers = sorted(((read_header(path), path) for path in paths), key=lambda item: item[0].index)
    _check_complete([header for header, _ in headers])
    whole = PartialSums(headers[0][0].samples)
    for header, path in headers:
        for name, digest in of.items():
            check_digest(
                f"the {name.removesuffix('_digest').replace('_', ' ')} of shard {header.shard}",
                str(getattr(header, name)),
                digest,
            )
        again, part = read_shard(path)
        if again != header:
            raise IntegrityError(f"{path.name} changed while it was read", "its header differs", "merge again")
        for node, sums in part.nodes.items():
            whole.add(node, sums)
    facts = {
        "shards": str(len(headers)),
        "engine": "; ".join(sorted({header.engine for header, _ in headers})),
        "seconds": f"{sum(header.seconds for header, _ in headers):.3f}",
    }
    return whole.scores(), facts


_SAME = {
    "count": "the number of shards",
    "samples": "the number of samples to forget",
    "order": "the names of the weights",
    "shapes": "the shapes of the weights",
}


def _check_complete(headers: Sequence[ShardHeader]) -> None:
    if not headers:
        raise UsageError("no shard was given", "there is nothing to merge", "give the files of all shards")
    first = headers[0]
    for header in headers[1:]:
        for name, what in _SAME.items():
            if getattr(header, name) != getattr(first, name):
                raise UsageError(
                    "the shards do not belong together",
                    f"shard {first.shard} and shard {header.shard} differ in {what}",
                    "score all shards with the same model, forget set and number of shards",
                )
    given = [header.index for header in headers]
    if len(set(given)) != len(given):
        raise UsageError("a shard was given twice", "it would be added twice", "give each file once")
    missing = sorted(set(range(first.count)) - set(given))
    if missing:
        some = ", ".join(str(Shard(index, first.count)) for index in missing[:5])
        what = "1 shard is missing" if len(missing) == 1 else f"{len(missing)} shards are missing"
        raise UsageError("the saliency is not complete", f"{what}: {some}", "give the files of all shards")


def _expected(header: ShardHeader) -> dict[str, list[int]]:
    if header.index >= header.count or header.chunk != CHUNK or sorted(header.order) != sorted(header.shapes):
        raise ValueError("its header contradicts itself")
    nodes = layout(header.samples, header.shard)
    return {f"{level}.{index}/{name}": shape for level, index in nodes for name, shape in header.shapes.items()}


def _digest(header: str, tensors: Mapping[str, Tensor]) -> str:
    hasher = hashlib.sha256(header.encode())
    for name, tensor in sorted(tensors.items()):
        hasher.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        hasher.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()
