import json
import re
import subprocess
import sys
import textwrap

import pytest
from typer.testing import CliRunner

from salun_core.cli.app import app
from salun_core.gate import Assurance
from salun_core.requests.ledger import Ledger, Transition
from salun_core.requests.schema import Outcome, Status
from salun_core.times import utc_clock
from tests.support.card_line import CLASSES, begin_classifier, begin_text_to_image, classifier_card
from tests.support.decisions import PROCEDURE

VERBS = ["submit", "show", "list", "hold", "release", "cancel", "retry", "reopen", "reindex"]
FILE = ["submit", "--id", "r-1", "--line", "faces"]
SAMPLES = [*FILE, "--samples", "secret-1,secret-2"]


@pytest.fixture
def invoke(store, monkeypatch):
    begin_classifier(store, "faces")
    monkeypatch.setenv("SALUN_STORE_URI", store.uri)
    monkeypatch.setenv("SALUN_ACTOR", "ana")
    return lambda *arguments, input=None: CliRunner().invoke(app, ["request", *arguments], input=input)


@pytest.fixture
def run(invoke):
    """Run `salun request` on the store and return what it printed."""

    def call(*arguments, input=None):
        result = invoke(*arguments, input=input)
        assert (result.exit_code, result.stderr) == (0, ""), result.output
        return result.stdout

    return call


@pytest.fixture
def refused(invoke):
    """Run `salun request`, which must end with this exit code, and return its one line on standard error."""

    def call(code, *arguments):
        result = invoke(*arguments)
        assert result.exit_code == code, result.output
        (line,) = result.stderr.splitlines()
        assert line.startswith("Error: ")
        return line

    return call


@pytest.fixture
def ledger(store):
    return Ledger(store, utc_clock)


def entry(number, **changes):
    target = {"kind": "samples", "ids": [f"secret-{number}"]}
    return {"id": f"r-{number}", "model_line": "faces", "target": target, **changes}


@pytest.mark.parametrize("verb", VERBS)
def test_each_help_ends_in_an_example_with_its_output(run, verb):
    lines = run(verb, "--help").strip().splitlines()
    example = [line.strip() for line in lines[lines.index(next(line for line in lines if "Example:" in line)) :]]
    assert any(line.startswith(f"$ salun request {verb}") for line in example)
    assert len([line for line in example if line and not line.startswith(("$", "Example"))]) >= 1


def test_the_group_loads_nothing_heavy():
    code = "import sys, salun_core.cli.requests; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"boto3", "torch", "pydantic", "yaml", "salun_core.requests.ledger"} & set(loaded)


CONCEPT = {"kind": "concept", "prompts": ["secret cat", "secret dog"], "anchor_prompt": "a secret", "images": 8}


