"""The HTTP API of a recommender, as a FastAPI app."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse

from lavic import __version__
from lavic.errors import LavicError
from lavic.recommend.conversation_forms import to_conversation
from lavic.recommend.conversation_record import ConversationRecord
from lavic.recommend.recommendation import Query
from lavic.recommend.serve_settings import ServeSettings
from lavic.recommend.serving import chat
from lavic.recommend.serving.api_page import POLICY, api_page
from lavic.recommend.serving.batching.batcher import Batcher
from lavic.recommend.serving.errors import ApiError, add_error_handlers
from lavic.recommend.serving.guard import Guard
from lavic.recommend.serving.metrics import Metrics
from lavic.recommend.serving.page.routes import page_router
from lavic.recommend.serving.schemas import (
    ChatRequest,
    ErrorResponse,
    FeedbackRequest,
    Item,
    Message,
    RecommendRequest,
    RecommendResponse,
    recommend_response,
)
from lavic.recommend.serving.service import Served, Service, check_limits

T = TypeVar("T")
log = logging.getLogger(__name__)

DESCRIPTION = (
    "Products for a conversation, with the probability that the model gives each. Every error has the form "
    '{"error": {"message", "type", "param", "code"}}.'
)


def create_app(
    settings: ServeSettings,
    token: str | None,
    load: Callable[[], Awaitable[Served]],
    metrics: Metrics,
    record: ConversationRecord | None = None,
) -> FastAPI:
    """The app, with its `Service` in `app.state.service` while it runs.

    Args:
        settings: Of the server.
        token: What clients must show; None: nothing.
        load: Loads what is served first; awaited in the event loop of the server.
        metrics: Of the server.
        record: Where conversations and likes are kept; None: they are not.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        batcher = Batcher(settings, metrics)
        app.state.service = service = Service(settings, await load(), batcher, metrics)
        batcher.start()
        service.ready = True
        try:
            yield
        finally:
            service.ready = False
            await batcher.stop()

    app = FastAPI(
        title="LaViC",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses={"4XX": {"model": ErrorResponse}, "5XX": {"model": ErrorResponse}},
    )
    add_error_handlers(app)
    _add_probes(app, metrics)
    _add_items(app)
    _add_recommend(app, settings, token, record)
    if record is not None:
        _add_feedback(app, settings, record)
    app.include_router(page_router(records=record is not None))
    app.add_middleware(Guard, settings=settings, token=token, metrics=metrics)
    if settings.cors:  # outermost: a browser's preflight request has no token
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    return app


def _service(request: Request) -> Service:
    service: Service | None = getattr(request.app.state, "service", None)
    if service is None or not service.ready:
        raise ApiError(503, "the server is not ready", headers={"Retry-After": "1"})
    return service


