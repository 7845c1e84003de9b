"""The routes of the page: its files, and what it has to know of the server."""

from __future__ import annotations

import hashlib
from importlib.resources import files

from fastapi import APIRouter, Request, Response

from lavic import __version__

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
"""Content-Security-Policy: the page's own script and style, nothing inline, nothing from elsewhere, no frame."""
FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
"""Path -> (file of the package, its media type). No part of a request becomes a path."""


def page_router(*, records: bool = False) -> APIRouter:
    """The page at `/`.

    Args:
        records: Whether the server keeps conversations: the page says so to its reader.
    """
    router = APIRouter(include_in_schema=False)
    folder = files("lavic.recommend.serving.page")
    for path, (name, media_type) in FILES.items():
        _add_file(router, path, folder.joinpath(name).read_bytes(), media_type)

    @router.get("/page.json")
    def page_settings() -> dict[str, str | bool]:
        return {"version": __version__, "records": records}

    return router


def _add_file(router: APIRouter, path: str, content: bytes, media_type: str) -> None:
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {"ETag": etag, "Cache-Control": "no-cache", "Content-Security-Policy": POLICY}

    @router.api_route(path, methods=["GET", "HEAD"])
    def page_file(request: Request) -> Response:
        if etag in request.headers.get("If-None-Match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=media_type, headers=headers)
