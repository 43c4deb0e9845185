"""A Kubeflow Pipelines API on loopback: it stores objects and refuses what KFP's published types refuse.

It answers the real `kfp.Client`. Every body is checked against the models of `kfp_server_api`, key by key, and
every run form against the uploaded pipeline, as the server of KFP does.

Its answers have the shapes of KFP 2.17: no text of any step, one creation time for all tasks of a run, two tasks for
each step (`step` and `step(0)`), the drivers among them, error bodies of two kinds, and pipelines that are objects of
Kubernetes if it is `native`.
"""

from __future__ import annotations

import email
import email.policy
import functools
import json
import re
import socket
import threading
import uuid
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import kfp_server_api
import yaml
from google.protobuf import json_format, struct_pb2
from kfp.pipeline_spec import pipeline_spec_pb2

ROOT = "/apis/v2beta1"
PRIMITIVES = {"str": str, "int": int, "bool": bool, "float": (int, float)}
KINDS = {
    "NUMBER_INTEGER": lambda value: isinstance(value, int | float) and value == int(value),
    "NUMBER_DOUBLE": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "STRING": lambda value: isinstance(value, str),
    "BOOLEAN": lambda value: isinstance(value, bool),
    "STRUCT": lambda value: isinstance(value, dict),
    "LIST": lambda value: isinstance(value, list),
}


class RefusedError(Exception):
    def __init__(self, status, message):
        super().__init__(message)
        self.status, self.message = status, message


def check(value, kind, where):
    """Refuse what does not fit the published type: a wrong JSON type, an unknown key, an unknown enum value."""
    if kind == "object" or value is None:
        return
    if found := re.fullmatch(r"list\[(.*)\]", kind):
        if not isinstance(value, list):
            raise RefusedError(400, f"{where} is no list")
        for number, item in enumerate(value):
            check(item, found[1], f"{where}[{number}]")
    elif found := re.fullmatch(r"dict\(str, (.*)\)", kind):
        if not isinstance(value, dict):
            raise RefusedError(400, f"{where} is no object")
        for key, item in value.items():
            check(item, found[1], f"{where}.{key}")
    elif kind in PRIMITIVES:
        if not isinstance(value, PRIMITIVES[kind]):
            raise RefusedError(400, f"{where} is no {kind}")
    elif kind == "datetime":
        datetime.fromisoformat(value)
    else:
        check_model(value, getattr(kfp_server_api, kind), where)


def check_model(value, model, where):
    if allowed := getattr(model, "allowable_values", None):
        if value not in allowed:
            raise RefusedError(400, f"{where}: {value!r} is not in {allowed}")
        return
    if not isinstance(value, dict):
        raise RefusedError(400, f"{where} is no {model.__name__}")
    names = {key: attribute for attribute, key in model.attribute_map.items()}
    for key, item in value.items():
        if key not in names:
            raise RefusedError(400, f"{where} has no field {key}")
        check(item, model.openapi_types[names[key]], f"{where}.{key}")


def hang_up(handler):
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


