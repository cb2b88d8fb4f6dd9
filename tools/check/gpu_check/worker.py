"""The process of one section: makes its checks in turn, from a given one on, and tells what it finds in lines of JSON.

    python -m tools.check.gpu_check.worker SECTION FIRST DESCRIPTOR OPTIONS

DESCRIPTOR is the open file to tell it in; standard output belongs to whatever the checks call. Before each check a line says
which one begins and how long it may take, so that who reads it knows what to end, and what to leave out next time.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from megatron_dppo.compat.optional_dependencies import hide_unusable_dependencies
from tools.check.gpu_check.findings import Check, Finding, Options, Skipped


def main() -> int:
    section, first, descriptor, options = sys.argv[1:]
    hide_unusable_dependencies()  # before a section imports megatron.core
    with os.fdopen(int(descriptor), "w", buffering=1) as pipe:

        def tell(**line: Any) -> None:
            pipe.write(json.dumps(line) + "\n")

        settings = json.loads(options)
        given = Options(
            **{**settings, "sanitizers": tuple(settings["sanitizers"]), "scratch": Path(settings["scratch"])}
        )
        checks = importlib.import_module(f"tools.check.gpu_check.sections.{section}").checks(given)
        for number in range(int(first), len(checks)):
            check = checks[number]
            tell(begins=number, check=check.name, limit_s=check.limit_s)
            start = time.monotonic()
            rows = rows_of(check)
            tell(ends=number, rows=rows, seconds=time.monotonic() - start)
    return 0


def rows_of(check: Check) -> list[dict[str, Any]]:
    """What a check found, as the fields of rows; an error is a row as well."""
    try:
        found = check.run()
        findings = [found] if isinstance(found, Finding) else list(found)
    except Skipped as reason:
        return [{"check": check.name, "outcome": "skipped", "figures": str(reason)}]
    except Exception as error:
        traceback.print_exc()
        said = (str(error).strip().splitlines() or [""])[0][:300]
        return [{"check": check.name, "outcome": "failed", "figures": f"{type(error).__name__}: {said}"}]
    outcomes = {True: "passed", False: "failed", None: "measured"}
    return [
        {
            "check": finding.name or check.name,
            "outcome": outcomes[finding.passed],
            "figures": finding.figures,
            "values": dict(finding.values),
        }
        for finding in findings
    ]


if __name__ == "__main__":
    sys.exit(main())
