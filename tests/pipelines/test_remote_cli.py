"""`python -m pipelines` against a Kubeflow API on loopback, by the real kfp client."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from pipelines import client, packages, runs
from pipelines import compile as compiling
from pipelines.cli import app
from pipelines.packages import form_table, load_package
from salun_core.errors import SalunError
from tests.pipelines.fake_kfp import FakeKubeflow

ROOT = Path(__file__).resolve().parents[2]
FORM = ("--model-line", "digits", "--store-uri", "s3://salun/demo")
_load = functools.lru_cache(load_package)  # reading and digesting takes longer than all the rest of a test
SWEEP = _load("deletion-sweep")
JWT = "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJzdWJtaXR0ZXIifQ.c2lnbmF0dXJl"


@pytest.fixture
def fake(monkeypatch, tmp_path):
    kubeflows = ("KFP_ENDPOINT", "KFP_NAMESPACE", "KF_PIPELINES_SA_TOKEN_PATH")
    for name in (*kubeflows, "SALUN_IMAGE", "SALUN_STORE_URI", "SALUN_S3_SECRETS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(client, "ATTEMPTS", 4)
    monkeypatch.setattr(runs, "SETTLING", 0.0)
    monkeypatch.setattr(packages, "load_package", _load)
    server = FakeKubeflow()
    monkeypatch.setenv("KFP_ENDPOINT", server.host)
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
    """A step of the script: what the next look at the run finds."""

    def apply(fake, item):
        details = [{"display_name": name.replace("_", "-"), **detail} for name, detail in tasks.items()]
        item.update(state=state, run_details={"task_details": details})

    return apply


def states(**names):
    return {name: {"state": state} for name, state in names.items()}


def test_register_is_idempotent_and_names_the_digest(fake):
    code, first, _ = run("register")
    assert code == 0
    assert first.count("uploaded") == 6
    names = sorted(version["display_name"] for version in fake.versions.values())
    assert SWEEP.version in names
    assert all(
        re.fullmatch(r"salun-(unlearning|deletion-sweep|sharded-mask)(-cpu)?-[0-9a-f]{12}", name) for name in names
    )
    code, second, _ = run("register")
    assert code == 0
    assert second == first.replace("uploaded ", "was there")
    assert (len(fake.pipelines), len(fake.versions)) == (6, 6)


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
    assert f"{fake.host}/#/runs/details/{item['run_id']}" in said
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


def test_waiting_reports_each_step_once(fake):
    fake.script = [
        to("PENDING"),
        to("RUNNING", **states(root="RUNNING", claim_requests="RUNNING")),
        to("RUNNING", **states(claim_requests="RUNNING")),
        to("RUNNING", **states(claim_requests="SUCCEEDED", **{"compute-mask(1)": "RUNNING"})),
        to("SUCCEEDED", **states(claim_requests="SUCCEEDED", settle_requests="SUCCEEDED")),
    ]
    fake.faults.append(("GET", "/runs/[^/]+$", 503))
    code, out, said = submit(wait=True)
    assert code == 0
    assert said.splitlines()[1:] == [
        "claim-requests     running",
        "claim-requests     succeeded",
        "compute-mask       running",
        "settle-requests    succeeded",
    ]
    assert out.startswith("succeeded  salun-deletion-sweep digits 2026-11-24 ")


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("salun_core.errors.GateRefusedError: the gate refused: forget_accuracy", 3),
        ("salun_core.errors.ConflictError: HEAD moved", 4),
        ("IntegrityError: digest", 5),
        ("ValueError: x", 1),
        ("Error (exit code 1)", 1),
    ],
)
def test_the_exit_code_is_that_of_the_failed_step(fake, message, code):
    failed = {"state": "FAILED", "error": {"code": 2, "message": message}}
    fake.script = [to("FAILED", gate_publish=failed, settle_requests={"state": "SUCCEEDED"})]
    found, out, said = submit(wait=True)
    assert found == code
    assert f"Error: gate-publish: {message}" in said
    assert out.startswith("failed ")
    (run_id,) = fake.runs
    assert run("status", run_id)[0] == code


def test_failure_without_message_names_the_step(fake):
    fake.script = [to("FAILED", **states(evaluate="FAILED"))]
    code, _, said = submit(wait=True)
    assert code == 1
    assert "Error: evaluate failed without a message" in said


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
    command = [sys.executable, "-m", "pipelines", "submit", *FORM, "--poll", "30"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    try:
        assert looked.wait(60)
        process.send_signal(sign)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
    (item,) = fake.runs.values()
    assert process.returncode == 128 + sign
    assert said.splitlines()[-1] == f"The run continues: {fake.host}/#/runs/details/{item['run_id']}"
    assert item["state"] == "PENDING"


def test_status_lists_the_newest_runs(fake):
    for seed in range(5):
        submit("--seed", str(seed))
    newest = list(fake.runs.values())[::-1]
    code, out, _ = run("status", "--last", "2", "--json")
    assert code == 0
    assert [item["run_id"] for item in json.loads(out)] == [item["run_id"] for item in newest[:2]]
    assert run("status", "--last", "1")[1].startswith(f"pending    {newest[0]['display_name']}  {fake.host}")


def test_many_runs_of_one_name_are_read_page_by_page(fake):
    for _ in range(4):
        submit()
        next(reversed(fake.runs.values()))["state"] = "FAILED"
    submit()
    submit()
    assert len(fake.runs) == 5


# schedule


def schedule(*words, form=FORM):
    return run("schedule", *form, *words)


def test_schedule_creates_updates_keeps_and_deletes(fake):
    assert schedule()[1].startswith("created    salun-deletion-sweep digits  ")
    (first,) = fake.schedules.values()
    assert (first["status"], first["no_catchup"], first["max_concurrency"]) == ("ENABLED", True, "1")
    assert schedule()[1].startswith("unchanged")
    assert schedule("--cron", "0 30 3 * * *")[1].startswith("updated")
    (second,) = fake.schedules.values()
    assert second["recurring_run_id"] != first["recurring_run_id"]
    assert (second["status"], second["trigger"]["cron_schedule"]["cron"]) == ("ENABLED", "0 30 3 * * *")
    assert "0 30 3 * * *" in schedule("--show", form=FORM[:2])[1]
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
    fake.faults.append((method, path, what))
    assert schedule("--seed", "2")[0] == 0
    (item,) = fake.schedules.values()
    assert (fake.faults, item["status"]) == ([], "ENABLED")
    assert item["runtime_config"]["parameters"]["seed"] == 2


@pytest.mark.parametrize(("method", "path"), [("DELETE", "/recurring"), ("POST", ":enable")])
def test_the_next_update_completes_an_interrupted_one(fake, method, path):
    schedule()
    fake.faults += [(method, path, 403)]
    assert schedule("--seed", "2")[0] == 1
    enabled = [item for item in fake.schedules.values() if item["status"] == "ENABLED"]
    assert len(enabled) <= 1  # never two at once
    assert schedule("--seed", "2")[1].startswith("updated")
    (item,) = fake.schedules.values()
    assert (item["status"], item["runtime_config"]["parameters"]["seed"]) == ("ENABLED", 2)


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
    assert f"cannot reach Kubeflow at {fake.host}" in error
    assert "\n" not in error.strip()


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


@pytest.mark.parametrize("name", ["unlearning", "deletion-sweep", "sharded-mask"])
def test_the_fields_of_the_run_form_are_documented(name):
    assert form_table(load_package(name)) in (ROOT / "docs" / "reference" / "run-form.md").read_text(encoding="utf-8")
