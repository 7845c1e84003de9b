"""The rankings of other systems, from their files: TREC runs, and answers in the LaViC format."""

from __future__ import annotations

import io
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavic.data.schema import conversation_from_row
from lavic.data.sources.json_records import json_records
from lavic.errors import ConfigError, DataError
from lavic.evaluation.test_set import TestSet
from lavic.metrics.trec_files import read_run
from lavic.recommend.ranking.answer_ids import released_answer
from lavic.recommend.ranking.ranked_list import RankedList
from lavic.storage.text_files import TextFile, read_text

RECOMMENDED, RESPONSE = "recommended", "response"
"""Beginnings of the released keys: the item that was recommended, and the generated text."""


def read_other_run(file: Path, test_set: TestSet, key: str | None = None) -> list[RankedList | None]:
    """A system's ranking of each conversation, None where its file has none.

    Args:
        file: A TREC run, whose queries are conversations by id (`test-0`) or by number of their row (`0`); or rows of
            the LaViC format with `recommended_*` (an id, a list of ids, or nothing) or `response_*` (a text, of
            which the released rule reads the id).
        test_set: The conversations.
        key: The key to read, where rows in the LaViC format have several.

    Raises:
        ConfigError: `key` is needed, or is not there.
        DataError: The file cannot be read, or is of other conversations.
    """
    text = read_text(file)
    if text.lstrip()[:1] in ("{", "["):
        return _released(file, text, test_set, key)
    if key is not None:
        raise ConfigError(f"{file}@{key}: a TREC run has no keys: leave @{key} out")
    return _trec(file, test_set)


def _trec(file: Path, test_set: TestSet) -> list[RankedList | None]:
    run = read_run(file)
    names = [(conversation.id, str(conversation.row)) for conversation in test_set.conversations]
    total = len(test_set) + len(test_set.other_ids)
    known = {conversation.id for conversation in test_set.conversations} | test_set.other_ids
    known |= {str(row) for row in range(total)}
    if unknown := [query for query in run if query not in known]:
        raise DataError(
            f"{file}: the query {unknown[0]}{_more(unknown)} is no conversation of {test_set.file}: queries are ids "
            f"such as {names[0][0]}, or numbers of rows from 0"
        )
    rankings: list[RankedList | None] = []
    for id, row in names:
        if id in run and row in run:
            raise DataError(f"{file}: the queries {id} and {row} are one conversation: leave one of them out")
        ranked = run.get(id, run.get(row))
        if ranked is None:
            rankings.append(None)
            continue
        rankings.append(RankedList(ids=tuple(item for item, _ in ranked), scores=tuple(score for _, score in ranked)))
    return rankings


def _released(file: Path, text: str, test_set: TestSet, key: str | None) -> list[RankedList | None]:
    source = TextFile(io.BytesIO(text.encode("utf-8", "surrogatepass")), str(file))
    records = list(json_records(str(file), source, None, is_json=file.suffix == ".json", keyed=False))
    rows: list[dict[str, Any]] = []
    for record in records:
        if not isinstance(record.value, dict):
            raise DataError(f"{file}:{record.line}: not an object with one conversation's answer")
        rows.append(record.value)
    recommended, response = _keys(file, rows, key)
    answers = [
        _answer(file, record.line, row, recommended, response) for record, row in zip(records, rows, strict=True)
    ]
    if not all("context" in row and "gt_items" in row for row in rows):
        return _in_order(file, answers, test_set)
    # By content: a file may lack conversations. Conversations of equal content are taken in their order.
    rows_by_content: dict[str, list[int]] = defaultdict(list)
    for number, conversation in reversed(list(enumerate(test_set.conversations))):
        rows_by_content[_content(conversation.turns, conversation.targets)].append(number)
    rankings: list[RankedList | None] = [None] * len(test_set)
    unknown = []
    for record, row, answer in zip(records, rows, answers, strict=True):
        try:
            conversation = conversation_from_row(row, id="", index=0, file=str(file), line=record.line)
        except ValueError as error:
            raise DataError(f"{file}:{record.line}: {error}") from None
        if numbers := rows_by_content[_content(conversation.turns, conversation.targets)]:
            number = numbers.pop()
            rankings[number] = _ranking(answer, test_set.lists[number])
        elif conversation.targets:
            unknown.append(record.line)
    if len(unknown) == len(rows):
        raise DataError(f"{file}: none of its {len(rows):,} rows is a conversation of {test_set.file}")
    if unknown and not test_set.other_ids:
        raise DataError(f"{file}:{unknown[0]}: this row{_more(unknown)} is no conversation of {test_set.file}")
    return rankings


