"""The HTTP API of a running server."""

from __future__ import annotations

import gzip
import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from lavic.recommend.recommendation import Query
from lavic.recommend.recommender import Recommender
from lavic.recommend.serving.errors import add_error_handlers

from ..conftest import KEY, Assets
from .conftest import Server

MESSAGES = [{"role": "user", "content": "an acme mug, red"}, {"role": "assistant", "content": "Striped or plain?"}]


@pytest.fixture(scope="module")
def recommender(assets: Assets, index) -> Recommender:
    return Recommender.load(assets.bundle, assets.store, index, retrieved=20)


def test_recommend_ranks_given_candidates(assets: Assets, client: httpx.Client, recommender: Recommender):
    listed = list(assets.conversations[0].candidates[KEY])
    answer = client.post("/v1/recommend", json={"conversation": "a red mug", "candidates": listed, "k": 4})
    assert answer.status_code == 200
    expected = recommender.recommend("a red mug", listed, k=4)
    items = answer.json()["items"]
    assert [item["id"] for item in items] == [item.id for item in expected]
    for item, other in zip(items, expected, strict=True):
        assert item["probability"] == pytest.approx(other.probability, abs=1e-5)
        assert item["title"] == other.title and item["photo"] is None and set(item["scores"]) == {"bm25"}
    assert answer.json()["candidates"] == 10


def test_recommend_searches_the_index_and_excludes_items(client: httpx.Client, recommender: Recommender):
    expected = [item.id for item in recommender.recommend(MESSAGES)]
    for conversation in (MESSAGES, ["an acme mug, red", "Striped or plain?"]):
        answer = client.post("/v1/recommend", json={"conversation": conversation})
        assert [item["id"] for item in answer.json()["items"]] == expected
    excluded = client.post("/v1/recommend", json={"conversation": MESSAGES, "exclude": expected[:2]}).json()["items"]
    assert not {item["id"] for item in excluded} & set(expected[:2])


def test_answers_do_not_depend_on_batches(assets: Assets, server: Server, recommender: Recommender):
    queries = [Query(conversation=c.turns[0].text, candidates=c.candidates[KEY]) for c in assets.conversations]
    expected = [recommender.recommend(query.conversation, query.candidates) for query in queries]

    def ask(query: Query) -> list[dict]:
        with server.client() as client:
            body = {"conversation": query.conversation, "candidates": list(query.candidates)}
            return client.post("/v1/recommend", json=body).json()["items"]

    with ThreadPoolExecutor(len(queries)) as pool:
        answers = list(pool.map(ask, queries))
    for answer, alone in zip(answers, expected, strict=True):
        assert [item["id"] for item in answer] == [item.id for item in alone]
        assert [item["probability"] for item in answer] == pytest.approx([i.probability for i in alone], abs=1e-5)


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 422, "conversation"),
        ({"conversation": ""}, 422, "conversation"),
        ({"conversation": []}, 422, "conversation"),
        ({"conversation": 7}, 422, "conversation"),
        ({"conversation": {"role": "user", "content": "a"}}, 422, "conversation"),
        ({"conversation": [5]}, 422, "conversation.0"),
        ({"conversation": [{"content": "a"}]}, 422, "conversation.0.role"),
        ({"conversation": [{"role": "user", "content": 5}]}, 422, "conversation.0.content"),
        ({"conversation": [{"role": "user", "content": ["a"]}]}, 422, "conversation.0.content.0"),
        ({"conversation": None}, 422, "conversation"),
        ({"conversation": "a", "candidates": []}, 422, "candidates"),
        ({"conversation": "a", "candidates": ["B0NOWHERE0"]}, 422, "candidates"),
        ({"conversation": "a", "candidates": ["B0\nNOWHERE"]}, 422, "candidates"),
        ({"conversation": "a", "candidates": ["B0" * 10_000]}, 422, "candidates"),
        ({"conversation": "a", "candidates": [""]}, 422, "candidates"),
        ({"conversation": "a", "candidates": "B0NOWHERE0"}, 422, "candidates"),
        ({"conversation": "a", "candidates": [1]}, 422, "candidates.0"),
        ({"conversation": "a", "exclude": "B0NOWHERE0"}, 422, "exclude"),
        ({"conversation": "a", "k": 0}, 422, "k"),
        ({"conversation": "a", "k": 101}, 422, "k"),
        ({"conversation": "a", "k": True}, 422, "k"),
        ({"conversation": "a", "k": 2.5}, 422, "k"),
        ({"conversation": "a", "colour": "red"}, 422, "colour"),
        ({"conversation": [{"role": "robot", "content": "a"}]}, 422, "conversation[0]"),
        ({"conversation": ["a"] * 201}, 422, "conversation"),
        ({"conversation": "a", "candidates": ["x"] * 1001}, 422, "candidates"),
        ("[" * 100_000, 400, None),
        ('{"conversation": "a"', 400, None),
        (b"\xff\xfe", 400, None),
        ('{"conversation": "a", "k": ' + "9" * 6000 + "}", 400, None),
        ('{"conversation": "a", "k": 1e400}', 422, "k"),
        ("[1, 2]", 422, None),
    ],
)
def test_invalid_bodies_are_refused_in_one_error_format(client: httpx.Client, body, status: int, param):
    data = json.dumps(body) if isinstance(body, dict) else body
    answer = client.post("/v1/recommend", content=data, headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert "\n" not in error["message"] and len(error["message"]) < 300
    assert status != 400 or error["message"] == "the body is not JSON"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", "/v1/recommend", 405),
        ("GET", "/v1/items/B0NOWHERE0", 404),
        ("GET", "/photos/B0NOWHERE0", 404),
        ("GET", "/photos/..%2f..%2fetc%2fpasswd", 404),
    ],
)
def test_unknown_paths_and_methods_are_refused(client: httpx.Client, method: str, path: str, status: int):
    answer = client.request(method, path)
    assert answer.status_code == status and answer.json()["error"]["type"] == "invalid_request_error"


