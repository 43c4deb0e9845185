"""Plug-ins: only what the operator lists is loaded, what ships comes first, and evidence and gate name their files."""

import json
import subprocess
import sys

import pytest

from salun_core import plugins
from salun_core.certificates.issue import build_statement
from salun_core.cli.certificates import _summary
from salun_core.doctor import _plugin
from salun_core.errors import IntegrityError, UsageError
from salun_core.evaluation.evidence import Metric
from salun_core.evaluation.optional_metrics import added, parse_optional_metrics
from salun_core.gate import Cause, Policy, decide, load_policy
from salun_core.methods import diffusion
from salun_core.methods.classification import METHODS, method_config
from salun_core.methods.method import get_method
from salun_core.models.architectures import build_classifier
from salun_core.plugins import PluginRecord
from salun_core.report import ReportContext, write_report
from salun_core.steps.form_check import check_form
from salun_core.steps.run_form import DeletionSweepForm
from tests.support.certified import evidence_of, input_of, judged
from tests.support.plugins import example, package, write_metadata

__all__ = ["example"]

ROW = "from salun_core.methods.classification.method import ClassifierMethod\n"
RECORD = PluginRecord(
    kind="method", name="fade", object="fading:FADE", distribution="salun-fade", version="2.1", digest="a" * 64
)


def offered(folder, code, points, name="salun-lab", kind="methods"):
    """Write a package with one module, and what its metadata say."""
    (folder / f"{name.replace('-', '_')}.py").write_text(code)
    write_metadata(folder, name, "1.0", {f"salun.{kind}": points})
    return name


def test_a_name_alone_loads_no_code(tmp_path, monkeypatch):
    """A run parameter, a settings file or a model card may name anything."""
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    offered(tmp_path, code, {"lab_one": "salun_lab:ONE"})
    with package(tmp_path, monkeypatch):
        for name in ("lab_one", "salun_lab:ONE", "os:system"):
            with pytest.raises(UsageError, match=f"method {name} is not allowed: it is a plug-in, and loading it runs"):
                method_config(name)
        with pytest.raises(UsageError, match="did you mean 'lab_one'"):
            get_method(METHODS, "lab_onne")
        with pytest.raises(UsageError, match="metric salun_lab:ONE is not allowed"):
            parse_optional_metrics("decile,salun_lab:ONE")
        with pytest.raises(UsageError, match="set SALUN_PLUGINS=salun_lab:ONE, in a pod in its image"):
            build_classifier("salun_lab:ONE", 3)
        assert plugins.find("method", "lab_one").record().distribution == "salun-lab"
    assert not (tmp_path / "ran").exists()
    assert "salun_lab" not in sys.modules


def test_a_package_allows_what_its_entry_points_name_and_nothing_else(example, monkeypatch):
    assert get_method(METHODS, "uniform").needs_mask
    assert method_config("uniform", {"epochs": 2}).learning_rate == 0.02
    with pytest.raises(UsageError, match="salun_example:UNIFORM is not allowed"):
        get_method(METHODS, "salun_example:UNIFORM")
    (record,) = plugins.loaded("method", "uniform", "salun")
    assert (record.object, record.version) == ("salun_example:UNIFORM", "1.0")
    for listed in (f"Salun_Example@sha256:{record.digest}", "other, salun_example:UNIFORM"):
        monkeypatch.setenv("SALUN_PLUGINS", listed)
        assert get_method(METHODS, "uniform").needs_mask
    monkeypatch.setenv("SALUN_PLUGINS", f"salun-example@sha256:{'0' * 64}")
    with pytest.raises(IntegrityError, match=f"their SHA-256 is {record.digest}"):
        get_method(METHODS, "uniform")


def test_a_digest_changes_with_any_file_of_the_package(tmp_path, monkeypatch):
    (tmp_path / "packed" / "inner").mkdir(parents=True)
    for name in ("__init__.py", "inner/part.py", "inner/note.txt"):
        (tmp_path / "packed" / name).write_text("one = 1\n")
    with package(tmp_path, monkeypatch):
        first = plugins.source_digest("packed.inner.part")
        (tmp_path / "packed" / "inner" / "note.txt").write_text("not imported\n")
        assert plugins.source_digest("packed") == first
        (tmp_path / "packed" / "inner" / "part.py").write_text("one = 2\n")
        assert plugins.source_digest("packed") != first
        assert "packed" not in sys.modules
        for name in ("sys", "no_such_package"):
            with pytest.raises(UsageError, match="no source files|cannot be imported"):
                plugins.source_digest(name)


