"""The parts of an API server that `kubectl apply` needs: discovery and stored objects."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

CLUSTER_SCOPED = {"Namespace"}
PLURALS = {"NetworkPolicy": "networkpolicies", "AuthorizationPolicy": "authorizationpolicies"}


class FakeApi:
    """Serves the given kinds; like a real one it refuses an object whose namespace is missing.

    Args:
        documents: objects of every kind that it shall know.
    """

    def __init__(self, documents: list[dict[str, Any]]) -> None:
        self.objects: dict[str, dict[str, Any]] = {}
        self.calls: list[tuple[str, str]] = []
        self.kinds: dict[str, set[str]] = {}
        for document in documents:
            self.kinds.setdefault(document["apiVersion"], set()).add(document["kind"])

    def answer(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, dict[str, Any]]:
        """Return the status and the body for a call."""
        found = self._discovery(path)
        if found:
            return 200, found
        self.calls.append((method, path))
        if method == "GET":
            return (200, self.objects[path]) if path in self.objects else (404, _status(404, "NotFound"))
        if method == "POST" and body:
            namespace = body["metadata"].get("namespace")
            if namespace and f"/api/v1/namespaces/{namespace}" not in self.objects:
                return 404, _status(404, "NotFound")
            self.objects[f"{path}/{body['metadata']['name']}"] = body
            return 201, body
        return 405, _status(405, "MethodNotAllowed")

    def _discovery(self, path: str) -> dict[str, Any] | None:
        groups = sorted({name.split("/")[0] for name in self.kinds if "/" in name})
        if path == "/api":
            return {"kind": "APIVersions", "versions": ["v1"]}
        if path == "/apis":
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": [self._group(name) for name in groups]}
        version = path.removeprefix("/apis/").removeprefix("/api/")
        if path.startswith("/api") and version in self.kinds:
            resources = [_resource(kind) for kind in sorted(self.kinds[version])]
            return {"kind": "APIResourceList", "groupVersion": version, "resources": resources}
        return None

    def _group(self, name: str) -> dict[str, Any]:
        versions = [
            {"groupVersion": item, "version": item.split("/")[1]} for item in self.kinds if item.startswith(f"{name}/")
        ]
        return {"name": name, "versions": versions, "preferredVersion": versions[0]}


def _resource(kind: str) -> dict[str, Any]:
    verbs = ["create", "get", "list", "patch", "delete"]
    name = PLURALS.get(kind, f"{kind.lower()}s")
    return {"name": name, "kind": kind, "namespaced": kind not in CLUSTER_SCOPED, "verbs": verbs, "singularName": ""}


def _status(code: int, reason: str) -> dict[str, Any]:
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "code": code,
        "reason": reason,
        "message": reason,
    }


@contextmanager
def serving(api: FakeApi) -> Iterator[str]:
    """Serve it on loopback; gives the address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def _answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            status, found = api.answer(self.command, self.path.split("?")[0], body)
            data = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = _answer  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Stay silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
