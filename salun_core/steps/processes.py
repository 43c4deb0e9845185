"""Runs a step in several processes of this machine, one per GPU.

`salun mask --processes` starts the same command again. A step of a Kubeflow pipeline has no command to start again, so
each process calls the step's function here. The parent does not take part: it waits, and raises the first error that a
process wrote to a file before it ended. A process that is killed writes none; the parent then reports its exit code.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from salun_core import errors
from salun_core.errors import SalunError
from salun_core.methods.distributed import PeerError
from salun_core.steps.context import RunContext
from salun_core.telemetry.logs import described, get_logger, run_bound

Step = Callable[..., object]
_THREADS = "OMP_NUM_THREADS"


def in_processes(processes: int, step: Step, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - of the step
    """Call a step in several processes that are joined as torchrun joins them, and wait for all.

    At most one process per GPU. With 1, or if torchrun has started this process, the step runs in this process. It must
    be a function of a module; its result is lost, so it must write files. The processes log the run of a `RunContext`;
    each loads models and data itself. The first error of a process is raised with its own class.
    """
    count = _processes(processes)
    if count == 1:
        step(*args, **kwargs)
        return
    with tempfile.TemporaryDirectory(prefix="salun-processes-") as folder:
        _launch(count, Path(folder), step, args, kwargs)


def _processes(wanted: int) -> int:
    import torch

    if "WORLD_SIZE" in os.environ:
        return 1
    there = torch.cuda.device_count() if torch.cuda.is_available() else wanted
    return max(1, min(wanted, there))


def joined(count: int, entry: Callable[..., object] | str) -> Callable[..., object]:
    """Return a function that starts joined processes on this machine, as torchrun does, and waits for them.

    It takes the entry's arguments; the entry is a function of a module, or a program. Each process gets its share of
    the cores unless $OMP_NUM_THREADS is set. It raises torch's `ChildFailedError` if one failed.
    """
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the error is reported below
    os.environ.setdefault(_THREADS, str(max(1, (os.cpu_count() or 1) // count)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=f"salun-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="spawn",
    )
    launched: Callable[..., object] = elastic_launch(config, entry)
    return launched


def _launch(count: int, folder: Path, step: Step, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    threads = os.environ.get(_THREADS)
    try:
        joined(count, _work)(folder, step, args, kwargs)
    except ChildFailedError as error:
        raise _told(folder) or _silent(error.get_first_failure()[1].exitcode) from None
    finally:
        if threads is None:
            os.environ.pop(_THREADS, None)


def _work(folder: Path, step: Step, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Run as one of the processes; a `SalunError` is written to a file for the parent before it ends this process."""
    try:
        with run_bound(next((item.run or None for item in args if isinstance(item, RunContext)), None)):
            step(*args, **kwargs)
    except PeerError:  # another process has the cause
        raise
    except SalunError as error:
        told = {"error": type(error).__name__, "what": error.what, "why": error.why, "remedy": error.remedy}
        told["public"] = error.public
        (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(told), encoding="utf-8")
        raise
    except Exception as error:
        get_logger().error("process_failed", rank=os.environ["RANK"], **described(error))
        raise


def _told(folder: Path) -> SalunError | None:
    """Return the error that a process wrote; the oldest one if several did."""
    for path in sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns):
        told = json.loads(path.read_text(encoding="utf-8"))
        kind: type[SalunError] = getattr(errors, told.pop("error"))
        return kind(**told)
    return None


def _silent(code: int) -> SalunError:
    how = f"signal {-code} ended it" if code < 0 else f"it ended with exit code {code}"
    return SalunError("one of the step's processes failed", how, "see the log above, and whether the memory suffices")