def test_naming_a_pinned_object_does_not_unpin_it(monkeypatch):
    monkeypatch.setenv("SALUN_PLUGINS", f"nets:small@sha256:{'0' * 64}")
    plugins.allow("nets:small")
    plugins.allow("resnet18")
    assert plugins.allowed() == [f"nets:small@sha256:{'0' * 64}"]
    plugins.allow("salun-example")
    assert len(plugins.allowed()) == 1
    plugins.allow("nets:large")
    assert plugins.is_allowed(plugins.Offer("architecture", "nets:large", "nets:large"))


def test_no_package_replaces_what_ships(tmp_path, monkeypatch):
    offered(tmp_path, "raise SystemExit('ran')", {name: "salun_lab:X" for name in METHODS})
    offered(tmp_path, "X = 1", dict.fromkeys(("lira", "RA"), "salun_bad:X"), "salun-bad", "metrics")
    with package(tmp_path, monkeypatch, "salun-lab,salun-bad"):
        assert all(get_method(METHODS, name) is row for name, row in METHODS.items())
        assert parse_optional_metrics("lira") == {"lira": 8}
        with pytest.raises(UsageError, match="metric RA of salun-bad cannot be used: a built-in metric has this name"):
            parse_optional_metrics("RA")


def test_two_packages_with_one_name_are_refused(tmp_path, monkeypatch):
    for name in ("salun-lab", "salun-twin"):
        offered(tmp_path, "", {"fade": f"{name.replace('-', '_')}:FADE"}, name)
    with (
        package(tmp_path, monkeypatch, "salun-lab,salun-twin"),
        pytest.raises(UsageError, match="salun-lab and salun-twin offer it.*write salun_lab:FADE or salun_twin:FAD"),
    ):
        get_method(METHODS, "fade")


@pytest.mark.parametrize(
    ("code", "point", "text"),
    [
        ("import no_such_module", "salun_lab:X", "package salun_lab cannot be imported: ModuleNotFoundError"),
        ("raise SystemExit(3)", "salun_lab:X", "package salun_lab cannot be imported: SystemExit: 3"),
        ("def f(:", "salun_lab:X", "package salun_lab cannot be imported: SyntaxError"),
        ("", "salun_lab:X", "salun_lab has no X.*the entry point of salun-lab"),
        ("", "salun_lab", "the entry point bad of salun-lab names no object: it is 'salun_lab'"),
        ("", "salun_gone:X", "package salun_gone cannot be imported: it is neither installed nor"),
        (
            "X = print",
            "salun_lab:X",
            "its object is of the type builtin_function_or_method. To fix it: make it a Class",
        ),
        (f"{ROW}X = ClassifierMethod(print, config_type=None)", "salun_lab:X", "method bad has no configuration class"),
        (f"{ROW}X = ClassifierMethod(print, config_type=dict)", "salun_lab:X", "set config_type to UnlearnConfig"),
        (f"{ROW}X = ClassifierMethod()", "salun_lab:X", "method bad cannot unlearn: it needs an `edit`, or"),
        (f"{ROW}X = ClassifierMethod(print, edit=print)", "salun_lab:X", "give its row exactly one of them"),
    ],
)
def test_a_malformed_plug_in_gives_one_line_with_the_fix(tmp_path, monkeypatch, code, point, text):
    offered(tmp_path, code, {"bad": point})
    with package(tmp_path, monkeypatch, "salun-lab"):
        with pytest.raises(UsageError, match=text) as raised:
            get_method(METHODS, "bad")
        assert "\n" not in str(raised.value)
        assert "To fix it" in str(raised.value)


def test_a_row_belongs_to_one_kind_of_model(example):
    with pytest.raises(UsageError, match="make it a DiffusionMethod, for this kind of model"):
        get_method(diffusion.METHODS, "uniform")
    for name, row in (*METHODS.items(), *diffusion.METHODS.items()):
        row.check_row(name)


