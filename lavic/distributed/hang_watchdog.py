"""Names the rank that the others wait for.

When a collective times out because one rank does not reach it, its error does not say which rank; under NCCL there may
be no exception at all. Here each rank records its place in a variable, and a thread publishes it every few seconds,
whatever the main thread hangs in.

When a rank has failed, or when ranks have waited too long, every rank publishes its place and its Python stack, and one
of them prints the report. After a failure the other ranks then end: what they wait for will not come.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from lavic.distributed.context import DistributedContext
from lavic.distributed.failure import exit_process, lost_connection
from lavic.distributed.flight_recorder import dump_flight_recorder
from lavic.distributed.heartbeat import Heartbeat, HeartbeatStore, describe_missing, format_report, stack_of
from lavic.errors import LavicError, Stopped, first_line

HEARTBEAT_S = 5.0
"""Seconds between two heartbeats."""
POLL_S = 1.0
"""Seconds between two checks whether a report is requested."""
GRACE_S = 10.0
"""Seconds until a rank ends its process after another has failed: it may raise an error of its own before."""


class HangWatchdog:
    """Watches the ranks while it is open: a context manager, entered by all ranks.

    Every rank reaches the same places in the same order.
    """

    def __init__(
        self,
        world: DistributedContext,
        *,
        warn_after_s: float = 300.0,
        heartbeat_s: float = HEARTBEAT_S,
        grace_s: float = GRACE_S,
        flight_recorder: Path | None = None,
    ) -> None:
        """A rank that has been in one place for `warn_after_s` reports which ranks it waits for.

        The ranks are in a process group. With `flight_recorder`, a folder, each rank's record is written there with a
        report.
        """
        self._world, self._warn_after_s = world, warn_after_s
        self._heartbeat_s = min(heartbeat_s, warn_after_s / 2)
        self._poll_s = min(POLL_S, self._heartbeat_s)
        self._grace_s, self._flight_recorder = grace_s, flight_recorder
        self._position, self._place, self._arrived = 0, "the start", time.monotonic()
        self._beat, self._error = 0, ""
        self._answered, self._stack = 0, ""
        self._warned_at = -1
        self._handled: BaseException | None = None
        self._ending, self._closed = threading.Event(), threading.Event()
        self._store: HeartbeatStore | None = None
        self._thread: threading.Thread | None = None
        self._recorder: threading.Thread | None = None
        self._main = threading.get_ident()

    def mark(self, place: str) -> None:
        """Records that this rank has reached a place, where it works or waits for the others; an assignment."""
        self._position, self._place, self._arrived = self._position + 1, place, time.monotonic()

    def marker(self, outer: str) -> Callable[[str], None]:
        """A `mark` for places within something larger, such as a step."""
        return lambda place: self.mark(f"{place} of {outer}")

    @contextlib.contextmanager
    def reported_errors(self) -> Iterator[None]:
        """Reports an error of the block to the other ranks at once, before what is around it closes.

        Raises:
            LavicError: For an error of a collective that lost the other ranks: says which one is missing.
        """
        try:
            yield
        except BaseException as error:
            self._handle(error)
            raise

    def __enter__(self) -> HangWatchdog:
        if self._world.size > 1:
            self._store = HeartbeatStore(self._world)
            self._publish(self._store)
            self._world.barrier()
            self._thread = threading.Thread(target=self._run, args=(self._store,), name="hang watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, error_type: object, error: BaseException | None, traceback: object) -> None:
        if self._thread is None or self._store is None:
            return
        try:
            if error is not None:
                self._handle(error)
        finally:
            if self._handled is not None and self._world.is_main:  # the store is in this process
                if self._error:
                    self._wait_for_report(self._store)
                else:
                    time.sleep(self._heartbeat_s)
            self._ending.set()
            self._closed.set()
            self._thread.join(timeout=5)

    # --- the main thread --------------------------------------------------------------------------------

    def _handle(self, error: BaseException) -> None:
        """Publishes an error that ends this rank, once."""
        if self._store is None or error is self._handled or isinstance(error, Stopped):
            return
        self._handled = error
        self._ending.set()  # this rank ends by itself: the thread need not do it
        if lost_connection(error):
            self._handled = LavicError(f"at {self._place}: {self._missing_ranks(self._store)}")
            raise self._handled from error
        self._error = first_line(error)
        with contextlib.suppress(Exception):
            self._publish(self._store)
            self._store.request_report()

    def _missing_ranks(self, store: HeartbeatStore) -> str:
        """Which ranks have ended or are behind; takes some seconds, to see which still publish."""
        try:
            before = store.get_all()
            if not any(heartbeat.error for heartbeat in before.values()):
                time.sleep(2 * self._heartbeat_s)
            now = store.get_all()
        except Exception:
            return "lost the other ranks: rank 0 has ended; see its output"
        return describe_missing(before, now)

    def _wait_for_report(self, store: HeartbeatStore) -> None:
        """Waits while the other ranks make their report, or until they fail as well."""
        deadline = time.monotonic() + 3 * self._poll_s
        with contextlib.suppress(RuntimeError):
            while time.monotonic() < deadline:
                if all(heartbeat.error for rank, heartbeat in store.get_all().items() if rank != self._world.rank):
                    return
                time.sleep(self._poll_s / 20)

    # --- the thread -------------------------------------------------------------------------------------

    def _run(self, store: HeartbeatStore) -> None:
        published = time.monotonic()
        while not self._closed.wait(self._poll_s):
            try:
                now = time.monotonic()
                if now - published >= self._heartbeat_s:
                    published = now
                    self._publish(store)
                    if now - self._arrived > self._warn_after_s and self._warned_at != self._position:
                        self._warn(store)
                if (number := store.reports()) > self._answered:
                    self._answer(store, number)
            except RuntimeError as error:  # of the store
                if not self._closed.is_set() and "timed out" not in str(error).lower():
                    self._end("lost rank 0; see its output")
                return

    def _warn(self, store: HeartbeatStore) -> None:
        """Reports which ranks the others wait for; the first of those that wait prints it."""
        heartbeats = store.get_all()
        furthest = max(heartbeat.position for heartbeat in heartbeats.values())
        waiting = [rank for rank, heartbeat in heartbeats.items() if heartbeat.position == furthest]
        behind = {rank: heartbeat for rank, heartbeat in heartbeats.items() if heartbeat.position < furthest}
        if not behind or waiting[0] != self._world.rank:
            return
        self._warned_at = self._position
        missing = "; ".join(
            f"rank {rank} ({heartbeat.host}), at {heartbeat.place} for {heartbeat.since:.0f} s"
            for rank, heartbeat in behind.items()
        )
        _print(f"at {self._place}: {len(waiting)} of {self._world.size} ranks wait for {missing}")
        store.request_report()

    def _answer(self, store: HeartbeatStore, number: int) -> None:
        """Publishes this rank's stack; the first rank that does prints the report. Then ends this rank if it must."""
        self._answered, self._stack = number, stack_of(self._main)
        self._publish(store)
        if self._flight_recorder is not None:
            # It takes seconds, in which this thread must publish heartbeats.
            folder = (self._flight_recorder, self._world.rank)
            self._recorder = threading.Thread(target=dump_flight_recorder, args=folder, daemon=True)
            self._recorder.start()
        # Ranks that meet the same error end together, and have printed it.
        if self._ending.wait(self._poll_s):
            return
        if self._is_first(store, number):
            heartbeats = self._wait_for_answers(store, number)
            _print(format_report(heartbeats, number))
        else:
            heartbeats = store.get_all()
        if any(heartbeat.error for heartbeat in heartbeats.values()):
            self._end("another rank has failed")

    def _is_first(self, store: HeartbeatStore, number: int) -> bool:
        """Whether no rank of a lower number will print the report."""
        deadline = time.monotonic() + self._heartbeat_s
        for rank in range(self._world.rank):
            while not (heartbeat := store.get(rank)).error:
                if heartbeat.answered >= number:
                    return False
                if time.monotonic() > deadline:
                    break
                time.sleep(self._poll_s / 4)
        return True

    def _wait_for_answers(self, store: HeartbeatStore, number: int) -> dict[int, Heartbeat]:
        """Every rank's heartbeat, once all that can have published their stack."""
        deadline = time.monotonic() + self._heartbeat_s
        while True:
            heartbeats = store.get_all()
            answered = all(heartbeat.error or heartbeat.answered >= number for heartbeat in heartbeats.values())
            if answered or time.monotonic() > deadline:
                return heartbeats
            time.sleep(self._poll_s / 4)

    def _end(self, reason: str) -> None:
        """Ends this process unless it is ending already: its main thread may wait in NCCL for ever."""
        if not self._ending.wait(self._grace_s):
            if self._recorder is not None:
                self._recorder.join(timeout=30)
            _print(f"rank {self._world.rank} ends at {self._place}: {reason}")
            exit_process(1)

    # --- both -------------------------------------------------------------------------------------------

    def _publish(self, store: HeartbeatStore) -> None:
        self._beat += 1
        store.publish(
            Heartbeat(
                host=socket.gethostname(),
                position=self._position,
                place=self._place,
                since=time.monotonic() - self._arrived,
                beat=self._beat,
                error=self._error,
                answered=self._answered,
                stack=self._stack,
            )
        )


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
