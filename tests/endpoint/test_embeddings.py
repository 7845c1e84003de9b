"""Embeddings from a server on loopback, and what servers do wrong with them."""

from __future__ import annotations

import numpy as np
import pytest

from lavic.endpoint.faults import EndpointError
from lavic.errors import ConfigError
from tests.endpoint.openai_server import DIMENSIONS, embeddings_body, vector_of

TEXTS = [f"text {n}" for n in range(23)]
EXPECTED = np.asarray([vector_of(text) for text in TEXTS], np.float32)


def change(edit):
    """An answer with one thing wrong."""

    def answer(texts):
        body = embeddings_body(texts)
        edit(body["data"])
        return body

    return answer


def test_one_vector_for_each_text(connect, server):
    client = connect(batch_size=5)
    vectors = client.embed(TEXTS)
    assert vectors.dtype == np.float32 and np.array_equal(vectors, EXPECTED)
    assert [len(body["input"]) for body in server.bodies].count(5) == 4 and server.requests == 5
    assert client.usage.prompt_tokens == sum(map(len, TEXTS))
    assert [len(batch) for batch in client.embed_batches(iter(TEXTS))] == [5, 5, 5, 5, 3]


def test_nothing_to_embed(connect, server):
    assert connect().embed([]).shape == (0, 0) and server.requests == 0


def test_a_text_is_no_list_of_texts(connect, server):
    with pytest.raises(ConfigError, match="a list of texts is embedded"):
        connect().embed("a red shoe")
    assert server.requests == 0


def test_an_answer_out_of_order_is_put_in_order(connect, server):
    server.embeddings = change(lambda rows: rows.reverse())
    assert np.array_equal(connect().embed(TEXTS), EXPECTED)


def test_an_answer_without_indices_is_in_order(connect, server):
    server.embeddings = change(lambda rows: [row.pop("index") for row in rows])
    assert np.array_equal(connect().embed(TEXTS), EXPECTED)


@pytest.mark.parametrize(
    "edit",
    [
        lambda rows: rows.pop(),
        lambda rows: rows.append(rows[0]),
        lambda rows: rows[1].update(index=0),
        lambda rows: rows[1].update(index="1"),
        lambda rows: rows[1].update(embedding=None),
        lambda rows: rows[1].update(embedding=[]),
        lambda rows: rows[1]["embedding"].pop(),
        lambda rows: rows[1]["embedding"].__setitem__(0, float("nan")),
        lambda rows: rows[1]["embedding"].__setitem__(0, float("inf")),
        lambda rows: rows.__setitem__(0, 3),
        lambda rows: rows.clear(),
    ],
    ids=["fewer", "more", "twice", "words", "null", "empty", "shorter", "nan", "inf", "number", "none"],
)
def test_a_wrong_answer_is_asked_for_again_and_then_refused(connect, server, edit):
    server.embeddings = change(edit)
    client = connect(retries=1)
    with pytest.raises(EndpointError, match=r"no embedding of 23 texts: http.*/v1 answers"):
        client.embed(TEXTS)
    assert client.usage.faults == {"shape": 2}
    answers = [change(edit), embeddings_body]
    server.embeddings = lambda texts: answers.pop(0)(texts)
    assert np.array_equal(client.embed(TEXTS), EXPECTED)


def test_a_server_that_takes_fewer_texts_at_once(connect, server):
    server.embeddings = lambda texts: (413, {}, b"too many") if len(texts) > 4 else embeddings_body(texts)
    assert np.array_equal(connect().embed(TEXTS), EXPECTED)


@pytest.mark.parametrize("before", [TEXTS[:9], TEXTS[:1] * 9])
def test_a_text_that_is_refused_is_named(connect, server, before):
    long = "x" * 5000
    server.embeddings = lambda texts: (400, {}, b"too long") if long in texts else embeddings_body(texts)
    with pytest.raises(EndpointError, match=r"no embedding of text 9 \(5000 characters\): .*400 \(too long\)"):
        connect(batch_size=4).embed([*before, long, *TEXTS[9:]])


def test_embeddings_are_kept_by_text(connect, server, tmp_path):
    first = connect(cache=tmp_path, batch_size=5)
    assert np.array_equal(first.embed(TEXTS), EXPECTED)
    again = connect(cache=tmp_path, batch_size=9)
    expected = np.asarray([vector_of(text) for text in [*TEXTS[::-1], "new", "new", " "]], np.float32)
    assert np.array_equal(again.embed([*TEXTS[::-1], "new", "new", ""]), expected)
    assert server.bodies[5:] == [{**server.bodies[0], "input": ["new", " "]}]
    assert connect(cache=tmp_path, model="other").embed(TEXTS[:1]).shape == (1, DIMENSIONS)
    assert server.requests == 7


def test_the_length_that_was_chosen(connect, server):
    client = connect(dimensions=4, retries=0)
    with pytest.raises(EndpointError, match="not of length 4"):
        client.embed(["x"])
    assert server.bodies[0]["dimensions"] == 4


def test_vectors_of_different_lengths_are_refused(connect, server):
    lengths = iter([8, 7, 7, 7])
    server.embeddings = lambda texts: {"data": [{"index": 0, "embedding": [0.5] * next(lengths)}]}
    with pytest.raises(EndpointError, match="different lengths"):
        connect(batch_size=1).embed(TEXTS[:3])