def test_other_content_types_and_encodings_are_refused(client: httpx.Client):
    answer = client.post("/v1/recommend", content='{"conversation": "a"}', headers={"Content-Type": "text/plain"})
    assert answer.status_code == 415 and answer.json()["error"]["code"] == "unsupported_media_type"
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    answer = client.post("/v1/recommend", content=gzip.compress(b'{"conversation": "a"}'), headers=headers)
    assert answer.status_code == 415 and "Content-Encoding" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/", "/healthz", "/readyz", "/docs", "/v1/models", "/photos/B0NOWHERE0"])
def test_head_is_get_without_a_body(client: httpx.Client, path: str):
    head, get = client.head(path), client.get(path)
    assert (head.status_code, head.headers["content-type"]) == (get.status_code, get.headers["content-type"])
    assert head.headers["content-length"] == get.headers["content-length"] and not head.content


def test_unknown_deeply_nested_keys_are_ignored(client: httpx.Client):
    nested: list = []
    for _ in range(600):
        nested = [nested]
    part = {"type": "text", "text": "a mug", "more": nested}
    answer = client.post("/v1/recommend", json={"conversation": [{"role": "user", "content": [part]}], "k": 3})
    assert answer.json() == client.post("/v1/recommend", json={"conversation": "a mug", "k": 3}).json()


def test_null_keys_are_treated_as_missing(client: httpx.Client):
    body = {"conversation": "a mug", "k": None, "candidates": None, "exclude": None}
    assert client.post("/v1/recommend", json=body).json() == client.post("/v1/recommend", json=body | {"k": 10}).json()
    chat = {"messages": MESSAGES, "model": None, "stream": None, "k": None}
    assert client.post("/v1/chat/completions", json=chat).json()["model"] == "lavic"


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([{"role": "system", "content": "be kind"}], "messages"),
        ([{"role": "user", "content": ""}], "messages"),
        ([{"role": "tool", "content": "a"}], "messages[0]"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "messages[0]"),
        ([{"role": "user", "content": "a"}] * 201, "messages"),
        ([{"role": "user", "content": "a" * 60_000}], "messages"),
        ([{"role": "user", "content": 5}], "messages.0.content"),
        ("a mug", "messages"),
    ],
)
def test_errors_of_chat_messages_name_the_messages(client: httpx.Client, messages, param: str):
    answer = client.post("/v1/chat/completions", json={"messages": messages})
    error = answer.json()["error"]
    assert answer.status_code == 422 and error["param"] == param and error["message"].startswith(f"{param}: ")


