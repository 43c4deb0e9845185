"""`python -m pipelines` against a Kubeflow API on loopback, by the real kfp client."""

import functools
import json
import os
import re
import signal
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from pipelines import client, packages, runs, schedules
from pipelines import compile as compiling
from pipelines.cli import app
from pipelines.packages import form_table, load_package, native_text
from salun_core.config import parse
from salun_core.errors import SalunError, UsageError
from salun_core.steps.outcome import new_outcome, write_outcome
from salun_core.steps.run_form import DeletionSweepForm
from tests.pipelines.fake_kfp import FakeKubeflow, RefusedError
from tests.support.forked import forked_module

ROOT = Path(__file__).resolve().parents[2]
FORM = ("--model-line", "digits", "--store-uri", "s3://salun/demo")
_load = functools.lru_cache(load_package)  # reading and digesting takes longer than all the rest of a test
SWEEP = _load("deletion-sweep")
UI = "http://ui.example"
JWT = "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJzdWJtaXR0ZXIifQ.c2lnbmF0dXJl"


@pytest.fixture
def fake(monkeypatch, request):
    kubeflows = ("KFP_ENDPOINT", "KFP_UI_ENDPOINT", "KFP_NAMESPACE", "KF_PIPELINES_SA_TOKEN_PATH")
    for name in (*kubeflows, "SALUN_IMAGE", "SALUN_STORE_URI", "SALUN_S3_SECRETS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(client, "ATTEMPTS", 4)
    monkeypatch.setattr(runs, "SETTLING", 0.0)
    monkeypatch.setattr(packages, "load_package", _load)
    server = FakeKubeflow()
    monkeypatch.setenv("KFP_ENDPOINT", server.host)
    monkeypatch.setenv("KFP_UI_ENDPOINT", UI)
    if "store" not in request.fixturenames:  # a machine without credentials for the store
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
            monkeypatch.delenv(name, raising=False)
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            monkeypatch.setenv(name, os.devnull)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    yield server
    server.close()


def run(*words):
    """Exit code, standard output and standard error of a command, as `main` would end it."""
    result = CliRunner().invoke(app, list(words))
    error = result.exception
    if isinstance(error, SalunError):
        return error.exit_code, result.stdout, f"{result.stderr}Error: {error}"
    if error is not None and not isinstance(error, SystemExit):
        raise error
    return result.exit_code, result.stdout, result.stderr


def submit(*words, wait=False):
    return run("submit", *FORM, "--slot", "2026-11-24", "--poll", "0.05", "--wait" if wait else "--no-wait", *words)


def to(state, **tasks):
    """A step of the script: what the next look at the run finds; tasks are named in the order of their start."""
    given = {name.replace("_", "-"): value for name, value in tasks.items()}
    return lambda server, item: server.report(item, state, given)


def test_register_is_idempotent_and_names_the_digest(fake):
    code, first, _ = run("register")
    assert code == 0
    assert first.count("uploaded") == len(packages.shipped()) == 6
    names = sorted(version["display_name"] for version in fake.versions.values())
    assert SWEEP.version in names
    assert all(
        re.fullmatch(r"salun-(unlearning|deletion-sweep|deletion-sweep-compact)(-cpu)?-[0-9a-f]{12}", name)
        for name in names
    )
    code, second, _ = run("register")
    assert code == 0
    assert second == first.replace("uploaded ", "was there")
    assert (len(fake.pipelines), len(fake.versions)) == (6, 6)


def test_all_pipelines_are_registered_at_once(fake):
    shipped = packages.shipped()
    meet = threading.Barrier(len(shipped), timeout=20)  # one after the other they would never meet
    fake.during_upload = meet.wait
    code, out, error = run("register")
    assert (code, out.count("uploaded")) == (0, len(shipped)), error
    names = [load_package(name).name for name in shipped]
    assert [line.split()[1].rpartition("-")[0] for line in out.splitlines()] == names


def test_versions_that_kubectl_applied_are_found(fake):
    fake.native = True
    fake.apply(*yaml.safe_load_all(native_text(SWEEP)))
    code, out, error = run("register", "--pipeline", "deletion-sweep")
    assert (code, len(fake.pipelines), len(fake.versions)) == (0, 1, 1), error
    assert out.startswith(f"was there  {SWEEP.version}")
    assert submit()[0] == 0
    assert (len(fake.versions), len(fake.runs)) == (1, 1)
    assert fake.count("POST", "/pipelines") == 0


@pytest.mark.parametrize("native", [False, True])
def test_a_version_of_the_same_digest_under_another_name_is_found(fake, native):
    fake.native = native
    pipeline, version = yaml.safe_load_all(native_text(SWEEP))
    version["metadata"]["name"] = version["spec"]["displayName"] = "by-hand"
    version["spec"]["pipelineSpec"]["sdkVersion"] = "kfp-9"
    fake.apply(pipeline, version)
    other = {**version, "metadata": {"name": "changed"}, "spec": {**version["spec"], "displayName": "changed"}}
    other["spec"]["platformSpec"] = {"platforms": {}}
    ours = fake.apply(pipeline, other)
    fake.pipelines = dict([next(iter(fake.pipelines.items()))])
    ours["pipeline_id"] = next(iter(fake.pipelines))
    assert run("register", "--pipeline", "deletion-sweep")[1].startswith("was there")
    assert len(fake.versions) == 2


def test_an_uploaded_version_is_found_in_kubernetes_and_on_later_pages(fake):
    fake.native = True
    for number in range(5):
        run("register", "--pipeline", "unlearning", "--image", f"registry.example/salun:{number}")
    assert {item["name"].count("salun-unlearning") for item in fake.versions.values()} == {2}
    run("register", "--pipeline", "unlearning", "--image", "registry.example/salun:0")
    assert len(fake.versions) == 5


def test_a_refused_upload_says_why(fake):
    fake.faults += [("POST", "upload_version", 400)]
    code, _, error = run("register", "--pipeline", "unlearning")
    assert code == 2
    assert "Kubeflow refuses to create pipelines (400): injected 400" in error


def test_without_the_address_of_the_interface_there_are_no_links(fake, monkeypatch):
    monkeypatch.delenv("KFP_UI_ENDPOINT")
    code, out, said = submit()
    (run_id,) = fake.runs
    assert code == 0
    assert out.strip() == run_id
    assert said.splitlines()[1:] == [
        "Ids are printed in place of links: KFP_UI_ENDPOINT (--ui-host) names the user interface's address.",
        f"submitted  {run_id}",
    ]
    document = json.loads(submit("--json")[1])
    assert document == {"run_id": run_id, "url": None, "made": False}
    for words in (("status",), ("register",), ("schedule", *FORM)):
        assert "://" not in run(*words)[1].replace("s3://", "")


def test_another_image_is_another_version(fake):
    run("register", "--pipeline", "unlearning")
    run("register", "--pipeline", "unlearning", "--image", "registry.example/salun@sha256:00")
    assert (len(fake.pipelines), len(fake.versions)) == (1, 2)
    spec = list(fake.versions.values())[1]["pipeline_spec"]["pipeline_spec"]
    images = {item["container"]["image"] for item in spec["deploymentSpec"]["executors"].values()}
    assert images == {"registry.example/salun@sha256:00"}


def test_secrets_of_single_steps_are_another_version(fake, monkeypatch):
    monkeypatch.setattr(packages, "load_package", load_package)  # one that looks at the environment each time
    monkeypatch.setenv("SALUN_S3_SECRETS", "gate_publish=salun-s3-publisher")
    run("register", "--pipeline", "deletion-sweep")
    (version,) = fake.versions.values()
    assert version["display_name"] != SWEEP.version
    pods = version["pipeline_spec"]["platform_spec"]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    named = {name: source["secretName"] for name, pod in pods.items() for source in pod["secretAsEnv"]}
    assert named.pop("exec-gate-publish") == "salun-s3-publisher"
    assert set(named.values()) == {"salun-s3"}
    monkeypatch.setenv("SALUN_S3_SECRETS", "unlearn=A B")
    code, _, error = run("register")
    assert (code, len(fake.versions)) == (2, 1)
    assert "'A B' is not a valid name of a Secret" in error


def test_a_sweep_that_is_submitted_twice_runs_once(fake):
    code, first, said = submit("--max-requests", "8", "--service-account", "runner")
    assert (code, len(fake.runs)) == (0, 1)
    (item,) = fake.runs.values()
    assert first.strip() == item["run_id"]
    assert f"{UI}/#/runs/details/{item['run_id']}" in said
    assert item["service_account"] == "runner"
    assert item["runtime_config"]["parameters"] == {
        "model_line": "digits",
        "store_uri": "s3://salun/demo",
        "max_requests": 8,
    }
    code, second, said = submit("--max-requests=8")
    assert (code, second, len(fake.runs)) == (0, first, 1)
    assert "was there" in said


@pytest.mark.parametrize(
    ("state", "runs"), [("RUNNING", 1), ("SUCCEEDED", 1), ("FAILED", 2), ("CANCELED", 2), ("CANCELING", 2)]
)
def test_active_and_succeeded_runs_replace_equal_work(fake, state, runs):
    submit()
    next(iter(fake.runs.values()))["state"] = state
    assert submit()[0] == 0
    assert len(fake.runs) == runs


def test_other_work_is_another_run(fake):
    submit()
    submit("--seed", "1")
    submit("--slot", "2026-11-25")
    submit("--image", "registry.example/salun@sha256:00")
    assert len(fake.runs) == 4
    assert len({item["display_name"] for item in fake.runs.values()}) == 4


def test_default_slot_is_the_hour_for_sweeps_and_empty_for_unlearning(fake):
    forget = ("--forget-manifest-uri", "s3://salun/demo/forget.json")
    run("submit", *FORM, "--no-wait")
    run("submit", "--pipeline", "unlearning", *FORM, *forget, "--no-wait")
    sweep, unlearning = (item["display_name"] for item in fake.runs.values())
    assert re.fullmatch(r"salun-deletion-sweep digits \d{4}-\d\d-\d\dT\d\dZ [0-9a-f]{12}", sweep)
    assert re.fullmatch(r"salun-unlearning digits [0-9a-f]{12}", unlearning)


@pytest.mark.parametrize("what", [503, "lost"])
@pytest.mark.parametrize("path", ["/experiments", "/pipelines", "/pipelines/upload_version", "/runs"])
def test_failed_or_lost_reply_creates_nothing_twice(fake, what, path):
    fake.faults.append(("POST", f"{path}$", what))
    code, _, error = submit()
    assert (code, fake.faults) == (0, []), error
    assert [len(table) for table in (fake.experiments, fake.pipelines, fake.versions, fake.runs)] == [1] * 4


@pytest.mark.parametrize("what", [500, "cut"])
def test_reads_are_retried(fake, what):
    fake.faults += [("GET", path, what) for path in ("/healthz", "/experiments", "/pipelines$", "/versions", "/runs")]
    assert submit()[0] == 0
    assert fake.faults == []


def test_retries_are_bounded_and_report_the_failure(fake):
    fake.faults += [("POST", "/runs$", 503)] * 9
    code, _, error = submit()
    assert code == 1
    assert "Kubeflow fails to create runs (503): injected 503" in error
    assert fake.count("POST", "/runs$") == client.ATTEMPTS


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_a_refusal_is_not_retried(fake, status):
    fake.faults += [("POST", "/runs$", status)] * 2
    assert submit()[0] == (2 if status == 400 else 1)
    assert fake.count("POST", "/runs$") == 1


def test_two_submitters_at_once_leave_one_run(fake, monkeypatch):
    run("submit", "--model-line", "other", "--store-uri", "s3://salun/demo", "--no-wait")  # registers, too
    fake.runs.clear()
    monkeypatch.setattr(runs, "SETTLING", 1.2)
    meet = threading.Barrier(2, timeout=20)
    listing = runs._first
    local = threading.local()

    def both_found_nothing(*args):
        found = listing(*args)
        if not getattr(local, "met", False):
            local.met = True
            meet.wait()
        return found

    monkeypatch.setattr(runs, "_first", both_found_nothing)
    outcomes = []
    api = client.connect(fake.host)
    job = runs.Job(SWEEP, {"model_line": "digits", "store_uri": "s3://salun/demo"})
    both = [threading.Thread(target=lambda: outcomes.append(runs.submit(api, job, "2026-11-24"))) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join(30)
    assert sorted(item["state"] for item in fake.runs.values()) == ["CANCELED", "PENDING"]
    (alive,) = [item["run_id"] for item in fake.runs.values() if item["state"] == "PENDING"]
    assert sorted(outcomes) == [(alive, False), (alive, True)]


def test_the_loser_without_the_right_to_terminate_names_the_winner(fake, multi, monkeypatch):
    fake.forbidden.add(("terminate", "runs"))
    api = client.connect(fake.host, "team", str(multi))
    job = runs.Job(SWEEP, {"model_line": "digits", "store_uri": "s3://salun/demo"})
    won, _ = runs.submit(api, job, "2026-11-24")
    there, looks = runs._first, []
    monkeypatch.setattr(runs, "_first", lambda *args: looks.append(1) or (None if len(looks) == 1 else there(*args)))
    fake.runs[won]["created_at"] = "2026-01-01T00:00:00Z"  # the older one
    with pytest.raises(client.RemoteError) as raised:
        runs.submit(api, job, "2026-11-24")
    (lost,) = set(fake.runs) - {won}
    text = str(raised.value)
    assert text.startswith(f"run {won} was first and does this work, and the second run {lost} could not be terminated")
    assert "the right to terminate runs in namespace team is missing (403)" in text
    assert "bind a Role with `terminate` on `runs` of pipelines.kubeflow.org" in text
    assert raised.value.exit_code == 1


def test_waiting_reports_each_step_once(fake):
    fake.script = [
        to("PENDING"),
        to("RUNNING", root="RUNNING", claim_requests="PENDING"),
        to("RUNNING", root="RUNNING", claim_requests="RUNNING"),
        to("RUNNING", claim_requests="RUNNING"),
        to("RUNNING", claim_requests="SUCCEEDED", fetch_model="SKIPPED", compute_mask="RUNNING"),
        to("SUCCEEDED", claim_requests="SUCCEEDED", fetch_model="SKIPPED", settle_requests="SUCCEEDED"),
    ]
    fake.faults.append(("GET", "/runs/[^/]+$", 503))
    code, out, said = submit(wait=True)
    assert code == 0
    assert said.splitlines()[2:-1] == [
        "claim-requests     pending",
        "claim-requests     running",
        "claim-requests     succeeded",
        "fetch-model        skipped",
        "compute-mask       running",
        "settle-requests    succeeded",
    ]
    assert out.startswith("succeeded  salun-deletion-sweep digits 2026-11-24 ")


def outcome_of(run_id, state, text, **fields):
    return new_outcome(run_id, "digits", state, text, **fields)


@pytest.mark.parametrize("kubeflow", ["FAILED", "SUCCEEDED"])
@pytest.mark.parametrize(
    ("state", "code"),
    [("refused", 3), ("stale_parent", 4), ("line_held", 4), ("damaged", 5), ("wrong_input", 2), ("killed", 1)]
    + [("published", 0), ("nothing_to_do", 0)],
)
def test_the_exit_code_is_that_of_the_outcome(fake, store, kubeflow, state, code):
    def end(server, item):
        server.report(item, kubeflow, {"evaluate": "SUCCEEDED", "gate-publish": kubeflow})
        address = f"{store.uri}/runs/{item['run_id']}/report.html"
        said = {"next": "salun report show", "report": address}
        write_outcome(store, outcome_of(item["run_id"], state, "forget_accuracy 0.91 > 0.2", **said))

    fake.script = [to("RUNNING"), end]
    found, out, said = submit("--store-uri", store.uri, wait=True)
    (run_id,) = fake.runs
    assert found == code
    name = fake.runs[run_id]["display_name"]
    assert out.splitlines() == [
        f"{kubeflow.lower():<9}  {name}",
        f"outcome    {state}: forget_accuracy 0.91 > 0.2",
        "next       salun report show",
        f"report     {store.uri}/runs/{run_id}/report.html",
    ]
    assert ("Error: forget_accuracy 0.91 > 0.2" in said) == bool(code)
    found, out, _ = run("status", run_id, "--json")
    document = json.loads(out)
    assert (found, document["exit_code"], document["outcome"]["state"]) == (code, code, state)
    assert document["steps"] == {"evaluate": "SUCCEEDED", "gate-publish": kubeflow}


def test_the_api_has_no_text_of_a_step(fake, store):
    fake.script = [to("FAILED", claim_requests="SUCCEEDED", evaluate="FAILED")]
    code, out, said = submit("--store-uri", store.uri, wait=True)
    (run_id,) = fake.runs
    tasks = fake.runs[run_id]["run_details"]["task_details"]
    assert not [task for task in tasks if task.get("error")]
    assert (code, out.count("\n")) == (1, 1)
    assert f"there is no outcome {store.uri}/runs/{run_id}/outcome.json" in said
    assert (
        f"Error: evaluate failed; Kubeflow's API has no text of a step, see the log: kubectl logs -n kubeflow -l pi"
        f"peline/runid={run_id}" in said
    )


@pytest.mark.parametrize(("state", "code"), [("FAILED", 1), ("SUCCEEDED", 0)])
def test_without_the_store_kubeflows_state_decides(fake, state, code):
    fake.script = [to(state, evaluate=state)]
    found, out, said = submit(wait=True)
    (run_id,) = fake.runs
    assert found == code
    assert out.startswith(f"{state.lower():<9}  ")
    (line,) = [line for line in said.splitlines() if "cannot read the outcome" in line]
    assert f"s3://salun/demo/runs/{run_id}/outcome.json" in line
    document = json.loads(run("status", run_id, "--json")[1])
    assert (document["outcome"], document["exit_code"]) == (None, code)


def test_an_outcome_that_is_not_final_is_a_failure(fake, store):
    def end(server, item):
        server.report(item, "SUCCEEDED", {"unlearn": "SUCCEEDED"})
        write_outcome(store, outcome_of(item["run_id"], "running", "unlearn works", step="unlearn"))

    fake.script = [end]
    code, _, said = submit("--store-uri", store.uri, wait=True)
    assert code == 1
    assert "Error: the run ended in unlearn and wrote no verdict" in said


def test_steps_are_listed_in_the_order_of_their_start(fake):
    order = ["claim-requests", "fetch-model", "compute-mask", "unlearn", "evaluate", "gate-publish", "settle-requests"]
    submit()
    (item,) = fake.runs.values()
    fake.report(item, "RUNNING", dict.fromkeys(order, "SUCCEEDED"))
    listed = [task["display_name"] for task in item["run_details"]["task_details"]]
    assert [name for name in listed if name in order] != order  # Kubeflow lists them in any order
    assert len({task["create_time"] for task in item["run_details"]["task_details"]}) == 1
    assert [line.split()[0] for line in run("status", item["run_id"])[1].splitlines()[:-1]] == order


def test_a_step_that_waits_for_a_node_says_so_after_a_minute(fake, monkeypatch):
    fake.script = [
        to("RUNNING", claim_requests="PENDING"),
        lambda server, item: monkeypatch.setattr(runs, "PATIENCE", -60.0),
        to("RUNNING", claim_requests="PENDING"),
        to("RUNNING", claim_requests="SUCCEEDED"),
        to("SUCCEEDED", claim_requests="SUCCEEDED"),
    ]
    said = submit(wait=True)[2].splitlines()[2:-1]
    (run_id,) = fake.runs
    assert said[0] == "claim-requests     pending"
    assert re.fullmatch(
        r"claim-requests     pending for -?\d+ s: waiting for a node. To see why: "
        rf"kubectl describe pod -n kubeflow -l pipeline/runid={run_id}",
        said[1],
    )
    assert said[2:] == ["claim-requests     succeeded"]
    (item,) = fake.runs.values()
    item["created_at"] = "2026-01-01T00:00:00Z"
    fake.report(item, "RUNNING", {"claim-requests": "PENDING"})
    monkeypatch.setattr(runs, "PATIENCE", 60.0)
    assert "waiting for a node" in run("status", run_id)[1]


def test_a_canceled_run_ends_the_wait(fake):
    fake.script = [to("CANCELED")]
    assert submit(wait=True)[0] == 1


def test_waiting_times_out(fake):
    code, _, error = submit("--timeout", "0.1", wait=True)
    (run_id,) = fake.runs
    assert code == 124
    assert f"run {run_id} is pending: 0.1 s have passed" in error
    assert fake.runs[run_id]["state"] == "PENDING"


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_the_run_continues_after_a_signal(fake, sign):
    looked = threading.Event()
    fake.script = [lambda server, item: looked.set()]
    with forked_module("pipelines", "submit", *FORM, "--poll", "30") as (process, errors):
        assert looked.wait(60)
        os.kill(process.pid, sign)
        said = errors.read()
        process.join(30)
        code = process.exitcode
    (item,) = fake.runs.values()
    assert code == 128 + sign
    assert said.splitlines()[-1] == f"The run continues: {UI}/#/runs/details/{item['run_id']}"
    assert item["state"] == "PENDING"


def test_status_lists_the_newest_runs(fake):
    for seed in range(5):
        submit("--seed", str(seed))
    newest = list(fake.runs.values())[::-1]
    code, out, _ = run("status", "--last", "2", "--json")
    assert code == 0
    assert [item["run_id"] for item in json.loads(out)] == [item["run_id"] for item in newest[:2]]
    assert run("status", "--last", "1")[1].startswith(f"pending    {newest[0]['display_name']}  {UI}/#/runs")


def test_many_runs_of_one_name_are_read_page_by_page(fake):
    for _ in range(4):
        submit()
        next(reversed(fake.runs.values()))["state"] = "FAILED"
    submit()
    submit()
    assert len(fake.runs) == 5


# schedule


def schedule(*words, form=FORM):
    when = () if "--cron" in words else ("--cron", quiet_cron())
    return run("schedule", *form, *when, *words)


def test_schedule_creates_updates_keeps_and_deletes(fake):
    assert schedule()[1].startswith("created    salun-deletion-sweep digits  ")
    (first,) = fake.schedules.values()
    assert (first["status"], first["no_catchup"], first["max_concurrency"]) == ("ENABLED", True, "1")
    assert schedule()[1].startswith("unchanged")
    later = quiet_cron().replace("0 0", "0 30")
    assert schedule("--cron", later)[1].startswith("updated")
    (second,) = fake.schedules.values()
    assert second["recurring_run_id"] != first["recurring_run_id"]
    assert (second["status"], second["trigger"]["cron_schedule"]["cron"]) == ("ENABLED", later)
    assert later in schedule("--show", form=FORM[:2])[1]
    assert schedule("--max-requests", "8")[1].startswith("updated")
    schedule(form=("--model-line", "other", *FORM[2:]))
    assert schedule("--delete", form=FORM[:2])[1].startswith("deleted")
    assert [item["display_name"] for item in fake.schedules.values()] == ["salun-deletion-sweep other"]
    assert schedule("--delete", form=FORM[:2])[1].startswith("none")


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/recurringruns$"), ("DELETE", "/recurring"), ("POST", ":enable")]
)
@pytest.mark.parametrize("what", [500, "lost"])
def test_an_update_survives_lost_replies(fake, method, path, what):
    schedule()
    if path == ":enable":
        schedule("--seed", "2")
        next(iter(fake.schedules.values()))["status"] = "DISABLED"
    fake.faults.append((method, path, what))
    assert schedule("--seed", "2")[0] == 0
    (item,) = fake.schedules.values()
    assert (fake.faults, item["status"]) == ([], "ENABLED")
    assert item["runtime_config"]["parameters"]["seed"] == 2


@pytest.mark.parametrize(("method", "path"), [("DELETE", "/recurring"), ("POST", "/recurringruns$")])
def test_the_next_update_completes_an_interrupted_one(fake, method, path):
    schedule()
    fake.faults += [(method, path, 403)]
    assert schedule("--seed", "2")[0] == 1
    assert schedule("--seed", "2")[1].startswith("updated")
    (item,) = fake.schedules.values()
    assert (item["status"], item["runtime_config"]["parameters"]["seed"]) == ("ENABLED", 2)
    assert min(fake.enabled) >= 1  # no slot is lost


def test_an_update_that_is_killed_leaves_the_new_one_enabled(fake):
    schedule()
    dead = threading.Event()

    def killed():
        process.kill()
        process.join(30)
        dead.set()
        raise RefusedError(503, "the request never arrived")

    fake.before_delete = killed
    with forked_module("pipelines", "schedule", *FORM, "--seed", "2", "--cron", quiet_cron()) as (process, _):
        assert dead.wait(60)
        code = process.exitcode
    assert code == -signal.SIGKILL
    assert [item["status"] for item in fake.schedules.values()] == ["ENABLED"] * 2
    fake.before_delete = lambda: None
    assert schedule("--seed", "2", "--cron", quiet_cron())[1].startswith("updated")
    (item,) = fake.schedules.values()
    assert (item["status"], item["runtime_config"]["parameters"]["seed"]) == ("ENABLED", 2)
    assert min(fake.enabled) >= 1


def test_a_disabled_one_is_enabled(fake):
    schedule()
    (item,) = fake.schedules.values()
    item["status"] = "DISABLED"
    assert schedule()[1].startswith("updated")
    assert [item["status"] for item in fake.schedules.values()] == ["ENABLED"]


def test_running_runs_outlive_their_schedule(fake):
    schedule()
    (first,) = fake.schedules
    fake.fire(first)
    assert schedule("--seed", "2")[1].startswith("updated")
    (second,) = fake.schedules
    fake.fire(second)
    assert schedule("--delete", form=FORM[:2])[1].startswith("deleted")
    assert fake.policies == ["ORPHAN", "ORPHAN"]
    assert [item["state"] for item in fake.runs.values()] == ["RUNNING"] * 2


def test_an_update_waits_until_no_slot_is_near(fake, monkeypatch):
    now, pauses = datetime(2026, 11, 24, 1, 59, 30, tzinfo=UTC), []

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return now + timedelta(seconds=sum(pauses))

    monkeypatch.setattr(schedules, "datetime", Clock)
    monkeypatch.setattr(schedules.time, "sleep", pauses.append)
    assert schedule("--cron", "0 0 2 * * *")[1].startswith("created")
    assert pauses == []  # there is nothing to replace
    code, out, said = schedule("--cron", "0 30 3 * * *")
    assert (code, pauses) == (0, [61.0])  # the slot of the old one at 2:00, and what the scheduler takes
    assert out.startswith("updated")
    assert "A slot is near: the update waits 61 s" in said
    pauses.clear()
    assert schedule("--cron", "0 * * * * *")[1].startswith("updated")
    assert schedule("--cron", "0 * * * * *", "--seed", "2")[1].startswith("updated")
    assert len(pauses) == 2 * schedules.TRIES  # every minute: no moment is quiet


def quiet_cron():
    """A schedule whose next slot is twelve hours away."""
    return f"0 0 {(datetime.now(UTC).hour + 12) % 24} * * *"


def test_cronjob_entry_needs_no_server(fake):
    code, out, _ = schedule("--cron", "0 15 2 * * ?", "--print-cronjob-args")
    entry = yaml.safe_load(out)
    assert (code, entry["schedule"], fake.requests) == (0, "15 2 * * *", [])
    assert run(*entry["args"][3:])[0] == 0
    assert len(fake.runs) == 1


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--cron", "0 2 * * *"), "did you mean '0 0 2 * * *'?"),
        (("--cron", "0 0 2 * * $(x)"), "is not a schedule"),
        (("--cron", "0 0 2 L * *"), "'L' is not valid as day; Kubeflow's scheduler knows no L, W and #"),
        (("--cron", "0 0 2 15W * ?"), "'15W' is not valid as day; Kubeflow's scheduler knows no L, W and #"),
        (("--cron", "0 0 2 ? * MON#2"), "'MON#2' is not valid as weekday; Kubeflow's scheduler knows no L, W and #"),
        (("--cron", "0 0 2 * * 7"), "'7' is not valid as weekday: 0 to 6"),
        (("--cron", "0 0 24 * * *"), "'24' is not valid as hour: 0 to 23"),
        (("--cron", "30 0 2 * * *", "--print-cronjob-args"), "a CronJob has no seconds"),
    ],
)
def test_a_wrong_schedule_is_refused(fake, words, text):
    code, _, error = schedule(*words)
    assert code == 2
    assert text in error
    assert fake.schedules == {}


