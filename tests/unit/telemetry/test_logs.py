"""Where log lines go, how they look, and what never gets into them."""

import json
import logging
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from salun_core.errors import UsageError
from salun_core.telemetry.logs import MASK, configure_logging, get_logger, is_denied, redact, redact_text, run_bound
from salun_core.telemetry.observe import observed

ACCESS_KEY = "AKIA" + "IOSFODNN7EXAMPLE"
SECRET_KEY = "wJalrXUtnFEMI/K7MDENG/" + "bPxRfiCYEXAMPLEKEY"


def lines(capsys):
    out, err = capsys.readouterr()
    assert out == ""
    return [json.loads(line) for line in err.splitlines()]


def test_a_line_is_json_with_time_level_event_and_run(capsys):
    configure_logging(json=True)
    with run_bound("run-7"):
        get_logger().info("step_done", step="evaluate", seconds=1.5, nested={"loss": [0.5, None, True]})
    (line,) = lines(capsys)
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "step_done",
        "level": "info",
        "run": "run-7",
        "step": "evaluate",
        "seconds": 1.5,
        "nested": {"loss": [0.5, None, True]},
    }


def test_the_run_is_on_every_line_of_its_block_and_on_no_other(capsys, monkeypatch):
    configure_logging(json=True)
    monkeypatch.delenv("SALUN_RUN_ID", raising=False)
    get_logger().info("before")
    with run_bound("run-7"):
        logging.getLogger("botocore").warning("of a library")
        with run_bound(""):
            get_logger().info("nothing known")
        with run_bound("run-8"):
            get_logger().info("inner")
        get_logger().info("outer")
    get_logger().info("after")
    monkeypatch.setenv("SALUN_RUN_ID", "of-the-pod")
    get_logger().info("pod")
    with run_bound("run-9"):
        get_logger().info("step in a pod")
    assert [line.get("run") for line in lines(capsys)] == [
        *(None, "run-7", "run-7", "run-8", "run-7", None),
        *("of-the-pod", "run-9"),
    ]


def test_a_step_logs_its_run_on_each_line_even_if_it_fails(capsys, monkeypatch):
    monkeypatch.delenv("PUSHGATEWAY_URL", raising=False)
    configure_logging(json=True)

    def step():
        with observed("purge", "all", "run-7"):
            get_logger().warning("within")
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        step()
    get_logger().info("next")
    assert [(line["event"], line.get("run")) for line in lines(capsys)] == [
        *[("step_started", "run-7"), ("within", "run-7"), ("step_failed", "run-7")],
        ("next", None),
    ]


def test_lines_below_the_level_are_dropped(capsys):
    configure_logging(json=True, level="WARNING")
    get_logger().info("quiet")
    get_logger().warning("loud")
    assert [line["event"] for line in lines(capsys)] == ["loud"]


def test_an_unknown_level_suggests_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'warning'"):
        configure_logging(level="warnin")


PROGRAM = "from salun_core.telemetry.logs import *; configure_logging({json}); get_logger().info('hello', size=3)"


@pytest.mark.parametrize(
    ("variable", "argument", "expected"),
    [(None, None, True), ("text", None, False), ("json", None, True), ("json", False, False), ("text", True, True)],
)
def test_the_format_follows_argument_then_variable_then_terminal(variable, argument, expected):
    environment = {name: value for name, value in os.environ.items() if name != "SALUN_LOG"}
    environment |= {"SALUN_LOG": variable} if variable else {}
    command = [sys.executable, "-c", PROGRAM.format(json=argument)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert done.stderr.startswith("{") is expected
    assert "hello" in done.stderr


def test_a_terminal_gets_readable_lines():
    ours, theirs = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name != "SALUN_LOG"}
    command = [sys.executable, "-c", PROGRAM.format(json=None)]
    subprocess.run(command, env=environment, stderr=theirs, check=True)
    os.close(theirs)
    text = os.read(ours, 65536).decode()
    os.close(ours)
    assert "hello" in text
    assert not text.startswith("{")


@pytest.mark.parametrize("as_json", [True, False])
def test_personal_data_and_secrets_are_redacted(as_json, capsys):
    configure_logging(json=as_json)
    get_logger().warning(
        f"opened with {ACCESS_KEY}",
        sample_ids=["img-0451.png"],
        subject_ref="person-17",
        prompts=["a photo of Jane Roe"],
        request={"ids": [7700451, 7700452], "target": {"subject": "person-17", "kind": "subject"}},
        headers=[{"Authorization": "Basic cGVyc29uOnB3"}],
        url=f"http://user:pass-word@host/x?X-Amz-Signature=deadbeef&X-Amz-Credential={ACCESS_KEY}%2F2026",
        note=f"key is {SECRET_KEY}",
        count=2,
    )
    text = capsys.readouterr().err
    for hidden in ("0451", "7700451", "person-17", "Jane", "cGVyc29u", "pass-word", "deadbeef", ACCESS_KEY, SECRET_KEY):
        assert hidden not in text, hidden
    assert MASK in text
    assert "kind" in text
    assert "count" in text


@pytest.mark.parametrize("as_json", [True, False])
def test_a_traceback_is_redacted_and_shows_no_variables(as_json, capsys):
    configure_logging(json=as_json)
    local = "a photo of Jane Roe"
    try:
        raise ValueError(f"cannot sign with {SECRET_KEY}")
    except ValueError:
        get_logger().exception("failed", size=len(local))
    text = capsys.readouterr().err
    assert "ValueError: cannot sign with" in text
    assert SECRET_KEY not in text
    assert "Jane" not in text


