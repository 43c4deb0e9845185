"""The check of all parameters of a run, before it costs anything."""

import json

import pytest

from salun_core.errors import IntegrityError, StoreError, UsageError
from salun_core.models import load_model
from salun_core.steps.form_check import check_form
from salun_core.steps.run_form import DeletionSweepForm, UnlearningForm
from salun_core.tasks import register_model
from tests.support.card_line import begin_classifier, begin_text_to_image, classifier_card
from tests.support.memory_store import MemoryFiles

ADDRESS = "s3://salun/nowhere"


@pytest.fixture
def no_store(monkeypatch):
    """A machine without credentials for any store."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/dev/null")


def sweep(**given):
    return DeletionSweepForm(**{"model_line": "digits", "store_uri": ADDRESS, **given})


def unlearning(**given):
    common = {"model_line": "digits", "store_uri": ADDRESS, "forget_manifest_uri": f"{ADDRESS}/forget.json"}
    return UnlearningForm(**{**common, **given})


def faults(form, *, in_pods=True):
    """The message of the check on a machine without a store."""
    with pytest.raises(UsageError) as raised:
        check_form(form, in_pods=in_pods, skipped=lambda line: None)
    return str(raised.value)


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (sweep(method="salum"), "did you mean 'salun'?"),
        (sweep(method_config={"epoch": 3}), "epoch: unknown key, did you mean 'epochs'?"),
        (sweep(method_config={"learning_rate": -1}), "learning_rate: Input should be greater than"),
        (sweep(method="finetune", method_config={"stepz": 5}), "stepz: unknown key"),
        (sweep(policy_uri="clasifier"), "did you mean 'classifier'?"),
        (sweep(policy_uri="strict.yaml"), "policy_uri is strict.yaml: a pod cannot read a file of this machine"),
        (sweep(policy_uri="https://x/strict.yaml"), "a pod cannot read a file of this machine"),
        (sweep(extra_metrics="lirra=4"), "did you mean 'lira'?"),
        (sweep(extra_metrics="kl"), "kl cannot be measured: there is no retrained model"),
        (sweep(evaluation_samples="few"), "evaluation_samples cannot be 'few'"),
        (sweep(tune=True, tune_budget="soon"), "'soon' is not a budget"),
        (sweep(method="auto"), "the method auto needs a search: only a search chooses a method"),
        (unlearning(method="salun,scrubb", tune=True), "did you mean 'scrub'?"),
        (sweep(store_uri="s3//salun"), "is not"),
        (sweep(model_line="Digits!"), "model line 'Digits!' is not a valid id"),
        (unlearning(forget_manifest_uri="forget.json"), "forget_manifest_uri is forget.json: a pod cannot read a file"),
    ],
)
def test_a_fault_is_found_without_the_store(no_store, form, text):
    assert text in faults(form)


def test_all_faults_are_in_one_message(no_store):
    message = faults(unlearning(method="salum", policy_uri="a.yaml", forget_manifest_uri="f.json", extra_metrics="x"))
    assert message.startswith("4 parameters are wrong: ")
    for text in (
        "forget_manifest_uri is f.json",
        "policy_uri is a.yaml",
        "unknown method 'salum'",
        "unknown metric 'x'",
    ):
        assert text in message


def test_a_method_of_any_task_counts_where_the_line_cannot_be_read(no_store):
    said = []
    for method in ("salun", "esd"):
        check_form(sweep(method=method), in_pods=True, skipped=said.append)
    assert len(said) == 2
    assert said[0].startswith("not checked here: model_line, because ")


def test_what_cannot_be_read_is_named_in_one_line(no_store):
    said = []
    form = unlearning(policy_uri="s3://salun/strict.yaml")
    check_form(form, in_pods=True, skipped=said.append)
    (line,) = said
    assert line.startswith("not checked here: model_line, forget_manifest_uri, policy_uri, because ")
    with pytest.raises(StoreError):
        check_form(form, in_pods=True)


def test_files_of_this_machine_are_read_outside_of_pods(store, tmp_path):
    policy = tmp_path / "policy.yaml"
    policy.write_text("rules: 3", encoding="utf-8")
    assert "policy.yaml" in faults(sweep(store_uri=store.uri, policy_uri=str(policy)), in_pods=False)


@pytest.fixture
def line(store, digits_model):
    register_model(store, "digits", digits_model, "train", len(load_model(digits_model).split.train))
    return store


def put(store, name, document):
    store.put_new(name, json.dumps(document).encode())
    return f"{store.uri}/{name}"


def test_a_form_without_faults_passes(line):
    target = put(line, "forget.json", [{"kind": "class", "class_id": 3}])
    said = []
    check_form(unlearning(store_uri=line.uri, forget_manifest_uri=target), in_pods=True, skipped=said.append)
    check_form(sweep(store_uri=line.uri, tune=True, extra_metrics="lira=4"), in_pods=True, skipped=said.append)
    assert said == []


def test_the_store_shows_further_faults(line):
    def refused(document, **given):
        uri = put(line, f"{len(given)}{abs(hash(str(document)))}.json", document)
        return faults(unlearning(store_uri=line.uri, forget_manifest_uri=uri, **given))

    concept = {"kind": "concept", "prompts": ["a"], "anchor_prompt": "b"}
    assert "a classifier cannot forget a concept" in refused(concept)
    assert "class_id" in refused({"kind": "class"})
    assert "is an empty list" in refused([])
    assert "unknown method 'esd'" in refused({"kind": "class", "class_id": 1}, method="esd")
    gone = unlearning(store_uri=line.uri, forget_manifest_uri=f"{line.uri}/gone.json", policy_uri=f"{line.uri}/gone")
    message = faults(gone)
    assert message.startswith("2 parameters are wrong: ")
    assert message.count("does not exist") == 2
    assert "model line other has no HEAD" in faults(
        unlearning(store_uri=line.uri, model_line="other", forget_manifest_uri=f"{line.uri}/gone.json")
    )


def test_a_line_whose_image_classifier_or_clip_model_is_missing_is_refused_before_any_work(monkeypatch, tmp_path):
    kept = MemoryFiles()
    monkeypatch.setattr("salun_core.steps.form_check.open_store", lambda uri: kept)
    monkeypatch.chdir(tmp_path)
    begin_classifier(kept, "judge")
    begin_text_to_image(kept, "whole", judge="judge")
    begin_text_to_image(kept, "misjudged", judge="base")
    begin_text_to_image(kept, "scored", judge="judge", clip="clip", extractor="inception.safetensors")
    check_form(sweep(model_line="whole"), in_pods=True)
    with pytest.raises(UsageError, match="'base' is neither a model line of this store nor a folder"):
        check_form(sweep(model_line="misjudged"), in_pods=False)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.json").write_text(classifier_card().model_dump_json())
    check_form(sweep(model_line="misjudged"), in_pods=False)
    with pytest.raises(UsageError, match="'base' is a folder of this machine"):
        check_form(sweep(model_line="misjudged"), in_pods=True)
    check_form(sweep(model_line="scored"), in_pods=True)  # the image of the pods may have both
    with pytest.raises(UsageError, match=r"extractor .* does not exist; the CLIP model 'clip' does not exist"):
        check_form(sweep(model_line="scored"), in_pods=False)


def test_a_damaged_manifest_is_reported_as_damaged(line):
    line.put_new("ids.json", b"[]")
    target = {"kind": "samples", "manifest_uri": f"{line.uri}/ids.json", "sha256": "0" * 64}
    uri = put(line, "forget.json", target)
    with pytest.raises(IntegrityError):
        check_form(unlearning(store_uri=line.uri, forget_manifest_uri=uri), in_pods=True)