# identity and bad input


@pytest.fixture
def multi(fake, monkeypatch, tmp_path):
    fake.multi_user, fake.token = True, JWT
    path = tmp_path / "token"
    path.write_text(f"{JWT}\n", encoding="utf-8")
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(path))
    monkeypatch.setenv("KFP_NAMESPACE", "team")
    return path


def test_multi_user_sends_its_token_and_namespace(fake, multi):
    assert submit()[0] == 0
    assert schedule()[0] == 0
    assert {item["namespace"] for table in (fake.experiments, fake.pipelines) for item in table.values()} == {"team"}
    assert {header for _, path, header in fake.requests if not path.endswith("/healthz")} == {f"Bearer {JWT}"}


def test_standalone_sends_neither_token_nor_namespace(fake, monkeypatch):
    monkeypatch.setenv("KFP_NAMESPACE", "team")  # a standalone server refuses one
    assert submit()[0] == 0
    assert {header for _, _, header in fake.requests} == {None}


def test_a_rotated_token_is_read_again_while_waiting(fake, multi):
    def rotate(server, item):
        server.token = "second"
        multi.write_text("second", encoding="utf-8")

    fake.script = [to("RUNNING"), rotate, to("RUNNING"), to("SUCCEEDED")]
    assert submit(wait=True)[0] == 0
    assert fake.requests[-1][2] == "Bearer second"


