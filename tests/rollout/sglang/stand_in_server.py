"""What is started in place of an SGLang server in tests of processes: it is healthy, says what it is asked, and no more."""

from __future__ import annotations

import sys
from pathlib import Path

_HEALTHY = """
import http.server, sys

class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        print("asked for", self.path, flush=True)

    def log_message(self, *arguments):
        pass

address = sys.argv[sys.argv.index("--host") + 1], int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(address, Healthy).serve_forever()
"""


def stand_in_interpreter(folder: Path, before: str = "") -> Path:
    """A program to be named in place of an interpreter that has SGLang. ``before``: shell commands that it begins with."""
    (folder / "healthy.py").write_text(_HEALTHY)
    interpreter = folder / "python"
    interpreter.write_text(f'#!/bin/sh\n{before}\nexec {sys.executable} {folder}/healthy.py "$@"\n')
    interpreter.chmod(0o755)
    return interpreter
