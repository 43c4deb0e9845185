"""The connection to a Kubeflow Pipelines API: identity, time limits, retries, and the meaning of a refusal.

The calls are those of the generated services of `kfp.Client`, which take a time limit; its convenience methods do not.

A lost reply must not make a second run. So urllib3 repeats only what may be repeated blindly (GET, DELETE, and any
connection that was never established), and `Api.ensure` repeats a POST after it has looked for the result.
"""

from __future__ import annotations

import json
import os
import random
import re
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import kfp.client
import kfp_server_api
import urllib3
from kfp.client.set_volume_credentials import ServiceAccountTokenVolumeCredentials

from salun_core.errors import SalunError, UsageError

ATTEMPTS = 7  # with these pauses about half a minute, in which the API server's pod can restart
FIRST_PAUSE = 0.5  # seconds, doubled after each attempt
LONGEST_PAUSE = 15.0
TIME_LIMIT = (10, 60)  # seconds to connect, seconds to answer
PAGE = 100
POD_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_SECRETS = re.compile(r"(?i)bearer\s+\S+|eyJ[\w-]+\.[\w-]+\.[\w-]*")
_REFUSALS = {
    401: (
        "Kubeflow at {host} does not accept the credentials (401)",
        "give a token of audience pipelines.kubeflow.org by KF_PIPELINES_SA_TOKEN_PATH",
    ),
    403: (
        "the right to {verb} {resource} in {place} is missing (403)",
        "bind a Role with `{verb}` on `{resource}` of pipelines.kubeflow.org",
    ),
    404: ("cannot {verb} {resource} in {place}: not found (404)", "check --host, --namespace and the name or id"),
    409: ("cannot {verb} {resource} in {place} (409)", "try again"),
}


class RemoteError(SalunError):
    """Kubeflow is unreachable, fails or refuses (exit 1); `status` is that of the HTTP answer.

    It is 0 without an answer, -1 if a repetition cannot help.
    """

    def __init__(self, what: str, why: str = "", remedy: str = "", *, status: int = -1) -> None:
        super().__init__(what, why, remedy)
        self.status = status

    @property
    def transient(self) -> bool:
        """Whether the same call may succeed a little later."""
        return self.status == 0 or self.status >= 500  # noqa: PLR2004


@dataclass(frozen=True)
class Api:
    """A Kubeflow Pipelines API that answered.

    Every method that calls it raises `RemoteError` if Kubeflow is unreachable, fails or refuses, and `UsageError` if it
    rejects the request as wrong or the token cannot be read. The namespace is None on a standalone Kubeflow, which has
    no namespaces; `ui` is None if its address is not known. `token_path` is the file of the token, if one is used.
    """

    client: Any
    host: str
    ui: str | None = None
    namespace: str | None = None
    token_path: str | None = None

    @property
    def scope(self) -> dict[str, str]:
        """The argument of lists that are limited to the namespace."""
        return {"namespace": self.namespace} if self.namespace else {}

    def call(self, act: str, function: Callable[..., Any], *args: object, **kwargs: object) -> Any:  # noqa: ANN401
        """Make a call; GET and DELETE are repeated while Kubeflow fails or cannot be reached, POST is not.

        `act` is the right that the call needs, such as "list runs".
        """
        try:
            return function(*args, **kwargs, _request_timeout=TIME_LIMIT)
        except kfp_server_api.ApiException as error:
            raise self._refusal(act, error) from None
        except urllib3.exceptions.HTTPError as error:
            reason = getattr(error, "reason", None) or error
            what, why = f"cannot reach Kubeflow at {self.host}", self._clean(str(reason))
            if isinstance(reason, urllib3.exceptions.SSLError):
                raise RemoteError(what, why, "check its certificate") from None
            raise RemoteError(
                what, why, "check --host (KFP_ENDPOINT) and that this machine may reach it", status=0
            ) from None
        except OSError as error:
            what, remedy = f"cannot read the token {self.token_path}", "check KF_PIPELINES_SA_TOKEN_PATH"
            raise UsageError(what, str(error.strerror), remedy) from None

    def ensure(self, act: str, find: Callable[[], Any], make: Callable[..., Any]) -> tuple[Any, bool]:
        """Find something, or make it; a lost reply does not make a second one. Also returns whether it was made now.

        `act` is the right that making it needs. `find` always returns None for a POST that may be repeated blindly.
        """
        for attempt in range(1, ATTEMPTS + 1):
            if (found := find()) is not None:
                return found, False
            try:
                return self.call(act, make), True
            except RemoteError as error:
                # 409: another process made it first, and the next look finds it.
                if not (error.transient or error.status == 409) or attempt == ATTEMPTS:  # noqa: PLR2004
                    raise
            # The random factor keeps several submitters from meeting again and again.
            time.sleep(min(FIRST_PAUSE * 2 ** (attempt - 1), LONGEST_PAUSE) * random.uniform(0.5, 1.0))
        raise AssertionError("the last attempt returns or raises")

    def every(self, kind: str, name: str | None = None, **scope: object) -> Iterator[Any]:
        """Yield, page by page, everything of a kind: experiments, pipelines, pipeline_versions, runs or recurring_runs.

        A Kubeflow that keeps its pipelines in Kubernetes finds none of them by their display name, so that pipelines
        and versions are listed without one. `scope` limits, sorts or divides the list.
        """
        service = "pipelines" if kind == "pipeline_versions" else kind
        listing = getattr(getattr(self.client, service), f"{service.removesuffix('s')}_service_list_{kind}")
        if name is not None:
            predicate = {"key": "display_name", "operation": "EQUALS", "stringValue": name}
            scope["filter"] = json.dumps({"predicates": [predicate]})
        right, token = f"list {service.replace('_', '')}", ""
        while True:
            answer = self.call(right, listing, page_token=token, **{"page_size": PAGE, **scope})
            yield from getattr(answer, kind) or []
            token = answer.next_page_token or ""
            if not token:
                return

    def find(self, kind: str, name: str, **scope: object) -> Any:  # noqa: ANN401 - kfp's model
        """Return the first item that `every` yields, or None."""
        return next(self.every(kind, name, **scope), None)

    def experiment(self, name: str) -> str:
        """Return the id of an experiment; it is created if it does not exist."""
        body = kfp_server_api.V2beta1Experiment(display_name=name, namespace=self.namespace)
        create = self.client.experiments.experiment_service_create_experiment
        find = lambda: self.find("experiments", name, **self.scope)  # noqa: E731
        found, _ = self.ensure("create experiments", find, lambda **more: create(body, **more))
        return str(found.experiment_id)

    def link(self, kind: str, identity: str) -> str:
        """Return the address of a page of the user interface; empty if its address is not known."""
        return f"{self.ui}/#/{kind}/details/{identity}" if self.ui else ""

    def _refusal(self, act: str, error: Any) -> SalunError:  # noqa: ANN401 - kfp's exception
        why, status = self._clean(_message(error.body) or str(error.reason)), int(error.status or -1)
        if status >= 500:  # noqa: PLR2004
            what, remedy = f"Kubeflow fails to {act} ({status})", "look at the log of ml-pipeline"
        elif status in _REFUSALS:
            verb, resource = act.split()
            place = f"namespace {self.namespace}" if self.namespace else "this Kubeflow"
            words = {"verb": verb, "resource": resource, "place": place, "host": self.host}
            what, remedy = (text.format(**words) for text in _REFUSALS[status])
        else:
            return UsageError(f"Kubeflow refuses to {act} ({status})", why, "correct the request")
        return RemoteError(what, why, remedy, status=status)

    def _clean(self, text: str) -> str:
        """Return a text in one line, without the token, and cut at a readable length."""
        try:
            token = Path(self.token_path).read_text(encoding="utf-8").strip() if self.token_path else ""
        except OSError:
            token = ""
        text = text.replace(token, "***") if token else text
        return " ".join(_SECRETS.sub("***", text).split())[:400]