def test_an_expired_token_is_refused_and_never_shown(fake, multi):
    fake.token = "another"
    code, out, error = submit()
    assert code == 1
    assert "does not accept the credentials (401): Unauthenticated: token *** is expired" in error
    assert "eyJ" not in out + error


def test_missing_token_file_is_reported(fake, multi):
    multi.unlink()
    code, _, error = submit()
    assert code == 2
    assert f"cannot read the token {multi}" in error


@pytest.mark.parametrize(
    ("right", "text"),
    [
        (("create", "runs"), "the right to create runs in namespace team is missing (403)"),
        (("list", "experiments"), "the right to list experiments in namespace team is missing (403)"),
        (("create", "pipelines"), "bind a Role with `create` on `pipelines` of pipelines.kubeflow.org"),
    ],
)
def test_missing_right_is_reported(fake, multi, right, text):
    fake.forbidden.add(right)
    code, _, error = submit()
    assert code == 1
    assert text in error


def test_multi_user_needs_a_known_namespace(fake, multi, monkeypatch):
    code, _, error = submit("--namespace", "strangers")
    assert code == 1
    assert "in namespace strangers is missing (403)" in error
    monkeypatch.delenv("KFP_NAMESPACE")
    code, _, error = submit()
    assert code == 2
    assert "no namespace was given" in error


