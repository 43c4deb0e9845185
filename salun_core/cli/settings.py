"""The settings file `salun.yaml`: defaults for the options that several verbs share.

Precedence: command line, environment variable, settings file, built-in default. The options get their values from
click's `default_map`. What has no option of its own, such as the endpoint of the store, is set as an environment
variable of this process unless it is set already, so that child processes have it as well.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import Field, field_validator

from salun_core.cli.options import DryRun
from salun_core.cli.output import MODE, echo, emit
from salun_core.config import Document, parse, parse_text, read_document
from salun_core.errors import UsageError
from salun_core.storage.keys import split_uri

NAME = "salun.yaml"
CONFIG_VARIABLE = "SALUN_CONFIG"
_ENDPOINT, _REGION, _SIGNING_KEY = "SALUN_S3_ENDPOINT_URL", "SALUN_S3_REGION", "SALUN_SIGNING_KEY"
_ACCOUNT = ("SALUN_S3_ACCESS_KEY_ID", "SALUN_S3_SECRET_ACCESS_KEY", "SALUN_S3_SESSION_TOKEN")
_NO_PROXY = ("NO_PROXY", "no_proxy")
# They say which code and which signers are trusted. A folder from elsewhere may hold its own `env_file`.
_TRUST = ("SALUN_PLUGINS", "SALUN_VERIFY_KEY")
_MAX_VARIABLES_BYTES = 65536
_OPTIONS = {f"--{name}": name for name in ("store", "line", "data", "policy", "device", "actor", "method")}
_OPTIONS["--extra-metrics"] = "extra_metrics"
_LINES = ("LINE", "LINE[@VERSION]")  # arguments that name the model line to look at
_UNTOUCHED = {  # options of that name that mean something else
    ("bench run", "data"),  # the data of a suite
    ("verify", "store"),  # offline, unless somebody asks for the store
    ("request list", "line"),  # a filter: requests of other lines would be hidden
    *((f"train {kind}", "line") for kind in ("classifier", "ddpm", "stable-diffusion")),  # to publish is a decision
    ("model import", "line"),
}
_KEY_NAMES = re.compile(r"secret|password|passwd|token|access_?key|key_?id|credential", re.IGNORECASE)
_KEYS_ELSEWHERE = (
    "remove it, and set SALUN_S3_ACCESS_KEY_ID and SALUN_S3_SECRET_ACCESS_KEY in the environment or in a file "
    "that `env_file` names"
)


class StoreSettings(Document):
    """Where the object store is."""

    uri: str | None = Field(default=None, description="s3://bucket/prefix")
    endpoint: str | None = Field(default=None, description="address of the S3 API, such as http://127.0.0.1:8333")
    region: str | None = Field(default=None, description="region of the S3 API")

    @field_validator("uri")
    @classmethod
    def _is_address(cls, uri: str | None) -> str | None:
        try:
            split_uri(uri or "s3://any")
        except UsageError as error:
            raise ValueError(f"{error.what}; {error.remedy}") from error
        return uri


class Settings(Document):
    """The settings that verbs share."""

    store: StoreSettings = Field(default=StoreSettings(), description="the object store: its address, or a section")
    line: str | None = Field(default=None, description="the model line")
    data: str | None = Field(default=None, description="the data set: a folder, a YAML spec, parquet or a name")
    policy: str | None = Field(default=None, description="the gate policy: a name, a file or an s3:// address")
    method: str | None = Field(default=None, description="the unlearning method")
    extra_metrics: str | None = Field(default=None, description="metrics that are off by default")
    device: str | None = Field(default=None, description="auto, cpu, cuda or cuda:N")
    actor: str | None = Field(default=None, description="your name in the audit log")
    signing_key: str | None = Field(default=None, description="file of the key that signs certificates")
    env_file: str | None = Field(default=None, description="file in this folder with variables, such as store/.env")

    @field_validator("store", mode="before")
    @classmethod
    def _address_alone(cls, store: Any) -> Any:  # noqa: ANN401 - what a document holds
        return {"uri": store} if isinstance(store, str) else store


@dataclass(frozen=True)
class SettingsFile:
    """A settings file that was read."""

    path: Path
    settings: Settings

    @property
    def folder(self) -> Path:
        """The folder that its relative paths begin at."""
        return self.path.parent

    def values(self) -> dict[str, str]:
        """Return the default of each shared option by its key; paths lead there from the working folder."""
        found = self.settings.model_dump(include=set(_OPTIONS.values()) - {"store"}, exclude_none=True)
        found |= {name: self._located(found[name]) for name in ("data", "policy") if name in found}
        return found | ({"store": self.settings.store.uri} if self.settings.store.uri else {})

    def default_map(self, root: Any) -> dict[str, Any]:  # noqa: ANN401 - click's, which typer hides
        """Return click's defaults: by verb of the root command, then by parameter."""
        return _defaults(root, self.values(), "")

    def variables(self) -> dict[str, str]:
        """Return the environment variables that the file and its `env_file` give.

        UsageError if `env_file` leads out of the folder, cannot be read, or is not a list of NAME=VALUE.
        """
        settings = self.settings
        found = self._of_env_file()
        if settings.store.uri:
            found.pop("SALUN_STORE_URI", None)  # the file's own address has priority
        key = settings.signing_key
        own = {_ENDPOINT: settings.store.endpoint, _REGION: settings.store.region}
        own[_SIGNING_KEY] = str(self.folder / key) if key else None
        return found | {name: value for name, value in own.items() if value}

    def _of_env_file(self) -> dict[str, str]:
        name = self.settings.env_file
        if name is None:
            return {}
        path = self.folder / name
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise UsageError(
                f"{self.path}: `env_file` leads out of the folder",
                "variables are read only from the folder of the settings file and below",
                "move the file, or set the variables in the environment",
            )
        return read_variables(path)

    def _located(self, value: str) -> str:
        """Return a path relative to the folder of the file; names and s3:// addresses stay."""
        is_path = "/" in value or "." in value or (self.folder / value).exists()
        if self.folder == Path() or not is_path or "://" in value or value.startswith("torchvision:"):
            return value
        return str(self.folder / value)


