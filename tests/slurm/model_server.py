"""Stands in for `vllm serve`: MODEL --host H --port P, and the key of VLLM_API_KEY."""

from __future__ import annotations

import os
import sys
import threading

from tests.endpoint.openai_server import OpenAiServer, chat_body


def main(words: list[str]) -> None:
    model, flags = words[0], dict(zip(words[1::2], words[2::2], strict=True))
    server = OpenAiServer(flags["--host"], int(flags["--port"]))
    server.loading = 2

    def answer(body):
        key = server.headers[-1].get("authorization")
        if key != f"Bearer {os.environ['VLLM_API_KEY']}" or body["model"] != model:
            return 401, {}, b"no"
        return chat_body("A mug with a handle.")

    server.chat = answer
    print(f"serving {model}", flush=True)
    threading.Event().wait()


main(sys.argv[1:])
