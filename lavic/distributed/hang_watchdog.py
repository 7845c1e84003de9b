"""Who is missing when the ranks wait for each other.

A collective that one rank does not reach ends by its timeout, and says nothing of who it was; under NCCL not even with
an exception. Here each rank notes where it is, which costs nothing; a thread tells the others every few seconds, over a
store of its own, whatever the main thread hangs in.

When a rank has left with an error, or when ranks have waited too long, every rank's thread tells where it is and what
Python does there, and one of them reports it. After an error the others then end their processes: what they wait for
will not come.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from lavic.distributed.context import World
from lavic.distributed.failure import leave, out_of_memory
from lavic.errors import LavicError, Stopped, first_line

BEAT_S = 5.0
"""Seconds between two signs of life."""
LOOK_S = 1.0
"""Seconds between two looks at whether a report is wanted."""
LINGER_S = 10.0
"""Seconds that a rank may still take once another has left with an error: to raise one of its own, or to be ended."""
_DEPTH = 12
"""Innermost calls of a Python stack that are reported."""
_REPORTS = "reports"
_stores: list[Any] = []
"""Servers of this process: the other ranks ask them until this process ends."""


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
    answered: int = 0
    """Reports that it has told its stack for."""
    stack: str = ""
    """What its main thread did then."""


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
        linger_s: float = LINGER_S,
        records: Path | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        """Describes it.

        Args:
            world: The ranks, connected.
            patience_s: After so long in one place a rank says for whom it waits.
            beat_s: Seconds between two signs of life.
            linger_s: Seconds until a rank ends its process, after another has left with an error.
            records: Folder for each rank's flight recorder, written with a report.
            say: Takes what is reported; standard error by default.
        """
        self._world, self._patience = world, patience_s
        self._beat_s = min(beat_s, patience_s / 2)
        self._look_s = min(LOOK_S, self._beat_s)
        self._linger_s, self._records = linger_s, records
        self._say = say or (lambda line: print(line, file=sys.stderr, flush=True))
        self._count, self._place, self._arrived = 0, "the start", time.monotonic()
        self._beat, self._left = 0, ""
        self._answered, self._stack = 0, ""
        self._said = -1
        self._noted: BaseException | None = None
        self._leaving, self._over = threading.Event(), threading.Event()
        self._store: Any = None
        self._thread: threading.Thread | None = None
        self._recorder: threading.Thread | None = None
        self._main = threading.get_ident()

    def at(self, place: str) -> None:
        """This rank has come to a place, where it works or waits for the others; an assignment, no message."""
        self._count, self._place, self._arrived = self._count + 1, place, time.monotonic()

    def within(self, whole: str) -> Callable[[str], None]:
        """Takes places within something larger, such as a step."""
        return lambda place: self.at(f"{place} of {whole}")

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Tells the other ranks of an error of the block at once, before whatever closes around it.

        Raises:
            LavicError: In the place of an error of a collective that did not find the others: says who is missing.
        """
        try:
            yield
        except BaseException as error:
            self._note(error)
            raise

    def __enter__(self) -> RollCall:
        if self._world.size == 1:
            return self
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        wait = timedelta(seconds=30)
        host = os.environ["MASTER_ADDR"]
        if self._world.is_main:
            self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=wait)
            _stores.append(self._store)
        port = self._world.broadcast(self._store.port if self._store else 0)
        self._store = self._store or TCPStore(host, port, is_master=False, timeout=wait)
        self._store.add(_REPORTS, 0)
        self._publish()
        self._world.barrier()
        self._thread = threading.Thread(target=self._keep_calling, name="roll call", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._thread is None:
            return
        try:
            if error is not None:
                self._note(error)
        finally:
            if self._noted is not None and self._world.is_main:  # the others ask this process's store
                if self._left:
                    self._wait_for_report()
                else:
                    time.sleep(self._beat_s)
            self._leaving.set()
            self._over.set()
            self._thread.join(timeout=5)

    def missing(self) -> str:
        """In words, which ranks are gone or behind; takes some seconds, to see who still gives signs of life."""
        try:
            before = self._signs()
            if not any(sign.left for sign in before.values()):
                time.sleep(2 * self._beat_s)
            now = self._signs()
        except Exception:
            return "lost the other ranks: rank 0 is gone; its own output says why"
        far = max(sign.count for sign in now.values())
        said = []
        left = any(sign.left for sign in now.values())
        for rank, sign in now.items():
            name = f"rank {rank} ({sign.host})"
            if sign.left:
                said.append(f"{name} left at {sign.place}: {sign.left}")
            elif left:
                continue  # the others wait for it, or end because of it
            elif sign.beat == before[rank].beat:
                said.append(f"{name} is gone; it was last seen at {sign.place}")
            elif sign.count < far:
                said.append(f"{name} has not come; it has been at {sign.place} for {sign.since:.0f} s")
        return "; ".join(said) or "lost the connection to the other ranks, though all of them live"

    # --- the main thread --------------------------------------------------------------------------------

    def _note(self, error: BaseException) -> None:
        """Takes notice of an error that ends this rank, once."""
        if self._thread is None or error is self._noted or isinstance(error, Stopped):
            return
        self._noted = error
        self._leaving.set()  # by itself: the thread need not end it
        if _lost(error):
            self._noted = LavicError(f"{self._where()}: {self.missing()}")
            raise self._noted from error
        self._left = first_line(error)
        with contextlib.suppress(Exception):
            self._publish()
            self._store.add(_REPORTS, 1)

    def _wait_for_report(self) -> None:
        """Waits while the other ranks make their report, or until they leave as well."""
        until = time.monotonic() + 3 * self._look_s
        with contextlib.suppress(RuntimeError):
            while time.monotonic() < until:
                others = [sign for rank, sign in self._signs().items() if rank != self._world.rank]
                if all(sign.left for sign in others):
                    return
                time.sleep(self._look_s / 20)

    # --- the thread -------------------------------------------------------------------------------------

    def _keep_calling(self) -> None:
        published = time.monotonic()
        while not self._over.wait(self._look_s):
            try:
                now = time.monotonic()
                if now - published >= self._beat_s:
                    published = now
                    self._publish()
                    if now - self._arrived > self._patience and self._said != self._count:
                        self._ask()
                if (asked := self._store.add(_REPORTS, 0)) > self._answered:
                    self._answer(asked)
            except RuntimeError as error:  # the store's server
                if not self._over.is_set() and "timed out" not in str(error).lower():
                    self._end("lost rank 0; its own output says why")
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
        self._store.add(_REPORTS, 1)

    def _answer(self, asked: int) -> None:
        """Tells this rank's stack; the first rank that does reports those of all. Then ends this one if it must."""
        self._answered, self._stack = asked, _stack(self._main)
        self._publish()
        if self._records is not None:
            # it takes seconds, in which this thread must give signs of life
            self._recorder = threading.Thread(target=self._record, args=(self._records,), daemon=True)
            self._recorder.start()
        # ranks that meet the same error leave together, and have said so
        if self._leaving.wait(self._look_s):
            return
        if self._is_first(asked):
            signs = self._answers(asked)
            self._say(_report(signs, asked))
        else:
            signs = self._signs()
        if any(sign.left for sign in signs.values()):
            self._end("another rank has left")

    def _is_first(self, asked: int) -> bool:
        """Whether no rank of a lower number will report."""
        until = time.monotonic() + self._beat_s
        for rank in range(self._world.rank):
            while not (sign := self._sign(rank)).left:
                if sign.answered >= asked:
                    return False
                if time.monotonic() > until:
                    break
                time.sleep(self._look_s / 4)
        return True

    def _answers(self, asked: int) -> dict[int, Sign]:
        """Every rank's sign, once all that can have answered."""
        until = time.monotonic() + self._beat_s
        while True:
            signs = self._signs()
            if all(sign.left or sign.answered >= asked for sign in signs.values()) or time.monotonic() > until:
                return signs
            time.sleep(self._look_s / 4)

    def _end(self, why: str) -> None:
        """Ends this process unless it is on its way out: its main thread may wait in NCCL for ever."""
        if not self._leaving.wait(self._linger_s):
            if self._recorder is not None:
                self._recorder.join(timeout=30)
            self._say(f"rank {self._world.rank} ends at {self._place}: {why}")
            leave(1)

    def _record(self, folder: Path) -> None:
        """Writes down this rank's last collectives, as torch's flight recorder has them."""
        import torch
        import torch.distributed as dist

        name = "_dump_nccl_trace" if dist.get_backend() == "nccl" else "_dump_fr_trace"
        dump = getattr(torch._C._distributed_c10d, name, None)
        if dump is not None:
            with contextlib.suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"rank_{self._world.rank}").write_bytes(dump())

    # --- both -------------------------------------------------------------------------------------------

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
            answered=self._answered,
            stack=self._stack,
        )
        self._store.set(f"rank {self._world.rank}", json.dumps(asdict(sign)))

    def _sign(self, rank: int) -> Sign:
        return Sign(**json.loads(self._store.get(f"rank {rank}")))

    def _signs(self) -> dict[int, Sign]:
        return {rank: self._sign(rank) for rank in range(self._world.size)}


