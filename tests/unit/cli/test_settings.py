"""The settings file: what it is the default of, what overrides it, and what is refused in it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import typer

from salun_core.cli.app import app
from salun_core.cli.settings import Settings, SettingsFile, find_settings, read_variables, set_variables
from salun_core.errors import UsageError

FILE = "store: s3://file\nline: of-file\npolicy: ddpm\nmethod: finetune\nextra_metrics: decile\n"


@pytest.fixture
def write(tmp_path):
    def write(text, name="salun.yaml"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return path

    return write


def test_a_required_option_may_come_from_the_file(form_of, write):
    write(FILE)
    form = form_of("sweep", "--now")
    assert (form.store_uri, form.model_line, form.policy_uri) == ("s3://file", "of-file", "ddpm")
    assert (form.method, form.extra_metrics, form.density) == ("finetune", "decile", 0.5)


def test_the_command_line_overrides_the_environment_which_overrides_the_file(form_of, write, monkeypatch):
    write(FILE)
    assert form_of("sweep", "--now").store_uri == "s3://file"
    monkeypatch.setenv("SALUN_STORE_URI", "s3://variable")
    assert form_of("sweep", "--now").store_uri == "s3://variable"
    assert form_of("sweep", "--now", "--store", "s3://option", "--line", "other").store_uri == "s3://option"
    assert form_of("sweep", "--now", "--line", "other").model_line == "other"


def test_the_configuration_of_a_run_overrides_the_settings(form_of, write, monkeypatch):
    write(FILE, "shared.yaml")
    write("model_line: of-run\nforget_manifest_uri: f\n", "run.yaml")
    form = form_of("--config", "shared.yaml", "run", "--config", "run.yaml")
    assert (form.model_line, form.store_uri, form.policy_uri) == ("of-run", "s3://file", "ddpm")
    assert form_of("--config=shared.yaml", "run", "--config", "run.yaml", "--policy", "nsfw").policy_uri == "nsfw"
    monkeypatch.setenv("SALUN_STORE_URI", "s3://variable")
    assert form_of("--config", "shared.yaml", "run", "--config", "run.yaml").store_uri == "s3://variable"


@pytest.mark.parametrize(
    "words",
    [
        ("--config", "a/b.yaml", "sweep", "--now"),
        ("sweep", "--now", "--config", "a/b.yaml"),
        ("sweep", "--config=a/b.yaml", "--now"),
    ],
)
def test_config_may_stand_anywhere(form_of, write, words):
    write("store: s3://here\n")
    write(FILE, "a/b.yaml")
    assert form_of(*words).store_uri == "s3://file"


def test_a_variable_names_the_file(form_of, write, monkeypatch):
    write(FILE, "b.yaml")
    monkeypatch.setenv("SALUN_CONFIG", "b.yaml")
    assert form_of("sweep", "--now").model_line == "of-file"


def test_a_file_that_does_not_exist_is_a_usage_error(salun):
    result = salun("request", "list", "--config", "none.yaml")
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: there is no settings file none.yaml")


def test_all_faults_are_listed_in_one_line_with_the_nearest_key(salun, write):
    write("polcy: auto\nstore: {uri: s3://abc, endpont: http://x}\nline: 7\n")
    result = salun("request", "list")
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    for part in ("3 faults", "'policy'", "store.endpont: unknown key, did you mean 'endpoint'?", "line: Input should"):
        assert part in result.stderr


@pytest.mark.parametrize(
    "text",
    [
        "store: {uri: s3://abc, secret_key: hunter2}\n",
        "access_key_id: hunter2\n",
        "store: s3://me:hunter2@abc\n",
        "store: {endpoint: 'http://me:hunter2@host'}\n",
        "SALUN_S3_SESSION_TOKEN: hunter2\n",
    ],
)
def test_a_secret_is_refused_and_not_repeated(salun, write, text):
    write(text)
    result = salun("request", "list", "--debug")
    assert result.exit_code == 2
    assert "in the environment or in a file that `env_file` names" in result.stderr
    assert "hunter2" not in result.stdout + result.stderr


def test_help_works_with_a_faulty_file_and_doctor_reports_it(salun, write):
    write("lin: a\n")
    assert salun("sweep", "--help").exit_code == 0
    result = salun("doctor")
    assert result.exit_code == 1
    assert "settings: correct them and try again" in result.stdout
    assert "did you mean 'line'?" in " ".join(result.stdout.split())


def test_doctor_and_debug_name_the_file(salun, write):
    path = write("line: a\nstore: {region: here}\n")
    assert f"{path}: line, store; 1 variables" in "".join(salun("doctor", "--json").stdout.split("\n"))
    assert f"settings: {path}" in salun("ls", "data", "--debug").stderr
    assert salun("ls", "data").stderr == ""


def _defaults(settings, folder=Path()):
    root = typer.main.get_command(app)
    return SettingsFile(folder / "salun.yaml", Settings.model_validate(settings)).default_map(root)


def _given(tree, path=""):
    for name, value in tree.items():
        below = f"{path} {name}".strip()
        yield from _given(value, below) if isinstance(value, dict) else [below]


def test_which_options_the_line_is_the_default_of():
    assert sorted(set(_given(_defaults({"line": "faces"}))) - {"init line"}) == [  # `init` writes the file
        "doctor line",
        "model history line",
        "model pull reference",
        "model show reference",
        "report line",
        "request submit line",
        "run model_line",
        "sweep model_line",
    ]


def test_data_of_a_suite_are_its_own():
    given = set(_given(_defaults({"data": "images"})))
    assert {"train classifier data", "model import data", "mask data", "evaluate data"} <= given
    assert "bench run data" not in given


def test_every_verb_with_a_store_takes_it_from_the_file():
    verbs = [name for name in _given(_defaults({"store": "s3://abc"}))]
    assert len(verbs) > 25
    assert {"doctor store", "request submit store", "model pull store", "sweep store_uri"} <= set(verbs)


def test_paths_begin_at_the_folder_of_the_file(tmp_path):
    (tmp_path / "images").mkdir()
    found = _defaults({"data": "images", "policy": "strict.yaml"}, tmp_path)
    assert found["train"]["classifier"]["data"] == str(tmp_path / "images")
    assert found["gate"]["policy"] == str(tmp_path / "strict.yaml")
    names = _defaults({"data": "torchvision:CIFAR10", "policy": "auto"}, tmp_path)
    assert names["train"]["classifier"]["data"] == "torchvision:CIFAR10"
    assert names["gate"]["policy"] == "auto"
    assert _defaults({"data": "s3://a/b"}, tmp_path)["mask"]["data"] == "s3://a/b"


ENV = (
    "# keys\nexport SALUN_STORE_URI=s3://served\nSALUN_S3_ACCESS_KEY_ID=key\nSALUN_S3_SECRET_ACCESS_KEY='a b'\n"
    "SALUN_S3_ENDPOINT_URL=http://127.0.0.1:1\nNO_PROXY=127.0.0.1,localhost\nPATH=/evil\nLD_PRELOAD=x\n"
)


@pytest.fixture
def clean(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SALUN_", "AWS_")) or name.lower() == "no_proxy":
            monkeypatch.delenv(name)


def test_a_file_of_variables_gives_only_our_own(clean, write, monkeypatch):
    write(ENV, "store/.env")
    settings = {"env_file": "store/.env", "store": {"endpoint": "http://file:2", "region": "here"}}
    monkeypatch.chdir(write("", "salun.yaml").parent)
    monkeypatch.setenv("NO_PROXY", "intern")
    set_variables(SettingsFile(Path("salun.yaml"), Settings.model_validate(settings)).variables())
    assert os.environ["SALUN_STORE_URI"] == "s3://served"
    assert os.environ["SALUN_S3_SECRET_ACCESS_KEY"] == "a b"
    assert os.environ["SALUN_S3_ENDPOINT_URL"] == "http://file:2"
    assert os.environ["SALUN_S3_REGION"] == "here"
    assert os.environ["NO_PROXY"] == "intern,127.0.0.1,localhost"
    assert os.environ["PATH"] != "/evil"
    assert "LD_PRELOAD" not in os.environ


def test_keys_of_two_accounts_are_never_mixed(clean, write, monkeypatch):
    monkeypatch.setenv("SALUN_S3_ACCESS_KEY_ID", "mine")
    set_variables(read_variables(write(ENV, ".env")))
    assert os.environ["SALUN_S3_ACCESS_KEY_ID"] == "mine"
    assert "SALUN_S3_SECRET_ACCESS_KEY" not in os.environ


@pytest.mark.parametrize("name", ["../.env", "/etc/hosts", "missing.env", "salun.yaml"])
def test_a_file_of_variables_elsewhere_or_of_another_kind_is_refused(write, name):
    path = write(f"env_file: {name}\n")
    with pytest.raises(UsageError):
        find_settings(path).variables()


@pytest.mark.parametrize("name", ["SALUN_PLUGINS", "SALUN_VERIFY_KEY"])
def test_a_file_of_variables_may_not_say_whom_to_trust(write, name):
    with pytest.raises(UsageError, match=f"must not set {name}"):
        read_variables(write(f"export {name}=evil:build\n", ".env"))


def test_a_pipe_or_a_large_file_of_variables_is_refused_at_once(write, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="not a regular file"):
        read_variables(tmp_path / "pipe")
    with pytest.raises(UsageError, match="too large"):
        read_variables(write("A=1\n" * 20_000, ".env"))


def test_init_writes_what_was_given_and_comments_the_rest(salun, tmp_path):
    words = ("--store", "s3://abc/x", "--endpoint", "http://127.0.0.1:1", "--line", "2024", "--data", "my images: a")
    result = salun("init", *words)
    assert result.exit_code == 0, result.stderr
    found = find_settings(tmp_path / "salun.yaml").settings
    assert found.store.model_dump() == {"uri": "s3://abc/x", "endpoint": "http://127.0.0.1:1", "region": None}
    assert (found.line, found.data, found.policy) == ("2024", "my images: a", None)
    assert "# policy: auto" in (tmp_path / "salun.yaml").read_text()
    assert result.stdout.count("  salun ") == 3


def test_init_overwrites_only_by_force(salun, write):
    path = write("line: mine\n")
    result = salun("init", "--line", "other")
    assert (result.exit_code, path.read_text()) == (2, "line: mine\n")
    assert "--force" in result.stderr
    assert salun("init", "--line", "other", "--force").exit_code == 0
    assert find_settings(path).settings.line == "other"


@pytest.mark.parametrize("words", [("--store", "s3://a:b@abc"), ("--store", "abc"), ("--line", "x", "--dry-run")])
def test_init_leaves_nothing_behind_when_it_refuses_or_plans(salun, tmp_path, words):
    salun("init", *words)
    assert list(tmp_path.iterdir()) == []


def test_init_finds_the_settings_of_an_own_store(salun, write, tmp_path):
    write(ENV, "store/.env")
    write("DJANGO=1\n", "other/.env")
    assert salun("init").exit_code == 0
    assert find_settings(tmp_path / "salun.yaml").settings.env_file == "store/.env"


def test_a_terminal_is_asked_for_what_is_missing(salun, monkeypatch, tmp_path):
    answers = {"Object store": "s3://asked", "Model line": "faces", "Data": ""}
    asked = []

    def prompt(text, **_):
        asked.append(text)
        return next(answer for start, answer in answers.items() if text.startswith(start))

    monkeypatch.setattr("salun_core.cli.settings._on_terminal", lambda: True)
    monkeypatch.setattr("typer.prompt", prompt)
    assert salun("init", "--policy", "auto").exit_code == 0
    found = find_settings(tmp_path / "salun.yaml").settings
    assert (found.store.uri, found.line, found.data, len(asked)) == ("s3://asked", "faces", None, 3)