def test_run_that_does_not_exist(fake):
    code, _, error = run("status", "nowhere")
    assert code == 1
    assert "cannot get runs in this Kubeflow: not found (404)" in error
    code, _, error = run("status")
    assert "experiment salun does not exist" in error


def test_unreachable_server(fake):
    fake.close()
    code, _, error = submit()
    assert code == 1
    assert f"cannot reach Kubeflow at {fake.host}" in error.splitlines()[-1]
    assert len(error.splitlines()) == 2  # with the line on what was not checked


@pytest.mark.parametrize("host", ["", "localhost:8888", "ftp://x", "http://me:secret@kfp.example"])
def test_malformed_address(fake, host):
    code, _, error = submit("--host", host)
    assert code == 2
    assert "secret" not in error


def test_missing_client_names_the_extra(fake, monkeypatch):
    for name in ("kfp_server_api", "pipelines.client", "pipelines.runs", "pipelines.schedules"):
        monkeypatch.setitem(sys.modules, name, None)  # as where the import finds nothing
    code, _, error = submit()
    assert code == 2
    assert "kfp's client is not installed" in error
    assert "pip install 'salun[kfp]'" in error


def test_all_faults_of_the_form_are_reported_at_once(fake):
    words = ("--model-lin", "digits", "--seed", "x", "--density=nan", "--dry-run=maybe", "--tolerations", "{}", "stray")
    code, _, error = run("submit", *words)
    assert code == 2
    for text in (
        "--model-lin is unknown (did you mean --model-line?)",
        "--seed must be a whole number",
        "--density must be a number",
        "--dry-run must be true or false",
        "--tolerations must be a JSON list",
        "stray is unknown",
        "--model-line is missing",
        "--store-uri is missing",
    ):
        assert text in error
    assert fake.requests == []


