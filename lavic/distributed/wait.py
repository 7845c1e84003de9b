"""A wait for other processes that is logged when it takes long and can be interrupted by a signal.

While C++ code waits (a rendezvous, a connection), Python runs no signal handler, and the process would go on waiting
until the timeout. Here a thread receives the signal.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
import time

FIRST_S, REPEAT_S = 10.0, 60.0
"""Seconds after which a wait is logged, and then how often."""
GRACE_S = 3.0
"""Seconds that a wait may still take after a signal."""
_ENDS = {signal.SIGTERM: 1, signal.SIGINT: 130}
"""Signal -> exit code. SIGTERM comes from a launcher when another rank has failed: that rank's code must be the higher
one, since srun reports the highest."""


class InterruptibleWait:
    """Watches a wait for the length of a block.

    A signal with a handler ends the process, unless the wait is over within `GRACE_S`: then its handler runs. One with
    the default handler ends the process anyway.
    """

    def __init__(self, process_name: str, awaited: str) -> None:
        """Names this process ("rank 3 of 8") and what it waits for ("the other ranks at node0:29400")."""
        self._process_name, self._awaited = process_name, awaited
        self._main = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> InterruptibleWait:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        if self._main:  # Python allows it nowhere else
            self._before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._main:
            signal.set_wakeup_fd(self._before)
        self._writer.close()
        self._thread.join()
        self._reader.close()

    def _watch(self) -> None:
        started = time.monotonic()
        announce, end, code = started + FIRST_S, float("inf"), 0
        while True:
            now = time.monotonic()
            if now >= end:
                self._log(f"got a stop signal while waiting for {self._awaited}: exiting")
                os._exit(code)
            if now >= announce:
                self._log(f"waiting for {self._awaited}, for {now - started:.0f} s so far")
                announce = now + REPEAT_S
            if not select.select([self._reader], [], [], max(0.0, min(announce, end) - now))[0]:
                continue
            numbers = self._reader.recv(64)
            if not numbers:
                return
            for number in numbers:
                if number in _ENDS and end == float("inf"):
                    end, code = time.monotonic() + GRACE_S, _ENDS[signal.Signals(number)]

    def _log(self, text: str) -> None:
        print(f"lavic: {self._process_name}: {text}", file=sys.stderr, flush=True)
