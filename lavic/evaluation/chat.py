"""The arm `chat`: any chat model behind an OpenAI-compatible server picks one candidate of each list."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import NonNegativeFloat, PositiveInt

from lavic.config import settings
from lavic.data.schema import Conversation
from lavic.endpoint.chat import ChatAnswer, ChatRequest, Photo
from lavic.endpoint.client import Endpoint
from lavic.endpoint.faults import EndpointError
from lavic.endpoint.settings import EndpointSettings
from lavic.evaluation.report.blocks import Section, Table
from lavic.evaluation.test_set import TestSet
from lavic.metrics.ranking_metrics import compute_metrics
from lavic.metrics.relevance import judge
from lavic.recommend.ranking.answer_ids import mentions, released_answer, unlisted
from lavic.recommend.ranking.ranked_list import RankedList

PROMPT_VERSION = "chat-1"
"""Version of the prompt below."""
_SYSTEM = "You recommend products. You answer with the ID of one product and nothing else."
_ROLES = {"seeker": "Seeker", "comment": "Comment"}
_ASKED = "\nWhich product of the list fits the conversation best? Answer with its ID and nothing else."
_MAX_TITLE = 500
_REPORTED = ("hit_rate", "hit_rate_in_list", "recall_micro", "valid_ratio")


@settings
class ChatSettings(EndpointSettings):
    """The arm `chat`: a chat model behind OpenAI-compatible servers."""

    photos: bool = False
    """Show it the candidates' photos, from --shards, and not their titles alone."""
    max_tokens: PositiveInt = 64
    """Maximum length of an answer, tokens; a reasoning model needs more."""
    temperature: NonNegativeFloat | None = 0.0
    """Sampling temperature; none: the server's default."""
    max_characters: PositiveInt = 20_000
    """Maximum length of a conversation, characters; a longer one loses its oldest turns."""


@dataclass
class ChatArm:
    """What the arm answered, and what that took.

    Attributes:
        rankings: Test set -> the answer of each conversation: one id or none; None where the server gave no answer,
            which is a miss.
        answers: Test set -> how many answers were of each kind (see `parse_answer`).
        model: The model's name.
        usage: Tokens, cost and faults.
    """

    rankings: dict[str, list[RankedList | None]] = field(default_factory=dict)
    answers: dict[str, Counter[str]] = field(default_factory=dict)
    model: str = ""
    usage: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self, test_sets: Sequence[TestSet]) -> dict[str, Any]:
        """For the results: the scores by the released rule, the kinds of answers, tokens and cost."""
        return {
            "model": self.model,
            "prompt": PROMPT_VERSION,
            "usage": dict(self.usage),
            "sets": {
                test_set.name: {
                    "answers": dict(sorted(self.answers[test_set.name].items())),
                    "released_rule": _by_released_rule(test_set, self.rankings[test_set.name]),
                }
                for test_set in test_sets
            },
        }


def chat_section(chat: Mapping[str, Any]) -> Section:
    """The report's part on the arm, of `ChatArm.as_dict`: how its answers were read, and what they took."""
    usage, cached = chat["usage"], chat["usage"]["cached"]
    rows = [
        (
            name,
            ", ".join(f"{count:,} {kind.replace('_', ' ')}" for kind, count in counts["answers"].items()),
            f"{counts['released_rule']['hit_rate']:.3f}",
            f"{counts['released_rule']['valid_ratio']:.3f}",
        )
        for name, counts in chat["sets"].items()
    ]
    usage_text = (
        f"{usage['requests']:,} answers took {usage['prompt_tokens']:,} + {usage['completion_tokens']:,} tokens"
    )
    cost = "" if usage["cost"] is None else f", cost {usage['cost']:.4g}"
    return Section(
        title="Chat model",
        lead=f"{chat['model']} was asked for one ID. {usage_text}{cost}; {cached['requests']:,} were kept from before.",
        blocks=(
            Table(
                columns=("Test set", "Answers", "HitRatio@1, released rule", "ValidRatio, released rule"),
                rows=tuple(rows),
                hints={"Answers": "an answer that names several IDs, or none, is a miss"},
            ),
        ),
    )


