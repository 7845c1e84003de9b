"""The teacher behind OpenAI-compatible servers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping

from lavic.data.tar_shards import Sample
from lavic.endpoint.chat import ChatAnswer, ChatRequest, Photo
from lavic.endpoint.client import Endpoint
from lavic.endpoint.faults import RETRIED
from lavic.endpoint.settings import EndpointSettings
from lavic.shards.teacher.question import Question
from lavic.shards.teacher.teacher import Description, Sampling
from lavic.shards.teacher.text_check import Flag, check_text, complete_sentences


class EndpointTeacher:
    """Sends each photo as it is in the shard, with the question about it. See `Teacher`."""

    batch_size = 1

    def __init__(self, endpoint: Endpoint, question: Question, sampling: Sampling, max_new_tokens: int) -> None:
        self._endpoint, self._question, self._sampling = endpoint, question, sampling
        self._max_new_tokens = max_new_tokens
        self.origin: Mapping[str, str] = endpoint_origin(endpoint.settings, question, sampling, max_new_tokens)

    def write(self, samples: Iterable[Sample], attempt: int, stopped: Callable[[], bool]) -> Iterator[Description]:
        """See `Teacher.write`; as many photos as may be in flight are described at once."""
        titles: list[str] = []

        def questions() -> Iterator[ChatRequest]:
            for sample in samples:
                titles.append(sample.title)
                yield self._request(sample, attempt)

        for number, answer in enumerate(self._endpoint.chat(questions(), stopped=stopped)):
            yield _written(answer, titles[number])

    def _request(self, sample: Sample, attempt: int) -> ChatRequest:
        sampling = self._sampling.for_attempt(attempt)
        return ChatRequest(
            parts=[Photo(sample.jpg), self._question.for_title(sample.title)],
            max_tokens=self._max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed if sampling.temperature else None,
            attempt=attempt,
        )


def endpoint_origin(
    settings: EndpointSettings, question: Question, sampling: Sampling, max_new_tokens: int
) -> dict[str, str]:
    """What descriptions of an endpoint depend on: model and further fields of its requests, question, sampling."""
    identity = hashlib.sha256(json.dumps(settings.identity, sort_keys=True).encode()).hexdigest()[:12]
    return {
        "model": settings.model,
        "weights": f"endpoint-{identity}",
        "prompt": question.version,
        "views": "whole",
        "dtype": "",
        "max_new_tokens": str(max_new_tokens),
        "sampling": sampling.text,
    }


def _written(answer: ChatAnswer, title: str) -> Description:
    if answer.fault is not None:
        return Description(text="", flag="failed" if answer.fault.kind in RETRIED else "rejected")
    refused = answer.refusal or answer.finish_reason == "content_filter"
    flag: Flag = "refusal" if refused else check_text(answer.text, title)
    return Description(text=complete_sentences(answer.text), flag=flag)
