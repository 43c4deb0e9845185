"""Each step may take the store's keys from its own Secret; by default all use the same one."""

import json
import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.packages import shipped
from pipelines.step_secrets import ROLES, give_secrets, read_secrets
from salun_core.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
BOTH = "fetch_model=salun-s3-reader, gate_publish=salun-s3-publisher"


def named(platform):
    """The Secret of each step."""
    pods = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    for name, pod in pods.items():
        (source,) = pod["secretAsEnv"]
        assert source["secretNameParameter"] == {"runtimeValue": {"constant": source["secretName"]}}
        assert [item["secretKey"] for item in source["keyToEnv"]] == ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"]
        yield re.sub(r"-\d+$", "", name.removeprefix("exec-")).replace("-", "_"), source["secretName"]


def test_all_steps_use_the_same_secret_and_have_a_role(each):
    found = dict(named(each[1]))
    assert set(found.values()) == {"salun-s3"}
    assert set(found) <= set(ROLES)


def test_named_steps_use_their_own_secret(sweep):
    give_secrets(sweep[1], read_secrets(BOTH))
    found = dict(named(sweep[1]))
    assert {found.pop("fetch_model"), found.pop("gate_publish")} == {"salun-s3-reader", "salun-s3-publisher"}
    assert set(found.values()) == {"salun-s3"}


def test_a_second_executor_of_a_step_is_the_same_step(sweep):
    pods = sweep[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    pods["exec-fetch-model-2"] = json.loads(json.dumps(pods["exec-fetch-model"]))
    give_secrets(sweep[1], {"fetch_model": "salun-s3-reader"})
    assert pods["exec-fetch-model-2"]["secretAsEnv"][0]["secretName"] == "salun-s3-reader"


@pytest.mark.parametrize("how", ["option", "variable"])
def test_the_compiler_applies_them(how, tmp_path, monkeypatch, compiled_once):
    """Into a folder of objects, so that the files that ship stay as they are."""
    monkeypatch.delenv("SALUN_S3_SECRETS", raising=False)
    words = ["compile", "--cpu", "--kubernetes-native", str(tmp_path)]
    if how == "option":
        words += ["--s3-secrets", BOTH]
    else:
        monkeypatch.setenv("SALUN_S3_SECRETS", BOTH)
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    files = sorted(tmp_path.glob("*.yaml"))
    assert {path.stem for path in files} == {f"salun-{name}" for name in shipped() if name.endswith("-cpu")}
    for path in files:
        _, version = yaml.load_all(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        found = dict(named(version["spec"]["platformSpec"]))
        assert found.get("fetch_model", "salun-s3-reader") == "salun-s3-reader"
        assert found.get("gate_publish", "salun-s3-publisher") == "salun-s3-publisher"
    assert CliRunner().invoke(app, [*words, "--check"]).exit_code == 0
    monkeypatch.delenv("SALUN_S3_SECRETS", raising=False)
    assert CliRunner().invoke(app, [*words[:4], "--check"]).exit_code == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fetch_modle=a", "did you mean 'fetch_model'"),
        ("fetch_model", "'' is not a valid name of a Secret"),
        ("fetch_model=Upper", "'Upper' is not a valid name of a Secret"),
        ("fetch_model=a,fetch_model=b", "fetch_model is given twice"),
    ],
)
def test_malformed_choice_of_secrets_is_refused(text, message):
    with pytest.raises(UsageError, match=message):
        read_secrets(text)


def test_empty_choice_of_secrets():
    assert read_secrets("") == read_secrets(" , ") == {}


def test_every_role_has_a_policy_and_is_documented():
    policies = {path.stem for path in (ROOT / "manifests" / "iam").glob("*.json")}
    assert set(ROLES.values()) <= policies
    text = (ROOT / "docs" / "how-to" / "keys.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (\w+) \|", text, re.MULTILINE))
    assert rows == ROLES
