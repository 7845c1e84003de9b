"""Decodes photos in another process with a limit of CPU time: nothing else stops a decoder written in C.

A photo that takes too long or too much memory, or that crashes the decoder, is refused, and the process is replaced. It
ends with the process that started it.
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

from lavic.distributed.rank_process import exit_name
from lavic.errors import LavicError
from lavic.shards.image.normalize import InspectedPhoto, NormalizedPhoto, PhotoError, PhotoSettings, inspect, normalize
from lavic.shards.image.srgb import remember_srgb

_MEMORY = 8 << 30
"""Bytes of address space of the process. The largest photo that Pillow accepts needs less than half of it."""
_START_S, _WAIT_S = 120, 60
"""Timeouts of the start, and of a reply beyond the CPU time: the machine may be busy."""
_WALL_TO_CPU = 20
"""A process is killed after this many times its CPU time, even if it does not use the CPU."""
_CODE = "import sys; sys.path[:] = {path!r}; from lavic.shards.image.decoder import serve; serve({fd})"


class _ProcessEnded(Exception):
    """The process ended before it answered; the argument is its exit code."""


class Decoder:
    """Normalizes photos in another process, one at a time; the process starts with the first one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def normalize(self, photo: InspectedPhoto, settings: PhotoSettings) -> NormalizedPhoto:
        """As `lavic.shards.image.normalize.normalize`, within `settings.decode_seconds` of CPU time.

        Raises:
            PhotoError: As there; `bomb` for a photo that takes too long or too much memory.
            LavicError: The process cannot be started.
        """
        request = pickle.dumps((photo.data, replace(settings, placeholders=())))
        with self._lock:
            for first_attempt in (True, False):
                try:
                    unchanged, jpg, width, height, error = pickle.loads(self._request(request, settings.decode_seconds))
                    break
                except _ProcessEnded as ended:
                    # Killed from outside, perhaps because other processes use too much memory.
                    if first_attempt and ended.args[0] in (-signal.SIGKILL, -signal.SIGTERM):
                        continue
                    raise _error_of(ended.args[0], settings) from None
        if error:
            raise PhotoError(*error)
        if unchanged and photo.header and photo.header.profile:
            remember_srgb(photo.header.profile, photo.header.mode)
        return NormalizedPhoto(photo.data if unchanged else jpg, width, height)

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()

    def _request(self, request: bytes, seconds: float) -> bytes:
        connection = self._connection if self._connection and self._process else self._start()
        try:
            connection.send_bytes(request)
            if connection.poll(_WALL_TO_CPU * seconds + _WAIT_S):
                return connection.recv_bytes()
        except (EOFError, OSError):
            pass
        raise _ProcessEnded(self._end())

    def _start(self) -> Connection:
        try:
            connection, child = Pipe()
            with child:
                # In its own session: Ctrl-C reaches only the parent, and this process ends with the parent.
                self._process = subprocess.Popen(
                    [sys.executable, "-c", _CODE.format(path=sys.path, fd=child.fileno())],
                    pass_fds=(child.fileno(),),
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                    env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
                )
        except OSError as error:
            # An OSError would be mistaken for an error of the set's storage.
            raise LavicError(f"the process that decodes photos cannot be started: {error}") from None
        self._connection = connection
        with suppress(EOFError, OSError):
            if connection.poll(_START_S):
                connection.recv_bytes()
                return connection
        code = self._end()
        raise LavicError(f"the process that decodes photos does not start (exit code {code}); see its output")

    def _end(self) -> int:
        """End the process, even if it hangs; returns its exit code."""
        process, connection, self._process, self._connection = self._process, self._connection, None, None
        if connection:
            connection.close()
        if not process:
            return 0
        try:
            # The exit code of a process that crashed or ended by itself says more than that of a killed one.
            return process.wait(1)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return -signal.SIGXCPU


def shared_decoder() -> Decoder:
    """The decoder of this process: a crawl's worker uses one for all its shards."""
    # By process: a forked one must not use its parent's connection.
    if (pid := os.getpid()) not in _decoders:
        _decoders.clear()
        _decoders[pid] = Decoder()
        atexit.register(_decoders[pid].close)
    return _decoders[pid]


_decoders: dict[int, Decoder] = {}


def _error_of(code: int, settings: PhotoSettings) -> PhotoError:
    if code in (-signal.SIGPROF, -signal.SIGXCPU):
        seconds = f"{settings.decode_seconds:g} s"
        return PhotoError("bomb", f"not decoded within the {seconds} of CPU time of --photo.decode-seconds")
    if code == -signal.SIGKILL:
        return PhotoError("bomb", "the process that decoded it was killed, likely for its memory")
    return PhotoError("truncated", f"the decoder crashed ({exit_name(code)})")


def serve(fd: int) -> None:
    """The other process: handles requests until its parent has ended."""
    _limit_memory()
    connection = Connection(fd)
    connection.send_bytes(b"ready")
    # C libraries print warnings about malformed files.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    # The signal's default action ends the process, even in the middle of C code.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    with suppress(EOFError, OSError):
        while True:
            data, settings = pickle.loads(connection.recv_bytes())
            signal.setitimer(signal.ITIMER_PROF, settings.decode_seconds)
            reply = _reply(data, settings)
            signal.setitimer(signal.ITIMER_PROF, 0)
            connection.send_bytes(pickle.dumps(reply))


def _reply(data: bytes, settings: PhotoSettings) -> tuple[bool, bytes, int, int, tuple[str, str] | None]:
    try:
        normalized = normalize(inspect(data, settings), settings)
    except PhotoError as error:
        return False, b"", 0, 0, (error.kind, error.reason)
    unchanged = normalized.jpg is data
    return unchanged, b"" if unchanged else normalized.jpg, normalized.width, normalized.height, None


def _limit_memory() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY or soft > _MEMORY:
        # Some systems do not have this limit.
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, hard))
