"""Reads YAML and JSON documents into pydantic models, and reports all faults of a document at once."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

try:  # libyaml, ten times as fast
    from yaml import CSafeLoader as _Loader
except ImportError:
    from yaml import SafeLoader as _Loader  # type: ignore[assignment]

from salun_core.errors import UsageError

MAX_DOCUMENT_BYTES = 64 * 1024 * 1024
MAX_YAML_CHARACTERS = 4 * 1024 * 1024
"""Of a document that is not JSON: YAML takes a hundred times as long to read."""
MAX_DEPTH = 64
_MAX_NUMBER = 1000
_TWICE = "a key occurs twice"
# For input such as `!!int ''` and `!!bool x`, PyYAML raises any of these.
_YAML_FAULTS = (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class _PlainLoader(_Loader):
    """YAML without repeated keys and without huge numbers; the caller checks the rest by its events."""

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """Refuse a number of thousands of digits: base 60 takes quadratic time, and base 16 makes one never printed."""
        if len(node.value) > _MAX_NUMBER:
            raise yaml.MarkedYAMLError(problem="a number is too long")
        number: int | float = (
            self.construct_yaml_int(node) if node.tag.endswith("int") else self.construct_yaml_float(node)
        )
        return number

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that occurs twice; construct any other mapping."""
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        if len(mapping) != len(node.value):
            raise yaml.MarkedYAMLError(problem=_TWICE)
        return mapping


_PlainLoader.add_constructor("tag:yaml.org,2002:int", _PlainLoader.construct_number)
_PlainLoader.add_constructor("tag:yaml.org,2002:float", _PlainLoader.construct_number)


def _load_yaml(text: str, source: str) -> Any:  # noqa: ANN401 - any YAML value
    """Load YAML without aliases (a few lines can expand to gigabytes, or to a list in itself) and of bounded depth.

    Both are checked by the events of the parser, which neither recurses nor expands. The loader would recurse in C.
    """
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases are not supported")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH + 1:  # one more: `parse` counts what lies inside the document
            raise _too_deep(source)
    return yaml.load(text, _PlainLoader)  # noqa: S506 - a SafeLoader


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object, as an `object_pairs_hook` that rejects repeated keys: readers resolve them differently."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise UsageError("a document is ambiguous", _TWICE, "leave one of them")
    return found


class Document(BaseModel):
    """Base of every configuration and stored document: frozen, unknown keys forbidden."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


D = TypeVar("D", bound=BaseModel)


def parse(kind: type[D], data: Any, source: str) -> D:  # noqa: ANN401 - any YAML or JSON value
    """Build a document from plain data; `source` is where they came from, for the message.

    Raises UsageError with every fault, and the nearest known key for each unknown one, or if nested over 64 levels
    deep.
    """
    _check_depth(data, source)
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        faults = [_fault(kind, fault) for fault in error.errors()]
        count = f"{len(faults)} fault{'s' if len(faults) > 1 else ''}"
        raise UsageError(
            f"{source} is not a valid {kind.__name__} ({count})",
            "; ".join(faults),
            "correct them and try again",
        ) from error


def _check_depth(data: Any, source: str) -> None:  # noqa: ANN401 - any YAML or JSON value
    level = [data]
    for _ in range(MAX_DEPTH + 1):
        inside = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list))
        level = [child for children in inside for child in children if isinstance(child, dict | list)]
        if not level:
            return
    raise _too_deep(source)


def _too_deep(source: str) -> UsageError:
    return UsageError(f"{source} is nested too deep", f"at most {MAX_DEPTH} levels are read", "flatten it")


def _fault(kind: type[BaseModel], fault: Any) -> str:  # noqa: ANN401 - pydantic's ErrorDetails
    where = ".".join(str(part) for part in fault["loc"]) or "document"
    if fault["type"] != "extra_forbidden":
        return f"{where}: {fault['msg']}"
    *outer, key = fault["loc"]
    near = difflib.get_close_matches(str(key), _keys_below(kind, outer), n=1, cutoff=0.5)
    return f"{where}: unknown key" + (f", did you mean {near[0]!r}?" if near else "")


def _keys_below(kind: type[BaseModel], path: Sequence[str | int]) -> list[str]:
    """Return the keys of the section at a path; those of the document if the section has no model of its own."""
    for part in path:
        field = kind.model_fields.get(str(part))
        of_field = [field.annotation, *get_args(field.annotation)] if field else []
        kind = next((item for item in of_field if isinstance(item, type) and issubclass(item, BaseModel)), kind)
    return list(kind.model_fields)


def read_document(path: Path) -> Any:  # noqa: ANN401 - any YAML or JSON value
    """Read a YAML or JSON file as plain data; a file that is too large raises UsageError."""
    try:
        if path.stat().st_size > MAX_DOCUMENT_BYTES:
            raise UsageError(
                f"{path} is too large",
                f"over {MAX_DOCUMENT_BYTES} bytes",
                "check that it is the file you meant",
            )
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # no text, or a path that holds a zero byte
        raise UsageError(f"cannot read {path}", str(error), "check the path and its permissions") from error
    return parse_text(text, str(path))


def parse_text(text: str, source: str) -> Any:  # noqa: ANN401 - any YAML or JSON value
    """Parse JSON, or YAML of at most 4 MiB if it is not JSON.

    Raises UsageError for deep nesting or a number that is too long, too.
    """
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except json.JSONDecodeError:
        pass
    except RecursionError as error:
        raise _too_deep(source) from error
    except ValueError as error:  # thousands of digits: reading them would take quadratic time
        raise UsageError(f"{source} holds a number that is too long", "", "shorten it") from error
    if len(text) > MAX_YAML_CHARACTERS:
        why = f"it is not JSON, and YAML may have {MAX_YAML_CHARACTERS} characters at most"
        raise UsageError(f"{source} is too large for YAML", why, "write it as JSON, or correct its JSON syntax")
    try:
        return _load_yaml(text, source)
    except _YAML_FAULTS as error:
        problem = getattr(error, "problem", None) or type(error).__name__
        raise UsageError(f"{source} is neither YAML nor JSON", str(problem), "correct its syntax") from error


def load(kind: type[D], path: Path) -> D:
    """Read a file and build a document from it; UsageError lists all faults."""
    return parse(kind, read_document(path), str(path))