def _in_order(file: Path, answers: Sequence[_Answer | None], test_set: TestSet) -> list[RankedList | None]:
    """Answers without their conversations, which must be those of the test file, row by row."""
    total = len(test_set) + len(test_set.other_ids)
    if len(answers) != total:
        raise DataError(
            f"{file}: {len(answers):,} rows without `context` and `gt_items` for the {total:,} conversations of "
            f"{test_set.file}: add these keys, so that an answer's conversation is known"
        )
    return [
        _ranking(answers[conversation.row], candidates)
        for conversation, candidates in zip(test_set.conversations, test_set.lists, strict=True)
    ]


def _keys(file: Path, rows: Sequence[Mapping[str, Any]], key: str | None) -> tuple[str | None, str | None]:
    """The keys of the recommended item and of the text."""
    present = dict.fromkeys(name for row in rows for name in row if name.startswith((RECOMMENDED, RESPONSE)))
    if key is not None:
        suffix = key.removeprefix(RECOMMENDED).removeprefix(RESPONSE)
        chosen = [name for name in present if name in (key, f"{RECOMMENDED}{suffix}", f"{RESPONSE}{suffix}")]
        if key not in present:
            raise ConfigError(f"{file}@{key}: no row has this key; there are: {', '.join(present) or 'none'}")
    else:
        chosen = list(present)
    recommended = [name for name in chosen if name.startswith(RECOMMENDED)]
    response = [name for name in chosen if name.startswith(RESPONSE)]
    if not chosen:
        raise DataError(f"{file}: neither a TREC run nor rows with `recommended_*` or `response_*`")
    if len(recommended) > 1 or len(response) > 1:
        raise ConfigError(f"{file}: rows have {', '.join(chosen)}: choose one with FILE@KEY")
    return next(iter(recommended), None), next(iter(response), None)


@dataclass(frozen=True, kw_only=True)
class _Answer:
    text: str | None
    ids: tuple[str, ...] | None
    """The recommended items; None where the row has a text alone."""


def _answer(
    file: Path, line: int, row: Mapping[str, Any], recommended: str | None, response: str | None
) -> _Answer | None:
    """One row's answer; None where it has neither of the keys."""
    if not any(name in row for name in (recommended, response) if name):
        return None
    text = row.get(response) if response else None
    if text is not None and not isinstance(text, str):
        raise DataError(f"{file}:{line}: `{response}` is not a text")
    if recommended is None:
        return _Answer(text=text, ids=None)
    value = row.get(recommended)
    items = value if isinstance(value, list) else [value]
    if not all(item is None or isinstance(item, str) for item in items):
        raise DataError(f"{file}:{line}: `{recommended}` is not an item id or a list of them")
    return _Answer(text=text, ids=tuple(dict.fromkeys(item.strip() for item in items if item and item.strip())))


def _ranking(answer: _Answer | None, candidates: Sequence[str]) -> RankedList | None:
    """An answer to a list; of a text alone the id that the released rule reads from it."""
    if answer is None:
        return None
    ids = answer.ids
    if ids is None:
        read = released_answer(answer.text or "", candidates)
        ids = (read,) if read else ()
    text = " ".join(ids) if answer.text is None else answer.text
    return RankedList(ids=ids, text=text, answer=next(iter(ids), None))


def _content(turns: Sequence[Any], targets: Sequence[str]) -> str:
    return json.dumps([[turn.text for turn in turns], list(targets)])


def _more(values: Sequence[object]) -> str:
    return f" and {len(values) - 1:,} more" if len(values) > 1 else ""