def test_values_out_of_range_are_refused_as_in_the_first_step(fake):
    words = (
        "--density",
        "1.5",
        "--min-requests",
        "0",
        "--node-selector",
        '{"a": 1}',
        "--method-config",
        '{"epochs": 0}',
    )
    for verb in ("submit", "schedule"):
        code, _, error = run(verb, *FORM, *words)
        assert code == 2
        for text in (
            "density: Input should be less than or equal to 1",
            "min_requests: Input should be greater than or equal to 1",
            "node_selector.a: Input should be a valid string",
        ):
            assert text in error
    with pytest.raises(UsageError, match="density: Input should be less than or equal to 1"):
        parse(DeletionSweepForm, {"model_line": "digits", "store_uri": "s3://salun/demo", "density": 1.5}, "the form")
    assert fake.requests == []


@pytest.mark.parametrize("verb", ["submit", "schedule"])
def test_what_the_parameters_name_is_checked_before_the_submission(fake, verb):
    words = ("--method", "salum", "--policy-uri", "strict.yaml", "--method-config", '{"epochs": 3}')
    code, _, error = run(verb, *FORM, *words)
    assert code == 2
    assert "2 parameters are wrong: policy_uri is strict.yaml: a pod cannot read a file of this machine" in error
    assert "unknown method 'salum'" in error
    code, _, error = run(verb, *FORM, "--method-config", '{"epoch": 3}')
    assert code == 2
    assert "epoch: unknown key, did you mean 'epochs'?" in error
    code, _, error = run(verb, *FORM, "--method-config", "{epochs")
    assert code == 2
    assert "method_config is neither YAML nor JSON" in error
    assert fake.requests == []


