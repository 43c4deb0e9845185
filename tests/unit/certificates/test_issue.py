"""What a certificate states, which input is refused, and that a request ends with exactly one."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from salun_core.certificates.envelope import PAYLOAD_TYPE, keyid, sign
from salun_core.certificates.issue import (
    build_statement,
    certify,
    issue,
    issue_addendum,
    salted_digest,
)
from salun_core.certificates.keys import public_pem
from salun_core.certificates.statement import (
    DisposalAddendum,
    DisposalDone,
    ErasureCertificate,
    open_statement,
)
from salun_core.certificates.verify import verify_certificate
from salun_core.data.targets import ClassTarget, RandomTarget
from salun_core.digest import canonical_json, digest_json, sha256_bytes
from salun_core.errors import GateRefusedError, IntegrityError, UsageError
from salun_core.evaluation.evidence import Forgotten, Metric
from salun_core.registry.lookup import Version
from salun_core.requests.schema import Outcome
from salun_core.storage.keys import addendum_key, certificate_key
from tests.support.certified import (
    CANARIES,
    KEY,
    OTHER,
    REQUEST,
    WEIGHTS,
    evidence_of,
    input_of,
    judged,
    nothing,
)


def opened(data, key=KEY):
    return open_statement(ErasureCertificate, data, [key.public_key()], "certificate")


def read(store, key=KEY):
    data = store.get(certificate_key("r-1")).data
    return sha256_bytes(data), opened(data, key).predicate


def test_a_certificate_states_what_was_done_and_measured():
    facts, documents = input_of()
    evidence = documents.evidence
    certificate = opened(certify(facts, documents, KEY))
    erasure = certificate.predicate
    assert {item.name: item.digest.sha256 for item in certificate.subject} == {
        "model.json": sha256_bytes(b"{}"),
        "model.safetensors": WEIGHTS,
    }
    assert (erasure.model.version, erasure.model.parent) == (facts.version.digest, OTHER)
    assert erasure.procedure.config_digest == digest_json(evidence.run.config)
    assert erasure.procedure.config == evidence.run.config
    assert (erasure.procedure.seed, erasure.procedure.density, erasure.procedure.mask_digest) == (3, 0.5, OTHER)
    assert erasure.provenance.environment == {"torch": "2.13.0", "device": "cpu"}
    found = {metric.name: metric for metric in erasure.metrics}
    assert found.keys() == evidence.metrics.keys()
    assert found["UA"].model_dump(exclude={"name"}) == evidence.metrics["UA"].model_dump()
    assert found["TA"].model_dump(exclude={"name"}) == evidence.metrics["TA"].model_dump()
    assert found["MIA_entropy"].before is None  # NaN has no JSON
    assert [verdict.rule for verdict in erasure.gate.verdicts] == [item.rule for item in documents.decision.verdicts]
    assert erasure.debt.fraction == 0.05
    assert erasure.signer == keyid(KEY.public_key())
    assert "does not prove" in erasure.statement


def test_only_the_salted_digest_of_the_forget_set_is_shown():
    first, second = input_of(), input_of()
    digests = [opened(certify(*given, KEY)).predicate.forgotten for given in (first, second)]
    assert digests[0].digest != digests[1].digest
    assert all(found.digest == salted_digest(found.salt, first[0].forget_digest) for found in digests)
    assert first[0].forget_digest.encode() not in build_statement(*first, OTHER).canonical()


def test_no_personal_data_is_copied():
    text = build_statement(*input_of(), OTHER).canonical().decode()
    assert [canary for canary in CANARIES if canary in text] == []


def test_nothing_to_erase_is_certified_for_the_searched_version():
    given = nothing()
    document = json.loads(build_statement(*given, OTHER).canonical())["predicate"]
    assert document["model"]["version"] == given[0].version.digest
    assert not {"procedure", "metrics", "gate", "supersedes"} & document.keys()
    assert "parent" not in document["model"]


JUDGED = judged(evidence_of())
OTHERS = judged(evidence_of().model_copy(update={"metrics": {}}))
SALUN = input_of()[0].version
CONTRADICTIONS = {
    "another version": ({"version": Version(OTHER, SALUN.manifest)}, "manifest"),
    "another line": ({"request": REQUEST.model_copy(update={"model_line": "cars"})}, "cars"),
    "no evidence": ({"documents": replace(JUDGED, evidence=None)}, "missing"),
    "no decision": ({"documents": replace(JUDGED, decision=None)}, "missing"),
    "none found": ({"found": 0}, "missing"),
    "another forget set": ({"frozen_digest": WEIGHTS}, "the claimed forget set"),
    "another model measured": ({"documents": judged(evidence_of(after=OTHER))}, "another model"),
    "another method measured": ({"documents": judged(evidence_of(method="finetune"))}, "another model"),
    "a decision of other evidence": ({"documents": replace(JUDGED, decision=OTHERS.decision)}, "gate's decision"),
    "retrained, says the outcome": (
        {"version": SALUN, "documents": JUDGED, "outcome": Outcome.RETRAINED},
        "made by salun",
    ),
    "nothing to erase, but samples": ({"outcome": Outcome.NOTHING_TO_ERASE, "run": None}, "nothing was erased"),
    "nothing to erase, but a run": ({"outcome": Outcome.NOTHING_TO_ERASE, "found": 0}, "nothing was erased"),
}


@pytest.mark.parametrize(("changed", "why"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_contradicting_input_is_not_signed(changed, why):
    with pytest.raises(IntegrityError, match=why):
        certify(*input_of(**changed), KEY)


def test_a_retrained_version_is_certified_as_such():
    assert opened(certify(*input_of(outcome=Outcome.RETRAINED), KEY)).predicate.procedure.method == "retrain"


def test_a_refused_version_is_not_certified():
    with pytest.raises(GateRefusedError):
        certify(
            *input_of(documents=replace(JUDGED, decision=JUDGED.decision.model_copy(update={"passed": False}))), KEY
        )


def test_a_configuration_without_a_canonical_form_is_not_signed():
    evidence = evidence_of()
    run = evidence.run.model_copy(update={"config": {"learning_rate": float("nan")}})
    with pytest.raises(IntegrityError, match="canonical"):
        certify(*input_of(documents=judged(evidence.model_copy(update={"run": run}))), KEY)


@pytest.mark.parametrize("given", [input_of, nothing])
def test_repeated_settles_give_one_certificate(store, given):
    first = issue(store, *given(), KEY)
    assert issue(store, *given(completed_at="2026-02-03T12:00:00+00:00"), KEY) == first  # other time, other salt
    assert read(store)[0] == first
    assert list(store.list("addenda/")) == []


def test_another_outcome_supersedes_and_keeps_the_certificate(store):
    first = issue(store, *nothing(), KEY)
    before = store.get(certificate_key("r-1")).data
    second = issue(store, *input_of(), KEY)
    digest, erasure = read(store)
    assert (digest, erasure.supersedes, erasure.outcome) == (second, first, Outcome.UNLEARNED)
    assert store.get(addendum_key("r-1", f"certificate-{first[:12]}.json")).data == before
    assert issue(store, *input_of(), KEY) == second


def test_the_next_settle_finishes_one_killed_between_copy_and_replacement(store):
    first = issue(store, *nothing(), KEY)
    store.put_new(addendum_key("r-1", f"certificate-{first[:12]}.json"), store.get(certificate_key("r-1")).data)
    second = issue(store, *input_of(), KEY)
    assert read(store)[0] == second
    assert len(list(store.list("addenda/"))) == 1


def test_a_certificate_of_another_key_is_superseded(store):
    stranger = Ed25519PrivateKey.generate()
    first = issue(store, *input_of(), stranger)
    second = issue(store, *input_of(), KEY)
    assert second != first
    assert read(store)[1].supersedes == first


class _Rival:
    """The store, where another settle of the same request is faster once."""

    def __init__(self, store, given):
        self._store, self._given = store, given
        self.winner = None

    def __getattr__(self, name):
        return getattr(self._store, name)

    def get(self, key):
        found = self._store.get(key)
        if self.winner is None:
            self.winner = issue(self._store, *self._given, KEY)
        return found


@pytest.mark.parametrize("earlier", [[], [nothing]])
def test_concurrent_settles_give_one_certificate(store, earlier):
    for given in earlier:
        issue(store, *given(), KEY)
    rival = _Rival(store, input_of())
    assert issue(rival, *input_of(), KEY) == rival.winner == read(store)[0]


def test_a_damaged_certificate_is_not_replaced(store):
    data = bytearray(certify(*input_of(), KEY))
    data[100] ^= 1
    store.put_new(certificate_key("r-1"), bytes(data))
    with pytest.raises(IntegrityError):
        issue(store, *input_of(), KEY)
    assert store.get(certificate_key("r-1")).data == data


def test_a_certificate_of_another_request_is_refused(store):
    other = input_of(request=REQUEST.model_copy(update={"id": "r-2"}))
    store.put_new(certificate_key("r-1"), certify(*other, KEY))
    with pytest.raises(IntegrityError, match="another request"):
        issue(store, *input_of(), KEY)


DONE = DisposalDone(what="superseded weights", at="2026-03-01T00:00:00+00:00")


def test_an_addendum_names_the_certificate_and_may_be_repeated(store):
    certificate = issue(store, *input_of(), KEY)
    first = issue_addendum(store, "r-1", [DONE], KEY)
    assert issue_addendum(store, "r-1", [DONE], KEY) == first
    (entry,) = store.list("addenda/")
    addendum = open_statement(DisposalAddendum, store.get(entry.key).data, [KEY.public_key()], "addendum")
    assert addendum.subject[0].digest.sha256 == certificate
    assert addendum.predicate.done == (DONE,)


def test_an_addendum_needs_a_certificate_and_something_that_was_deleted(store):
    with pytest.raises(UsageError, match="no certificate"):
        issue_addendum(store, "r-1", [DONE], KEY)
    issue(store, *input_of(), KEY)
    with pytest.raises(UsageError, match="done"):
        issue_addendum(store, "r-1", [], KEY)


def test_an_addendum_is_not_a_certificate(store):
    issue(store, *input_of(), KEY)
    issue_addendum(store, "r-1", [DONE], KEY)
    (entry,) = store.list("addenda/")
    with pytest.raises(IntegrityError):
        opened(store.get(entry.key).data)


def _edited(edit):
    document = json.loads(build_statement(*input_of(), OTHER).canonical())
    edit(document)
    return document


EDITS = {
    "a config of another digest": lambda d: d["predicate"]["procedure"]["config"].update(epochs=6),
    "no gate": lambda d: d["predicate"].pop("gate"),
    "a gate that refused": lambda d: d["predicate"]["gate"].update(passed=False),
    "nothing forgotten": lambda d: d["predicate"]["forgotten"].update(count=0),
    "a file twice": lambda d: d["subject"].append(d["subject"][0]),
    "a path as a file's name": lambda d: d["subject"][0].update(name="../model.json"),
    "no file": lambda d: d.update(subject=[]),
    "another predicate": lambda d: d.update(predicateType="urn:salun:erasure:v2"),
    "a later format": lambda d: d["predicate"].update(format="salun.certificate/v2"),
    "more": lambda d: d["predicate"].update(more=1),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_a_signed_statement_of_another_form_is_refused(edit):
    with pytest.raises(IntegrityError):
        opened(sign(canonical_json(_edited(edit)), PAYLOAD_TYPE, KEY))


def _predicate(**parts):
    """Return an edit that updates parts of the predicate."""

    def edit(document):
        for name, fields in parts.items():
            document["predicate"][name].update(fields)

    return edit


CONTRADICTIONS = {
    "it passed the gate, and the rule 'weights finite' failed": lambda d: d["predicate"]["gate"]["verdicts"][2].update(
        passed=False
    ),
    "it was completed before it was received": _predicate(request={"completed_at": "2026-01-30T09:00:00+00:00"}),
    "it was due before it was received": _predicate(request={"due_at": "2026-01-30T09:00:00+00:00"}),
    "5 samples were forgotten, and the request names 4": _predicate(forgotten={"count": 5}),
    "an erasure without a metric": lambda d: d["predicate"].update(metrics=[]),
    "no metric has a value after the erasure": lambda d: d["predicate"].update(
        metrics=[{"name": "UA", "before": 0.5, "n": 3}]
    ),
    "the metric UA stands twice": lambda d: d["predicate"]["metrics"].append({"name": "UA", "after": 1.0, "n": 3}),
    "its outcome is retrained, and its method salun": lambda d: d["predicate"].update(outcome="retrained"),
    "its level is retrained, and its outcome unlearned": _predicate(assurance={"level": "retrained"}),
    "its level is nothing_to_erase, and its outcome unlearned": _predicate(assurance={"level": "nothing_to_erase"}),
    "it was measured, and n is missing": lambda d: d["predicate"]["assurance"].pop("n"),
    "its margin has no n": _predicate(assurance={"n": 0}),
    "its margin has no power": lambda d: d["predicate"]["assurance"].pop("power"),
    "its power has no n": lambda d: d["predicate"].update(assurance={"level": "procedure", "power": 0.5}),
    "it was measured, and no rule on an interval is shown": lambda d: [
        verdict.pop("shown", None) for verdict in d["predicate"]["gate"]["verdicts"]
    ],
    "its version is its parent": lambda d: d["predicate"]["model"].update(parent=d["predicate"]["model"]["version"]),
}


@pytest.mark.parametrize(("why", "edit"), CONTRADICTIONS.items(), ids=CONTRADICTIONS)
def test_a_contradiction_is_refused_although_the_right_key_signed_it(why, edit, tmp_path):
    path, key = tmp_path / "certificate.json", tmp_path / "signer.pub"
    document = json.loads(build_statement(*input_of(), keyid(KEY.public_key())).canonical())
    key.write_bytes(public_pem(KEY.public_key()))
    path.write_bytes(sign(canonical_json(document), PAYLOAD_TYPE, KEY))
    assert verify_certificate(path, keys=[key]).certificate.predicate.gate.passed
    edit(document)
    path.write_bytes(sign(canonical_json(document), PAYLOAD_TYPE, KEY))
    with pytest.raises(IntegrityError, match="contradicts itself") as caught:
        verify_certificate(path, keys=[key])
    assert why in caught.value.why


LEVELS_OF_NOTHING = {
    "its level is measured, and its outcome nothing_to_erase": {"level": "measured", "n": 9},
    "its level is procedure, and its outcome nothing_to_erase": {"level": "procedure"},
    "nothing was erased, and its level has figures": {"level": "nothing_to_erase", "n": 9},
}


@pytest.mark.parametrize(("why", "level"), LEVELS_OF_NOTHING.items(), ids=LEVELS_OF_NOTHING)
def test_nothing_to_erase_has_no_other_level_and_no_figures(why, level):
    document = json.loads(build_statement(*nothing(), keyid(KEY.public_key())).canonical())
    assert document["predicate"]["assurance"] == {"level": "nothing_to_erase"}
    document["predicate"]["assurance"] = level
    with pytest.raises(IntegrityError, match=why):
        opened(sign(canonical_json(document), PAYLOAD_TYPE, KEY))


def test_the_level_is_that_of_the_decision_with_its_figures():
    found = opened(certify(*input_of(requests=1), KEY)).predicate.assurance
    assert (found.level, found.margin, found.n, found.requests) == ("measured", 0.1, 40, 1)
    retrained = opened(certify(*input_of(outcome=Outcome.RETRAINED), KEY)).predicate.assurance
    assert retrained.level == "retrained"


def test_a_request_of_a_batch_has_the_level_of_its_kind():
    """The classes are shown, and the samples are too few."""
    metrics = evidence_of().metrics | {
        "attack_auc": Metric(before=0.7, after=0.5, n=5, low=0.2, high=0.8),
        "UA_class": Metric(before=0.0, after=1.0, n=90, low=0.96, high=1.0),
        "restored": Metric(before=1.0, after=0.1, n=90, low=0.05, high=0.2),
    }
    forgotten = Forgotten(count=95, train_count=1200, kinds=["class", "subject"], classes=[3])
    documents = judged(evidence_of().model_copy(update={"metrics": metrics, "forgotten": forgotten}))
    assert (documents.decision.passed, documents.decision.level) == (True, "procedure")
    of_class = REQUEST.model_copy(update={"target": ClassTarget(class_index=3)})
    found = {
        request.target.kind: opened(
            certify(*input_of(documents=documents, request=request, requests=2), KEY)
        ).predicate.assurance
        for request in (REQUEST, of_class)
    }
    assert (found["class"].level, found["class"].n, found["class"].margin) == ("measured", 90, None)
    assert (found["subject"].level, found["subject"].n, found["subject"].margin) == ("procedure", 5, 0.1)
    assert all("evidence of a batch of 2 requests" in item.figures for item in found.values())
    share = RandomTarget(fraction=0.1, seed=1)  # samples, drawn at random
    drawn = forgotten.model_copy(update={"kinds": ["class", "samples"]})
    documents = judged(evidence_of().model_copy(update={"metrics": metrics, "forgotten": drawn}))
    decision = documents.decision.model_copy(update={"level": "measured"})  # that of the kind counts
    documents = replace(documents, decision=decision)
    random = certify(*input_of(documents=documents, request=REQUEST.model_copy(update={"target": share})), KEY)
    assert opened(random).predicate.assurance.level == "procedure"
    # A person may be one of the classes, and nothing tells which: both kinds of rules apply.
    mixed = forgotten.model_copy(update={"in_classes": 90})
    documents = judged(evidence_of().model_copy(update={"metrics": metrics, "forgotten": mixed}))
    assert documents.decision.kinds["subject"].level == "procedure"
    assert documents.decision.kinds["class"].level == "measured"


def test_a_contradiction_is_not_signed():
    facts, documents = input_of()
    failed = documents.decision.verdicts[0].model_copy(update={"passed": False})
    decision = documents.decision.model_copy(update={"verdicts": [failed, *documents.decision.verdicts[1:]]})
    with pytest.raises(IntegrityError, match="it passed the gate, and the rule 'forget set' failed"):
        build_statement(facts, replace(documents, decision=decision), OTHER)
    with pytest.raises(IntegrityError, match="9 samples were forgotten, and the request names 4"):
        build_statement(*input_of(found=9), OTHER)


def test_clocks_that_differ_by_minutes_are_no_contradiction():
    times = {"received_at": "2026-02-03T11:02:00+00:00", "completed_at": "2026-02-03T11:00:00+00:00"}
    document = _edited(_predicate(request=times))
    document["predicate"]["signer"] = keyid(KEY.public_key())
    opened(sign(canonical_json(document), PAYLOAD_TYPE, KEY))


def test_the_named_signer_must_be_the_signing_key():
    from salun_core.certificates.statement import sign_statement

    with pytest.raises(IntegrityError, match="another signer"):
        opened(sign_statement(build_statement(*input_of(), OTHER), KEY))