class TestConcepts:
    @pytest.fixture(autouse=True)
    def _line(self, store):
        begin_text_to_image(store, "sd", judge="judge", classes=CLASSES, data={"source": "/no-such-folder/images"})
        begin_classifier(store, "judge")
        begin_text_to_image(store, "unjudged")
        begin_text_to_image(store, "misjudged", judge="base")

    def test_a_concept_is_filed_by_its_text_or_by_a_file(self, run, refused, ledger, tmp_path):
        run("submit", "--id", "r-1", "--line", "sd", "--concept", "secret cat", "--anchor", "a dog")
        target = ledger.get("r-1").target
        assert (target.prompts, target.anchor_prompt, target.images) == (["secret cat"], "a dog", 64)
        path = tmp_path / "concept.yaml"
        path.write_text("prompts: [secret cat, secret kitten]\nanchor_prompt: a dog\nimages: 8\nneighbours: [a lynx]\n")
        run("submit", "--id", "r-2", "--line", "sd", "--concept", str(path))
        target = ledger.get("r-2").target
        assert (len(target.prompts), target.images, target.neighbours) == (2, 8, ["a lynx"])
        run("submit", "--id", "r-3", "--line", "sd", "--concept", str(path), "--anchor", "a horse")
        assert ledger.get("r-3").target.anchor_prompt == "a horse"
        path.write_text("id: r-1")
        assert '"anchor_prompt": "a dog"' in refused(2, "submit", "--id", "r-4", "--line", "sd", "--concept", str(path))
        assert "cannot read" in refused(2, "submit", "--id", "r-4", "--line", "sd", "--concept", "no-such.yaml")

    def test_a_line_without_an_image_classifier_is_named_before_filing(self, run):
        concept = ["--concept", "secret cat", "--anchor", "a dog"]
        assert "warning: the line has no image classifier" in run(
            "submit", "--id", "r-1", "--line", "unjudged", *concept
        )
        (receipt,) = json.loads(run("submit", "--id", "r-1", "--line", "unjudged", *concept, "--json"))
        assert "cannot be measured" in receipt["match"]["warnings"][0]
        assert "warning" not in run("submit", "--id", "r-2", "--line", "sd", *concept)

    def test_an_image_classifier_that_the_store_does_not_have_is_named_before_filing(self, run, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        concept = ["--line", "misjudged", "--concept", "secret cat", "--anchor", "a dog"]
        assert "'base' is neither a model line of this store nor a folder" in run("submit", "--id", "r-1", *concept)
        (tmp_path / "base").mkdir()
        assert "'base' is not a model folder" in run("submit", "--id", "r-2", *concept)
        (tmp_path / "base" / "model.json").write_text(classifier_card().model_dump_json())
        assert "'base' is a folder of this machine, so in a pod, UA" in run("submit", "--id", "r-3", *concept)

    def test_a_concept_is_shown_by_its_number_of_prompts(self, run, ledger):
        target = {**CONCEPT, "neighbours": ["secret mouse"]}
        run("submit", "-", input=json.dumps(entry(1, model_line="sd", target=target)))
        assert ledger.get("r-1").target.neighbours == ["secret mouse"]
        for arguments in (["show", "r-1"], ["show", "r-1", "--json"], ["list"], ["list", "--json"]):
            told = run(*arguments)
            assert "1 concept by 2 prompts" in " ".join(told.split())
            assert "secret" not in told
        assert "secret mouse" in run("show", "r-1", "--target")

    def test_an_invalid_concept_is_refused_without_showing_prompts(self, refused, ledger, tmp_path):
        path = tmp_path / "request.json"
        path.write_text(json.dumps(entry(1, target={**CONCEPT, "anchor_prompt": "Secret  CAT"})))
        line = refused(2, "submit", str(path))
        assert "a prompt equals `anchor_prompt`" in line
        assert "secret" not in line.lower().replace(str(tmp_path).lower(), "")
        assert list(ledger.list()) == []


class TestSubmit:
    @pytest.mark.parametrize(
        ("flags", "target"),
        [
            (["--samples", "a, b"], {"kind": "samples", "ids": ["a", "b"]}),
            (["--class", "3"], {"kind": "class", "class_id": 3}),
            (["--class", "cat"], {"kind": "class", "class_id": "cat"}),
            (["--class", "00001"], {"kind": "class", "class_id": "00001"}),
            (["--class-name", "00001"], {"kind": "class", "class_name": "00001"}),
            (["--class-index", "1"], {"kind": "class", "class_index": 1}),
            (["--subject", "person-7"], {"kind": "subject", "subject_ref": "person-7"}),
        ],
    )
    def test_by_flags(self, run, ledger, flags, target):
        (receipt,) = json.loads(run(*FILE, *flags, "--received-at", "2026-01-31", "--source", "ticket", "--json"))
        assert receipt["due_at"] == "2026-02-28T00:00:00+00:00"
        request = ledger.get("r-1")
        assert request.target.model_dump(exclude_none=True) == target
        assert request.source == "ticket"
        assert ledger.events("r-1")[0].actor == "ana"

    def test_by_file_and_by_stdin(self, run, ledger, tmp_path):
        file = tmp_path / "requests.jsonl"
        file.write_text("\n".join(json.dumps(entry(number)) for number in range(40)))
        assert "40 requests filed" in run("submit", str(file))
        assert "r-7" in run("submit", "-", input=json.dumps(entry(7)))
        assert len(ledger.list(statuses=[Status.QUEUED])) == 40

    def test_opendsr_with_a_line(self, run, refused, ledger, tmp_path):
        file, number = tmp_path / "erasure.json", "a7551968-d5d6-44b2-9831-815ac9017798"
        identity = {"identity_type": "email", "identity_value": "secret@example.com", "identity_format": "raw"}
        request = {
            "regulation": "gdpr",
            "subject_request_id": number,
            "subject_request_type": "erasure",
            "submitted_time": "2026-01-31T15:00:00Z",
            "subject_identities": [identity],
        }
        file.write_text(json.dumps(request))
        assert "give --line" in refused(2, "submit", str(file))
        assert "secret" not in run("submit", str(file), "--line", "faces")
        state = ledger.state(number)
        assert (state.request.target.subject_ref, state.request.source) == ("secret@example.com", "opendsr")
        assert state.request.due_at == "2026-02-28T15:00:00+00:00"

    def test_the_table_shows_the_receipt_and_not_the_target(self, run):
        text = run(*SAMPLES, "--received-at", "2026-01-31")
        assert "2026-02-28 00:00" in text
        assert "secret" not in text

    def test_filing_again_is_harmless_and_other_content_a_conflict(self, run, refused):
        first = run(*SAMPLES, "--json")
        assert run(*SAMPLES, "--json") == first
        assert "request r-1 exists already" in refused(4, *FILE, "--samples", "other")

    def test_refused_requests_are_counted_and_the_others_filed(self, run, refused, ledger, store, tmp_path):
        run(*SAMPLES)
        file = tmp_path / "requests.json"
        begin_classifier(store, "cats")
        file.write_text(json.dumps([entry(0), entry(1, model_line="cats"), entry(2)]))
        assert "1 of 3 requests were refused: request r-1 exists already" in refused(4, "submit", str(file))
        assert [state.request.id for state in ledger.list(line="faces")] == ["r-1", "r-0", "r-2"]

    def test_dry_run_writes_nothing(self, run, store):
        before = [entry.key for entry in store.list("")]
        assert "nothing was written" in run(*SAMPLES, "--dry-run")
        assert [entry.key for entry in store.list("")] == before

    @pytest.mark.parametrize(
        "arguments",
        [
            ["submit"],
            ["submit", "no-such-file.json"],
            ["submit", "no-such-file.json", "--id", "r-1"],
            FILE,
            [*SAMPLES, "--class", "3"],
            [*FILE, "--samples", ""],
            [*SAMPLES, "--received-at", "soon"],
            [*SAMPLES, "--received-at", "2999-01-01"],
            ["submit", "--id", "R 1", "--line", "faces", "--class", "3"],
        ],
    )
    def test_a_wrong_call_is_refused(self, refused, store, arguments):
        assert "To fix it: " in refused(2, *arguments)
        assert [*store.list("requests/"), *store.list("index/")] == []

    def test_a_terminal_shows_progress(self, real_store, tmp_path, salun_path):
        """On a real pseudo-terminal; elsewhere standard error stays empty."""
        store = real_store
        begin_classifier(store, "faces")
        file = tmp_path / "requests.json"
        file.write_text(json.dumps([entry(number) for number in range(20)]))
        script = """
            import os, pty, sys
            sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))
        """
        call = [str(salun_path), "request", "submit", str(file), "--yes", "--store", store.uri]
        command = [sys.executable, "-c", textwrap.dedent(script), *call]
        shown = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
        assert shown.returncode == 0, shown.stdout
        assert "filing requests" in shown.stdout
        assert "20/20" in shown.stdout
        quiet = subprocess.run(call, capture_output=True, text=True, check=True, timeout=120)
        assert quiet.stderr == ""


class TestShow:
    def test_status_and_transitions(self, run, ledger):
        run(*SAMPLES)
        ledger.move("r-1", Transition(Status.IN_PROGRESS, "sweep", "claimed", run="run-1"))
        ledger.move(
            "r-1",
            Transition(Status.COMPLETED, "sweep", "[bold]published[/]", outcome=Outcome.UNLEARNED, assurance=PROCEDURE),
        )
        text = run("show", "r-1")
        assert text.startswith("r-1: completed: unlearned, due ")
        assert "2 samples" in text
        assert "completed: unlearned" in text
        assert "[bold]published[/]" in text
        assert "secret" not in text
        assert run("status", "r-1") == text

    def test_the_level_of_a_completed_request_is_shown_and_listed(self, run, ledger):
        run(*SAMPLES)
        ledger.move("r-1", Transition(Status.IN_PROGRESS, "sweep", "claimed", run="run-1"))
        level = Assurance(level="procedure", margin=0.1, n=5, power=0.0, requests=3)
        done = Transition(Status.COMPLETED, "sweep", "published", outcome=Outcome.UNLEARNED, assurance=level)
        ledger.move("r-1", done)
        text = run("show", "r-1")
        assert "level procedure: margin 0.1, n 5, power 0%, evidence of a batch of 3 requests\n" in text
        assert "does not show that the model forgot this data" in " ".join(text.split())
        shown = json.loads(run("show", "r-1", "--json"))
        assert shown["assurance"] == level.model_dump() == shown["events"][-1]["assurance"]
        assert json.loads(run("list", "--json"))[0]["level"] == "procedure"
        assert re.search(r"completed: unlearned +procedure ", run("list"))

    def test_the_target_is_shown_only_on_demand(self, run):
        run(*SAMPLES)
        hidden, shown = json.loads(run("show", "r-1", "--json")), json.loads(run("show", "r-1", "--target", "--json"))
        assert hidden["request"]["target"] == {"kind": "samples", "summary": "2 samples"}
        assert shown["request"]["target"] == {"kind": "samples", "ids": ["secret-1", "secret-2"]}
        assert "secret-1" in run("show", "r-1", "--target")
        assert (hidden["status"], hidden["overdue"], len(hidden["events"])) == ("queued", False, 1)

    def test_overdue_is_shown(self, run):
        run(*SAMPLES, "--received-at", "2020-01-31")
        assert "queued, overdue, due 2020-02-29" in run("show", "r-1")
        run("cancel", "r-1", "--reason", "withdrawn")
        assert "overdue" not in run("show", "r-1")

    def test_an_unknown_id_names_the_nearest(self, run, refused):
        run(*SAMPLES)
        assert "did you mean 'r-1'" in refused(2, "show", "r-2")


class TestList:
    def test_filters(self, run, ledger):
        for number, day in enumerate(["2026-01-10", "2026-01-20", "2020-01-30"]):
            run("submit", "--id", f"r-{number}", "--line", "faces", "--samples", "secret-1", "--received-at", day)
        run("hold", "r-1", "--reason", "in doubt")

        def ids(*flags):
            return [row["id"] for row in json.loads(run("list", "--json", *flags))]

        assert ids() == ["r-2", "r-0", "r-1"]
        assert ids("--status", "on_hold") == ["r-1"]
        assert ids("--due-before", "2026-02-20") == ["r-2", "r-0"]
        assert ids("--line", "cats") == []
        text = run("list")
        assert "queued, overdue" in text
        assert "secret" not in text
        assert run("list", "--line", "cats") == "no requests\n"
        assert json.loads(run("list", "--json"))[0]["overdue"] is True

    def test_an_unknown_status_names_the_nearest(self, refused):
        assert "did you mean 'queued'" in refused(2, "list", "--status", "queue")


class TestReindex:
    def test_it_repairs_and_reports_the_number(self, run, store):
        run(*SAMPLES)
        (entry,) = [row.key for row in store.list("index/")]
        store.delete(entry)
        assert run("list") == "no requests\n"
        assert "1 (dry run" in run("reindex", "--dry-run")
        assert json.loads(run("reindex", "--json")) == {"changed": 1}
        assert run("reindex") == "index entries put or deleted: 0\n"
        assert [row.key for row in store.list("index/")] == [entry]


class TestMoves:
    def test_hold_release_cancel(self, run, ledger):
        run(*SAMPLES)
        assert run("hold", "r-1", "--reason", "in doubt") == "r-1: queued -> on_hold (event 2)\n"
        assert run("release", "r-1", "--reason", "clear") == (
            "r-1: on_hold -> queued (event 3)\nthe next sweep that claims it erases what it names\n"
        )
        event = json.loads(run("cancel", "r-1", "--reason", "withdrawn", "--actor", "bob", "--json"))
        assert (event["to_status"], event["actor"], event["reason"]) == ("cancelled", "bob", "withdrawn")
        assert ledger.status("r-1") is Status.CANCELLED
        shown = run("show", "r-1", "--target")
        assert "2 samples (redacted)" in shown
        assert "secret" not in shown

    @pytest.mark.parametrize(("end", "verb"), [(Status.FAILED, "retry"), (Status.COMPLETED, "reopen")])
    def test_retry_and_reopen(self, run, ledger, end, verb):
        run(*SAMPLES)
        ledger.move("r-1", Transition(Status.IN_PROGRESS, "sweep", "claimed"))
        outcome = Outcome.RETRAINED if end is Status.COMPLETED else None
        assurance = PROCEDURE if outcome else None
        ledger.move("r-1", Transition(end, "sweep", "ended", outcome=outcome, assurance=assurance))
        assert f"{end} -> queued" in run(verb, "r-1", "--reason", "again")

    @pytest.mark.parametrize("verb", ["hold", "release", "cancel", "retry", "reopen"])
    def test_dry_run_checks_and_writes_nothing(self, run, refused, store, verb):
        run(*SAMPLES)
        before = [entry.key for entry in store.list("")]
        if verb in {"hold", "cancel"}:
            assert "nothing was written" in run(verb, "r-1", "--reason", "test", "--dry-run")
        else:
            assert "r-1 is queued" in refused(4, verb, "r-1", "--reason", "test", "--dry-run")
        assert [entry.key for entry in store.list("")] == before
