"""Who is missing when the ranks wait for each other.

A collective that one rank does not reach ends by its timeout, and says nothing of who it was. Here each rank notes
where it is, which costs nothing; a thread tells the others every few seconds, over a store of its own, whatever the
main thread hangs in. When ranks have waited too long one of them says for whom, before the collective gives up.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any

from lavic.errors import LavicError, Stopped, first_line
from lavic.failure import out_of_memory
from lavic.world import World

BEAT_S = 5.0
"""Seconds between two signs of life."""


@dataclass(frozen=True, kw_only=True)
class Sign:
    """A rank's sign of life."""

    host: str
    count: int
    """Places it has come to: those of fewer are behind."""
    place: str
    since: float
    """Seconds it has been there."""
    beat: int
    """Grows as long as the process lives."""
    left: str = ""
    """Why it went."""


class RollCall:
    """Keeps the ranks' whereabouts while it is open.

    Every rank comes to the same places in the same order.
    """

    def __init__(
        self,
        world: World,
        *,
        patience_s: float = 300.0,
        beat_s: float = BEAT_S,
        say: Callable[[str], None] | None = None,
    ) -> None:
        """Describes it.

        Args:
            world: The ranks, connected.
            patience_s: After so long in one place a rank says for whom it waits.
            beat_s: Seconds between two signs of life.
            say: Takes such a line; standard error by default.
        """
        self._world, self._patience = world, patience_s
        self._beat_s = min(beat_s, patience_s / 2)
        self._say = say or (lambda line: print(line, file=sys.stderr, flush=True))
        self._count, self._place, self._arrived = 0, "the start", time.monotonic()
        self._beat, self._left = 0, ""
        self._said = -1
        self._over = threading.Event()
        self._store: Any = None
        self._thread: threading.Thread | None = None

    def at(self, place: str) -> None:
        """This rank has come to a place, where it works or waits for the others; an assignment, no message."""
        self._count, self._place, self._arrived = self._count + 1, place, time.monotonic()

    def within(self, whole: str) -> Callable[[str], None]:
        """Takes places within something larger, such as a step."""
        return lambda place: self.at(f"{place} of {whole}")

    def __enter__(self) -> RollCall:
        if self._world.size == 1:
            return self
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        wait = timedelta(seconds=30)
        host = os.environ["MASTER_ADDR"]
        if self._world.is_main:
            self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=wait)
        port = self._world.broadcast(self._store.port if self._store else 0)
        self._store = self._store or TCPStore(host, port, is_master=False, timeout=wait)
        self._publish()
        self._world.barrier()
        self._thread = threading.Thread(target=self._keep_calling, name="roll call", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._thread is None:
            return
        lost = _lost(error)
        try:
            if lost:
                raise LavicError(f"{self._where()}: {self.missing()}") from error
        finally:
            if error is not None and not lost and not isinstance(error, Stopped):
                self._left = first_line(error)
                with contextlib.suppress(Exception):
                    self._publish()
            if lost and self._world.is_main:
                time.sleep(self._beat_s)  # the others ask this process's store
            self._over.set()
            self._thread.join(timeout=5)

    def missing(self) -> str:
        """In words, which ranks are gone or behind; takes some seconds, to see who still gives signs of life."""
        try:
            before = self._signs()
            time.sleep(2 * self._beat_s)
            now = self._signs()
        except Exception:
            return "lost the other ranks: rank 0 is gone; its own output says why"
        far = max(sign.count for sign in now.values())
        said = []
        for rank, sign in now.items():
            name = f"rank {rank} ({sign.host})"
            if sign.left:
                said.append(f"{name} left at {sign.place}: {sign.left}")
            elif sign.beat == before[rank].beat:
                said.append(f"{name} is gone; it was last seen at {sign.place}")
            elif sign.count < far:
                said.append(f"{name} has not come; it has been at {sign.place} for {sign.since:.0f} s")
        return "; ".join(said) or "lost the connection to the other ranks, though all of them live"

    def _keep_calling(self) -> None:
        while not self._over.wait(self._beat_s):
            try:
                self._publish()
                if time.monotonic() - self._arrived > self._patience and self._said != self._count:
                    self._ask()
            except Exception:  # the store is gone with rank 0; the next collective says so
                return

    def _ask(self) -> None:
        """Says for whom the ranks wait; of those who wait, the first one speaks."""
        signs = self._signs()
        far = max(sign.count for sign in signs.values())
        waiting = [rank for rank, sign in signs.items() if sign.count == far]
        behind = [(rank, sign) for rank, sign in signs.items() if sign.count < far]
        if not behind or waiting[0] != self._world.rank:
            return
        self._said = self._count
        absent = "; ".join(
            f"rank {rank} ({sign.host}), which has been at {sign.place} for {sign.since:.0f} s" for rank, sign in behind
        )
        self._say(f"{self._where()}: {len(waiting)} of {self._world.size} ranks wait for {absent}")

    def _where(self) -> str:
        return f"at {self._place}"

    def _publish(self) -> None:
        self._beat += 1
        sign = Sign(
            host=socket.gethostname(),
            count=self._count,
            place=self._place,
            since=time.monotonic() - self._arrived,
            beat=self._beat,
            left=self._left,
        )
        self._store.set(f"rank {self._world.rank}", json.dumps(asdict(sign)))

    def _signs(self) -> dict[int, Sign]:
        return {rank: Sign(**json.loads(self._store.get(f"rank {rank}"))) for rank in range(self._world.size)}


def _lost(error: BaseException | None) -> bool:
    """Whether an error is that of a collective which did not find the others."""
    from torch.distributed import DistError

    if error is None or out_of_memory(error) or "Duplicate GPU detected" in str(error):
        return False
    if isinstance(error, DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "Connection closed", "NCCL"))