def connect(host: str, namespace: str | None = None, token_path: str | None = None, ui: str | None = None) -> Api:
    """Connect, and find out which kind of Kubeflow answers.

    On a multi-user Kubeflow the namespace defaults to the pod's own. The token's file is read at each call; by default
    it is the one that Kubernetes projects into the pod, if there is one. Without `ui` there are no links.
    """
    _check_address(host)
    projected = kfp.client.KF_PIPELINES_SA_TOKEN_PATH
    path = token_path or (projected if os.path.isfile(projected) else None)
    credentials = ServiceAccountTokenVolumeCredentials(path) if path else None
    host = host.rstrip("/")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        # With a namespace the constructor does not call the server itself, with long pauses and tracebacks.
        client = kfp.Client(host=host, namespace=namespace or "unset", credentials=credentials)
    http = client.runs.api_client  # shared by all services
    http.configuration.retries = urllib3.Retry(
        ATTEMPTS - 1,
        other=0,  # a wrong certificate stays wrong
        status_forcelist=range(500, 600),
        raise_on_status=False,  # the last answer says more than urllib3's "too many error responses"
        backoff_factor=FIRST_PAUSE,
        backoff_max=LONGEST_PAUSE,
        backoff_jitter=FIRST_PAUSE,
    )
    http.rest_client = kfp_server_api.rest.RESTClientObject(http.configuration)  # the first one has no retries
    api = Api(client, host, ui.rstrip("/") if ui else None, token_path=path)
    if not api.call("read healthz", client.healthzs.healthz_service_get_healthz).multi_user:
        return api
    namespace = namespace or (POD_NAMESPACE.read_text("utf-8").strip() if POD_NAMESPACE.is_file() else None)
    if not namespace:
        raise UsageError("no namespace was given", "this is a multi-user Kubeflow", "--namespace (KFP_NAMESPACE)")
    return replace(api, namespace=namespace)


def _check_address(host: str) -> None:
    parts, remedy = urlsplit(host), "--host http://ml-pipeline.kubeflow:8888, or KFP_ENDPOINT"
    if not host:
        raise UsageError("the address of Kubeflow's API is missing", "neither option nor variable was given", remedy)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        shown = parts.hostname or host.partition("@")[2] or host  # never a password
        raise UsageError(f"{shown!r} is not the address of an API", "it needs http:// or https://, no password", remedy)


def _message(body: object) -> str:
    """Return the error message of the server's JSON; a page of HTML has none.

    The services answer with `message` or `error`, and the upload of a file with `error_message` and `error_details`.
    """
    try:
        document = json.loads(str(body))
    except json.JSONDecodeError:
        return ""
    names = ("message", "error", "error_message", "error_details")
    found = (document.get(name) for name in names) if isinstance(document, dict) else ()
    return next((str(text) for text in found if text), "")
