"""A small shop of drawn products, and a server with the same routes and a simple ranking, for tests of the page."""

from __future__ import annotations

import io
import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import Body, FastAPI, Response

from lavic.data.tar_shards import Sample
from lavic.mini.catalog import make_products
from lavic.mini.drawing import COLOURS, KINDS, PATTERNS, SIDE, draw
from lavic.recommend.serving.page.routes import page_router
from lavic.recommend.serving.photos import ItemPhotos
from tests.crawled_sets import write_set


@dataclass(frozen=True)
class Product:
    """A product of the shop."""

    id: str
    title: str
    words: str


@dataclass
class Shop:
    """Products with photos, and the next answers of the server."""

    products: dict[str, Product]
    photos: ItemPhotos | None
    answers: list[Response] = field(default_factory=list)
    """Sent first, in order."""
    requests: list[dict[str, Any]] = field(default_factory=list)
    """Bodies of the requests."""
    feedback: list[dict[str, Any]] = field(default_factory=list)
    hold: threading.Event = field(default_factory=threading.Event)
    """While cleared, answers wait."""

    def app(self, *, records: bool = False) -> FastAPI:
        """The server."""
        app = FastAPI(docs_url=None, redoc_url=None)
        app.include_router(page_router(records=records))

        @app.get("/photos/{id:path}")
        def photo(id: str) -> Response:
            photo_file = self.photos.get(id) if self.photos else None
            if photo_file is None:
                return Response(status_code=404)
            return Response(photo_file.data, media_type=photo_file.media_type)

        @app.post("/v1/recommend")
        def recommend(body: Annotated[dict[str, Any], Body()]) -> Any:
            self.requests.append(body)
            self.hold.wait()
            if self.answers:
                return self.answers.pop(0)
            text = " ".join(turn["content"] for turn in body["conversation"])
            return {"items": self._rank(text, body["k"], body["exclude"])}

        @app.post("/v1/feedback", status_code=204)
        def feedback(body: Annotated[dict[str, Any], Body()]) -> None:
            self.feedback.append(body)

        return app

    def _rank(self, text: str, k: int, exclude: list[str]) -> list[dict[str, Any]]:
        requested_words = set(text.lower().split())
        remaining = [product for product in self.products.values() if product.id not in exclude]
        scored = [(len(requested_words & set(product.words.split())), product) for product in remaining]
        scored.sort(key=lambda pair: -pair[0])
        total = sum(4.0**score for score, _ in scored[:k])
        return [
            {
                "id": product.id,
                "title": product.title,
                "probability": 4.0**score / total,
                "scores": {"bm25": float(score), "tokens": 0.5} if score else {"tokens": 0.25},
                "photo": self.photos.path(product.id) if self.photos else None,
            }
            for score, product in scored[:k]
        ]


def make_shop(folder: Path, titles: Sequence[str] = (), count: int = 40) -> Shop:
    """Draws products and writes their photos as a set of shards.

    Args:
        folder: For the set.
        titles: Titles of the first products, instead of drawn ones.
        count: Products; the last has no photo.
    """
    looks = [(kind, colour, pattern) for kind in KINDS for colour in COLOURS for pattern in PATTERNS]
    drawn = make_products(count, random.Random(3), looks)
    products, samples = {}, []
    for number, product in enumerate(drawn):
        title = titles[number] if number < len(titles) else product.title
        products[product.id] = Product(product.id, title, f"{product.colour} {product.pattern} {product.kind}")
        jpg = io.BytesIO()
        draw(product.kind, product.colour, product.pattern, product.seed).save(jpg, "JPEG", quality=92)
        samples.append(Sample.of(item_id=product.id, n=0, jpg=jpg.getvalue(), title=title, width=SIDE, height=SIDE))
    manifest = write_set(folder, samples[:-1])
    shop = Shop(products, ItemPhotos([manifest.folder], lambda id: f"{id}_0"))
    shop.hold.set()
    return shop


@contextmanager
def running(app: Any) -> Iterator[str]:
    """Runs a server on loopback during the block; yields its address."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", access_log=False))
    started = threading.Event()
    startup = server.startup

    async def startup_and_signal(sockets: Any = None) -> None:
        await startup(sockets)
        started.set()

    server.startup = startup_and_signal  # type: ignore[method-assign]
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        assert started.wait(60), "the server does not start"
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(60)
