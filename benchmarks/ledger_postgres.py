"""The same ledger on PostgreSQL, as one would write it there: rows, one transaction a step, `SKIP LOCKED`.

It keeps the very documents of ours (request, events, run record, sealed set, certificate), built by the same code, so
that only the place differs.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

from benchmarks.ledger_s3 import LINE, THREADS, TRAINED_ON, Wide
from salun_core.digest import digest_json, sha256_bytes
from salun_core.errors import ConflictError
from salun_core.requests.ledger import Move, event_after
from salun_core.requests.redaction import redacted_request
from salun_core.requests.schema import DeletionRequest, Outcome, RequestEvent, RequestState, Status, Submission
from salun_core.sweeps.runs import RunMember, RunRecord
from salun_core.times import due_after_one_month, utc_clock

SCHEMA = """
CREATE TABLE IF NOT EXISTS lines (line text PRIMARY KEY, version text NOT NULL, lease_epoch int NOT NULL,
    lease_run text, lease_until timestamptz);
CREATE TABLE IF NOT EXISTS requests (id text PRIMARY KEY, line text NOT NULL, status text NOT NULL,
    received_at timestamptz NOT NULL, due_at timestamptz NOT NULL, attempt int NOT NULL, n int NOT NULL,
    body jsonb NOT NULL);
CREATE INDEX IF NOT EXISTS standing ON requests (line, status, received_at, id);
CREATE TABLE IF NOT EXISTS events (request text REFERENCES requests, n int, body jsonb NOT NULL,
    PRIMARY KEY (request, n));
CREATE TABLE IF NOT EXISTS runs (run text PRIMARY KEY, line text NOT NULL, body jsonb NOT NULL, sealed bytea);
CREATE TABLE IF NOT EXISTS certificates (request text PRIMARY KEY REFERENCES requests, body jsonb NOT NULL);
"""
STANDING = """
SELECT r.body, e.body FROM requests r JOIN events e ON e.request = r.id AND e.n = r.n
WHERE r.line = %s AND r.status = %s ORDER BY r.received_at, r.id LIMIT %s FOR UPDATE OF r SKIP LOCKED
"""
MEMBERS = """
SELECT r.body, e.body FROM requests r JOIN events e ON e.request = r.id AND e.n = r.n
WHERE r.id = ANY(%s) AND r.status = %s FOR UPDATE OF r
"""
LEASE = """
UPDATE lines SET lease_run = %s, lease_epoch = lease_epoch + 1, lease_until = now() + interval '26 hours'
WHERE line = %s AND (lease_run IS NULL OR lease_until < now()) RETURNING version, lease_epoch
"""
GAUGES = """
SELECT status, count(*), min(received_at), count(*) FILTER (WHERE received_at < now() - interval '7 days'),
    count(*) FILTER (WHERE now() > received_at + (due_at - received_at) * 0.5),
    count(*) FILTER (WHERE now() > received_at + (due_at - received_at) * 0.8), count(*) FILTER (WHERE due_at < now())