def _defaults(command: Any, values: Mapping[str, str], path: str) -> dict[str, Any]:  # noqa: ANN401
    if hasattr(command, "commands"):
        return {name: _defaults(child, values, f"{path} {name}".strip()) for name, child in command.commands.items()}
    found: dict[str, Any] = {}
    for parameter in command.params:
        key = next((_OPTIONS[flag] for flag in parameter.opts if flag in _OPTIONS), None)
        if parameter.param_type_name == "argument" and parameter.metavar in _LINES:
            key = "line"
        if key is not None and key in values and (path, key) not in _UNTOUCHED:
            found[parameter.name] = values[key]
    return found


def find_settings(config: Path | None) -> SettingsFile | None:
    """Read the settings file: the one that is named, or `salun.yaml` in the working folder; None if there is none.

    UsageError if a named file does not exist; it lists all faults: secrets, unknown keys and wrong types.
    """
    path = Path(NAME) if config is None else config
    if config is None and not path.is_file():
        return None
    if not path.is_file():
        raise UsageError(f"there is no settings file {path}", "the file does not exist", "`salun init` writes one")
    return SettingsFile(path, parse_settings(read_document(path), str(path)))


def parse_settings(document: Any, source: str) -> Settings:  # noqa: ANN401 - any YAML value
    """Build settings from what YAML gave, None for an empty file; UsageError lists all faults and repeats no secret."""
    for place in _secrets(document):
        raise UsageError(f"{source} holds a secret", f"`{place}` is or contains one", _KEYS_ELSEWHERE)
    return parse(Settings, {} if document is None else document, source)


def _secrets(document: Any) -> Iterator[str]:  # noqa: ANN401 - any YAML value
    """Yield the keys of secrets, and of addresses with a user's name and password."""
    for name, value in document.items() if isinstance(document, dict) else ():
        if _KEY_NAMES.search(str(name)) or (isinstance(value, str) and re.search(r"//[^/\s]*@", value)):
            yield str(name)
        yield from _secrets(value)


