"""Fixtures for every test: a real S3 server on loopback, and quiet settings."""

from __future__ import annotations

import gc
import logging
import os
import secrets
import shutil
import sys
import tempfile
from contextlib import ExitStack, nullcontext
from pathlib import Path

import pytest
from hypothesis import settings

from salun_core.errors import StoreError
from tests.support import pictures
from tests.support.forked import forked_processes, forked_runs, python_path, salun_path

__all__ = ["forked_processes", "forked_runs", "python_path", "salun_path"]

settings.register_profile("salun", deadline=None, derandomize=os.environ.get("CI") == "true")  # CI: the same examples
settings.load_profile("salun")

_FOREIGN = ("AWS_PROFILE", "AWS_ROLE_ARN", "AWS_WEB_IDENTITY_TOKEN_FILE")
_TRAINED = {"lab", "digits_model"}
_TESTS = Path(__file__).resolve().parent
_WITH_PICTURES = _TESTS / "unit" / "report"
_shared = pytest.StashKey[ExitStack]()
_server_key = pytest.StashKey[object]()


@pytest.hookimpl(hookwrapper=True)
def pytest_collection():
    """Collect garbage neither while tests are collected, nor among what was: thousands of objects that stay."""
    gc.disable()
    yield
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items):
    """Mark the rings: what needs the S3 server, runs whole commands, or uses a model that has to be trained first."""
    for item in items:
        if "s3_server" in item.fixturenames:
            item.add_marker("s3")
        if item.path.is_relative_to(_TESTS / "e2e"):
            item.add_marker("e2e")
        if not _TRAINED.isdisjoint(item.fixturenames):
            item.add_marker("slow")


def _start_server(stack: ExitStack):
    """Start one server in a folder of its own; return its variables, or the reason why there is none."""
    from lab.seaweedfs import embedded_s3

    folder = Path(tempfile.mkdtemp(prefix="salun-s3-"))
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    try:
        return stack.enter_context(embedded_s3(folder)).environ
    except StoreError as error:
        if "not installed" not in str(error):
            raise
        return str(error)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    """Under xdist the controller runs one server for all its workers."""
    config = node.config
    if "not s3" in config.option.markexpr:
        return
    if _shared not in config.stash:
        config.stash[_shared] = ExitStack()
        config.stash[_server_key] = _start_server(config.stash[_shared])
    node.workerinput["s3"] = config.stash[_server_key]


def pytest_unconfigure(config):
    if _shared in config.stash:
        config.stash[_shared].close()


@pytest.fixture(scope="session")
def s3_server(request):
    """The variables of a running S3 server, set in the environment for the session; bucket `salun`."""
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        given = getattr(request.config, "workerinput", {})
        found = given["s3"] if "s3" in given else _start_server(stack)
        if isinstance(found, str):
            pytest.skip(found)
        for name in _FOREIGN:
            patch.delenv(name, raising=False)
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            patch.setenv(name, os.devnull)
        for name, value in found.items():
            patch.setenv(name, value)
        yield found


@pytest.fixture
def real_store(s3_server):
    """An empty store: a fresh prefix of the session's bucket."""
    from salun_core.storage import open_store

    return open_store(f"s3://salun/{secrets.token_hex(8)}")


@pytest.fixture
def store(real_store):
    """The same; some folders have one in memory instead (`tests/support/memory_s3.py`)."""
    return real_store


@pytest.fixture(autouse=True)
def _one_thread():
    """Leave the machine's cores to the test workers, in tests that use torch."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def _pictures(request):
    """Draw the pictures of reports only in tests that look at them."""
    with nullcontext() if request.path.is_relative_to(_WITH_PICTURES) else pictures.left_out():
        yield


@pytest.fixture(autouse=True)
def _logs_of_its_own():
    """Let no test log to the standard error of an earlier one, which was captured and is closed."""
    _forget_logs()
    yield
    _forget_logs()


def _forget_logs() -> None:
    """Undo `configure_logging`, which any log line calls: its loggers, and its handler of what libraries log."""
    structlog = sys.modules.get("structlog")
    if structlog is None or not structlog.is_configured():
        return
    structlog.reset_defaults()
    root = logging.getLogger()
    ours = structlog.stdlib.ProcessorFormatter
    root.handlers[:] = [handler for handler in root.handlers if not isinstance(handler.formatter, ours)]


@pytest.fixture(scope="session")
def digits_model(tmp_path_factory):
    """The folder of a small classifier that fits the digits, trained once for all workers; read-only."""
    from tests.support.made_once import made_once

    return made_once(tmp_path_factory, "digits", _train_digits) / "model"


def _train_digits(folder: Path) -> None:
    import torch

    from salun_core.data import DataSpec
    from salun_core.methods.classification import UnlearnConfig
    from salun_core.tasks.classification.training import train_model

    torch.set_num_threads(1)
    config = UnlearnConfig(
        epochs=6, learning_rate=0.1, schedule="cosine", batch_norm="update", batch_size=64, device="cpu"
    )
    train_model(DataSpec(source="digits"), "resnet8", config, folder / "model")


@pytest.fixture
def digits_line(store, digits_model):
    """The name of a model line in `store` whose first version is the digits' classifier."""
    from salun_core.models import load_model
    from salun_core.tasks import register_model

    register_model(store, "digits", digits_model, "train", len(load_model(digits_model).split.train))
    return "digits"
