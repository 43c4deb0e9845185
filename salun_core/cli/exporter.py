"""`salun exporter`: serves the ledger's gauges to Prometheus until it is told to stop."""

from __future__ import annotations

from threading import Event
from typing import Annotated

import typer

from salun_core.cli.output import emit


def exporter(
    store: Annotated[
        str, typer.Option("--store", envvar="SALUN_STORE_URI", help="The store of the ledger: s3://bucket/prefix.")
    ],
    host: Annotated[str, typer.Option("--host", help="The address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="The port; 0 for any that is free.")] = 9400,
    interval: Annotated[
        float, typer.Option("--interval", min=1, max=3600, metavar="SECONDS", help="Time between two refreshes.")
    ] = 15,
    once: Annotated[bool, typer.Option("--once", help="Print the metrics and end.")] = False,
) -> None:
    """Serve the ledger's gauges to Prometheus: /metrics, and /healthz. A scrape never reads the store."""
    from salun_core.requests.gauges import GaugeReader
    from salun_core.storage import open_store
    from salun_core.telemetry.exporter import Exporter, serving
    from salun_core.times import utc_clock

    serve = Exporter(GaugeReader(open_store(store), utc_clock).take, interval)
    if once:
        serve.refresh()
        rows = [{"metric": name, "labels": labels, "value": value} for name, labels, value in serve.samples()]
        emit(rows, lambda: typer.echo(serve.text(), nl=False))
        return
    with serving(serve, host, port) as url:
        emit({"url": url}, lambda: typer.echo(f"serving {url}"))
        Event().wait()
