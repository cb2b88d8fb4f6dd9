"""Signals to servers at the moment that matters."""

from __future__ import annotations

import os
import signal
import threading

from megatron_dppo.rollout.sglang.servers.server import SGLangServer
from tests.waiting import wait_until

BATCH_STARTED = "Prefill batch"  # in a server's log


def signal_when_they_work(servers: list[SGLangServer], number: signal.Signals = signal.SIGKILL) -> threading.Thread:
    """From another thread, while ``generate`` runs: send it to these servers' process groups once they all have begun."""
    logs = [server.log_path for server in servers]
    before = [log.read_text().count(BATCH_STARTED) for log in logs]

    def all_work() -> bool:
        return all(log.read_text().count(BATCH_STARTED) > count for log, count in zip(logs, before, strict=True))

    def send() -> None:
        wait_until(all_work, within_s=60, what=f"{logs} begin")
        for server in servers:
            assert server.pid is not None
            os.killpg(server.pid, number)

    thread = threading.Thread(target=send)
    thread.start()
    return thread
