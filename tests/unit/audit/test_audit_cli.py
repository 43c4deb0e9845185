"""`salun audit` and `salun verify` on files of predictions: what is read, refused, written, signed and verified."""

from __future__ import annotations

import base64
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from salun_core.audit.statement import verify_audit
from salun_core.certificates.envelope import PAYLOAD_TYPE, sign
from salun_core.certificates.keys import create_key, load_signing_key
from salun_core.digest import canonical_json
from salun_core.errors import IntegrityError
from tests.support.commands import _settings_restored, invoke  # noqa: F401 - a fixture, used by every test
from tests.support.simulated_outputs import World

WORLD = World(count=30, held_out=90)  # small: enough for all but one test
LARGE = World()


def ids_of(world):
    return [f"patient-{number:03d}" for number in range(len(world.labels))]


IDS = ids_of(WORLD)


@pytest.fixture
def salun(tmp_path, monkeypatch):
    monkeypatch.delenv("SALUN_CONFIG", raising=False)
    monkeypatch.chdir(tmp_path)
    return invoke


def columns(logits, order=None, world=WORLD):
    rows = np.arange(len(world.labels)) if order is None else order
    return {"id": np.array(ids_of(world))[rows], "label": world.labels[rows], "logits": logits[rows]}


def write_npz(path, given, **more):
    np.savez(path, **{**columns(given), **more})
    return path


def flat(found):
    names = {f"logit_{place}": found["logits"][:, place] for place in range(found["logits"].shape[1])}
    return {"id": found["id"], "label": found["label"], **names}


def write_world(folder, world):
    for name, logits in (("before", world.logits(0, saw=True)), ("after", world.logits(1))):
        np.savez(folder / name, **columns(logits, world=world))
    (folder / "forget.txt").write_text("\n".join(ids_of(world)[: world.count]))
    (folder / "held-out.txt").write_text("\n".join(ids_of(world)[world.count :]))


@pytest.fixture
def files(tmp_path):
    write_world(tmp_path, WORLD)
    return tmp_path


def arguments(files, **changed):
    named = {"before": "before.npz", "after": "after.npz", "forget": "forget.txt", "held-out": "held-out.txt"}
    given = {name: files / path for name, path in named.items()} | {"out": files / "audit.json"}
    given |= {name: files / path for name, path in changed.items()}
    return ["audit", *(str(word) for name, value in given.items() for word in (f"--{name}", value))]


