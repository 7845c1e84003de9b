"""`lavic recommend`: the products that fit a conversation, with titles and probabilities."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import PositiveFloat, PositiveInt

from lavic.config import parse, settings
from lavic.data.schema import Conversation, Turn
from lavic.errors import ConfigError, DataError
from lavic.launch.conversation_input import NO_CANDIDATES, read_candidates, read_conversation
from lavic.model.config import BaseModelSettings
from lavic.recommend.recommendation import Recommendation, not_in_store

if TYPE_CHECKING:
    from lavic.model.item_store import ItemStore
    from lavic.recommend.recommender import Recommender

DESCRIPTION = """Rank candidates for a conversation by the probability that the model answers with them. The candidates
are given, or searched for in the whole catalogue with a retrieval index. Photos are read as the item tokens of the
store: neither photos nor the vision tower are loaded.

  lavic recommend --bundle runs/tune/bundle --store store --index index --conversation "a black lamp"
  lavic recommend --bundle runs/tune/bundle --store store --conversation talk.txt --candidates B07GL3RKRN B09B161799
  lavic recommend --bundle runs/tune/bundle --store store --conversation "a black lamp" --candidates-file ids.txt
  lavic recommend --bundle runs/tune/bundle --store store --conversation test.jsonl --json > ranked.jsonl
  lavic recommend --bundle runs/tune/bundle --store store --candidates-file ids.txt

Without --conversation, in a terminal, the command asks for one."""

BAR_WIDTH = 24
"""Characters of the bar of probability 1."""

SHOWN = 10
"""Items shown of those that were searched for."""

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Characters that a terminal obeys, or that reverse the text behind them."""