def test_metrics_and_attacks_have_their_own_rows(example, monkeypatch):
    assert parse_optional_metrics("confidence,entropy_area") == {"confidence": 1, "entropy_area": 1}
    assert [record.kind for kind in plugins.GROUPS for record in plugins.loaded(kind, "confidence", "entropy_area")]
    with pytest.raises(UsageError, match="confidence takes no count"):
        parse_optional_metrics("confidence=3")
    assert added("nothing") is None
    monkeypatch.setenv("SALUN_PLUGINS", "salun_example:CONFIDENCE,salun_example:ENTROPY_AREA,salun_example:pocket")
    assert type(added("salun_example:ENTROPY_AREA")).__name__ == "AddedAttack"
    assert type(added("salun_example:CONFIDENCE")).__name__ == "AddedMetric"
    with pytest.raises(UsageError, match="make it an AddedMetric or an AddedAttack"):
        added("salun_example:pocket")


def test_an_architecture_with_a_name_of_timm_is_ambiguous(tmp_path, monkeypatch, example):
    assert build_classifier("pocket", 3)[2].out_features == 3
    offered(tmp_path, "", {"resnet26": "salun_lab:net"}, kind="architectures")
    with package(tmp_path, monkeypatch, "salun-lab"):
        found = plugins.find("architecture", "resnet26")
        assert found.target == "salun_lab:net"
        with pytest.raises(UsageError, match="write salun_lab:net or timm:resnet26"):
            build_classifier("resnet26", 3)


def with_plugins(*records):
    evidence = evidence_of()
    return evidence.model_copy(update={"run": evidence.run.model_copy(update={"plugins": list(records) or None})})


def policy(**fields):
    return Policy.model_validate({**load_policy("classifier").model_dump(), **fields})


def test_documents_without_plug_ins_do_not_mention_them():
    fields = evidence_of().model_dump(mode="json")
    assert "plugins" not in fields | fields["run"]
    assert with_plugins().digest == evidence_of().digest != with_plugins(RECORD).digest
    assert policy(plugins="forbid").digest != policy().digest == load_policy("classifier").digest


@pytest.mark.parametrize(
    ("listed", "passes"),
    [
        (None, False),
        ("forbid", False),
        ([], False),
        (["other"], False),
        (["salun-fade"], True),
        (["salun_FADE"], True),
        (["fading:FADE"], True),
        ([f"salun-fade@sha256:{'a' * 64}"], True),
        ([f"salun-fade@sha256:{'b' * 64}"], False),
    ],
)
def test_a_policy_forbids_plug_ins_that_it_does_not_list(listed, passes):
    decision = decide(with_plugins(RECORD), policy(plugins=listed))
    assert decision.passed is passes, decision.summary
    if not passes:
        assert "the policy does not allow the method fade (salun-fade 2.1, sha256 aaaaaaaaaaaa)" in decision.summary
        assert [refusal.cause for refusal in decision.refusals] == [Cause.INTEGRITY]
        assert "list the plug-in under `plugins` in a policy of your own" in decision.next


def test_the_architecture_of_a_line_needs_no_entry_unless_the_policy_has_a_list():
    record = RECORD.model_copy(update={"kind": "architecture"})
    assert decide(with_plugins(record), policy()).passed
    assert not decide(with_plugins(record), policy(plugins="forbid")).passed
    assert decide(with_plugins(record), policy(plugins=["salun-fade"])).passed


def test_evidence_must_name_the_files_of_a_method_from_elsewhere():
    evidence = evidence_of()
    nameless = evidence.model_copy(update={"run": evidence.run.model_copy(update={"method": "fading:FADE"})})
    decision = decide(nameless, policy(plugins=["fading:FADE"]))
    assert "the evidence does not name the files of the method fading:FADE" in decision.summary


def test_an_attack_of_a_plug_in_has_a_cause_and_an_absent_one_its_switch():
    """A high area means that the model remembers, a low one that it forgot too much."""
    attack = RECORD.model_copy(update={"kind": "attack", "name": "fading:AREA", "object": "fading:AREA"})
    rule = {"metric": "fading:AREA", "op": "within", "value": 0.5, "tolerance": 0.1, "reason": "like unseen data"}
    own = Policy.model_validate({"name": "own", "plugins": ["fading:AREA"], "rules": [rule]})

    def refusal(value=None):
        measured = {"fading:AREA": Metric(before=0.9, after=value, n=9)} if value else {}
        fields = {"metrics": {**evidence_of().metrics, **measured}, "plugins": [attack]}
        return decide(evidence_of().model_copy(update=fields), own).refusals[0]

    assert [refusal(value).cause for value in (0.9, 0.1)] == [Cause.NOT_FORGOTTEN, Cause.OVER_FORGOTTEN]
    assert refusal().next.startswith("measure it: --extra-metrics fading:AREA; or ")