def test_lines_of_libraries_are_redacted(capsys):
    configure_logging(json=True)
    logging.getLogger("botocore.auth").warning("headers: %s", {"Authorization": f"AWS4 Credential={ACCESS_KEY}/x"})
    logging.getLogger("urllib3").info("not shown")
    (line,) = lines(capsys)
    assert line["level"] == "warning"
    assert ACCESS_KEY not in line["event"]


def test_an_unconfigured_library_warns_on_standard_error(capsys, monkeypatch):
    monkeypatch.setenv("SALUN_LOG", "json")
    get_logger().warning("careful")
    assert [line["event"] for line in lines(capsys)] == ["careful"]


@pytest.mark.parametrize(
    "key",
    [
        *("ids", "sample_ids", "sampleIds", "subject", "subject_ref", "Prompt", "prompts", "token", "hf_token"),
        *("secret", "client_secret", "secretAccessKey", "PASSWORD", "Authorization", "X-Amz-Security-Token"),
        *("aws_access_key_id", "aws_secret_access_key", "aws_kms_key", "api_key", "credentials", "Set-Cookie"),
    ],
)
def test_denied_keys(key):
    assert is_denied(key)
    assert redact({"outer": [{key: "value"}]}) == {"outer": [{key: MASK}]}


@pytest.mark.parametrize(
    "key", ["request_id", "run", "step", "tokenizer", "model_line", "forget_set", "keys", "key", "count", "prompted_at"]
)
def test_logged_keys(key):
    assert not is_denied(key)
    assert redact({key: "value"}) == {key: "value"}


@pytest.mark.parametrize(
    "text",
    [
        "a" * 64,
        "0123456789abcdef0123456789abcdef01234567",
        "s3://bucket/lines/cifar10-resnet18/HEAD.json",
        "/srv/models/resnet18/version-12/model.safetensors",
        "http://127.0.0.1:9091/metrics",
        "the token bucket is full",
        "2026-01-02T03:04:05Z",
    ],
)
def test_harmless_text_stays(text):
    assert redact_text(text) == text


@pytest.mark.parametrize(
    "text",
    [
        f"id {ACCESS_KEY}.",
        f"aws_secret_access_key={SECRET_KEY}",
        f"'{SECRET_KEY}'",
        "Authorization: Bearer abcdef.ghijkl-123",
        "https://name:word1234@host/path",
        'password = "hunter22"',
        '{"session_token": "abcd1234"}',
        "AWS_SESSION_TOKEN=FwoGZXIvYXdzEXAMPLE",
    ],
)
def test_secrets_in_text_are_masked(text):
    found = redact_text(text)
    assert MASK in found
    for hidden in (ACCESS_KEY, SECRET_KEY, "abcdef.ghijkl", "word1234", "hunter22", "abcd1234", "FwoGZX"):
        assert hidden not in found


def test_objects_become_plain_text():
    class Loud:
        def __repr__(self):
            return f"Loud(password='{'x' * 8}')"

    found = redact({"path": Path("/srv/x"), "what": Loud(), "set": {1}, "bytes": b"ab"})
    assert found == {"path": "/srv/x", "what": f"Loud(password='{MASK}')", "set": [1], "bytes": "b'ab'"}


def test_debug_shows_our_own_lines_and_of_libraries_only_warnings(capsys):
    configure_logging(json=True, level="debug")
    get_logger().debug("ours")
    for library in ("botocore.endpoint", "urllib3.connectionpool"):
        logging.getLogger(library).debug("theirs")
        logging.getLogger(library).warning("serious")
    events = [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()]
    assert events == ["ours", "serious", "serious"]


def test_debug_shows_nothing_of_a_library_that_logs_at_debug_by_itself(capsys, monkeypatch):
    configure_logging(json=True, level="debug")
    for name in ("botocore", "urllib3", "boto3", "s3transfer"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.DEBUG)
        logging.getLogger(f"{name}.part").debug("theirs")
    assert capsys.readouterr().err == ""


def test_no_line_about_a_request_can_be_replayed(store):
    """All that the S3 client logs of a signed request, at its lowest level."""
    logged, client = [], logging.getLogger("botocore")
    handler, level = logging.Handler(), client.level
    handler.emit = lambda record: logged.append(record.getMessage())
    client.addHandler(handler)
    client.setLevel(logging.DEBUG)
    try:
        store.put_new("a", b"1")
    finally:
        client.removeHandler(handler)
        client.setLevel(level)
    raw = "\n".join(logged)
    signatures = set(re.findall(r"Signature[=:]\s*([0-9a-f]{64})", raw))
    assert signatures, "the client logs its signatures"
    masked = "\n".join(redact_text(message) for message in logged)
    for signature in signatures:
        assert signature not in masked
    assert not re.search(r"Signature[=:]\s*[0-9a-f]", masked)
    assert not re.search(r"Authorization['\"]?: *b?['\"]?AWS4", masked)


def test_a_terminal_shows_control_characters_as_text(capsys):
    configure_logging(json=False)
    get_logger().warning("read", name="\x1b[2Jcat")
    assert "\\u001b[2Jcat" in capsys.readouterr().err
