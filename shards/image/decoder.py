"""Photos decoded in a process of their own, which a budget of CPU time ends: nothing else stops a decoder written in C.

A photo that takes too long, too much memory, or makes the decoder crash is refused; the process is replaced. It ends
by itself with the process that started it.
"""

from __future__ import annotations

import atexit
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection, Pipe

from lavic.errors import LavicError
from lavic.shards.image.normalize import Photo, PhotoError, PhotoSettings, Stored, examine, store
from lavic.shards.image.srgb import see_srgb

_MEMORY = 8 << 30
"""Bytes of address space of the process. A photo of the most pixels that Pillow takes needs less than half."""
_START_S, _WAIT_S = 120, 60
"""For the process to start, and for an answer beside the budget, which counts CPU time: the machine may be busy."""
_LATER = 20
"""Times the budget after which a process that does not use the CPU is ended."""
_CODE = "import sys; sys.path[:] = {path!r}; from lavic.shards.image.decoder import serve; serve({fd})"


class _Gone(Exception):
    """The process ended before it answered; the argument is its exit code."""


class Decoder:
    """Stores photos in another process, one at a time; the process starts when the first one comes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._line: Connection | None = None

    def store(self, photo: Photo, settings: PhotoSettings) -> Stored:
        """As `lavic.shards.image.normalize.store`, within the budget of `settings.decode_seconds`.

        Raises:
            PhotoError: As there; `bomb` for a photo that takes too long or too much memory.
            LavicError: The process cannot be started.
        """
        request = pickle.dumps((photo.data, replace(settings, placeholders=())))
        with self._lock:
            for again in (True, False):
                try:
                    kept, jpg, width, height, error = pickle.loads(self._ask(request, settings.decode_seconds))
                    break
                except _Gone as gone:
                    # Killed from outside, maybe for the memory that others took.
                    if again and gone.args[0] in (-signal.SIGKILL, -signal.SIGTERM):
                        continue
                    raise _refusal(gone.args[0], settings) from None
        if error:
            raise PhotoError(*error)
        if kept and photo.header and photo.header.profile:
            see_srgb(photo.header.profile, photo.header.mode)
        return Stored(photo.data if kept else jpg, width, height)

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()

    def _ask(self, request: bytes, seconds: float) -> bytes:
        line = self._line if self._line and self._process else self._start()
        try:
            line.send_bytes(request)
            if line.poll(_LATER * seconds + _WAIT_S):
                return line.recv_bytes()
        except (EOFError, OSError):
            pass
        raise _Gone(self._end())

    def _start(self) -> Connection:
        try:
            line, far = Pipe()
            with far:
                # In a session of its own: Ctrl-C is for its parent, with which it ends.
                self._process = subprocess.Popen(
                    [sys.executable, "-c", _CODE.format(path=sys.path, fd=far.fileno())],
                    pass_fds=(far.fileno(),),
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                    env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
                )
        except OSError as error:
            # As an OSError it would be taken for one of the set's storage.
            raise LavicError(f"the process that decodes photos cannot be started: {error}") from None
        self._line = line
        with suppress(EOFError, OSError):
            if line.poll(_START_S):
                line.recv_bytes()
                return line
        code = self._end()
        raise LavicError(f"the process that decodes photos does not start (exit code {code}); its log says why")

    def _end(self) -> int:
        """End the process, whatever it does; gives the exit code that it had, or gets."""
        process, line, self._process, self._line = self._process, self._line, None, None
        if line:
            line.close()
        if not process:
            return 0
        try:
            # One that has ended by itself, or that ends as its line is closed, says more than one that is killed.
            return process.wait(1)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return -signal.SIGXCPU


def shared() -> Decoder:
    """The decoder of this process: a crawl's worker uses one for all its shards."""
    # By process: one that was forked must not talk on its parent's line.
    if (pid := os.getpid()) not in _decoders:
        _decoders.clear()
        _decoders[pid] = Decoder()
        atexit.register(_decoders[pid].close)
    return _decoders[pid]


_decoders: dict[int, Decoder] = {}


def _refusal(code: int, settings: PhotoSettings) -> PhotoError:
    if code in (-signal.SIGPROF, -signal.SIGXCPU):
        seconds = f"{settings.decode_seconds:g} s"
        return PhotoError("bomb", f"not decoded within the {seconds} of CPU time of --photo.decode-seconds")
    if code == -signal.SIGKILL:
        return PhotoError("bomb", "the process that decoded it was killed, likely for its memory")
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return PhotoError("truncated", f"the decoder crashed ({name})")


def serve(fd: int) -> None:
    """The other process: answers requests until its parent has gone."""
    _limit_memory()
    line = Connection(fd)
    line.send_bytes(b"ready")
    # What C libraries print about strange files is no news.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    # The signal's own action ends the process, also in the middle of C code.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    with suppress(EOFError, OSError):
        while True:
            data, settings = pickle.loads(line.recv_bytes())
            signal.setitimer(signal.ITIMER_PROF, settings.decode_seconds)
            answer = _answer(data, settings)
            signal.setitimer(signal.ITIMER_PROF, 0)
            line.send_bytes(pickle.dumps(answer))


def _answer(data: bytes, settings: PhotoSettings) -> tuple[bool, bytes, int, int, tuple[str, str] | None]:
    try:
        stored = store(examine(data, settings), settings)
    except PhotoError as error:
        return False, b"", 0, 0, (error.kind, error.reason)
    kept = stored.jpg is data
    return kept, b"" if kept else stored.jpg, stored.width, stored.height, None


def _limit_memory() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY or soft > _MEMORY:
        # Some systems do not have this limit.
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, hard))
