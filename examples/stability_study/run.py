#!/usr/bin/env python3
"""The stability study: which methods keep training stable when rollouts come from a policy that is not quite the trainer's.

    python examples/stability_study/run.py --dry-run        # the list, and how long it takes
    python examples/stability_study/run.py --minutes 60     # makes what is missing; stop it at any moment, and go on later
    python examples/stability_study/run.py --short          # three runs, recorded in their own folder: for the nightly tests

Every run is a normal run of examples/pretrain_dppo.py with a folder of its own below --runs. Its record, one line, is added
to docs/records/stability_study/metrics.jsonl when it has ended: commit that file as it grows. report.py draws figure and
table from it. docs/stability_study.md says what is compared and what counts as a collapse.

Exit code 0: nothing is missing any more, or the minutes are over; 1: a run ended for a reason that is no result, which is
said; 2: the study cannot be made as it stands; 130: interrupted.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from examples.stability_study.execution import FailedRunError, Workshop
from examples.stability_study.plan import PARTS, SHORT, PlannedRun, Study, StudyError, read_study
from examples.stability_study.records import append_line, missing, read_lines
from tools.check.record_run import CODE

RECORD = ROOT / "docs" / "records" / "stability_study"


def main() -> int:
    arguments = parse_arguments()
    try:
        study = read_study(arguments.study, SHORT if arguments.short else PARTS)
        lines = read_lines(arguments.record / "metrics.jsonl")
        missing(tuple(study.warm_starts.values()), lines)  # other settings would be other policies
        left = missing(study.runs, lines)
        if arguments.dry_run:
            print(listing(study, left, arguments.jobs))
            return 0
        commit = commit_that_runs(arguments.record)
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: the runs under way are ended
    workshop = Workshop(study, arguments.runs, commit, arguments.override)
    deadline = time.monotonic() + 60 * arguments.minutes
    try:
        done = make(left, workshop, arguments.record / "metrics.jsonl", deadline, arguments.jobs)
    except FailedRunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; what has ended is recorded, start it again to go on", file=sys.stderr)
        return 130
    finally:
        workshop.end_all()
    print(f"{done} runs made, {len(left) - done} of {len(study.runs)} missing")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--minutes", type=float, default=240.0, help="begin no run that would not end by then (default: 240)"
    )
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="runs at once (default: one per core)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the list and the estimated time")
    parser.add_argument("--short", action="store_true", help="three runs that are recorded below --runs only")
    parser.add_argument("--study", type=Path, default=Path(__file__).with_name("study.yaml"))
    parser.add_argument("--runs", type=Path, help="folder of run folders (default: runs/stability_study)")
    parser.add_argument("--record", type=Path, help="folder of the record (default: docs/records/stability_study)")
    parser.add_argument(
        "--override", action="append", default=[], metavar="key.sub=value", help="of every run, unrecorded studies only"
    )
    arguments = parser.parse_args()
    arguments.runs = arguments.runs or ROOT / "runs" / (
        "stability_study_short" if arguments.short else "stability_study"
    )
    arguments.record = arguments.record or (arguments.runs if arguments.short else RECORD)
    if arguments.jobs < 1:
        parser.error("--jobs must be at least 1")
    if arguments.override and arguments.record == RECORD:
        parser.error(f"--override is for trying things out: give another --record than {RECORD.relative_to(ROOT)}")
    return arguments


def make(left: list[PlannedRun], workshop: Workshop, records: Path, deadline: float, jobs: int) -> int:
    """Make runs in their order, ``jobs`` at a time, and record each when it has ended; how many."""
    waiting, running = list(left), set[Future]()
    done = 0
    with ThreadPoolExecutor(jobs) as threads:
        try:
            while waiting or running:
                while waiting and len(running) < jobs and time.monotonic() + workshop.expected_s < deadline:
                    run = waiting.pop(0)
                    if (line := workshop.warm_start(run.policy)) is not None:
                        append_line(records, line)
                    running.add(threads.submit(workshop.make, run))
                if not running:
                    break
                ended, running = wait(running, return_when=FIRST_COMPLETED)
                for future in ended:
                    line = future.result()
                    append_line(records, line)
                    done += 1
                    print(
                        f"{line['name']}: {line['ended']}, {line['seconds']:.0f} s ({done} of {len(left)})", flush=True
                    )
        finally:
            workshop.end_all()  # before the threads are waited for
    return done


def listing(study: Study, left: list[PlannedRun], jobs: int) -> str:
    """Every run, whether it is still to be made, and the hours that those take."""
    names = {run.name for run in left}
    rows = [f"{'missing ' if run.name in names else 'recorded'}  {run.part:12} {run.name}" for run in study.runs]
    hours = len(left) * study.seconds_per_run / jobs / 3600
    end = f"{len(left)} of {len(study.runs)} runs are missing: about {hours:.1f} hours, {jobs} at a time"
    return "\n".join([*rows, end])


def commit_that_runs(record: Path) -> str:
    """HEAD. StudyError if the code differs from it and the record is the one that is committed."""
    head = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--", *CODE)
    if changed and record.resolve() == RECORD:
        raise StudyError(f"the code differs from HEAD, so no commit says what runs; commit it first:\n{changed}")
    return f"{head}, changed" if changed else head


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise StudyError(f"git {arguments[0]} failed: {done.stderr.strip()}")
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