def test_a_report_names_the_plug_ins(tmp_path):
    context = ReportContext(model_line="faces", created_at="2026-02-03T10:00:00+00:00")
    write_report(tmp_path / "report.html", with_plugins(RECORD), None, context)
    assert f"method fade: salun-fade 2.1 <code>{'a' * 64}</code>" in (tmp_path / "report.html").read_text()
    write_report(tmp_path / "report.html", with_plugins(), None, context)
    assert "Plug-ins" not in (tmp_path / "report.html").read_text()


def test_a_method_and_a_metric_with_other_files_are_two_plug_ins():
    other = RECORD.model_copy(update={"digest": "b" * 64})
    evidence = with_plugins(RECORD).model_copy(update={"plugins": [other, RECORD]})
    assert evidence.all_plugins == [RECORD, other]
    assert not decide(evidence, policy(plugins=[f"salun-fade@sha256:{'a' * 64}"])).passed


def test_a_certificate_names_the_plug_ins():
    plain = build_statement(*input_of(), "0" * 64)
    assert b"plugins" not in plain.canonical()
    facts, documents = input_of()
    evidence = documents.evidence.model_copy(update={"plugins": [RECORD]})
    decided = decide(evidence, policy(plugins=["salun-fade"]))
    documents = judged(evidence).__class__(documents.split_digest, evidence, decided)
    statement = build_statement(facts, documents, "0" * 64)
    assert ("plug-in", RECORD.words) in _summary(statement.predicate)
    named = json.loads(statement.canonical())
    assert named["predicate"]["provenance"]["plugins"] == [RECORD.model_dump()]


def test_a_form_with_a_plug_in_that_the_policy_forbids_costs_nothing(example, tmp_path):
    form = DeletionSweepForm(model_line="digits", store_uri="s3://salun/nowhere", method="uniform")
    with pytest.raises(UsageError, match="policy classifier does not allow the method uniform.*its gate would refuse"):
        check_form(form, in_pods=False, skipped=lambda line: None)
    (tmp_path / "own.yaml").write_text(json.dumps(policy(plugins=["salun-example"]).model_dump(mode="json")))
    allowed = form.model_copy(update={"policy_uri": str(tmp_path / "own.yaml"), "extra_metrics": "entropy_area"})
    check_form(allowed, in_pods=False, skipped=lambda line: None)
    other = allowed.model_copy(update={"extra_metrics": "confidance"})
    with pytest.raises(UsageError, match="did you mean 'confidence'"):
        check_form(other, in_pods=False, skipped=lambda line: None)


def test_doctor_checks_what_may_be_loaded(example, monkeypatch):
    (record,) = {item.digest for item in plugins.records("salun-example")}
    wrong = f"salun-example@sha256:{'0' * 64}"
    monkeypatch.setenv("SALUN_PLUGINS", f"{wrong},salun-gone,salun_example:pocket@sha256:{record},no_such:thing")
    found = {check.name: check for check in map(_plugin, plugins.allowed())}
    states = {
        "salun-example": "failed",
        "salun-gone": "failed",
        "salun_example:pocket": "ok",
        "no_such:thing": "failed",
    }
    assert {name.removeprefix("plug-in "): check.state for name, check in found.items()} == states
    assert record in found["plug-in salun-example"].detail
    assert found["plug-in salun-gone"].remedy == "install it, or correct SALUN_PLUGINS"
    assert "salun_example" not in sys.modules


def test_help_imports_neither_torch_nor_a_plug_in(tmp_path):
    offered(tmp_path, "raise SystemExit(9)", {"lab_one": "salun_lab:ONE"})
    code = (
        "import sys; sys.argv = ['salun', 'plugin', '--help']\n"
        "from salun_core.cli.app import app\n"
        "try: app()\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'salun_lab'} & set(sys.modules)))"
    )
    variables = {"PYTHONPATH": f"{tmp_path}:{':'.join(sys.path)}", "SALUN_PLUGINS": "salun-lab"}
    shown = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
    assert shown.stdout.endswith("[]\n")
    assert "check" in shown.stdout
