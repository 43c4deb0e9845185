"""The connection to a Kubeflow Pipelines API: who asks, how often, and what a refusal means.

The calls are those of `kfp.Client`'s own generated services, each with a time limit, which the client's
convenience methods lack.
"""

from __future__ import annotations

import json
import os
import random
import re
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import kfp.client
import kfp_server_api
import urllib3
from kfp.client.set_volume_credentials import ServiceAccountTokenVolumeCredentials

from salun_core.errors import SalunError, UsageError

ATTEMPTS = 7
FIRST_PAUSE = 0.5  # seconds, twice as long after each attempt
LONGEST_PAUSE = 15.0
TIME_LIMIT = (10, 60)  # seconds to connect, seconds to answer
PAGE = 100
POD_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_SECRETS = re.compile(r"(?i)bearer\s+\S+|eyJ[\w-]+\.[\w-]+\.[\w-]*")
_UNREACHABLE, _UNAUTHORIZED, _FORBIDDEN, _NOT_FOUND, _CONFLICT = 0, 401, 403, 404, 409


class RemoteError(SalunError):
    """Kubeflow cannot be reached, fails or refuses us (exit 1).

    Args:
        what: what went wrong.
        why: the cause.
        remedy: what the reader can do.
        status: of the HTTP answer; 0 where there was none, and -1 for what no repetition can mend.
    """

    def __init__(self, what: str, why: str = "", remedy: str = "", *, status: int = -1) -> None:
        super().__init__(what, why, remedy)
        self.status = status

    @property
    def transient(self) -> bool:
        """Whether the same call may succeed a little later."""
        return self.status == _UNREACHABLE or self.status >= 500  # noqa: PLR2004


@dataclass(frozen=True)
class Api:
    """A Kubeflow Pipelines API that answered.

    Args:
        client: kfp's own.
        host: its address.
        ui: address of the user interface, for links.
        namespace: of the runs on a multi-user Kubeflow; None on a standalone one, which has no such thing.
        token_path: file of the token, if one is used.
    """

    client: Any
    host: str
    ui: str
    namespace: str | None = None
    token_path: str | None = None

    def call(self, act: str, function: Callable[..., Any], *args: object, **kwargs: object) -> Any:  # noqa: ANN401
        """Make a call that may be repeated, and repeat it while Kubeflow fails or cannot be reached.

        Args:
            act: the right that the call needs, such as "list runs".
            function: of the generated services.
            args: its arguments.
            kwargs: its arguments.

        Returns:
            What it returns.

        Raises:
            RemoteError: it still fails after all attempts, or Kubeflow refuses.
            UsageError: Kubeflow calls the request wrong.
        """
        for pause in pauses():
            try:
                return self.once(act, function, *args, **kwargs)
            except RemoteError as error:
                if not error.transient or pause is None:
                    raise
                time.sleep(pause)
        raise AssertionError("the last pause is None")

    def once(self, act: str, function: Callable[..., Any], *args: object, **kwargs: object) -> Any:  # noqa: ANN401
        """Make a call once; everything else is as in `call`."""
        try:
            return function(*args, **kwargs, _request_timeout=TIME_LIMIT)
        except kfp_server_api.ApiException as error:
            raise self._refusal(act, error) from None
        except urllib3.exceptions.HTTPError as error:
            raise RemoteError(
                f"cannot reach Kubeflow at {self.host}",
                self._clean(str(getattr(error, "reason", None) or error)),
                "check --host (KFP_ENDPOINT) and that this machine may reach it",
                status=_UNREACHABLE,
            ) from None
        except AttributeError as error:  # the generated client's own fault, where TLS failed and there is no body
            if not isinstance(error.__context__, kfp_server_api.ApiException):
                raise
            reason = self._clean(str(error.__context__.reason))
            raise RemoteError(f"cannot reach Kubeflow at {self.host}", reason, "check its certificate") from None
        except OSError as error:
            raise UsageError(
                f"cannot read the token {self.token_path}", str(error.strerror), "check KF_PIPELINES_SA_TOKEN_PATH"
            ) from None

    def ensure(self, act: str, find: Callable[[], Any], make: Callable[[], Any]) -> tuple[Any, bool]:
        """Find something, or make it; a reply that was lost on the way makes no second one.

        Args:
            act: the right that making it needs.
            find: returns it, or None.
            make: the call that makes it, of the generated services.

        Returns:
            The thing, and whether it was made now.

        Raises:
            RemoteError: as in `call`.
        """
        for pause in pauses():
            if (found := find()) is not None:
                return found, False
            try:
                return self.once(act, make), True
            except RemoteError as error:
                if not (error.transient or error.status == _CONFLICT) or pause is None:
                    raise
                time.sleep(pause)
        raise AssertionError("the last pause is None")

    def ensure_gone(self, act: str, function: Callable[..., Any], identity: str) -> None:
        """Delete something; that it is gone already is no fault, for the reply of the first attempt may be lost."""
        try:
            self.call(act, function, identity)
        except RemoteError as error:
            if error.status != _NOT_FOUND:
                raise

    def every(self, act: str, function: Callable[..., Any], field: str, **kwargs: object) -> Iterator[Any]:
        """Yield all items of a list, page by page.

        Args:
            act: the right that it needs.
            function: of the generated services.
            field: of its answer that holds the items.
            kwargs: its arguments; `name` becomes a filter by the name that the UI shows.
        """
        token, name = "", kwargs.pop("name", None)
        if name is not None:
            predicate = {"key": "display_name", "operation": "EQUALS", "stringValue": name}
            kwargs["filter"] = json.dumps({"predicates": [predicate]})
        while True:
            answer = self.call(act, function, page_size=PAGE, page_token=token, **kwargs)
            yield from getattr(answer, field) or []
            token = answer.next_page_token or ""
            if not token:
                return

    def experiment(self, name: str, *, make: bool = True) -> str | None:
        """Return the id of an experiment; it is made where it is missing, unless that is not wanted."""
        service = self.client.experiments
        body = kfp_server_api.V2beta1Experiment(display_name=name, namespace=self.namespace)
        kwargs = {"namespace": self.namespace} if self.namespace else {}

        def find() -> Any:  # noqa: ANN401 - kfp's model
            listing = service.experiment_service_list_experiments
            return next(self.every("list experiments", listing, "experiments", name=name, **kwargs), None)

        if not make:
            return getattr(find(), "experiment_id", None)
        found, _ = self.ensure(
            "create experiments", find, lambda **more: service.experiment_service_create_experiment(body, **more)
        )
        return str(found.experiment_id)

    def link(self, kind: str, identity: str) -> str:
        """Return the address of a page of the user interface."""
        return f"{self.ui}/#/{kind}/details/{identity}"

    def _refusal(self, act: str, error: Any) -> SalunError:  # noqa: ANN401 - kfp's exception
        place = f"namespace {self.namespace}" if self.namespace else "this Kubeflow"
        why, status = self._clean(_message(error.body) or str(error.reason)), int(error.status or -1)
        if status == _UNAUTHORIZED:
            remedy = "give a token of audience pipelines.kubeflow.org by KF_PIPELINES_SA_TOKEN_PATH"
            return RemoteError(f"Kubeflow at {self.host} does not accept who asks (401)", why, remedy, status=status)
        if status == _FORBIDDEN:
            remedy = f"bind a Role with `{act.split()[0]}` on `{act.split()[-1]}` of pipelines.kubeflow.org"
            return RemoteError(f"the right to {act} in {place} is missing (403)", why, remedy, status=status)
        if status == _NOT_FOUND:
            remedy = "check --host, --namespace and the name or id"
            return RemoteError(f"cannot {act} in {place}: not found (404)", why, remedy, status=status)
        if status >= 500:  # noqa: PLR2004
            remedy = "look at the log of ml-pipeline"
            return RemoteError(f"Kubeflow fails to {act} ({status})", why, remedy, status=status)
        if status == _CONFLICT:
            return RemoteError(f"cannot {act} in {place} (409)", why, "try again", status=status)
        return UsageError(f"Kubeflow refuses to {act} ({status})", why, "correct the request")

    def _clean(self, text: str) -> str:
        """Return a text of one line, without the token, cut at a length that a reader bears."""
        try:
            token = Path(self.token_path).read_text(encoding="utf-8").strip() if self.token_path else ""
        except OSError:
            token = ""
        text = text.replace(token, "***") if token else text
        return " ".join(_SECRETS.sub("***", text).split())[:400]