def _add_probes(app: FastAPI, metrics: Metrics) -> None:
    @app.get("/healthz", tags=["probes"])
    async def alive() -> dict[str, str]:
        """Whether the process runs."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["probes"])
    async def ready(request: Request) -> dict[str, Any]:
        """Whether requests are answered; 503 before the start and while the server shuts down."""
        bundle, store = _service(request).current.names
        return {"status": "ready", "bundle": bundle, "store": store}

    @app.get("/metrics", tags=["probes"], response_class=Response)
    async def measured() -> Response:
        """Counters in Prometheus' text format. On Ray Serve 404: Ray exports those of all replicas, on every node."""
        text = metrics.render()
        if text is None:
            raise ApiError(404, "a replica has no counters of all: Ray exports them, see `On Ray Serve` in serving.md")
        return Response(text, media_type=metrics.content_type)

    @app.get("/docs", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(api_page(app.openapi()), headers={"Content-Security-Policy": POLICY})


def _add_items(app: FastAPI) -> None:
    # `:path`, because an id may hold a slash, which arrives here decoded. No id is ever part of a file's path.
    @app.get("/v1/items/{id:path}", tags=["items"])
    def item(request: Request, id: str) -> Item:
        """An item of the catalogue by its id."""
        served = _service(request).current
        store = served.recommender.store
        if id not in store:
            raise ApiError(404, "no item has this id", param="id")
        return Item(id=id, title=store.title(id), photo=served.photo(id))

    @app.get("/photos/{id:path}", tags=["items"], response_class=Response)
    def photo(request: Request, id: str) -> Response:
        """The photo that an item's tokens were made of."""
        photos = _service(request).current.photos
        try:
            stored = photos.get(id) if photos else None
        except LavicError as error:
            log.warning("%s", error)  # it names a folder, which is not for clients
            raise ApiError(503, "the photo cannot be read now", headers={"Retry-After": "10"}) from None
        if stored is None:
            raise ApiError(404, "no item with this id has a photo here", param="id")
        headers = {"ETag": stored.etag, "Cache-Control": "private, max-age=300"}
        if stored.etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(stored.data, media_type=stored.media_type, headers=headers)


def _add_recommend(app: FastAPI, settings: ServeSettings, token: str | None, record: ConversationRecord | None) -> None:
    async def ask(request: Request, query: Query) -> RecommendResponse:
        service = _service(request)
        check_limits(query, settings)
        served, answer = await until_gone(request, service.answer(query))
        if record is not None:
            await asyncio.to_thread(_keep, record, query, [item.id for item in answer])
        return recommend_response(answer, [served.photo(item.id) for item in answer])

    @app.post("/v1/recommend", tags=["recommend"])
    async def recommend(request: Request, body: RecommendRequest) -> RecommendResponse:
        """Items for a conversation, best first: of the given candidates, or of the whole catalogue."""
        query = Query(conversation=_form(body.conversation), candidates=body.candidates, k=body.k, exclude=body.exclude)
        return await ask(request, query)

    @app.post("/v1/chat/completions", tags=["OpenAI"], response_model=None)
    async def complete(request: Request, body: ChatRequest) -> Response:
        """The same for clients of the OpenAI chat API: an answer in words, and the items under `lavic`."""
        query = Query(
            conversation=_form(body.messages),
            candidates=body.candidates,
            k=body.k,
            exclude=body.exclude,
            name="messages",
        )
        answer = await ask(request, query)
        # Pictures in a chat are fetched without a token.
        base_url = None if token else str(request.base_url).rstrip("/")
        if body.stream:
            events = chat.chunks(answer, body.model, base_url, include_usage=body.stream_options.include_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        return JSONResponse(chat.completion(answer, body.model, base_url))

    @app.get("/v1/models", tags=["OpenAI"])
    async def models() -> dict[str, Any]:
        """The one model, for clients that look for it."""
        return {"object": "list", "data": [chat.MODEL]}

    @app.get("/v1/models/{model}", tags=["OpenAI"])
    async def model(model: str) -> dict[str, Any]:
        """The same under its name."""
        if model != chat.MODEL["id"]:
            raise ApiError(404, f"the only model here is {chat.MODEL['id']!r}", param="model")
        return chat.MODEL


def _keep(record: ConversationRecord, query: Query, recommended: Sequence[str]) -> None:
    """Records an answered conversation; if that fails, the answer is sent all the same."""
    try:
        record.add_answer(to_conversation(query.conversation).turns, recommended)
    except LavicError as error:
        log.error("not recorded: %s", error)


def _add_feedback(app: FastAPI, settings: ServeSettings, record: ConversationRecord) -> None:
    @app.post("/v1/feedback", tags=["recommend"], status_code=204)
    def feedback(request: Request, body: FeedbackRequest) -> None:
        """Keeps a like or dislike, to train with. Only on a server that records (`--record`)."""
        store = _service(request).current.recommender.store
        query = Query(conversation=_form(body.conversation), candidates=body.candidates)
        check_limits(query, settings)
        if unknown := [item for item in (body.item, *body.candidates) if item not in store]:
            raise ApiError(422, f"no item has the id {unknown[0][:100]!r}", param="item")
        if body.item not in body.candidates:
            raise ApiError(422, "item: not among the candidates, the ids that were shown", param="item")
        turns = to_conversation(query.conversation).turns
        try:
            record.add_vote(turns, body.candidates, body.item, liked=body.liked)
        except LavicError as error:
            log.error("not recorded: %s", error)
            raise ApiError(503, "it cannot be recorded now", headers={"Retry-After": "10"}) from None


def _form(conversation: str | list[Message | str] | list[Message]) -> Any:
    """A conversation as the recommender takes it."""
    if isinstance(conversation, str):
        return conversation
    return [turn if isinstance(turn, str) else {"role": turn.role, "content": turn.content} for turn in conversation]


async def until_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Awaits work, and cancels it when the client closes its connection.

    Raises:
        ApiError: 499, which nobody reads: the client has left.
    """
    task = asyncio.ensure_future(work)
    disconnected = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(499, "the client has left")
    finally:
        task.cancel()
        disconnected.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