def test_what_cannot_be_checked_here_is_said_in_one_line(fake):
    code, _, said = submit()
    assert code == 0
    assert said.splitlines()[0].startswith("not checked here: model_line, because cannot read s3://salun/demo/")
    assert schedule("--delete")[2].count("not checked") == 0


def test_the_model_line_is_read_where_the_store_can_be(fake, store):
    code, _, error = run(
        "submit",
        *("--pipeline", "unlearning", "--model-line", "digits", "--store-uri", store.uri, "--no-wait"),
        *("--forget-manifest-uri", f"{store.uri}/forget.json"),
    )
    assert code == 2
    assert "2 parameters are wrong: model line digits has no HEAD" in error
    assert f"object {store.uri}/forget.json does not exist" in error


def test_unknown_pipeline(fake):
    code, _, error = submit("--pipeline", "deletion-swep")
    assert code == 2
    assert "did you mean 'deletion-sweep'?" in error


def test_the_form_is_read_by_its_types(fake):
    words = (
        "--dry-run",
        "--density=0.25",
        "--node-selector",
        '{"gpu": "a"}',
        "--retrain-reference",
        "false",
        "--cpu=2",
    )
    assert submit(*words)[0] == 0
    (item,) = fake.runs.values()
    given = item["runtime_config"]["parameters"]
    assert given == {
        "model_line": "digits",
        "store_uri": "s3://salun/demo",
        "dry_run": True,
        "density": 0.25,
        "node_selector": {"gpu": "a"},
        "retrain_reference": False,
        "cpu": "2",
    }