def test_item_route(assets: Assets, client: httpx.Client, recommender: Recommender):
    item = recommender.store.ids[3]
    answer = client.get(f"/v1/items/{item}")
    assert answer.json() == {"id": item, "title": recommender.store.title(item), "photo": None}
    assert answer.headers["x-content-type-options"] == "nosniff" and "default-src 'none'" in str(answer.headers)


def test_chat_completions(client: httpx.Client, recommender: Recommender):
    body = {"model": "any", "messages": MESSAGES, "temperature": 0.7, "k": 3}
    answer = client.post("/v1/chat/completions", json=body).json()
    expected = recommender.recommend(MESSAGES, k=3)
    (choice,) = answer["choices"]
    assert answer["object"] == "chat.completion" and answer["model"] == "any" and choice["finish_reason"] == "stop"
    assert [item["id"] for item in choice["message"]["lavic"]["items"]] == [item.id for item in expected]
    for rank, item in enumerate(expected, 1):
        assert f"{rank}. **{item.title}** ({item.id})" in choice["message"]["content"]

    with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
    assert events[-1] == "[DONE]"
    deltas = [json.loads(event)["choices"][0] for event in events[:-1]]
    assert "".join(choice["delta"].get("content", "") for choice in deltas) == choice["message"]["content"]
    assert deltas[-1]["finish_reason"] == "stop" and deltas[-1]["delta"]["lavic"] == choice["message"]["lavic"]
    assert client.post("/v1/chat/completions", json={"messages": []}).status_code == 422


def test_a_stream_ends_with_its_usage_if_asked(client: httpx.Client):
    body = {"messages": MESSAGES, "k": 3, "stream": True, "stream_options": {"include_usage": True}}
    lines = client.post("/v1/chat/completions", json=body).text.split("\n\n")
    *chunks, last = [json.loads(line.removeprefix("data: ")) for line in lines if line and "[DONE]" not in line]
    assert all(chunk["choices"] and chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == [] and last["usage"]["total_tokens"] == 0
    unasked = client.post("/v1/chat/completions", json=body | {"stream_options": None}).text
    assert "usage" not in unasked


def test_models(client: httpx.Client):
    (model,) = client.get("/v1/models").json()["data"]
    assert model["id"] == "lavic" and client.get("/v1/models/lavic").json() == model
    answer = client.get("/v1/models/gpt-5")
    assert answer.status_code == 404 and answer.json()["error"]["param"] == "model"


def test_a_model_name_that_utf8_cannot_encode_is_answered(client: httpx.Client):
    body = '{"messages": [{"role": "user", "content": "a mug"}], "model": "a\\ud800", "k": 1, "stream": %s}'
    for stream in ("false", "true"):
        answer = client.post(
            "/v1/chat/completions", content=body % stream, headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 200 and '"model":"a?"' in answer.text.replace(" ", "")


def test_an_unexpected_failure_closes_the_connection():
    """As uvicorn does: a client must not send its next request there."""
    app = FastAPI()
    add_error_handlers(app)

    @app.get("/")
    def fail() -> None:
        raise RuntimeError("secret")

    answer = TestClient(app, raise_server_exceptions=False).get("/")
    assert answer.status_code == 500 and answer.headers["Connection"] == "close" and "secret" not in answer.text


def test_probes_metrics_and_api_page(client: httpx.Client):
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json()["status"] == "ready"
    client.post("/v1/recommend", json={"conversation": "a mug"})
    text = client.get("/metrics").text
    assert 'lavic_requests_total{route="/v1/recommend",status="200"}' in text
    assert "lavic_batch_seconds_bucket" in text and "lavic_waiting_requests 0.0" in text
    page = client.get("/docs")
    assert "/v1/chat/completions" in page.text and "script-src" not in page.headers["content-security-policy"]
    assert "<script" not in page.text and "http://" not in page.text
    assert client.get("/openapi.json").json()["paths"]["/v1/recommend"]["post"]
