"""The last step's numbers for Prometheus: a text page at http://HOST:PORT/metrics, from the standard library."""

from __future__ import annotations

import math
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from megatron_dppo.training.metrics.sink import Metrics

_PREFIX = "megatron_dppo_"
_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_REQUEST_TIMEOUT_S = 10.0


class PrometheusSink:
    """Answers on all addresses of this host. Anybody who reaches the port can read the numbers, and nothing else.

    Args:
        port: to listen on.
        run: the run's name, a label of every number.
    """

    def __init__(self, port: int, run: str) -> None:
        self._run = run
        self._page = b""
        sink = self

        class Handler(BaseHTTPRequestHandler):
            timeout = _REQUEST_TIMEOUT_S

            def do_GET(self) -> None:
                is_page = self.path.partition("?")[0] == "/metrics"
                body = sink._page if is_page else b"see /metrics\n"
                self.send_response(200 if is_page else 404)
                self.send_header("Content-Type", _CONTENT_TYPE)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """A scrape every few seconds is no news."""

        self._server = ThreadingHTTPServer(("", port), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, name="prometheus", daemon=True)
        self._thread.start()

    def record(self, step: int, metrics: Metrics) -> None:
        """Numbers become gauges; texts a gauge of 1 with the text as a label. What a step lacks is gone from the page."""
        page = exposition({"step": step, "step_recorded_unix_seconds": time.time(), **metrics}, self._run)
        self._page = page.encode()

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def exposition(metrics: Metrics, run: str) -> str:
    """In Prometheus' text format: ``dppo/mask_fraction`` is ``megatron_dppo_dppo_mask_fraction{run="..."}``."""
    lines = []
    for name, value in metrics.items():
        gauge = _PREFIX + re.sub(r"[^a-zA-Z0-9_]", "_", name)
        if isinstance(value, str):
            labels, number = f'run="{_escaped(run)}",value="{_escaped(value)}"', "1"
            gauge += "_info"
        else:
            labels, number = f'run="{_escaped(run)}"', _number(value)
        lines += [f"# TYPE {gauge} gauge", f"{gauge}{{{labels}}} {number}"]
    return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return repr(float(value))


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