def run_chat(
    test_sets: Sequence[TestSet],
    chosen: ChatSettings,
    endpoint: Endpoint,
    title: Callable[[str], str],
    photo: Callable[[str], bytes | None],
) -> ChatArm:
    """Asks the model about every list that has candidates.

    Args:
        title: Item -> its title or other text, empty where it has none.
        photo: Item -> its encoded photo; asked only with `chosen.photos`.

    Raises:
        ConfigError: Key, address or model are wrong.
        EndpointError: The servers do not answer, or refuse every question.
    """
    arm = ChatArm()
    for test_set in test_sets:
        pairs = list(zip(test_set.conversations, test_set.lists, strict=True))
        nonempty = [(conversation, candidates) for conversation, candidates in pairs if candidates]
        answers = endpoint.chat(_questions(nonempty, chosen, title, photo))
        rankings: list[RankedList | None] = []
        counts: Counter[str] = Counter()
        fault = None
        for _, candidates in pairs:
            if not candidates:
                rankings.append(RankedList(ids=()))
                counts["empty_list"] += 1
                continue
            answer = next(answers)
            ranking, kind = _ranking(answer, candidates)
            rankings.append(ranking)
            counts[kind] += 1
            fault = fault or answer.fault
        if fault is not None and counts["failed"] == len(nonempty):
            raise EndpointError(f"--chat.model {chosen.model}: none of {len(nonempty):,} questions: {fault.message}")
        arm.rankings[test_set.name], arm.answers[test_set.name] = rankings, counts
    arm.model, arm.usage = chosen.model, endpoint.usage.as_dict()
    return arm


def chat_question(
    conversation: Conversation,
    candidates: Sequence[str],
    title: Callable[[str], str],
    photo: Callable[[str], bytes | None] | None = None,
    *,
    max_characters: int = 20_000,
) -> list[str | Photo]:
    """The message of one list: the conversation, then each candidate's ID and title, and its photo if there is one."""
    parts: list[str | Photo] = [f"Conversation:\n{_turns(conversation, max_characters)}\n\nProducts:\n"]
    for item in candidates:
        item_title = " ".join(title(item).split())[:_MAX_TITLE] or "(no title)"
        parts.append(f"{item}: {item_title}\n")
        if photo is not None and (data := photo(item)) is not None:
            parts.append(Photo(data))
    return [*parts, _ASKED]


def parse_answer(text: str, candidates: Collection[str]) -> tuple[tuple[str, ...], str]:
    """The item that an answer names, and the kind of the answer.

    The released rule takes the first word that has the shape of an ID. Here an answer is one ID: a text that names
    several different ones, as one that repeats the list does, has not answered. Letters of an ID may be in lower case.

    Returns:
        ids: The ID in a tuple, empty for none.
        kind: `listed` (one candidate), `unlisted` (one ID that is not in the list), `several`, `no_id`, or `empty`.
    """
    if not text.strip():
        return (), "empty"
    named = mentions(text, [*candidates, *unlisted(text, candidates)], any_case=True)
    ids = tuple(dict.fromkeys(mention.item for mention in named))
    if len(ids) == 1:
        return ids, "listed" if ids[0] in candidates else "unlisted"
    return (), "several" if ids else "no_id"


def _questions(
    pairs: Sequence[tuple[Conversation, Sequence[str]]],
    chosen: ChatSettings,
    title: Callable[[str], str],
    photo: Callable[[str], bytes | None],
) -> Iterator[ChatRequest]:
    for conversation, candidates in pairs:
        yield ChatRequest(
            parts=chat_question(
                conversation,
                candidates,
                title,
                photo if chosen.photos else None,
                max_characters=chosen.max_characters,
            ),
            system=_SYSTEM,
            max_tokens=chosen.max_tokens,
            temperature=chosen.temperature,
        )


def _ranking(answer: ChatAnswer, candidates: Sequence[str]) -> tuple[RankedList | None, str]:
    if answer.fault is not None:
        return None, "failed"
    ids, kind = parse_answer(answer.text, candidates)
    if answer.refusal or answer.finish_reason == "content_filter":
        kind = "refused"
    elif not ids and answer.finish_reason == "length":
        kind = "cut"
    return RankedList(ids=ids, text=answer.text, answer=released_answer(answer.text, candidates)), kind


def _turns(conversation: Conversation, max_characters: int) -> str:
    """The turns, without the oldest ones where they are too long; of a longer last turn its beginning."""
    kept: list[str] = []
    remaining = max_characters
    for turn in reversed(conversation.turns):
        lines = turn.text.strip().splitlines()
        text = f"{_ROLES[turn.role]}: " + "\n  ".join(lines)  # indented: no line of a turn looks like one of the list
        if kept and len(text) > remaining:
            break
        kept.append(text[:remaining])
        remaining -= len(text)
    return "\n".join(reversed(kept))


def _by_released_rule(test_set: TestSet, rankings: Sequence[RankedList | None]) -> Mapping[str, float | None]:
    """The scores of the IDs that the released scripts would have read; None for one that counts no conversation."""
    read = [None if row is None else RankedList(ids=(row.answer,) if row.answer else ()) for row in rankings]
    metrics = compute_metrics(judge(test_set.predictions(read)))
    return {name: metrics[name].value if metrics[name].denominator.any() else None for name in _REPORTED}