def read_variables(path: Path) -> dict[str, str]:
    """Read a file of NAME=VALUE lines, as `salun store serve` writes it; only our own variables and NO_PROXY count.

    UsageError: it is no regular file or too large, a line has another form, or it says whom to trust.
    """
    remedy = "correct `env_file`: it names a file of NAME=VALUE lines, such as the .env of `salun store serve`"
    from salun_core.certificates.keys import read_small

    data, _ = read_small(path, _MAX_VARIABLES_BYTES)
    if len(data) > _MAX_VARIABLES_BYTES:
        raise UsageError(f"{path} is too large", f"over {_MAX_VARIABLES_BYTES} bytes", remedy)
    try:
        words = shlex.split(data.decode(), comments=True)
    except ValueError as error:
        raise UsageError(f"cannot read {path}", "it is not a list", remedy) from error
    pairs = [word.partition("=") for word in words if word != "export"]
    if any(not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or not equals for name, equals, _ in pairs):
        raise UsageError(f"{path} is not a list of variables", "a line is not NAME=VALUE", remedy)
    for name, _, _ in pairs:
        if name in _TRUST:
            why = "it says whom to trust, and a file in a folder may come from somebody else"
            raise UsageError(f"{path} must not set {name}", why, f"set {name} in the environment")
    return {name: value for name, _, value in pairs if name.startswith("SALUN_") or name in _NO_PROXY}


def set_variables(variables: Mapping[str, str]) -> None:
    """Set environment variables that are not set; keys of one account are never completed with those of another.

    NO_PROXY is added to the value that is there.
    """
    own_account = any(os.environ.get(name) for name in _ACCOUNT)
    for name, value in variables.items():
        there = os.environ.get(name, "")
        if name in _NO_PROXY and there:
            os.environ[name] = ",".join(dict.fromkeys(f"{there},{value}".split(",")))
        elif not there and not (own_account and name in _ACCOUNT):
            os.environ[name] = value


_TEMPLATE = """\
# Settings of salun: defaults for the options of every command that is called in this folder.
# Priority: command line, environment variable, this file, built-in default. Paths begin at this folder.
# Secrets do not belong here: see env_file. To check everything: salun doctor

# The object store. With an endpoint: store: {{uri: s3://bucket, endpoint: http://127.0.0.1:8333, region: us-east-1}}
{store}

# The model line that `sweep`, `run`, `request submit` and `model history` work on.
{line}

# The data set: a folder of class folders, parquet, a YAML spec or a name; see `salun ls data`.
{data}

# The gate policy: auto (by the kind of model), a shipped name, a file or an s3:// address.
{policy}

# The key that signs certificates; `salun key create` makes one.
{signing_key}

# A file in this folder with NAME=VALUE lines, for the store's keys. Only SALUN_* and NO_PROXY are read from it.
{env_file}

# Further options: method, extra_metrics, device, actor.
"""
_SAMPLES = {
    "store": "s3://salun",
    "line": "faces",
    "data": "images",
    "policy": "auto",
    "signing_key": "keys/salun.pem",
    "env_file": "store/.env",
}


