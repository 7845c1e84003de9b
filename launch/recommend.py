"""`lavic recommend`: a conversation in, the candidates out, best first, each with its title and probability."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import PositiveInt

from lavic.config.loader import parse, settings
from lavic.data.schema import Conversation, Turn
from lavic.distributed.context import World
from lavic.errors import ConfigError, DataError
from lavic.launch.conversation_input import NAME_THEM, read_candidates, read_conversation
from lavic.model.config import BaseModelSettings

if TYPE_CHECKING:
    from lavic.model.item_store import ItemStore
    from lavic.recommend.ranker import Ranker, Ranking

DESCRIPTION = """Rank candidates for a conversation: each with its title and the probability that the model answers
with it. The photos are the item store's ready tokens; no photo and no vision tower is loaded.

  lavic recommend --bundle runs/tune/bundle --store store --conversation talk.txt --candidates B07GL3RKRN B09B161799
  lavic recommend --bundle runs/tune/bundle --store store --conversation "a black lamp" --candidates-file ids.txt
  lavic recommend --bundle runs/tune/bundle --store store --conversation test.jsonl --json > ranked.jsonl
  lavic recommend --bundle runs/tune/bundle --store store --candidates-file ids.txt

The last one, in a terminal, asks what you are looking for."""

BAR = 24
"""Characters of a probability of 1 in a terminal."""


@settings
class RecommendSettings:
    """Rank candidates for conversations."""

    bundle: Path
    """The bundle that `lavic tune` made: RUN/bundle."""
    store: Path
    """The item store that it was tuned on, from `lavic embed`."""
    conversation: str | None = None
    """A file, - for standard input, or the words themselves ("a black lamp"). A file holds plain text (one request;
    `<submission>` and `<comment>` tags are understood) or jsonl in the released form (every row is ranked). Without it,
    what is typed or piped in."""
    candidates: tuple[str, ...] = ()
    """Item ids to rank, with blanks or commas between them."""
    candidates_file: Path | None = None
    """A file of item ids to rank, one per line."""
    key: str = "candidates_st"
    """Which list of a jsonl row is ranked, where no candidates are named."""
    missing: Literal["refuse", "drop"] = "refuse"
    """What happens to a candidate that is not in the store: an error, or it leaves its list (and is counted)."""
    top: PositiveInt | None = None
    """Print only the first so many."""
    json: bool = False
    """One JSON object per conversation instead of a table."""
    tokens_per_item: PositiveInt | None = None
    """Item tokens shown of each candidate, its first ones; by default as many as the bundle was tuned on."""
    model: BaseModelSettings = BaseModelSettings()
    """The base model of --bundle."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the weights. `auto`: bfloat16 on a GPU, float32 on a CPU."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    chosen = parse(RecommendSettings, argv, command="recommend", description=DESCRIPTION)
    named = read_candidates(chosen.candidates, chosen.candidates_file)
    typed = chosen.conversation is None and sys.stdin.isatty()
    source = "-" if chosen.conversation is None else chosen.conversation
    asked = [] if typed else read_conversation(source, named, chosen.key)
    if typed and not named:
        raise ConfigError(NAME_THEM)
    store = _open_store(chosen)
    if typed:
        asked = [Conversation(id="typed", turns=(), candidates={chosen.key: named})]
    asked = _stored(asked, chosen, store)
    ranker = _load(chosen, store)
    if not typed:
        _answer(chosen, ranker, asked)
        return 0
    for conversation in _typed(asked[0].candidates[chosen.key], chosen.key):
        _answer(chosen, ranker, [conversation])
    return 0


def _stored(asked: Sequence[Conversation], chosen: RecommendSettings, store: ItemStore) -> list[Conversation]:
    """The conversations with lists of items that the store holds.

    Raises:
        DataError: An item is not in the store and `--missing` refuses that, or no list holds an item.
    """
    source = "--candidates-file" if chosen.candidates_file else "--candidates" if chosen.candidates else ""
    kept = []
    for conversation in asked:
        listed = conversation.candidates[chosen.key]
        known = tuple(item for item in listed if item in store)
        if len(known) < len(listed):
            place = source or f"{conversation.place}: {chosen.key}"
            if chosen.missing == "refuse":
                raise DataError(_not_stored(place, [item for item in listed if item not in store], store))
            print(f"{place}: {len(listed) - len(known)} of {len(listed)} items are not in the store", file=sys.stderr)
        elif not listed:
            print(f"{conversation.place}: the list {chosen.key} is empty", file=sys.stderr)
        kept.append(replace(conversation, candidates={chosen.key: known}))
    if not any(conversation.candidates[chosen.key] for conversation in kept):
        raise DataError(f"{source or asked[0].file}: no candidate is left to rank; {NAME_THEM}")
    return kept


