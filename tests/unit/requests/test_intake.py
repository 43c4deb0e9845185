import json
from datetime import UTC, datetime

import pytest

from salun_core.data.targets import SamplesTarget
from salun_core.errors import ConflictError, StoreError, UsageError
from salun_core.requests.intake import read_submissions, submit_all
from salun_core.requests.ledger import Ledger
from salun_core.requests.schema import Status
from salun_core.storage.s3 import S3Store
from salun_core.times import utc_clock

ONE = {"id": "r-1", "model_line": "faces", "target": {"kind": "samples", "ids": ["img-1"]}}
TWO = {**ONE, "id": "r-2", "received_at": "2026-01-31T09:00:00+02:00", "source": "line\u2028separator"}
YAML = """
- id: r-1
  model_line: faces
  target: {kind: samples, ids: [img-1]}
- id: r-2
  model_line: faces
  target: {kind: class, class_id: 3}
  received_at: 2026-01-31T09:00:00Z
"""


def dump(document):
    return json.dumps(document, ensure_ascii=False)


class TestRead:
    @pytest.mark.parametrize(
        "text",
        [
            dump([ONE, TWO]),
            json.dumps([ONE, TWO], indent=1),
            dump(ONE) + "\n" + dump(TWO),
            dump(ONE) + "\r\n\r\n  " + dump(TWO) + "\n",
        ],
    )
    def test_json_and_json_lines_give_the_same_requests(self, text):
        first, second = read_submissions(text, "file")
        assert (first.id, first.target, first.received_at) == ("r-1", SamplesTarget(ids=["img-1"]), None)
        assert second.received_at.astimezone(UTC) == datetime(2026, 1, 31, 7, tzinfo=UTC)
        assert second.source == TWO["source"]

    def test_yaml_with_many_and_with_one(self):
        first, second = read_submissions(YAML, "file")
        assert (first.id, second.target.class_id) == ("r-1", 3)
        assert second.received_at == datetime(2026, 1, 31, 9, tzinfo=UTC)
        assert read_submissions(dump(ONE), "file") == [first]

    def test_all_faulty_entries_are_counted_and_named(self):
        bad = [{**ONE, "id": f"R {number}"} for number in range(3)]
        with pytest.raises(UsageError, match=r"3 of 4 requests have faults.*file\[1\].*file\[3\]"):
            read_submissions(dump([ONE, *bad]), "file")
        with pytest.raises(UsageError, match=r"1 of 3 requests.*file:3"):
            read_submissions("\n".join(map(dump, [ONE, TWO, {"id": "r-3"}])), "file")

    def test_an_unknown_key_names_the_nearest(self):
        with pytest.raises(UsageError, match="did you mean 'model_line'"):
            read_submissions(dump({"id": "r-1", "model_lin": "faces", "target": ONE["target"]}), "file")

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "[]",
            "null",
            "3",
            "[3]",
            "hello",
            "{",
            "[" * 100_000,
            dump({**ONE, "received_at": "2026-01-31T09:00:00"}),
        ],
    )
    def test_an_invalid_request_is_refused(self, text):
        with pytest.raises(UsageError):
            read_submissions(text, "file")

    def test_a_repeated_id_needs_the_same_content(self):
        assert len(read_submissions(dump([ONE, ONE]), "file")) == 2
        with pytest.raises(UsageError, match="two requests 'r-1'"):
            read_submissions(dump([ONE, {**ONE, "model_line": "cats"}]), "file")

    def test_faults_do_not_show_what_was_named(self):
        entry = {**ONE, "target": {"kind": "samples", "ids": ["secret-1", 7]}, "source": "secret-2\n"}
        with pytest.raises(UsageError) as caught:
            read_submissions(dump(entry), "file")
        assert "secret" not in str(caught.value)


class TestSubmitAll:
    def test_many_are_filed_in_order_and_each_is_reported(self, ledger):
        many = read_submissions(dump([{**ONE, "id": f"r-{number}"} for number in range(20)]), "file")
        done = []
        filed = submit_all(ledger, many, "ana", lambda: done.append(1))
        assert [receipt.id for receipt in filed.receipts] == [item.id for item in many]
        assert (len(filed.refused), len(done)) == (0, 20)
        assert len(ledger.list(statuses=[Status.QUEUED])) == 20
        assert submit_all(ledger, many, "ana") == filed
        assert {state.last.actor for state in ledger.list()} == {"ana"}

    def test_one_that_is_refused_does_not_stop_the_others(self, ledger):
        ledger.submit("r-2", "cats", SamplesTarget(ids=["img-1"]))
        filed = submit_all(ledger, read_submissions(dump([ONE, TWO, {**ONE, "id": "r-3"}]), "file"), "ana")
        assert [receipt.id for receipt in filed.receipts] == ["r-1", "r-3"]
        (refused,) = filed.refused
        assert isinstance(refused, ConflictError)
        assert "r-2" in str(refused)

    def test_a_store_that_refuses_access_stops_filing(self, s3_server):
        ledger = Ledger(S3Store("no-such-bucket"), utc_clock)
        with pytest.raises(StoreError, match="no-such-bucket"):
            submit_all(ledger, read_submissions(dump([ONE, TWO]), "file"), "ana")