def record_collectives(folder: Path) -> None:
    """Turns torch's flight recorder on, for process groups that are made from here on.

    It keeps the last collectives of each rank; NCCL's watchdog writes them to `folder`, one file for each rank, when a
    collective runs into its timeout. `torchfrtrace FOLDER -p rank_` compares them. Variables that are set already stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"):  # the second before torch 2.9
        os.environ.setdefault(name, "2000")
    for name in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):
        os.environ.setdefault(name, str(folder.absolute() / "rank_"))
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")


def _stack(thread: int) -> str:
    """What a thread does, innermost call last."""
    frame = sys._current_frames().get(thread)
    calls = traceback.extract_stack(frame)[-_DEPTH:] if frame else []
    return "\n".join(f"{'/'.join(Path(call.filename).parts[-3:])}:{call.lineno} in {call.name}" for call in calls)


def _report(signs: dict[int, Sign], asked: int) -> str:
    """Where every rank is; those that are at the same place and do the same there, together."""
    lines, groups = ["where the ranks are:"], dict[tuple[str, str], list[int]]()
    for rank, sign in signs.items():
        if sign.left:
            lines.append(f"  rank {rank} ({sign.host}) left at {sign.place}: {sign.left}")
        elif sign.answered < asked:
            lines.append(f"  rank {rank} ({sign.host}) gives no sign of life; it was last seen at {sign.place}")
        else:
            groups.setdefault((sign.place, sign.stack), []).append(rank)
    for (place, stack), ranks in groups.items():
        names = f"rank {ranks[0]} ({signs[ranks[0]].host})" if len(ranks) == 1 else f"ranks {_ranges(ranks)}"
        lines.append(f"  {names} at {place}, for {max(signs[rank].since for rank in ranks):.0f} s:")
        lines += [f"    {call}" for call in stack.splitlines()]
    return "\n".join(lines)


def _ranges(numbers: list[int]) -> str:
    """Rising numbers as "0, 2-7"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)


def _lost(error: BaseException | None) -> bool:
    """Whether an error is that of a collective which did not find the others."""
    from torch.distributed import DistError

    if error is None or out_of_memory(error) or "Duplicate GPU detected" in str(error):
        return False
    if isinstance(error, DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "Connection closed", "NCCL"))
