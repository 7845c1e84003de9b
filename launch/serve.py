"""`lavic serve`: the recommender over HTTP, with a page to try it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence

from lavic.config import parse
from lavic.errors import LaunchError
from lavic.recommend.serve_settings import ServeSettings, check_settings, read_token

DESCRIPTION = """Serve recommendations over HTTP: a page to try it at /, POST /v1/recommend for programs, and
POST /v1/chat/completions for chat front ends. /docs describes every route.

  lavic serve --bundle runs/tune/bundle --store store --index index --shards shards/train
  curl localhost:8000/v1/recommend -H 'Content-Type: application/json' -d '{"conversation": "a warm hat", "k": 3}'
  LAVIC_SERVE_TOKEN=... lavic serve ... --host 0.0.0.0 --token env:LAVIC_SERVE_TOKEN
  lavic serve ... --ray --scale.replicas 4 --scale.gpus 1

The server listens on 127.0.0.1. On any other address clients must send a token. SIGHUP reloads bundle, store, index and
shards without dropping a request. On SIGTERM or Ctrl-C the server finishes requests in flight, accepts no new ones, and
exits with 0."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    chosen = parse(ServeSettings, argv, command="serve", description=DESCRIPTION)
    token = read_token(chosen)
    try:
        from lavic.recommend.serving.server import hangups_kept, listen

        if chosen.ray:
            from lavic.recommend.serving import ray_app
    except ModuleNotFoundError as error:
        extra = "serve-ray" if error.name == "ray" else "serve"
        raise LaunchError(f"{error.name} is not installed: pip install 'lavic[{extra}]'") from None
    check_settings(chosen)
    with hangups_kept() as hangup:
        if chosen.ray:
            ray_app.run(chosen)
            return 0
        with listen(chosen.host, chosen.port) as server:
            serve(chosen, token, server, hangup)
    return 0


def serve(chosen: ServeSettings, token: str | None, server: socket.socket, hangup: threading.Event) -> None:
    """Loads everything, then serves until a signal.

    `hangup` is set if SIGHUP came while everything was loaded; then it is loaded again.
    """
    from lavic.recommend.conversation_record import ConversationRecord
    from lavic.recommend.serving.app import create_app
    from lavic.recommend.serving.metrics import Metrics
    from lavic.recommend.serving.server import run
    from lavic.recommend.serving.service import Served, load_served

    record = None if chosen.record is None else ConversationRecord(chosen.record)
    served = load_served(chosen)

    async def load() -> Served:
        return served

    app = create_app(chosen, token, load, Metrics(), record)
    host, port = server.getsockname()[:2]
    url_host = f"[{host}]" if ":" in host else host
    run(
        app,
        server,
        grace=chosen.deadline,
        reload=lambda: app.state.service.reload(),
        ready=lambda: print(f"serving on http://{url_host}:{port}", flush=True),
        hangup=hangup,
    )