class FakeKubeflow:
    """The state of the server, and the faults that a test injects."""

    def __init__(self, *, multi_user=False, namespaces=("team",), token=None, native=False):
        self.multi_user, self.namespaces, self.token, self.native = multi_user, set(namespaces), token, native
        self.experiments, self.pipelines, self.versions, self.runs, self.schedules = {}, {}, {}, {}, {}
        self.requests = []  # (method, path, authorization)
        self.faults = []  # (method, pattern, what): 500, 503, 403, "lost" (done, but no reply) or "cut" (not done)
        self.forbidden = set()  # (verb, resource)
        self.script = []  # what each look at a run makes of it
        self.before_create = lambda body: None
        self.before_delete = lambda: None
        self.during_upload = lambda: None  # called without the lock
        self.policies = []  # the propagation policy of each deletion of a recurring run
        self.enabled = []  # how many recurring runs were enabled after each change
        self._starts = {}
        self._lock = threading.RLock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # headers and body in one packet: a second one waits for the delayed ACK of the first

            def _do(self):
                fake._serve(self)

            do_GET = do_POST = do_DELETE = _do  # noqa: N815 - names of the standard library

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.host = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def count(self, method, pattern):
        return sum(1 for verb, path, _ in self.requests if verb == method and re.search(pattern, path))

    def _serve(self, handler):
        parts = urlsplit(handler.path)
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        self.requests.append((handler.command, parts.path, handler.headers.get("authorization")))
        fault = self._fault(handler.command, parts.path)
        try:
            if fault == "cut":
                hang_up(handler)
                return
            if isinstance(fault, int):
                raise RefusedError(fault, f"injected {fault}")
            query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
            if not parts.path.endswith("/healthz"):
                self._authenticate(handler.headers.get("authorization"))
            answer, status = self._route(handler, parts.path, query, body), 200
            if fault == "lost":
                hang_up(handler)
                return
        except RefusedError as error:
            answer, status = self._error(parts.path, error.message), error.status
        data = json.dumps(answer).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)
        handler.wfile.flush()

    def _error(self, path, message):
        """The body of a refusal: the upload of a file is served by another part of the API server."""
        if "/upload" in path:
            return {"error_message": message, "error_details": message}
        detail = {"@type": "type.googleapis.com/api.Error", "error_message": "Internal", "error_details": message}
        return {"error": message, "code": 13, "message": message, "details": [detail]}

    def _fault(self, method, path):
        for number, (verb, pattern, what) in enumerate(self.faults):
            if verb == method and re.search(pattern, path):
                del self.faults[number]
                return what
        return None

    def _authenticate(self, header):
        if self.token is not None and header != f"Bearer {self.token}":
            raise RefusedError(401, f"Unauthenticated: token {str(header)[7:]} is expired")

    def _may(self, verb, resource, namespace):
        if (verb, resource) in self.forbidden or (self.multi_user and namespace not in self.namespaces):
            raise RefusedError(403, f"User 'x' is not authorized (Namespace:{namespace},Verb:{verb})")

    def _space(self, given):
        if self.multi_user and not given:
            raise RefusedError(400, "Invalid input error: namespace is empty")
        if not self.multi_user and given:
            raise RefusedError(400, "Invalid input error: in single-user mode there is no namespace")
        return given

    def _route(self, handler, path, query, body):
        if "/upload" in path:
            self.during_upload()
        with self._lock:
            path = unquote(path).removeprefix(ROOT)
            method = handler.command
            for verb, pattern, action in ROUTES:
                if verb == method and (found := re.fullmatch(pattern, path)):
                    return action(self, handler, query, body, *found.groups())
        raise RefusedError(404, f"no route {method} {path}")

    # experiments, pipelines and versions

    def health(self, handler, query, body):
        return {"multi_user": self.multi_user}

    def create_experiment(self, handler, query, body):
        item = self._body(body, "V2beta1Experiment")
        self._may("create", "experiments", self._space(item.get("namespace")))
        return self._new(self.experiments, item, "experiment_id", same=("display_name", "namespace"))

    def create_pipeline(self, handler, query, body):
        item = self._body(body, "V2beta1Pipeline")
        self._may("create", "pipelines", self._space(item.get("namespace")))
        item.setdefault("name", item["display_name"])
        return self._new(self.pipelines, item, "pipeline_id", same=("name", "namespace"))

    def apply(self, pipeline, version):
        """What `kubectl apply` does with a Pipeline and a PipelineVersion: the API shows the names of the objects."""
        names = {"name": pipeline["metadata"]["name"], "display_name": pipeline["spec"]["displayName"]}
        there = self._new(self.pipelines, names, "pipeline_id")
        document = {"pipeline_spec": version["spec"]["pipelineSpec"], "platform_spec": version["spec"]["platformSpec"]}
        item = {"pipeline_id": there["pipeline_id"], "display_name": version["spec"]["displayName"]}
        item |= {"name": version["metadata"]["name"], "pipeline_spec": _through_struct(document)}
        return self._new(self.versions, item, "pipeline_version_id")

    def upload_version(self, handler, query, body):
        pipeline = self._get(self.pipelines, query["pipelineid"])
        self._may("create", "pipelines", pipeline.get("namespace"))
        header = f"Content-Type: {handler.headers['Content-Type']}\r\n\r\n".encode()
        message = email.message_from_bytes(header + body, policy=email.policy.HTTP)
        (part,) = [part for part in message.iter_parts() if part.get_param("name", header="content-disposition")]
        document = json.loads(_checked(part.get_payload(decode=True)))
        item = {"pipeline_id": query["pipelineid"], "display_name": query["name"], "pipeline_spec": document}
        item["name"] = f"{pipeline['name']}-{query['name']}" if self.native else query["name"]
        item["description"] = query.get("description", "")
        return self._new(self.versions, item, "pipeline_version_id", same=("name", "pipeline_id"))

    def list_experiments(self, handler, query, body):
        self._may("list", "experiments", self._space(query.get("namespace")))
        return self._list("experiments", self.experiments.values(), query)

    def list_pipelines(self, handler, query, body):
        self._may("list", "pipelines", self._space(query.get("namespace")))
        return self._list("pipelines", self.pipelines.values(), query)

    def list_versions(self, handler, query, body, pipeline_id):
        found = (item for item in self.versions.values() if item["pipeline_id"] == pipeline_id)
        return self._list("pipeline_versions", found, query)

    # runs

    def create_run(self, handler, query, body):
        item = self._body(body, "V2beta1Run")
        self._check_job(item, "runs")
        self.before_create(item)
        return self._new(self.runs, {**item, "state": "PENDING"}, "run_id")

    def list_runs(self, handler, query, body):
        self._may("list", "runs", self._get(self.experiments, query["experiment_id"]).get("namespace"))
        return self._list("runs", self.runs.values(), query)

    def get_run(self, handler, query, body, run_id):
        run = self._get(self.runs, run_id)
        if self.script:
            self.script.pop(0)(self, run)
        return run

    def report(self, run, state, tasks):
        """Set the state of a run and of its tasks, as KFP 2.17 reports them.

        A step is a node that counts attempts and one node for each attempt; only the latter is the pod. Every node has
        the Workflow's creation time, and the order of the list means nothing.
        """
        details, created = [], datetime.fromisoformat(run["created_at"])
        for name, given in {"root-driver": "SUCCEEDED", **tasks}.items():
            started = self._starts.setdefault((run["run_id"], name), len(self._starts))
            common = {"run_id": run["run_id"], "create_time": run["created_at"], "child_tasks": []}
            common["start_time"] = (created + timedelta(seconds=started)).isoformat().replace("+00:00", "Z")
            step = "RUNNING" if given == "PENDING" else given
            details.append({**common, "task_id": f"{name}-node", "display_name": name, "state": step})
            if given != "SKIPPED":
                details.append({**common, "task_id": f"{name}-pod", "display_name": f"{name}(0)", "state": given})
        details.sort(key=lambda item: str(uuid.uuid5(uuid.NAMESPACE_URL, item["task_id"])))
        run.update(state=state, run_details={"task_details": details})

    def terminate_run(self, handler, query, body, run_id):
        run = self._get(self.runs, run_id)
        self._may("terminate", "runs", self.experiments[run["experiment_id"]].get("namespace"))
        run["state"] = "CANCELED"
        return {}

    # recurring runs

    def create_schedule(self, handler, query, body):
        item = self._body(body, "V2beta1RecurringRun")
        self._check_job(item, "recurringruns")
        cron = item["trigger"]["cron_schedule"]["cron"]
        if len(cron.split()) != 6 or not 1 <= int(item["max_concurrency"]) <= 10:
            raise RefusedError(400, f"Invalid input error: the schedule {cron} or its concurrency")
        status = {"ENABLE": "ENABLED", "DISABLE": "DISABLED"}[item["mode"]]
        made = self._new(self.schedules, {**item, "status": status}, "recurring_run_id")
        self._count_enabled()
        return made

    def list_schedules(self, handler, query, body):
        self._may("list", "recurringruns", self._get(self.experiments, query["experiment_id"]).get("namespace"))
        return self._list("recurringRuns", self.schedules.values(), query)

    def switch_schedule(self, handler, query, body, identity, verb):
        self._get(self.schedules, identity)["status"] = f"{verb.upper()}D"
        self._count_enabled()
        return {}

    def delete_schedule(self, handler, query, body, identity):
        """Delete it, and with it its runs: Kubernetes collects what a deleted object owned, unless told to orphan."""
        self._get(self.schedules, identity)
        self.before_delete()
        self.policies.append(query.get("propagation_policy"))
        del self.schedules[identity]
        if query.get("propagation_policy") != "ORPHAN":
            self.runs = {key: run for key, run in self.runs.items() if run.get("recurring_run_id") != identity}
        self._count_enabled()
        return {}

    def fire(self, identity):
        """Start the run of a slot of a recurring run."""
        item = self._get(self.schedules, identity)
        names = ("display_name", "experiment_id", "pipeline_version_reference", "runtime_config")
        run = {**{name: item[name] for name in names}, "recurring_run_id": identity, "state": "RUNNING"}
        return self._new(self.runs, run, "run_id")

    def _count_enabled(self):
        self.enabled.append(sum(item["status"] == "ENABLED" for item in self.schedules.values()))

    def _check_job(self, item, resource):
        experiment = self._get(self.experiments, item["experiment_id"])
        self._may("create", resource, experiment.get("namespace"))
        reference = item["pipeline_version_reference"]
        version = self._get(self.versions, reference["pipeline_version_id"])
        if version["pipeline_id"] != reference["pipeline_id"]:
            raise RefusedError(400, "Invalid input error: the version is of another pipeline")
        declared = version["pipeline_spec"]["pipeline_spec"]["root"]["inputDefinitions"]["parameters"]
        given = item["runtime_config"].get("parameters", {})
        for name, value in given.items():
            if name not in declared or not KINDS[declared[name]["parameterType"]](value):
                raise RefusedError(400, f"Invalid input error: parameter {name}")
        for name, definition in declared.items():
            if not definition.get("isOptional") and name not in given:
                raise RefusedError(400, f"Invalid input error: parameter {name} is required")

    # common parts

    def _body(self, body, kind):
        item = json.loads(body)
        check(item, kind, kind)
        if not item.get("display_name"):
            raise RefusedError(400, "Invalid input error: display_name is empty")
        return item

    def _new(self, table, item, key, same=()):
        if same and any(all(item.get(name) == other.get(name) for name in same) for other in table.values()):
            raise RefusedError(409, f"Already exist error: {item['display_name']}")
        identity = str(uuid.uuid4())
        created = datetime.now(UTC).replace(microsecond=0).isoformat().replace("+00:00", "Z")
        table[identity] = {**item, key: identity, "created_at": created}
        return table[identity]

    def _get(self, table, identity):
        if identity not in table:
            raise RefusedError(404, f"ResourceNotFoundError: {identity} not found")
        return table[identity]

    def _list(self, field, items, query):
        found = [item for item in items if self._matches(item, query)]
        if query.get("sort_by") == "created_at desc":
            found = found[::-1]
        start, size = int(query.get("page_token") or 0), min(int(query.get("page_size") or 10), 3)
        after = str(start + size) if start + size < len(found) else ""
        return {field: found[start : start + size], "next_page_token": after, "total_size": len(found)}

    def _matches(self, item, query):
        names = {"stringValue": "string_value"}  # proto3 JSON takes both spellings
        given = json.loads(query.get("filter") or "{}")
        if given and self.native and "experiment_id" not in item and "name" in item:
            return False  # objects of Kubernetes are not found by their display name
        predicates = [{names.get(key, key): value for key, value in one.items()} for one in given.get("predicates", [])]
        check({"predicates": predicates}, "V2beta1Filter", "filter")
        assert all(one["operation"] == "EQUALS" for one in predicates)
        scope = [name for name in ("experiment_id", "namespace") if query.get(name) and name in item]
        named = all(item[one["key"]] == one["string_value"] for one in predicates)
        return named and all(item[name] == query[name] for name in scope)


