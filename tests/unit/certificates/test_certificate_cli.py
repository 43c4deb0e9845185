"""`salun verify`, `salun certificate`, `salun key`, and the other methods of docs/how-to/verify-certificates.md."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from salun_core.certificates.issue import certify
from salun_core.cli.app import app
from salun_core.cli.output import MODE
from salun_core.gate import Assurance
from tests.support.certified import KEY, evidence_of, input_of, judged, nothing
from tests.unit.certificates.test_tampering import FIXTURE

DOCUMENT = (Path(__file__).parents[3] / "docs" / "how-to" / "verify-certificates.md").read_text()


@pytest.fixture
def salun(tmp_path, monkeypatch):
    """Runs a command in a folder with a copy of the fixture."""
    for name in ("SALUN_STORE_URI", "SALUN_VERIFY_KEY", "SALUN_SIGNING_KEY"):
        monkeypatch.delenv(name, raising=False)
    shutil.copytree(FIXTURE, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    yield lambda *args: CliRunner().invoke(app, list(args))
    MODE.json = MODE.debug = False


def test_the_summary_shows_what_a_reader_needs(salun):
    result = salun("verify", "certificate.json", "--model", "model", "--addendum", "disposal.json")
    assert result.exit_code == 0, result.stderr
    for text in (
        "VALID: signed by a trusted key, from salun.pub beside the certificate",
        "key 9969baee9f6f47ccaa4328dda63ee8c448d90784d7b63e368050c5ae2491c65d",
        "all 3 files of model",
        "r-1: received 2026-01-31 09:00, due 2026-02-28 09:00, settled 2026-02-03 11:00",
        "3 training samples, of 4",
        "passed 17 checks of policy classifier",
        "weights of the superseded version   deleted (addendum)   2026-03-01 00:00",
        "cannot be\nproved",
    ):
        assert text in result.stdout
    assert re.search(r"UA +0\.0000 +0\.9750 +1\.0000 +0\.8710 +0\.9960 +40\n", result.stdout)


def test_without_a_model_it_reports_that_only_the_certificate_was_checked(salun):
    result = salun("verify", "certificate.json", "--key", "salun.pub")
    assert result.exit_code == 0
    assert "only the certificate was checked" in result.stdout
    assert "beside the certificate" not in result.stdout
    assert re.search(r"weights of the superseded version +due +2026-03-05", result.stdout)


def test_json_is_one_document_with_the_whole_certificate(salun):
    document = json.loads(salun("verify", "certificate.json", "--model", "model", "--json").stdout)
    assert (document["valid"], document["model_files"]) == (True, 3)
    assert document["certificate"]["_type"] == "https://in-toto.io/Statement/v1"


def test_the_summary_covers_nothing_to_erase(salun, tmp_path):
    from salun_core.certificates.keys import public_pem

    Path("nothing.json").write_bytes(certify(*nothing(), KEY))
    Path("signer.pub").write_bytes(public_pem(KEY.public_key()))
    result = salun("verify", "nothing.json", "--key", "signer.pub")
    assert result.exit_code == 0, result.stderr
    assert "nothing to erase" in result.stdout
    assert "metric" not in result.stdout


def test_the_summary_shows_how_many_images_a_sample_stands_for(salun):
    from salun_core.certificates.keys import public_pem

    evidence = evidence_of()
    sample = evidence.metrics["RA"].model_copy(update={"n": 20_000, "population": 1_200_000})
    sampled = evidence.model_copy(update={"metrics": {**evidence.metrics, "RA": sample}})
    Path("sampled.json").write_bytes(certify(*input_of(documents=judged(sampled)), KEY))
    Path("signer.pub").write_bytes(public_pem(KEY.public_key()))
    result = salun("verify", "sampled.json", "--key", "signer.pub")
    assert result.exit_code == 0, result.stderr
    assert re.search(r"RA +1\.0000 .* 20000 of 1200000\n", result.stdout)
    assert re.search(r"TA +0\.9600 .* 300\n", result.stdout)
    metrics = json.loads(salun("verify", "sampled.json", "--key", "signer.pub", "--json").stdout)["certificate"]
    found = {metric["name"]: metric.get("population") for metric in metrics["predicate"]["metrics"]}
    assert (found["RA"], found["TA"]) == (1_200_000, None)


def test_exit_codes_distinguish_damage_from_a_missing_key(salun):
    Path("model/model.json").write_bytes(b"{}")
    result = salun("verify", "certificate.json", "--model", "model")
    assert (result.exit_code, result.stdout) == (5, "")
    assert "model.json was changed" in result.stderr
    Path("salun.pub").unlink()
    result = salun("verify", "certificate.json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--key" in result.stderr
    assert salun("verify", "nowhere.json", "--key", "salun.pub").exit_code == 2


def test_a_certificate_is_fetched_byte_for_byte(salun, store):
    data = (FIXTURE / "certificate.json").read_bytes()
    store.put_new("certificates/r-1.json", data)
    assert salun("certificate", "r-1", "--out", "fetched.json", "--store", store.uri).exit_code == 0
    assert Path("fetched.json").read_bytes() == data
    result = salun("certificate", "r-2", "--out", "other.json", "--store", store.uri)
    assert (result.exit_code, Path("other.json").exists()) == (2, False)
    assert "salun request show r-2" in result.stderr


def test_a_key_is_created_once(salun):
    result = salun("key", "create", "--out", "keys/mine", "--json")
    assert len(json.loads(result.stdout)["keyid"]) == 64
    assert salun("key", "create", "--out", "keys/mine").exit_code == 2


def _block(language):
    return re.search(rf"```{language}\n(.*?)```", DOCUMENT, re.DOTALL)[1]


def _in_python(*args):
    command = [sys.executable, "-c", _block("python"), *args]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_documented_python_code_verifies(salun):
    assert len(_block("python").strip().splitlines()) <= 16
    files = ("certificate.json", "salun.pub", "model")
    assert _in_python(*files).stdout == "VALID: unlearned\n"
    Path("model/model.json").write_bytes(b"{}")
    assert "another model" in _in_python(*files).stderr
    data = json.loads(Path("certificate.json").read_text())
    data["payload"] = data["payload"].replace("A", "B", 1)
    Path("certificate.json").write_text(json.dumps(data))
    assert "InvalidSignature" in _in_python(*files).stderr


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl")
def test_the_documented_openssl_commands_verify(salun):
    command = ["bash", "-c", _block("bash"), "verify", "certificate.json", "salun.pub"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    data = json.loads(Path("certificate.json").read_text())
    data["payload"] = data["payload"].replace("A", "B", 1)
    Path("certificate.json").write_text(json.dumps(data))
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0


def test_addenda_are_listed_and_written_next_to_the_certificate(salun, store, monkeypatch):
    monkeypatch.setenv("SALUN_STORE_URI", store.uri)
    certificate, disposal = (Path(name).read_bytes() for name in ("certificate.json", "disposal.json"))
    store.put_new("certificates/r-1.json", certificate)
    none = salun("certificate", "r-1", "--addenda")
    assert none.exit_code == 0, none.stderr
    assert "no addendum yet" in none.stdout
    store.put_new("addenda/r-1/disposal-0123456789ab.json", disposal)
    store.put_new("addenda/r-1/certificate-0123456789ab.json", certificate)  # a superseded one is no addendum
    listed = json.loads(salun("certificate", "r-1", "--addenda", "--json").stdout)["addenda"]
    assert [(item["addendum"], item["current"], item["file"]) for item in listed] == [
        ("disposal-0123456789ab.json", True, None)
    ]
    assert listed[0]["done"][0]["what"] == "weights of the superseded version"
    Path("out").mkdir()
    written = salun("certificate", "r-1", "--out", "out/c.json", "--addenda")
    assert written.exit_code == 0, written.stderr
    assert "weights of the superseded version" in written.stdout
    added = Path("out/c.disposal-0123456789ab.json")
    assert added.read_bytes() == disposal
    assert f"salun verify out/c.json --addendum {added}" in written.stdout
    verified = salun("verify", "out/c.json", "--addendum", str(added), "--key", "salun.pub")
    assert "deleted (addendum)" in verified.stdout


def test_an_addendum_of_a_superseded_certificate_is_named_and_not_written(salun, store, monkeypatch):
    monkeypatch.setenv("SALUN_STORE_URI", store.uri)
    store.put_new("certificates/r-1.json", Path("certificate.json").read_bytes() + b" ")
    store.put_new("addenda/r-1/disposal-0123456789ab.json", Path("disposal.json").read_bytes())
    written = salun("certificate", "r-1", "--out", "c.json", "--addenda")
    assert "of a superseded certificate" in written.stdout
    assert list(Path().glob("c.disposal*")) == []


def test_a_damaged_addendum_and_a_missing_option_are_one_line(salun, store, monkeypatch):
    monkeypatch.setenv("SALUN_STORE_URI", store.uri)
    store.put_new("certificates/r-1.json", Path("certificate.json").read_bytes())
    store.put_new("addenda/r-1/disposal-0123456789ab.json", b"{}")
    damaged = salun("certificate", "r-1", "--addenda")
    assert (damaged.exit_code, damaged.stderr.count("\n")) == (5, 1)
    nothing_asked = salun("certificate", "r-1")
    assert (nothing_asked.exit_code, nothing_asked.stderr.count("\n")) == (2, 1)
    assert "--out FILE" in nothing_asked.stderr


def _verified(salun, given):
    from salun_core.certificates.keys import public_pem

    Path("made.json").write_bytes(certify(*given, KEY))
    Path("signer.pub").write_bytes(public_pem(KEY.public_key()))
    results = [salun("verify", "made.json", "--key", "signer.pub", *more) for more in ((), ("--json",))]
    assert [result.exit_code for result in results] == [0, 0], results[0].stderr
    return results[0].stdout, json.loads(results[1].stdout)


def test_the_level_is_shown_with_its_figures_and_its_meaning(salun):
    text, document = _verified(salun, input_of(requests=3))
    assert "level       measured: margin 0.1, n 40, power 0%, evidence of a batch of 3 requests\n" in text
    assert Assurance(level="measured").text in " ".join(text.split())
    assert "WARNING" not in text
    assert document["warnings"] == []
    assert document["certificate"]["predicate"]["assurance"]["requests"] == 3


def test_a_procedure_is_shown_with_a_warning(salun):
    evidence = evidence_of()
    few = evidence.metrics["attack_auc"].model_copy(update={"n": 5, "low": 0.2, "high": 0.8})
    metrics = evidence.metrics | {"attack_auc": few}
    text, document = _verified(
        salun, input_of(documents=judged(evidence.model_copy(update={"metrics": metrics})), requests=1)
    )
    assert re.search(r"^level +procedure: margin 0.1, n 5, power 0%$", text, re.MULTILINE)
    assert text.splitlines()[1] == "WARNING: " + document["warnings"][0]
    assert "not shown that the model forgot" in document["warnings"][0]


def test_nothing_to_erase_is_a_level(salun):
    text, document = _verified(salun, nothing())
    assert "level       nothing to erase\n" in text
    assert document["warnings"] == []