def _not_stored(place: str, missing: Sequence[str], store: ItemStore) -> str:
    """What to do about items that are not in the store."""
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    if missing[0].upper() in store:
        hint = f"did you mean {missing[0].upper()}?"
    else:
        hint = "embed its photo first, or leave such items out with --missing drop"
    return f"{place}: {missing[0]}{more} is not in the item store {store.folder}: {hint}"


def _open_store(chosen: RecommendSettings) -> ItemStore:
    """The item store, of the bundle's base model and adapter; the model is not loaded yet."""
    from lavic.model.bundle import BundleInfo
    from lavic.model.item_store import ItemStore

    info, store = BundleInfo.read(chosen.bundle), ItemStore.open(chosen.store)
    info.check_store(store)
    if info.language_adapter is None:
        raise ConfigError(f"--bundle {chosen.bundle}: of stage 1, it cannot recommend yet: run `lavic tune` first")
    return store


def _load(chosen: RecommendSettings, store: ItemStore) -> Ranker:
    from lavic.model.bundle import Bundle
    from lavic.recommend.ranker import Ranker

    bundle = Bundle.load(chosen.bundle, World.from_env().device(), dtype=chosen.dtype, base=chosen.model.name)
    return Ranker(bundle, store, tokens_per_item=chosen.tokens_per_item)


def _answer(chosen: RecommendSettings, ranker: Ranker, asked: Sequence[Conversation]) -> None:
    from lavic.recommend.ranker import Request

    requests = [Request(conversation=one, candidates=one.candidates[chosen.key]) for one in asked]
    for conversation, ranking in zip(asked, ranker.rank(requests), strict=True):
        if chosen.json:
            print(json.dumps(_as_json(conversation, ranking, ranker, chosen.top), ensure_ascii=False))
        else:
            if len(asked) > 1:
                print(f"{conversation.id}: {_shorten(conversation.turns[0].text if conversation.turns else '')}")
            print(_table(conversation, ranking, ranker, chosen.top))


def _as_json(conversation: Conversation, ranking: Ranking, ranker: Ranker, top: int | None) -> dict[str, Any]:
    rows = list(zip(ranking.ids, ranking.probabilities, ranking.logprobs, strict=True))[:top]
    return {
        "id": conversation.id,
        **({} if ranking.none is None else {"none": ranking.none}),
        "ranking": [
            {"id": item, "title": ranker.store.title(item), "probability": p, "logprob": logprob}
            for item, p, logprob in rows
        ],
    }


def _table(conversation: Conversation, ranking: Ranking, ranker: Ranker, top: int | None) -> str:
    """One line per candidate; in a terminal with a bar. Known targets are marked."""
    if not ranking.ids:
        return "     no candidates\n"
    lines = []
    width = max(len(item) for item in ranking.ids)
    for rank, (item, p) in enumerate(list(zip(ranking.ids, ranking.probabilities, strict=True))[:top], 1):
        bar = f"{'█' * round(p * BAR):<{BAR}}  " if sys.stdout.isatty() else ""
        mark = "  <- right" if item in conversation.targets else ""
        lines.append(f"{rank:>3}  {p:>6.1%}  {bar}{item:<{width}}  {_shorten(ranker.store.title(item))}{mark}")
    if ranking.none is not None:
        lines.append(f"     {ranking.none:>6.1%}  none of these")
    return "\n".join([*lines, ""])


def _typed(named: tuple[str, ...], key: str) -> Iterator[Conversation]:
    """What is typed, line by line; each line goes on with the conversation, an empty one begins another."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (gives `input` line editing and a history)
    print("What are you looking for? Further lines go on with the conversation, an empty one starts over; Ctrl-D ends.")
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
        yield Conversation(id="typed", turns=tuple(turns), candidates={key: named}, file="typed")


def _shorten(text: str, width: int = 72) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 3]}..."