def connect(host: str, namespace: str | None = None, token_path: str | None = None, ui: str | None = None) -> Api:
    """Connect, and see what kind of Kubeflow answers.

    Args:
        host: address of the API, such as http://ml-pipeline.kubeflow:8888.
        namespace: of the runs; on a multi-user Kubeflow else the pod's own.
        token_path: file of a ServiceAccount token, read again at each call; else the one that Kubernetes projects,
            if there is any.
        ui: address of the user interface; else the host's.

    Returns:
        The connection.

    Raises:
        UsageError: no address or none of the right form, or a namespace is needed.
        RemoteError: it cannot be reached or refuses.
    """
    _check_address(host)
    kept = kfp.client.KF_PIPELINES_SA_TOKEN_PATH
    path = token_path or (kept if os.path.isfile(kept) else None)
    credentials = ServiceAccountTokenVolumeCredentials(path) if path else None
    host = host.rstrip("/")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        # any name keeps the constructor from asking the server itself, with long pauses and tracebacks
        client = kfp.Client(host=host, namespace=namespace or "unset", credentials=credentials)
    api = Api(client, host, (ui or host).rstrip("/"), token_path=path)
    health = api.call("read healthz", client.healthzs.healthz_service_get_healthz)
    if not health.multi_user:
        return api
    namespace = namespace or (POD_NAMESPACE.read_text("utf-8").strip() if POD_NAMESPACE.is_file() else None)
    if not namespace:
        raise UsageError("no namespace was given", "this Kubeflow is a multi-user one", "--namespace (KFP_NAMESPACE)")
    return Api(client, host, api.ui, namespace, path)


def pauses() -> Iterator[float | None]:
    """Yield the pause after each attempt, longer each time and never the same for two; None after the last."""
    for number in range(ATTEMPTS - 1):
        yield min(FIRST_PAUSE * 2**number, LONGEST_PAUSE) * random.uniform(0.5, 1.0)
    yield None


def _check_address(host: str) -> None:
    parts = urlsplit(host)
    if parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc:
        return
    remedy = "--host http://ml-pipeline.kubeflow:8888, or KFP_ENDPOINT"
    if not host:
        raise UsageError("no Kubeflow was named", "there is no address of its API", remedy)
    shown = parts.hostname or host.partition("@")[2] or host
    raise UsageError(f"{shown!r} is no address of an API", "it needs http:// or https://, and no password", remedy)


def _message(body: object) -> str:
    """Return what the server says of an error; a page of HTML says nothing."""
    try:
        document = json.loads(str(body))
    except json.JSONDecodeError:
        return ""
    return str(document.get("message") or document.get("error") or "") if isinstance(document, dict) else ""
