"""An API server on loopback: the Kubernetes API with TLS as a pod sees it, or Kubeflow's."""

from __future__ import annotations

import ipaddress
import json
import ssl
import threading
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from salun_core.sweeps import liveness

NAME = "salun-deletion-sweep-x7k2p"
WORKFLOW_PATH = f"/apis/argoproj.io/v1alpha1/namespaces/team/workflows/{NAME}"


class Server:
    """Answers by path, and keeps what it was asked."""

    def __init__(self, context=None):
        self.answers, self.asked = {}, []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                server.asked.append((self.path, self.headers.get("Authorization")))
                code, body = server.answers.get(self.path, (404, "404 page not found"))
                data = (body if isinstance(body, str) else json.dumps(body)).encode()
                self.send_response(code)
                if code == 302:
                    self.send_header("Location", str(body))
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if context:
            self.http.socket = context.wrap_socket(self.http.socket, server_side=True)
        self.port = self.http.server_address[1]


@contextmanager
def serving(context=None):
    server = Server(context)
    thread = threading.Thread(target=server.http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
        thread.join()


def issue(folder):
    """Write a certificate for 127.0.0.1 that is its own authority, as `ca.crt`, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "kubernetes")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    (folder / "ca.crt").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    form = serialization.PrivateFormat.PKCS8
    (folder / "key").write_bytes(key.private_bytes(serialization.Encoding.PEM, form, plain))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "ca.crt", folder / "key")
    return context


@pytest.fixture
def account(tmp_path, monkeypatch):
    """The folder of the ServiceAccount, empty: a process outside of any cluster, without a Kubeflow API."""
    folder = tmp_path / "serviceaccount"
    folder.mkdir()
    monkeypatch.setattr(liveness, "ACCOUNT", folder)
    for name in ("KUBERNETES_SERVICE_HOST", "KFP_ENDPOINT", "KF_PIPELINES_SA_TOKEN_PATH", "SALUN_WORKFLOW"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture
def kubernetes(account, monkeypatch):
    """The API server of a cluster, with TLS; this process is a pod of Workflow NAME in it."""
    context = issue(account)
    (account / "token").write_text("of-the-pod\n")
    with serving(context) as server:
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.port))
        monkeypatch.setenv("SALUN_WORKFLOW", NAME)
        monkeypatch.setenv("SALUN_NAMESPACE", "team")
        yield server


@pytest.fixture
def kubeflow(monkeypatch):
    with serving() as server:
        monkeypatch.setenv("KFP_ENDPOINT", f"http://127.0.0.1:{server.port}/")
        yield server
