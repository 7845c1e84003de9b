"""Runs the app on uvicorn: signals, slow clients, the end."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import resource
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.importer import import_from_string

from lavic.errors import LaunchError

if TYPE_CHECKING:
    from fastapi import FastAPI

HEADER_SECONDS = 10.0
"""Maximum time in which the head of a request arrives."""
HEAD_BYTES = 1 << 16
"""Maximum size of the head of a request, and of what follows a chunked body: h11's own, which httptools lacks."""
BACKLOG = 1024
"""Connections that wait in the kernel until they are accepted."""
_OTHER_FILES = 0.25
"""Share of the open files that a process may have which is kept for others than connections."""
_FILES = 1 << 16
"""Limit of open files that a process requests from the system."""


def listen(host: str, port: int) -> socket.socket:
    """A socket on an address, before anything large is loaded.

    Raises:
        LaunchError: The address is not this machine's, or in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        server = socket.socket(family, kind, protocol)
        try:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(address)
        except OSError:
            server.close()
            raise
    except OSError as error:
        raise LaunchError(f"--host {host} --port {port}: cannot listen there ({error.strerror or error})") from None
    return server


@contextlib.contextmanager
def hangups_kept() -> Iterator[threading.Event]:
    """Keeps SIGHUP from ending the process while everything loads; the event says whether one came."""
    received = threading.Event()
    before = signal.signal(signal.SIGHUP, lambda number, frame: received.set())
    try:
        yield received
    finally:
        signal.signal(signal.SIGHUP, before or signal.SIG_DFL)


def run(
    app: FastAPI,
    server: socket.socket,
    *,
    grace: float,
    reload: Callable[[], Any],
    ready: Callable[[], None],
    hangup: threading.Event | None = None,
) -> None:
    """Serves until SIGTERM, SIGINT or SIGUSR1 (SLURM's warning); then answers what runs and takes nothing new.

    Args:
        app: What to serve.
        server: The socket, see `listen`.
        grace: Seconds for requests that run when the signal comes.
        reload: Called in the event loop on SIGHUP; makes an awaitable.
        ready: Called when requests are taken.
        hangup: Set if SIGHUP came before, see `hangups_kept`: then `reload` is called at once.
    """
    connections = round((1 - _OTHER_FILES) * raise_file_limit())
    config = uvicorn.Config(
        app,
        http=_protocol(connections),
        log_config=None,
        log_level="error",  # not a line for each connection that is refused
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(grace)),
        timeout_keep_alive=15,
        backlog=BACKLOG,
        ws="none",
        proxy_headers=False,
    )
    _Server(config, reload, ready, hangup or threading.Event()).run(sockets=[server])


class _Server(uvicorn.Server):
    """uvicorn's server with our signals: ends with 0 on SIGTERM and takes up what is new on SIGHUP."""

    def __init__(
        self, config: uvicorn.Config, reload: Callable[[], Any], ready: Callable[[], None], hangup: threading.Event
    ) -> None:
        super().__init__(config)
        self._reload, self._ready, self._hangup = reload, ready, hangup
        self._tasks: set[asyncio.Future[Any]] = set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn's own would end the process by the signal again once everything is answered.
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        loop.add_signal_handler(signal.SIGHUP, self._begin_reload)
        yield

    def _begin_reload(self) -> None:
        if not self.started:
            self._hangup.set()
            return
        task = asyncio.ensure_future(self._reload())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            self._ready()
            if self._hangup.is_set():
                self._begin_reload()


def raise_file_limit() -> int:
    """Lets the process open more files, as far as the system allows it; returns how many.

    Each connection is an open file. A process that may not open another one neither accepts connections nor reads
    shards.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= _FILES:
        return _FILES
    soft_limit = _FILES if hard == resource.RLIM_INFINITY else min(hard, _FILES)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft_limit, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _protocol(connections: int) -> Any:
    """uvicorn's HTTP protocol, with limits of time and size for the head of a request.

    Args:
        connections: Most of them; further ones are closed.
    """
    is_httptools = importlib.util.find_spec("httptools") is not None
    name = "httptools_impl:HttpToolsProtocol" if is_httptools else "h11_impl:H11Protocol"
    base: Any = import_from_string(f"uvicorn.protocols.http.{name}")

    class TimedProtocol(base):
        """Closes connections on which the head of a request is too large or does not arrive in time."""

        _timer: asyncio.TimerHandle | None = None
        _unparsed = 0
        """Bytes since a head, a piece of a body or a request was complete: httptools keeps all of them."""

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            if len(self.connections) > connections:
                transport.abort()
            else:
                self._arm()

        def data_received(self, data: bytes) -> None:
            self._unparsed += len(data)
            super().data_received(data)
            if self._unparsed > HEAD_BYTES and is_httptools and not self.transport.is_closing():
                self.send_400_response("The head of the request is too large.")
            if self.cycle is not None and not self.cycle.response_complete:
                self._disarm()  # the head is there; the app limits the time of the body
            elif self._timer is None:
                self._arm()

        # The next three are called by httptools, each as soon as that part of a request is complete.
        def on_headers_complete(self) -> None:
            self._unparsed = 0
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            self._unparsed = 0
            super().on_body(body)

        def on_message_complete(self) -> None:
            self._unparsed = 0
            super().on_message_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            self._disarm()
            super().connection_lost(exc)

        def _arm(self) -> None:
            self._timer = asyncio.get_running_loop().call_later(HEADER_SECONDS, self.transport.close)

        def _disarm(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return TimedProtocol