@functools.lru_cache
def _checked(package):
    """The JSON text of an uploaded file, if its documents have KFP's published types; most tests upload the same."""
    spec, platform = yaml.load_all(package, yaml.CSafeLoader)
    json_format.ParseDict(spec, pipeline_spec_pb2.PipelineSpec())
    json_format.ParseDict(platform, pipeline_spec_pb2.PlatformSpec())
    return json.dumps(_through_struct({"pipeline_spec": spec, "platform_spec": platform}))


def _through_struct(document):
    """A document as the server gives it back: protobuf knows no integers."""
    return json_format.MessageToDict(json_format.ParseDict(document, struct_pb2.Struct()))


_ID = r"([^/:]+)"
ROUTES = (
    ("GET", "/healthz", FakeKubeflow.health),
    ("POST", "/experiments", FakeKubeflow.create_experiment),
    ("GET", "/experiments", FakeKubeflow.list_experiments),
    ("POST", "/pipelines/upload_version", FakeKubeflow.upload_version),
    ("POST", "/pipelines", FakeKubeflow.create_pipeline),
    ("GET", "/pipelines", FakeKubeflow.list_pipelines),
    ("GET", f"/pipelines/{_ID}/versions", FakeKubeflow.list_versions),
    ("POST", "/runs", FakeKubeflow.create_run),
    ("GET", "/runs", FakeKubeflow.list_runs),
    ("GET", f"/runs/{_ID}", FakeKubeflow.get_run),
    ("POST", f"/runs/{_ID}:terminate", FakeKubeflow.terminate_run),
    ("POST", "/recurringruns", FakeKubeflow.create_schedule),
    ("GET", "/recurringruns", FakeKubeflow.list_schedules),
    ("POST", f"/recurringruns/{_ID}:(enable|disable)", FakeKubeflow.switch_schedule),
    ("DELETE", f"/recurringruns/{_ID}", FakeKubeflow.delete_schedule),
)
