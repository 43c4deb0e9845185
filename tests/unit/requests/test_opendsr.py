import json
from datetime import UTC, datetime

import pytest

from salun_core.data.targets import SubjectTarget
from salun_core.errors import UsageError
from salun_core.requests.intake import read_submissions

EMAIL = {"identity_type": "email", "identity_value": "secret@example.com", "identity_format": "raw"}
CUSTOMER = {"identity_type": "controller_customer_id", "identity_value": "person-7", "identity_format": "raw"}
REQUEST = {
    "regulation": "gdpr",
    "subject_request_id": "a7551968-d5d6-44b2-9831-815ac9017798",
    "subject_request_type": "erasure",
    "submitted_time": "2026-01-31T15:00:00Z",
    "subject_identities": [CUSTOMER],
    "api_version": "2.0",
    "status_callback_urls": ["https://controller.example/opendsr_callbacks"],
    "extensions": {"processor.example": {"property_id": "123456"}},
}


def read(line="faces", **changes):
    (found,) = read_submissions(json.dumps({**REQUEST, **changes}), "file", line)
    return found


def test_an_erasure_becomes_a_request():
    found = read()
    assert (found.id, found.model_line, found.source) == (REQUEST["subject_request_id"], "faces", "opendsr")
    assert found.target == SubjectTarget(subject_ref="person-7")
    assert found.received_at.astimezone(UTC) == datetime(2026, 1, 31, 15, tzinfo=UTC)


def test_version_1_without_a_regulation_is_read():
    old = {name: value for name, value in REQUEST.items() if name != "regulation"} | {"api_version": "1.0"}
    (found,) = read_submissions(json.dumps(old), "file", "faces")
    assert found.target.subject_ref == "person-7"


def test_lists_and_json_lines_may_hold_many():
    other = {**REQUEST, "subject_request_id": "A7551968-D5D6-44B2-9831-815AC9017799"}
    for text in (json.dumps([REQUEST, other]), json.dumps(REQUEST) + "\n" + json.dumps(other)):
        assert [found.id[-2:] for found in read_submissions(text, "file", "faces")] == ["98", "99"]


@pytest.mark.parametrize(
    ("identities", "chosen"),
    [([EMAIL], "secret@example.com"), ([EMAIL, CUSTOMER], "person-7"), ([CUSTOMER, EMAIL, EMAIL], "person-7")],
)
def test_the_controllers_own_identity_is_preferred(identities, chosen):
    assert read(subject_identities=identities).target.subject_ref == chosen


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"subject_request_type": "access"}, "does not ask for erasure.*'access'"),
        ({"subject_request_type": None}, "subject_request_type"),
        ({"subject_request_id": "../x"}, "subject_request_id"),
        ({"submitted_time": "2026-01-31T15:00:00"}, "submitted_time"),
        ({"submitted_time": 1769871600}, "submitted_time.*RFC 3339"),
        ({"submitted_time": None}, "submitted_time"),
        ({"api_version": "3.0"}, "api_version"),
        ({"subject_identities": []}, "names nobody"),
        ({"subject_identities": [EMAIL, EMAIL]}, "in 2 ways"),
        ({"subject_identities": [CUSTOMER, {**CUSTOMER, "identity_value": "person-8"}]}, "2 of them are of type"),
        ({"subject_identities": [{**EMAIL, "identity_format": "sha256"}]}, "by a hash.*'sha256'"),
        ({"subject_identities": [{**EMAIL, "identity_value": ""}]}, "identity_value"),
        ({"subject_identities": [{**EMAIL, "identity_value": "x" * 257}]}, "identity_value"),
        ({"subject_identities": [EMAIL] * 101}, "subject_identities"),
        ({"line": None}, "names no model line.*--line"),
        ({"line": "../x"}, "model_line"),
    ],
)
def test_an_unusable_request_is_refused_with_the_reason(changes, why):
    with pytest.raises(UsageError, match=why) as caught:
        read(**changes)
    assert "secret" not in str(caught.value)


def test_a_line_from_outside_is_for_opendsr_only():
    own = {"id": "r-1", "model_line": "faces", "target": {"kind": "class", "class_id": 3}}
    assert len(read_submissions(json.dumps([own]), "file")) == 1
    with pytest.raises(UsageError, match="1 of 2 requests have faults.*not an OpenDSR request"):
        read_submissions(json.dumps([own, REQUEST]), "file", "faces")