def test_a_retrained_model_is_measured(salun, files):
    write_world(files, LARGE)
    for number in range(4):
        np.savez(files / f"oracle-{number}", **columns(LARGE.logits(10 + number), world=LARGE))
    oracles = [word for number in range(4) for word in ("--reference", str(files / f"oracle-{number}.npz"))]
    result = salun(*arguments(files, report="audit.md"), *oracles, "--require", "measured", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == json.loads((files / "audit.json").read_text())
    evidence = json.loads(result.stdout)
    assert evidence["level"] == "measured"
    assert evidence["sizes"] == {
        "forget": 200,
        "held_out": 500,
        "retain": 0,
        "references": 4,
        "shadows": 0,
        "classes": [],
    }
    assert {item["role"] for item in evidence["inputs"]} == {"before", "after", "reference", "forget", "held_out"}
    report = (files / "audit.md").read_text()
    assert report.startswith("# Audit: measured")
    for text in (report, result.stdout):
        assert "patient-" not in text
    forget = next(item["sha256"] for item in evidence["inputs"] if item["role"] == "forget")
    assert forget not in report  # by which a list of few ids could be found


def test_the_model_before_is_refused_with_its_figures(salun, files):
    write_npz(files / "same.npz", WORLD.logits(0, saw=True))
    result = salun(*arguments(files, after="same.npz", report="audit.md"))
    assert result.exit_code == 3
    assert "change: the outputs must have changed" in result.stderr
    assert "REFUSED" in result.stdout
    assert json.loads((files / "audit.json").read_text())["level"] == "refused"
    assert (files / "audit.md").read_text().startswith("# Audit: refused")


def test_undecided_is_a_refusal_if_measured_is_required(salun, files):
    (files / "few.txt").write_text("\n".join(IDS[:4]))
    assert salun(*arguments(files, forget="few.txt")).exit_code == 0
    assert salun(*arguments(files, forget="few.txt"), "--require", "measured").exit_code == 3


def test_parquet_csv_and_npz_in_any_order_give_the_same_findings(salun, files):
    shuffled = columns(WORLD.logits(1), np.random.default_rng(0).permutation(len(IDS)))
    table = {"id": shuffled["id"], "label": shuffled["label"], "logits": list(shuffled["logits"])}
    pyarrow.parquet.write_table(pyarrow.table(table), files / "after.parquet")
    found = flat(shuffled)
    lines = [",".join(found), *(",".join(map(str, row)) for row in zip(*found.values(), strict=True))]
    (files / "after.csv").write_text("\n".join(lines))
    findings = []
    for name in ("after.npz", "after.parquet", "after.csv"):
        result = salun(*arguments(files, after=name), "--json")
        findings.append(json.loads(result.stdout)["findings"])
    assert findings[0] == findings[1] == findings[2]


def test_a_class_target_is_all_samples_of_the_class_that_are_not_held_out(salun, files):
    (files / "class.json").write_text(json.dumps({"kind": "class", "class_index": 2}))
    (files / "held-out.txt").write_text("\n".join(IDS[60:]))
    evidence = json.loads(salun(*arguments(files, forget="class.json"), "--json").stdout)
    assert evidence["sizes"]["classes"] == [2]
    assert evidence["sizes"]["forget"] == int((WORLD.labels[:60] == 2).sum())
    assert evidence["sizes"]["retain"] == int((WORLD.labels[:60] != 2).sum())


LOGITS = WORLD.logits(1)
BROKEN = {
    "other samples": ({"id": np.array(["x", *IDS[1:]])}, "other samples"),
    "an id twice": ({"id": np.array([IDS[1], *IDS[1:]])}, "names 1 samples twice"),
    "NaN": ({"logits": np.where(np.arange(len(IDS))[:, None] == 3, np.nan, LOGITS)}, "NaN or infinite"),
    "other classes": ({"logits": LOGITS[:, :4], "label": WORLD.labels % 4}, "4 classes"),
    "other labels": ({"label": (WORLD.labels + 1) % 5}, "other labels"),
    "a label outside": ({"label": WORLD.labels + 3}, "labels outside its classes"),
    "missing rows": ({"id": np.array(IDS[:-1])}, "different lengths"),
    "no logits": ({"logits": np.zeros(len(IDS))}, "outputs of shape"),
    "both": ({"probabilities": LOGITS}, "both logits and probabilities"),
    "a pickle": ({"label": np.array([object()] * len(IDS))}, "cannot read"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_file_that_does_not_fit_is_refused_in_one_line(salun, files, fault):
    changed, message = BROKEN[fault]
    write_npz(files / "after.npz", LOGITS, **changed)
    result = salun(*arguments(files))
    assert result.exit_code == 1, result.stdout
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert "patient-" not in result.stderr
    assert not (files / "audit.json").exists()


@pytest.mark.parametrize(
    ("changed", "words", "code"),
    [
        ({"after": "missing.npz"}, "there are no predictions", 2),
        ({"after": "after.pth"}, "mixed", 2),
        ({"reference": "before.npz"}, "is the same model as", 1),
        ({"reference": "after.npz"}, "is the same model as", 1),
        ({"forget": "held-out.txt"}, "also held out", 1),
        ({"forget": "none.txt"}, "names no forget sample", 1),
        ({"forget": "other.txt"}, "1 of 2 ids are not in", 1),
        ({"shadow": "after.npz"}, "no column 'member'", 1),
    ],
)
def test_inputs_that_contradict_each_other_are_refused(salun, files, changed, words, code):
    (files / "none.txt").write_text("\n")
    (files / "other.txt").write_text(f"{IDS[0]}\nnobody\n")
    result = salun(*arguments(files, **changed))
    assert (result.exit_code, words in result.stderr) == (code, True), result.stderr


def test_held_out_samples_must_be_named(salun, files):
    words = arguments(files)
    place = words.index("--held-out")
    result = salun(*words[:place], *words[place + 2 :])
    assert result.exit_code == 2
    assert "--held-out FILE" in result.stderr


@pytest.fixture
def signed(salun, files):
    made = create_key(files / "auditor")
    result = salun(*arguments(files), "--key", str(made.private))
    assert result.exit_code == 0, result.stderr
    return files / "audit.json"


def test_a_signed_audit_verifies_with_the_auditors_key_and_the_audited_file(salun, files, signed):
    result = salun("verify", signed, "--key", files / "auditor.pub", "--model", files / "after.npz", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["audit"]["level"] in ("measured", "procedure")
    shown = salun("verify", signed, "--key", files / "auditor.pub")
    assert "VALID: an audit" in shown.stdout
    assert "it may be about another model" in shown.stdout


def test_an_audit_of_another_model_does_not_verify(salun, files, signed):
    write_npz(files / "newer.npz", WORLD.logits(2))
    result = salun("verify", signed, "--key", files / "auditor.pub", "--model", files / "newer.npz")
    assert result.exit_code == 5
    assert "the audit of another model" in result.stderr


def test_an_audit_of_another_auditor_or_of_nobody_does_not_verify(salun, files, signed):
    create_key(files / "other")
    assert salun("verify", signed, "--key", files / "other.pub").exit_code == 5
    salun(*arguments(files))
    result = salun("verify", signed, "--key", files / "auditor.pub")
    assert (result.exit_code, "is not signed" in result.stderr) == (5, True)


def test_every_edited_byte_is_found(files, signed):
    data = signed.read_bytes()
    for place in range(0, len(data), 197):
        signed.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(IntegrityError):
            verify_audit(signed, keys=[files / "auditor.pub"])


EDITS = {
    "level": lambda audit: audit.update(level="measured"),
    "verdict": lambda audit: audit["findings"][0].update(verdict="pass"),
    "value": lambda audit: audit["findings"][1].update(value=0.5),
    "a test left out": lambda audit: audit.update(findings=[]),
    "auditor": lambda audit: audit.update(auditor="0" * 64),
    "subject": lambda audit: audit["inputs"].pop(1),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_audit_that_contradicts_itself_is_refused_although_it_is_signed(salun, files, edit):
    key = create_key(files / "auditor").private
    salun(*arguments(files, after="before.npz"), "--key", str(key))
    path = files / "audit.json"
    statement = json.loads(base64.b64decode(json.loads(path.read_bytes())["payload"]))
    EDITS[edit](statement["predicate"])
    path.write_bytes(sign(canonical_json(statement), PAYLOAD_TYPE, load_signing_key(key)))
    with pytest.raises(IntegrityError):
        verify_audit(path, keys=[files / "auditor.pub"])


def test_a_certificate_is_no_audit(files):
    key = create_key(files / "auditor").private
    statement = {"_type": "https://in-toto.io/Statement/v1", "predicateType": "urn:salun:erasure:v1"}
    (files / "c.json").write_bytes(sign(canonical_json(statement), PAYLOAD_TYPE, load_signing_key(key)))
    with pytest.raises(IntegrityError):
        verify_audit(files / "c.json", keys=[files / "auditor.pub"])
