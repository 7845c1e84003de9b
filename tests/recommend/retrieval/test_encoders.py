"""Encoders of texts, by a model and by a server: how long texts are truncated."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from lavic.data.schema import Conversation, Turn
from lavic.endpoint.settings import EndpointSettings
from lavic.errors import ConfigError
from lavic.recommend.retrieval import query_text
from lavic.recommend.retrieval.query import plain, shorten
from lavic.recommend.retrieval.vectors.endpoint_encoder import EndpointEncoder
from lavic.recommend.retrieval.vectors.sentence_encoder import DenseSettings, SentenceEncoder, dense_settings
from tests.endpoint.openai_server import openai_server

FILLER = "I have been looking for a while and nothing in the shops was quite right for the room. " * 40


def conversation(*texts: str) -> Conversation:
    turns = [Turn("comment" if position else "seeker", text) for position, text in enumerate(texts)]
    return Conversation(id="c-0", turns=tuple(turns))


@pytest.fixture(scope="module")
def encoder(sentence_model) -> SentenceEncoder:
    return SentenceEncoder(dense_settings(DenseSettings(model=str(sentence_model))), device="cpu")


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize(
    "turns",
    [
        ("I need something for my desk", FILLER, FILLER, "{}"),
        (FILLER, "{}"),
        (FILLER + "{}",),
        ("short", FILLER + "{}"),
    ],
)
def test_the_last_turn_of_a_long_thread_affects_its_vector(encoder, turns):
    queries = [
        query_text(conversation(*(turn.format(last) for turn in turns)))
        for last in ("a black lamp made of glass", "warm woollen socks for hiking", "warm woollen socks for hiking")
    ]
    lamp, socks, same = encoder.queries(queries)
    assert cosine(lamp, socks) < 0.97
    assert cosine(socks, same) > 0.999


def test_the_request_of_a_long_thread_affects_its_vector(encoder):
    texts = ["a black lamp made of glass", "warm woollen socks for hiking"]
    lamp, socks = encoder.queries([query_text(conversation(text, FILLER, FILLER, "any ideas?")) for text in texts])
    assert cosine(lamp, socks) < 0.97


def test_a_short_query_is_embedded_as_plain_text(encoder):
    short = conversation("a black lamp", "of glass?")
    assert plain(query_text(short)) == "a black lamp\nof glass?"
    vector = encoder.queries([query_text(short)])[0]
    assert cosine(vector, encoder.documents(["a black lamp\nof glass?"])[0]) > 0.999


def test_vectors_do_not_depend_on_the_batch(encoder):
    texts = ["a lamp", FILLER, "woollen socks"]
    together = encoder.documents(texts)
    for text, vector in zip(texts, together, strict=True):
        assert np.allclose(encoder.documents([text])[0], vector, atol=1e-5)


def test_another_version_of_the_model_is_refused(sentence_model):
    recorded = dense_settings(DenseSettings(model=str(sentence_model)))
    with pytest.raises(ConfigError, match="another version of this model"):
        SentenceEncoder({**recorded, "fingerprint": "0" * 16})
    with pytest.raises(ConfigError, match=r"--dense.model"):
        dense_settings(DenseSettings(model="/absent"))


@pytest.mark.parametrize("name", ["1_Pooling/config.json", "tokenizer.json", "config_sentence_transformers.json"])
def test_changed_pooling_or_tokenizer_files_are_another_version(sentence_model, tmp_path, name):
    folder = tmp_path / "model"
    shutil.copytree(sentence_model, folder)
    recorded = dense_settings(DenseSettings(model=str(folder)))
    assert {**recorded, "model": ""} == {**dense_settings(DenseSettings(model=str(sentence_model))), "model": ""}
    (folder / name).write_text(f"{(folder / name).read_text('utf-8')} ", "utf-8")
    with pytest.raises(ConfigError, match=r"another version of this model \(modules .*make another index"):
        SentenceEncoder(recorded)


def truncate_words(text: str, limit: int, middle: bool) -> tuple[str, int]:
    words = text.split()
    if len(words) > limit:
        head = limit // 2 if middle else limit
        words = words[:head] + words[len(words) - (limit - head) :]
    return " ".join(words), len(words)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (99, "a b c\nd e f\ng h i\nj k l m"),
        (10, "a b c\ng h i\nj k l m"),
        (8, "a b c\ng\nj k l m"),
        (5, "a\nj k l m"),
        (4, "j k l m"),
        (2, "j m"),
        (1, "m"),
    ],
)
def test_shorten_keeps_the_request_and_the_last_turn(limit, expected):
    query = query_text(conversation("a b c", "d e f", "g h i", "j k l m"))
    assert shorten(query, limit, truncate_words) == expected


def test_endpoint_queries_keep_the_last_turn():
    with openai_server() as server:
        settings = EndpointSettings(url=(server.url,), model="m")
        encoder = EndpointEncoder(settings, 100)
        encoder.queries([query_text(conversation("a lamp", FILLER, f"{FILLER} of glass")), ""])
        encoder.documents([FILLER])
        sent = [text for body in server.bodies for text in body["input"]]
        encoder.close()
    assert sent[0].endswith("of glass")
    assert all(len(text) <= 100 for text in sent)
