"""The client for code that is not asynchronous."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from lavic.endpoint.chat import ChatAnswer, ChatRequest
from lavic.endpoint.embeddings import Vector
from lavic.endpoint.settings import EndpointSettings
from lavic.endpoint.usage import Usage
from lavic.errors import ConfigError, LaunchError, Stopped

if TYPE_CHECKING:
    from lavic.endpoint.async_client import AsyncEndpoint

T = TypeVar("T")
R = TypeVar("R")

_ASK_S = 0.2
"""How often it is asked whether to stop."""
_AHEAD = 4
"""Requests begun for each that may be in flight: a slow answer does not hold up the others, which wait behind it."""


class Endpoint:
    """A model behind OpenAI-compatible servers: a context manager. It may be used from several threads.

        with Endpoint(EndpointSettings(url=("http://localhost:8000/v1",), model="llava")) as endpoint:
            for answer in endpoint.chat(ChatRequest(parts=[question]) for question in questions):
                ...
            vectors = endpoint.embed(texts)

    The requests run in an event loop of a thread of its own; Ctrl-C and an error in the block cancel them.

    Args:
        settings: Which servers, which model, how fast.
        flag: What the settings are called on the command line, for messages.
        stopped: Asked while servers are awaited that still load.

    Raises:
        Stopped: It was true.
        ConfigError: A setting is missing, or the key's variable or file.
        EndpointError: A server does not answer within `startup_s`.
        LaunchError: aiohttp is not installed.
    """

    def __init__(
        self, settings: EndpointSettings, flag: str = "--endpoint", *, stopped: Callable[[], bool] | None = None
    ) -> None:
        try:
            from lavic.endpoint.async_client import AsyncEndpoint
        except ModuleNotFoundError as error:
            raise LaunchError(f"{error.name} is not installed: pip install 'lavic[endpoint]'") from None
        self.settings = settings
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="endpoint", daemon=True)
        self._thread.start()

        async def make() -> AsyncEndpoint:
            return AsyncEndpoint(settings, flag)

        try:
            self._client = self._submit(make()).result()
        except BaseException:
            self._stop()
            raise
        if settings.startup_s:
            try:
                ready = self._submit(self._client.wait_until_ready())
                while not wait([ready], timeout=_ASK_S).done:
                    if stopped is not None and stopped():
                        raise Stopped("stopped on request, before the servers answered; run the same command again")
                ready.result()
            except BaseException:
                self.close()
                raise

    @property
    def usage(self) -> Usage:
        """Tokens, cost and faults so far."""
        return self._client.usage

    def chat(
        self, requests: Iterable[ChatRequest], *, stopped: Callable[[], bool] | None = None
    ) -> Iterator[ChatAnswer]:
        """The answers to some questions, in their order.

        The questions are drawn as the answers come, so that any number of them, with photos, fit into memory.

        Args:
            requests: The questions.
            stopped: Asked while an answer is awaited; the answers end when it is true.

        Raises:
            ConfigError: Every request would fail the same: a wrong key, address or model.
            EndpointError: Too many requests failed in a row. A single one that failed has a `fault`.
        """
        return self._in_order(requests, self._client.chat, stopped)

    def embed(self, texts: Sequence[str]) -> Vector:
        """The embeddings of some texts, float32 [n, d]; [0, 0] for no text. An empty text is sent as one space.

        Raises:
            ConfigError: As `chat`.
            EndpointError: There is no embedding of a text.
        """
        batches = list(self.embed_batches(texts))
        return np.concatenate(batches) if batches else np.zeros((0, 0), np.float32)

    def embed_batches(self, texts: Iterable[str]) -> Iterator[Vector]:
        """The embeddings of any number of texts: float32 [at most `batch_size`, d], in order, all of one d.

        Raises:
            ConfigError: As `chat`.
            EndpointError: There is no embedding of a text, or they differ in length.
        """
        from lavic.endpoint.faults import EndpointError

        if isinstance(texts, str):  # each of its characters would be sent
            raise ConfigError("a list of texts is embedded, also where there is one")

        length = 0
        size = self.settings.batch_size
        for vectors in self._in_order(
            enumerate(_batches(texts, size)), lambda numbered: self._client.embed(numbered[1], numbered[0] * size)
        ):
            lengths = {vector.size for vector in vectors} | ({length} if length else set())
            if len(lengths) > 1:
                raise EndpointError(f"{self.settings.model}: embeddings of different lengths: {sorted(lengths)}")
            (length,) = lengths
            yield np.stack(vectors)

    def close(self) -> None:
        """Cancels what is in flight and closes the connections."""
        if self._loop.is_closed():
            return

        async def end() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._client.close()

        try:
            self._submit(end()).result()
        finally:
            self._stop()

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _in_order(
        self,
        items: Iterable[T],
        run: Callable[[T], Coroutine[Any, Any, R]],
        stopped: Callable[[], bool] | None = None,
    ) -> Iterator[R]:
        pending: deque[Future[R]] = deque()
        remaining = iter(items)
        try:
            while True:
                for item in islice(remaining, _AHEAD * self.settings.concurrency - len(pending)):
                    pending.append(self._submit(run(item)))
                if not pending:
                    return
                while stopped is not None:
                    if stopped():
                        return
                    if wait([pending[0]], timeout=_ASK_S).done:
                        break
                yield pending[0].result()
                pending.popleft()
        finally:
            for future in pending:
                future.cancel()

    def _submit(self, work: Coroutine[Any, Any, R]) -> Future[R]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _batches(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    remaining = iter(texts)
    while batch := list(islice(remaining, size)):
        yield batch
