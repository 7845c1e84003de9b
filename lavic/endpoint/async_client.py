"""The client itself: each request is looked up, sent in its turn, retried by kind and kept."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from lavic.config.secrets import redact
from lavic.endpoint.answer_cache import AnswerCache, request_digest
from lavic.endpoint.chat import ChatAnswer, ChatRequest, parse_chat, token_counts
from lavic.endpoint.connection import Connection
from lavic.endpoint.embeddings import Vector, embedding_body, pack, parse_embeddings, sent_text, unpack
from lavic.endpoint.faults import FATAL, PAUSING, REFUSED, RETRIED, EndpointError, Fault, backoff_s
from lavic.endpoint.servers import Server, Servers
from lavic.endpoint.settings import EndpointSettings, require_endpoint
from lavic.endpoint.usage import Usage
from lavic.errors import ConfigError

T = TypeVar("T")

_MEND = {
    "auth": "check {flag}.api-key",
    "missing": "check {flag}.url and {flag}.model {model}",
    "quota": "top up the account, and run again",
    "redirect": "give {flag}.url the address that it redirects to",
    "tls": "check {flag}.url, or the certificates of this machine (SSL_CERT_FILE)",
}
_POLL_S = 0.5
_KEPT = ("text", "finish_reason", "refusal", "prompt_tokens", "completion_tokens")


class AsyncEndpoint:
    """A client for one event loop, which must run when it is made; close it at the end.

    Attributes:
        usage: What it took so far.
    """

    def __init__(self, settings: EndpointSettings, flag: str = "--endpoint") -> None:
        """Raises ConfigError where a setting is missing; `flag` is what the settings are called, for messages."""
        require_endpoint(settings, flag)
        self.usage = Usage(settings.input_price, settings.output_price)
        self._settings, self._flag = settings, flag
        self._cache = AnswerCache(settings.cache) if settings.cache else None
        self._servers = Servers(settings.url, settings.requests_per_minute)
        self._in_flight = asyncio.Semaphore(settings.concurrency)
        self._failed_in_row = 0
        self._connection = Connection(settings)

    async def close(self) -> None:
        """Closes its connections."""
        await self._connection.close()

    async def wait_until_ready(self) -> None:
        """Waits until every server answers. Raises EndpointError where one does not within `startup_s`."""
        deadline = time.monotonic() + self._settings.startup_s
        waiting = list(self._settings.url)
        while waiting := [url for url in waiting if not await self._connection.is_up(url)]:
            if time.monotonic() >= deadline:
                names = ", ".join(map(_shown_url, waiting[:3]))
                raise EndpointError(
                    f"{len(waiting)} of {len(self._settings.url)} servers do not answer within "
                    f"{self._flag}.startup-s {self._settings.startup_s:g}: {names}"
                )
            await asyncio.sleep(_POLL_S)

    async def chat(self, request: ChatRequest) -> ChatAnswer:
        """The answer to one question. One that a server refuses, or that fails after all retries, has a `fault`.

        Raises:
            ConfigError: Every request would fail the same: a wrong key, address or model.
            EndpointError: Too many requests failed in a row.
        """
        body = request.body(self._settings)
        digest = request_digest("chat", {**body, "attempt": request.attempt})
        if (answer := self._cached_chat(digest)) is not None:
            return answer
        try:
            answer = await self._send("chat/completions", body, parse_chat)
        except Fault as fault:
            return ChatAnswer(fault=fault)
        self.usage.add(answer.prompt_tokens, answer.completion_tokens, cached=False)
        if self._cache:
            self._cache.put(digest, {name: asdict(answer)[name] for name in _KEPT})
        return answer

    async def embed(self, texts: Sequence[str], first: int = 0) -> list[Vector]:
        """The float32 vectors of some texts, in one request or, where the server refuses that, in smaller ones.

        The number of the `first` text is for messages.

        Raises:
            ConfigError: As `chat`.
            EndpointError: The server refuses a text, or does not answer.
        """
        sent_texts = [sent_text(text) for text in texts]
        digests = [request_digest("embedding", embedding_body([text], self._settings)) for text in sent_texts]
        vectors = [self._cached_vector(digest) for digest in digests]
        numbers: dict[str, int] = {}
        for n, vector in enumerate(vectors):
            if vector is None:
                numbers.setdefault(sent_texts[n], first + n)
        if numbers:
            new_vectors = dict(zip(numbers, await self._embed_new(list(numbers), list(numbers.values())), strict=True))
            for n, vector in enumerate(vectors):
                if vector is None:
                    vectors[n] = new_vectors[sent_texts[n]]
                    if self._cache:
                        self._cache.put(digests[n], pack(new_vectors[sent_texts[n]]))
        return [vector for vector in vectors if vector is not None]

    async def _embed_new(self, texts: list[str], numbers: list[int]) -> list[Vector]:
        def parse(answer: Any) -> list[Vector]:
            vectors = parse_embeddings(answer, len(texts), self._settings.dimensions)
            self.usage.add(token_counts(answer)[0], 0, cached=False)
            return vectors

        try:
            return await self._send("embeddings", embedding_body(texts, self._settings), parse)
        except Fault as fault:
            if fault.kind == REFUSED and len(texts) > 1:  # too many for the server, or one is too long
                half = len(texts) // 2
                first_half = await self._embed_new(texts[:half], numbers[:half])
                return first_half + await self._embed_new(texts[half:], numbers[half:])
            subject = (
                f"of text {numbers[0]} ({len(texts[0])} characters)" if len(texts) == 1 else f"of {len(texts)} texts"
            )
            raise EndpointError(f"{self._flag}: no embedding {subject}: {fault.message}") from None

    async def _send(self, path: str, body: dict[str, Any], parse: Callable[[Any], T]) -> T:
        """The parsed answer to a request, after retries; raises the last Fault."""
        settings = self._settings
        data = json.dumps(body).encode()
        server: Server | None = None
        for attempt in range(settings.retries + 1):
            async with self._in_flight:
                server = await self._servers.next(avoid=server)
                try:
                    answer = parse(await self._connection.post(server.url, path, data))
                except Fault as fault:
                    last_fault = Fault(fault.kind, f"{_shown_url(server.url)} {fault.message}", fault.wait_s)
                    self.usage.faults[fault.kind] += 1
                else:
                    server.faults = self._failed_in_row = 0
                    return answer
            if last_fault.kind in FATAL:
                remedy = _MEND[last_fault.kind].format(flag=self._flag, model=settings.model)
                raise ConfigError(f"{last_fault.message}: {remedy}")
            if (
                last_fault.kind not in RETRIED
                or attempt == settings.retries
                or (last_fault.wait_s or 0.0) > settings.max_wait_s
            ):
                break
            server.pause(last_fault, settings.backoff_s)
            if last_fault.kind not in PAUSING:
                await asyncio.sleep(backoff_s(settings.backoff_s, attempt))
        self.usage.failed[last_fault.kind] += 1
        self._failed_in_row += 1
        if self._failed_in_row >= settings.give_up_after:
            raise EndpointError(
                f"{settings.give_up_after} requests in a row failed, the last one: {last_fault.message}"
            )
        raise last_fault

    def _cached_chat(self, digest: str) -> ChatAnswer | None:
        cached = self._cache.get(digest) if self._cache else None
        if cached is None:
            return None
        try:
            answer = ChatAnswer(**{name: cached[name] for name in _KEPT}, cached=True)
        except KeyError:
            return None
        self.usage.add(answer.prompt_tokens, answer.completion_tokens, cached=True)
        return answer

    def _cached_vector(self, digest: str) -> Vector | None:
        cached = self._cache.get(digest) if self._cache else None
        vector = unpack(cached) if cached is not None else None
        if vector is not None:
            self.usage.add(0, 0, cached=True)
        return vector


def _shown_url(url: str) -> str:
    return redact(url.partition("?")[0])