FROM requests GROUP BY status
"""


class PostgresSide:
    """The ledger in a database.

    Args:
        where: how to connect; the tables are made if they are not there.
    """

    name = "PostgreSQL"

    def __init__(self, where: str) -> None:
        self._where = where
        self._connection = self._connect()
        self._connection.execute(SCHEMA)
        first = (LINE, digest_json("the first version"))
        self._connection.execute("INSERT INTO lines VALUES (%s, %s, 0) ON CONFLICT DO NOTHING", first)

    def _connect(self) -> Any:  # noqa: ANN401 - psycopg need not be installed
        import psycopg

        return psycopg.connect(self._where, autocommit=True)

    def submit(self, submissions: Sequence[Submission]) -> None:
        """File requests, each in a transaction of its own, by many threads with a connection each."""
        idle: SimpleQueue[Any] = SimpleQueue()
        connections = [self._connect() for _ in range(max(1, min(THREADS, len(submissions))))]
        for connection in connections:
            idle.put(connection)

        def file(submission: Submission) -> None:
            connection = idle.get()
            try:
                _submit(connection, submission)
            finally:
                idle.put(connection)

        with ThreadPoolExecutor(len(connections)) as pool:
            list(pool.map(file, submissions))
        for connection in connections:
            connection.close()

    def claim(self, run: str, limit: int) -> RunRecord:
        """Claim a batch: lease, moves, events, run record and sealed set in one transaction."""
        with self._connection.transaction():
            execute = self._connection.execute
            version, epoch = execute(LEASE, (run, LINE)).fetchone()
            states = _states(execute(STANDING, (LINE, Status.QUEUED, limit)).fetchall())
            resolver = Wide(version, frozenset())
            moved = self._move(states, Move(Status.IN_PROGRESS, "benchmark", "claimed", run, epoch=epoch, rung=0))
            sealed = resolver.seal([state.request for state in moved])
            record = _record(run, version, epoch, moved, resolver, sha256_bytes(sealed))
            execute("INSERT INTO runs VALUES (%s, %s, %s, %s)", (run, LINE, _text(record), sealed))
        return record

    def erase(self, record: RunRecord) -> None:
        """The model's versions are not the database's business; nothing is timed here."""

    def settle(self, record: RunRecord) -> None:
        """Certify, complete and redact the requests of a run, and free the line, in one transaction."""
        with self._connection.transaction():
            execute = self._connection.execute
            members = [member.id for member in record.members]
            states = _states(execute(MEMBERS, (members, Status.IN_PROGRESS)).fetchall())
            assert len(states) == len(members)
            version = digest_json(record.run)
            certificates = [{"request": s.request.id, "version": version, "outcome": "unlearned"} for s in states]
            with self._connection.cursor() as cursor:
                cursor.executemany(
                    "INSERT INTO certificates VALUES (%s, %s)",
                    [(row["request"], json.dumps(row)) for row in certificates],
                )
            move = Move(Status.COMPLETED, "benchmark", "published", record.run, Outcome.UNLEARNED, record.epoch)
            done = self._move(states, move)
            redacted = [redacted_request(state.request, keep_hashes=True) for state in done]
            with self._connection.cursor() as cursor:
                cursor.executemany(
                    "UPDATE requests SET body = %s WHERE id = %s", [(_text(item), item.id) for item in redacted]
                )
            execute("UPDATE runs SET sealed = NULL WHERE run = %s", (record.run,))
            execute("UPDATE lines SET version = %s, lease_run = NULL WHERE line = %s", (version, LINE))

    def _move(self, states: Sequence[RequestState], move: Move) -> list[RequestState]:
        events = [event_after(state.request.id, state.last, move, utc_clock()) for state in states]
        with self._connection.cursor() as cursor:
            cursor.executemany("INSERT INTO events VALUES (%s, %s, %s)", [(e.request, e.n, _text(e)) for e in events])
            cursor.executemany(
                "UPDATE requests SET status = %s, attempt = %s, n = %s WHERE id = %s",
                [(event.to_status, event.attempt, event.n, event.request) for event in events],
            )
        return [RequestState(request=s.request, last=e) for s, e in zip(states, events, strict=True)]

    def finish(self, count: int) -> None:
        """Complete the oldest requests, by runs of at most a thousand."""
        while count > 0:
            record = self.claim(f"filler-{secrets.token_hex(6)}", min(count, 1000))
            self.settle(record)
            count -= len(record.members)

    def counts(self) -> tuple[int, int]:
        """Return how many requests wait and how many are completed."""
        found = dict(self._connection.execute("SELECT status, count(*) FROM requests GROUP BY status").fetchall())
        return found.get(Status.QUEUED, 0), found.get(Status.COMPLETED, 0)

    def gauges(self) -> Callable[[], object]:
        """Return what asks the database for what the exporter tells of the requests."""
        return lambda: self._connection.execute(GAUGES).fetchall()

    def empty(self) -> None:
        """Throw all requests and runs away."""
        self._connection.execute("TRUNCATE requests, events, runs, certificates")
        self._connection.execute("UPDATE lines SET lease_run = NULL")

    def version(self) -> str:
        """Return the server's version."""
        return str(self._connection.execute("SHOW server_version").fetchone()[0]).split()[0]

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def _submit(connection: Any, submission: Submission) -> None:  # noqa: ANN401
    now = utc_clock()
    received = submission.received_at or now
    request = DeletionRequest(
        id=submission.id,
        model_line=submission.model_line,
        target=submission.target,
        received_at=received.isoformat(),
        due_at=due_after_one_month(received).isoformat(),
        source=submission.source,
    )
    event = event_after(request.id, None, Move(Status.QUEUED, "benchmark", "submitted"), now)
    fields = (request.id, request.model_line, event.to_status, request.received_at, request.due_at, _text(request))
    with connection.transaction():
        added = connection.execute(
            "INSERT INTO requests (id, line, status, received_at, due_at, attempt, n, body) "
            "VALUES (%s, %s, %s, %s, %s, 1, 1, %s) ON CONFLICT (id) DO NOTHING",
            fields,
        ).rowcount
        if not added:
            raise ConflictError(f"request {request.id} exists already", "the benchmark files each once", "start anew")
        connection.execute("INSERT INTO events VALUES (%s, %s, %s)", (event.request, event.n, _text(event)))


def _text(document: DeletionRequest | RequestEvent | RunRecord) -> str:
    return document.canonical().decode()


def _states(rows: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> list[RequestState]:
    return [RequestState.model_validate({"request": request, "last": last}) for request, last in rows]


def _record(
    run: str, version: str, epoch: int, states: Sequence[RequestState], resolver: Wide, sealed: str
) -> RunRecord:
    members: list[RunMember] = []
    together: set[str] = set()
    for state in states:
        resolved = resolver.resolve(state.request)
        together.update(resolved.ids)
        assert state.last is not None
        member = RunMember(
            id=state.request.id,
            event=state.last.n,
            attempt=state.last.attempt,
            forget_digest=resolved.digest,
            salt=secrets.token_hex(16),
            found=len(resolved.ids),
            named=resolved.named,
        )
        members.append(member)
    return RunRecord(
        run=run,
        line=LINE,
        parent=version,
        epoch=epoch,
        created_at=utc_clock().isoformat(),
        method="salun",
        density=0.5,
        work_key=digest_json({"parent": version, "forget": sorted(together)}),
        members=members,
        forget_sha256=sealed,
        forget_count=len(together),
        train_count=TRAINED_ON,
    )