@settings
class RecommendSettings:
    """Rank candidates for conversations."""

    bundle: Path
    """The bundle that `lavic tune` made: RUN/bundle."""
    store: Path
    """The item store that it was tuned on, from `lavic embed`."""
    index: Path | None = None
    """The retrieval index of the catalogue, from `lavic retrieve`: where no candidates are given, they are searched for
    in it, also for the rows of a jsonl file."""
    retrieved: PositiveInt = 50
    """Number of candidates to search for."""
    methods: tuple[str, ...] = ()
    """Methods of --index to search by. Default: all that take text."""
    weights: tuple[PositiveFloat, ...] = ()
    """Weight of each method's ranks in the fusion, in the order of `methods`; by default all count the same."""
    conversation: str | None = None
    """A file, - for standard input, or text ("a black lamp"). A file holds plain text (one conversation, with optional
    `<submission>` and `<comment>` tags) or jsonl in the LaViC format (every row is ranked). Default: standard input,
    or a prompt in a terminal."""
    candidates: tuple[str, ...] = ()
    """Item ids to rank, separated by blanks or commas."""
    candidates_file: Path | None = None
    """A file of item ids to rank, separated by line ends, blanks or commas."""
    key: str = "candidates_st"
    """Key of the candidate list of a jsonl row, if neither candidates nor an index are given."""
    missing: Literal["refuse", "drop"] = "refuse"
    """A candidate that is not in the store is an error, or is dropped from its list and counted."""
    top: PositiveInt | None = None
    """Print only the best candidates, at most this many. Default: 10 of those that were searched for, all that were
    given."""
    json: bool = False
    """One JSON object per conversation instead of a table."""
    tokens_per_item: PositiveInt | None = None
    """Number of item tokens per candidate, the first ones; by default as in tuning."""
    model: BaseModelSettings = BaseModelSettings()
    """The base model of --bundle."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the weights. `auto`: bfloat16 on a GPU, float32 on a CPU."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    chosen = parse(RecommendSettings, argv, command="recommend", description=DESCRIPTION)
    candidates = read_candidates(chosen.candidates, chosen.candidates_file)
    searched = chosen.index is not None and not candidates
    interactive = chosen.conversation is None and sys.stdin.isatty()
    lists = {chosen.key: candidates}
    if interactive:
        if not candidates and not searched:
            raise ConfigError(NO_CANDIDATES)
        conversations = [Conversation(id="typed", turns=(), candidates=lists)]
    else:
        source = "-" if chosen.conversation is None else chosen.conversation
        conversations = read_conversation(source, candidates, chosen.key, candidates_needed=not searched)
    store = _open_store(chosen)
    if not searched:
        conversations = _check_candidates(conversations, chosen, store)
        lists = conversations[0].candidates
    recommender = _load(chosen)
    if interactive:
        for conversation in _prompt(lists):
            _print_answers(chosen, recommender, [conversation], searched)
    else:
        _print_answers(chosen, recommender, conversations, searched)
    return 0


def _check_candidates(
    conversations: Sequence[Conversation], chosen: RecommendSettings, store: ItemStore
) -> list[Conversation]:
    """The conversations without the candidates that are not in the store.

    Raises:
        DataError: A candidate is not in the store and `--missing` is refuse, or no candidate is left.
    """
    source = "--candidates-file" if chosen.candidates_file else "--candidates" if chosen.candidates else ""
    checked = []
    for conversation in conversations:
        ids = conversation.candidates[chosen.key]
        known = tuple(item for item in ids if item in store)
        if len(known) < len(ids):
            location = source or f"{conversation.place}: {chosen.key}"
            if chosen.missing == "refuse":
                missing = [item for item in ids if item not in store]
                name, remedy = f"the item store {store.folder}", "drop such items with --missing drop"
                raise DataError(f"{location}: {not_in_store(missing, store, name=name, remedy=remedy)}")
            print(f"{location}: {len(ids) - len(known)} of {len(ids)} items are not in the store", file=sys.stderr)
        elif not ids:
            print(f"{conversation.place}: the list {chosen.key} is empty", file=sys.stderr)
        checked.append(replace(conversation, candidates={chosen.key: known}))
    if not any(conversation.candidates[chosen.key] for conversation in checked):
        raise DataError(f"{source or conversations[0].file}: no candidate is left to rank; {NO_CANDIDATES}")
    return checked


def _open_store(chosen: RecommendSettings) -> ItemStore:
    """The item store, checked against the bundle; loads no model."""
    from lavic.model.bundle import BundleInfo
    from lavic.model.item_store import ItemStore

    info, store = BundleInfo.read(chosen.bundle), ItemStore.open(chosen.store)
    info.check_store(store)
    if info.language_adapter is None:
        raise ConfigError(f"--bundle {chosen.bundle}: a stage-1 bundle cannot recommend: run `lavic tune` first")
    return store


def _load(chosen: RecommendSettings) -> Recommender:
    from lavic.recommend.recommender import Recommender

    return Recommender.load(
        chosen.bundle,
        chosen.store,
        chosen.index,
        dtype=chosen.dtype,
        base=chosen.model.name,
        tokens_per_item=chosen.tokens_per_item,
        retrieved=chosen.retrieved,
        methods=chosen.methods,
        weights=chosen.weights,
    )


def _print_answers(
    chosen: RecommendSettings, recommender: Recommender, conversations: Sequence[Conversation], searched: bool
) -> None:
    """Answers the conversations and prints a JSON row or a table for each."""
    from lavic.recommend.recommendation import Query, Recommendation

    candidate_lists = [None if searched else row.candidates[chosen.key] for row in conversations]
    queries = [
        Query(conversation=row, candidates=ids, k=chosen.top or (SHOWN if ids is None else len(ids)))
        for row, ids in zip(conversations, candidate_lists, strict=True)
        if ids is None or ids
    ]
    answers = iter(recommender.recommend_batch(queries))
    for conversation, ids in zip(conversations, candidate_lists, strict=True):
        empty = Recommendation(items=(), candidates=0)
        answer = next(answers) if ids is None or ids else empty
        if chosen.json:
            print(json.dumps(_as_json(conversation, answer), ensure_ascii=False))
        else:
            if len(conversations) > 1:
                print(f"{conversation.id}: {_shorten(conversation.turns[0].text if conversation.turns else '')}")
            print(_table(conversation, answer))


def _as_json(conversation: Conversation, answer: Recommendation) -> dict[str, Any]:
    return {
        "id": conversation.id,
        **({} if answer.none is None else {"none": answer.none}),
        "ranking": [asdict(item) for item in answer],
    }


def _table(conversation: Conversation, answer: Recommendation) -> str:
    """A line per item, with a bar in a terminal. Known targets are marked."""
    if not answer:
        return "     no candidates\n"
    lines = []
    width = max(len(item.id) for item in answer)
    for rank, item in enumerate(answer, 1):
        bar = f"{'█' * round(item.probability * BAR_WIDTH):<{BAR_WIDTH}}  " if sys.stdout.isatty() else ""
        mark = "  <- target" if item.id in conversation.targets else ""
        id = _CONTROL.sub("\ufffd", item.id)
        lines.append(f"{rank:>3}  {item.probability:>6.1%}  {bar}{id:<{width}}  {_shorten(item.title)}{mark}")
    if answer.none is not None:
        lines.append(f"     {answer.none:>6.1%}  none of these")
    return "\n".join([*lines, ""])


def _prompt(lists: dict[str, tuple[str, ...]]) -> Iterator[Conversation]:
    """Reads a conversation line by line and yields it after each line; an empty line starts a new one."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (line editing and history for `input`)
    print("What are you looking for? Each line continues the conversation, an empty line starts over, Ctrl-D ends.")
    turns: list[Turn] = []
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        if not line:
            turns = []
            continue
        turns.append(Turn("comment" if turns else "seeker", line))
        yield Conversation(id="typed", turns=tuple(turns), candidates=lists, file="typed")


def _shorten(text: str, width: int = 72) -> str:
    line = _CONTROL.sub("\ufffd", " ".join(text.split()))  # words from data, on a terminal
    return line if len(line) <= width else f"{line[: width - 3]}..."
