"""Finds the class that a forget target names: by name before index, and never by a guess."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from salun_core.errors import AmbiguousTargetError, UsageError, unknown_name

if TYPE_CHECKING:
    from salun_core.data.targets import ClassTarget


def find_class(target: ClassTarget, classes: Sequence[str]) -> int:
    """Return the index of the class that a target names; raises AmbiguousTargetError if `class_id` fits two classes."""
    if target.class_index is not None:
        return _indexed(target.class_index, classes)
    if target.class_name is not None:
        return _named(target.class_name, classes)
    wanted = target.class_id
    assert wanted is not None
    number = _number(wanted)
    found = [index for index, name in enumerate(classes) if _is_name(wanted, name)]
    if found and number is not None and _counts_as_index(wanted) and number < len(classes) and number not in found:
        found.append(number)
    if len(found) > 1:
        first, *others = found
        raise AmbiguousTargetError(
            f"class {wanted!r} is ambiguous",
            f"{classes[first]!r} is the name of class {first}, and {_meanings(others, classes)}",
            f"give the name (--class-name, `class_name`), such as {classes[first]!r}, "
            "or the index (--class-index, `class_index`)",
        )
    if found:
        return found[0]
    return _named(str(wanted), classes) if number is None else _indexed(number, classes)


def _number(wanted: int | str) -> int | None:
    """Return the number that a value stands for; None for a name that is no number."""
    if isinstance(wanted, int):
        return wanted
    return int(wanted) if wanted.isascii() and wanted.isdecimal() else None


def _is_name(wanted: int | str, name: str) -> bool:
    """Return whether a value may mean the class of this name.

    A number also means names with leading zeros: YAML reads 00001 as the number 1.
    """
    if isinstance(wanted, int):
        return name.isascii() and name.isdecimal() and int(name) == wanted
    return name == wanted


def _counts_as_index(wanted: int | str) -> bool:
    """Return whether a value may mean an index: text with leading zeros, such as 00001, is a name only."""
    return isinstance(wanted, int) or wanted == str(_number(wanted))


def _meanings(others: Sequence[int], classes: Sequence[str]) -> str:
    return "; ".join(f"it may also mean class {index}, {classes[index]!r}" for index in others[:3])


def _named(name: str, classes: Sequence[str]) -> int:
    names = list(classes)
    if name in names:
        return names.index(name)
    for other in names:
        if other.casefold() == name.casefold():
            raise UsageError(f"unknown class {name!r}", "upper and lower case count", f"did you mean {other!r}?")
    raise unknown_name("class", name, names)


def _indexed(index: int, classes: Sequence[str]) -> int:
    if not 0 <= index < len(classes):
        raise UsageError(
            f"there is no class {index}", f"the data have {len(classes)}", f"give 0 to {len(classes) - 1}, or a name"
        )
    return index