# the objects of a Kubernetes-native Kubeflow


def test_native_objects_carry_the_digest_and_are_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "compile_all", lambda: [SWEEP])
    folder = tmp_path / "native"
    words = ("compile", "--kubernetes-native", str(folder))
    assert run(*words)[0] == 0
    assert run(*words, "--check")[0] == 0
    path = folder / "salun-deletion-sweep.yaml"
    pipeline, version = yaml.safe_load_all(path.read_text(encoding="utf-8"))
    assert (pipeline["kind"], version["kind"]) == ("Pipeline", "PipelineVersion")
    assert version["metadata"]["name"] == SWEEP.version
    assert version["spec"]["pipelineName"] == pipeline["metadata"]["name"] == "salun-deletion-sweep"
    assert version["spec"]["platformSpec"] == SWEEP.platform
    assert path.stat().st_size < 256 * 1024  # what `kubectl apply` can keep in an annotation
    path.write_text(path.read_text(encoding="utf-8").replace("runAsUser: '10001'", "runAsUser: '0'"), encoding="utf-8")
    code, out, error = run(*words, "--check")
    assert code == 1
    assert "salun-deletion-sweep.yaml is out of step" in out
    assert "--kubernetes-native" in error


@pytest.mark.parametrize("verb", ["run", "submit", "schedule"])
def test_help_lists_the_parameters_of_the_default_pipeline(verb):
    code, out, _ = run(verb, "--help")
    shown = load_package("unlearning" if verb == "run" else "deletion-sweep").inputs
    assert code == 0
    assert [name for name in shown if f"--{name.replace('_', '-')}" not in out] == []


@pytest.mark.parametrize("name", ["unlearning", "deletion-sweep"])
def test_the_fields_of_the_run_form_are_documented(name):
    assert form_table(load_package(name)) in (ROOT / "docs" / "reference" / "run-form.md").read_text(encoding="utf-8")
