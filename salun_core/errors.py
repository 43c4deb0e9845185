"""The errors of the project: each has what happened, why, how to fix it, and an exit code."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

EXIT_CODES = {
    0: "done, also if nothing was due",
    1: "an error of data, model, device, store or file; a check of `doctor` failed",
    2: "a wrong argument, name, setting or configuration",
    3: "the gate refused: nothing was published; or an audit did not confirm that a model forgot",
    4: "another writer or run was first, or the parent is stale",
    5: "bytes that do not match their digest, format or signature",
    124: "`python -m pipelines submit --wait` waited for too long",
    130: "interrupted by Ctrl-C",
    143: "ended by SIGTERM",
}
"""What each exit code of a command means; the codes of signals are 128 and their number."""

_LISTED = 120  # names that an error lists; a data set may have 30,000 classes
_WHERE = "submit it with `python -m pipelines submit`, or run it with `salun run`: both print them"

# control characters, which a terminal obeys; lone surrogates, which cannot be printed; marks that reverse a line
_UNSAFE = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028\\u2029\\u202a-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")


def escaped(text: str, keep: str = "\n\t") -> str:
    r"""Return a text for a terminal: what could control it is written as in JSON, such as `\u001b` for Escape.

    Characters in `keep` stay as they are.
    """
    return _UNSAFE.sub(lambda found: found[0] if found[0] in keep else f"\\u{ord(found[0]):04x}", text)


class SalunError(Exception):
    """Base of every error that is reported to users.

    Args:
        what: what happened, with the name of the thing.
        why: the cause, if it is known.
        remedy: how to fix it.
        public: what happened, for the logs and outcomes of a pipeline, if the other texts may name a sample, a subject
            or a prompt: everybody who may see the run can read these.
    """

    exit_code = 1

    def __init__(self, what: str, why: str = "", remedy: str = "", public: str = "") -> None:
        self.what, self.why, self.remedy, self.public = what, why, remedy, public
        super().__init__(what, why, remedy)

    def for_pods(self) -> SalunError:
        """Return the error as a pipeline may report it: it names no sample, no subject and no prompt."""
        if not self.public:
            return self
        reported = SalunError(self.public, "the details may name what is to be forgotten", _WHERE)
        reported.exit_code = self.exit_code
        return reported

    def __str__(self) -> str:
        parts = [self.what + (f": {self.why}" if self.why else "")]
        if self.remedy:
            parts.append(f"To fix it: {self.remedy}")
        return escaped(". ".join(" ".join(part.split()).rstrip(".") for part in parts) + ".", keep="")


class UsageError(SalunError):
    """A wrong argument, name or configuration (exit 2)."""

    exit_code = 2


class AmbiguousTargetError(UsageError):
    """A forget target that may mean several things: a person decides which one (exit 2)."""


class DataError(SalunError):
    """Data that cannot be read or does not fit (exit 1)."""


class ModelError(SalunError):
    """A checkpoint or an architecture that does not fit (exit 1)."""


class StateMismatchError(ModelError):
    """Weights that do not fit an architecture (exit 1); `details` has every difference, by kind."""

    def __init__(self, what: str, why: str, remedy: str, details: Mapping[str, Sequence[str]]) -> None:
        super().__init__(what, why, remedy)
        self.details = details


class DivergedError(ModelError):
    """A loss or a weight became NaN or infinite: the settings are too strong (exit 1)."""


class DeviceMemoryError(SalunError):
    """The memory of the device does not hold the work, also in smaller batches (exit 1)."""


class StoreError(SalunError):
    """The object store is unreachable, unsafe, or refuses the credentials (exit 1)."""


class StoreDeniedError(StoreError):
    """The object store does not allow this account to do that (exit 1)."""


class StoreUnreachableError(StoreError):
    """The object store does not answer, or is busy: the same call may succeed later (exit 1)."""


class GateRefusedError(SalunError):
    """The gate refused to publish (exit 3)."""

    exit_code = 3


class ConflictError(SalunError):
    """Another writer was first, or the parent is stale (exit 4)."""

    exit_code = 4


class LineHeldError(ConflictError):
    """Another run works on the model line: a later run may find it free (exit 4)."""


class RunSettledError(ConflictError):
    """The run was settled, by itself or by the run that took its line over: only a new run can go on (exit 4)."""


class IntegrityError(SalunError):
    """Bytes that do not match their digest or their format (exit 5)."""

    exit_code = 5


@contextmanager
def reported_as(public: str) -> Iterator[None]:
    """Set the text by which pipelines report the errors of a block, which may name samples, subjects or prompts.

    An error of the store names an address only, and keeps its text.
    """
    try:
        yield
    except StoreError:
        raise
    except SalunError as error:
        error.public = error.public or public
        raise


def exit_code_of(name: str) -> int | None:
    """Return the exit code of the error class with a name, or None if it is not one of these."""
    kind = globals().get(name)
    return kind.exit_code if isinstance(kind, type) and issubclass(kind, SalunError) else None


def unknown_name(kind: str, name: str, options: Iterable[str]) -> UsageError:
    """Return the error for a name that does not exist, with the nearest match; `kind` is its type, such as "method"."""
    known = sorted(options)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    remedy = f"did you mean {near[0]!r}? " if near else ""
    listed = ", ".join(known) if len(known) <= _LISTED else f"{', '.join(known[:5])} and {len(known) - 5} more"
    return UsageError(f"unknown {kind} {name!r}", "it does not exist", f"{remedy}choose one of: {listed}")