def init(
    context: typer.Context,
    store: Annotated[str | None, typer.Option(help="The object store: s3://bucket/prefix.")] = None,
    line: Annotated[str | None, typer.Option(help="The model line.")] = None,
    data: Annotated[str | None, typer.Option(metavar="D", help="The data set; see `salun ls data`.")] = None,
    policy: Annotated[str | None, typer.Option(help="The gate policy: a name, a file or s3://.")] = None,
    endpoint: Annotated[str | None, typer.Option(help="Address of the S3 API. Default: AWS.")] = None,
    region: Annotated[str | None, typer.Option(help="Region of the S3 API.")] = None,
    signing_key: Annotated[str | None, typer.Option(metavar="FILE", help="Key that signs certificates.")] = None,
    env_file: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Variables of the store, such as DIR/.env of `salun store serve DIR`."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Write salun.yaml, the settings file of this folder.

    It contains defaults for the options of every command, with comments. In a terminal it asks for missing values; in a
    script it does not. Without --store and --env-file it uses the `.env` that `salun store serve` wrote into this
    folder or a folder in it. `salun --config FILE init` writes another file.
    """
    from salun_core.storage.local_files import write_whole

    path = context.find_root().params.get("config") or Path(NAME)
    if path.exists() and not force:
        raise UsageError(f"{path} exists already", "it may contain your settings", "edit it, or give --force")
    given = {"line": line, "data": data, "policy": policy, "signing_key": signing_key, "env_file": env_file}
    if store is None and env_file is None:
        given["env_file"] = _served_store(path.parent)
    if _on_terminal():
        store, given = _asked(store, given)
    address = {"uri": store, "endpoint": endpoint, "region": region}
    section: Any = {name: value for name, value in address.items() if value}
    if section:
        given["store"] = section["uri"] if list(section) == ["uri"] else section
    text = _filled(given)
    settings = parse_settings(parse_text(text, str(path)), f"the new {path}")
    if not dry_run:
        write_whole(path, text.encode())
    steps = _next_steps(settings)
    facts = {"settings": path, "next": steps, **({"dry_run": True} if dry_run else {})}
    emit(facts, lambda: _show_init(path, text, steps, dry_run))


def _served_store(folder: Path) -> str | None:
    """Return the .env of `salun store serve` in a folder or below it, if there is exactly one."""
    found = [path for pattern in (".env", "*/.env") for path in folder.glob(pattern) if _names_store(path)]
    return str(found[0].relative_to(folder)) if len(found) == 1 else None


def _names_store(path: Path) -> bool:
    try:
        return "SALUN_STORE_URI" in read_variables(path)
    except UsageError:  # a file of another program
        return False


def _on_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty() and not MODE.json


def _asked(store: str | None, given: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """Ask on a terminal for what was not given; an empty answer leaves it out."""

    def ask(question: str) -> str | None:
        answer: str = typer.prompt(question, default="", show_default=False, err=True)
        return answer.strip() or None

    if store is None and given["env_file"] is None:
        store = ask("Object store, such as s3://bucket/prefix (empty: later)")
    questions = {"line": "Model line, such as faces (empty: later)", "data": "Data: a folder or name (empty: later)"}
    return store, {**given, **{name: ask(text) for name, text in questions.items() if given[name] is None}}


def _filled(given: Mapping[str, Any]) -> str:
    """Return the text of a settings file; what was not given is a comment."""
    lines = {
        name: f"{name}: {_yaml(given[name])}" if given.get(name) else f"# {name}: {_SAMPLES[name]}" for name in _SAMPLES
    }
    return _TEMPLATE.format(**lines)


def _yaml(value: Any) -> str:  # noqa: ANN401
    """Return a value as YAML in one line; JSON is YAML, and quotes what would be read as another type."""
    plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w./-]*|s3://[\w./-]+", value)
    if plain and parse_text(value, "a value") == value:  # `no` would be a truth value
        return str(value)
    return json.dumps(value, ensure_ascii=False)


def _next_steps(settings: Settings) -> list[str]:
    data, line = settings.data or "DATA", settings.line or "LINE"
    publish = f"salun model import CHECKPOINT --arch ARCH --out model --line {shlex.quote(line)}"
    publish += "" if settings.data else f" --data {data}"
    file = "salun request submit --id r-1 --class NAME" + ("" if settings.line else f" --line {line}")
    if not (settings.store.uri or settings.env_file):
        return ["salun store serve store", publish, "salun doctor"]
    key = f"salun key create --out keys/salun    # a sweep needs it: signing_key: {_SAMPLES['signing_key']}"
    return [publish, file if settings.signing_key else key, "salun doctor"]


def _show_init(path: Path, text: str, steps: list[str], dry_run: bool) -> None:
    if dry_run:
        echo(f"{text}\ndry run: {path} was not written")
        return
    echo(f"settings  {path}\n\nNext:")
    for step in steps:
        echo(f"  {step}")
