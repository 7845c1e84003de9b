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

from lavic.config import parse, settings
from lavic.data.conversations import parse_conversations
from lavic.data.records import Conversation, Turn, turns_of
from lavic.errors import ConfigError, DataError
from lavic.model.settings import BaseModelSettings
from lavic.storage.text_files import TextFileError, read_text, text_of
from lavic.world import World

if TYPE_CHECKING:
    from lavic.recommend.rank import Ranker, Ranking

DESCRIPTION = """Rank candidates for a conversation: each with its title and the probability that the model answers
with it. The photos are the item store's ready tokens; no photo and no vision tower is loaded.

  lavic recommend --bundle runs/tune/bundle --store store --conversation talk.txt --candidates B07GL3RKRN B09B161799
  lavic recommend --bundle runs/tune/bundle --store store --conversation test.jsonl --json > ranked.jsonl
  lavic recommend --bundle runs/tune/bundle --store store --candidates-file ids.txt

The last one, in a terminal, asks what you are looking for."""

NAME_THEM = "name the items to choose from: --candidates ID ..., or --candidates-file FILE"

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
    """A file, or - for standard input: plain text (one request; `<submission>` and `<comment>` tags are understood), or
    jsonl in the released form (every row is ranked). Without it, what is typed or piped in."""
    candidates: tuple[str, ...] = ()
    """Item ids to rank."""
    candidates_file: Path | None = None
    """A file of item ids to rank, one per line."""
    key: str = "candidates_st"
    """Which list of a jsonl row is ranked, where no candidates are named."""
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
    named = _named_candidates(chosen)
    typed = chosen.conversation is None and sys.stdin.isatty()
    asked = [] if typed else _read(chosen.conversation or "-", named, chosen.key)
    if typed and not named:
        raise ConfigError(NAME_THEM)
    ranker = _load(chosen)
    unknown = [item for item in named if item not in ranker.store]
    if unknown:
        raise DataError(f"--candidates: {unknown[0]} is not in the item store {chosen.store}: embed its photo first")
    if typed:
        for conversation in _typed(named, chosen.key):
            _answer(chosen, ranker, [conversation])
        return 0
    _answer(chosen, ranker, asked)
    return 0


def _load(chosen: RecommendSettings) -> Ranker:
    from lavic.model.bundle import Bundle, BundleInfo
    from lavic.model.itemstore import ItemStore
    from lavic.recommend.rank import Ranker

    info, store = BundleInfo.read(chosen.bundle), ItemStore.open(chosen.store)
    info.check_store(store)
    if info.language_adapter is None:
        raise ConfigError(f"--bundle {chosen.bundle}: of stage 1, it cannot recommend yet: run `lavic tune` first")
    bundle = Bundle.load(chosen.bundle, World.from_env().device(), dtype=chosen.dtype, base=chosen.model.name)
    return Ranker(bundle, store, tokens_per_item=chosen.tokens_per_item)


def _answer(chosen: RecommendSettings, ranker: Ranker, asked: Sequence[Conversation]) -> None:
    from lavic.recommend.rank import Request

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
    lines = []
    width = max((len(item) for item in ranking.ids), default=0)
    for rank, (item, p) in enumerate(list(zip(ranking.ids, ranking.probabilities, strict=True))[:top], 1):
        bar = f"{'█' * round(p * BAR):<{BAR}}  " if sys.stdout.isatty() else ""
        mark = "  <- right" if item in conversation.targets else ""
        lines.append(f"{rank:>3}  {p:>6.1%}  {bar}{item:<{width}}  {_shorten(ranker.store.title(item))}{mark}")
    if ranking.none is not None:
        lines.append(f"     {ranking.none:>6.1%}  none of these")
    return "\n".join([*lines, ""])


def _named_candidates(chosen: RecommendSettings) -> tuple[str, ...]:
    if chosen.candidates_file is None:
        return chosen.candidates
    if chosen.candidates:
        raise ConfigError("--candidates and --candidates-file: give one of them")
    try:
        text = read_text(chosen.candidates_file)
    except TextFileError as error:
        raise DataError(f"--candidates-file {error}") from None
    named = tuple(line.strip() for line in text.split("\n") if line.strip())
    if not named:
        raise DataError(f"{chosen.candidates_file}: no item id in it; one per line is expected")
    return named


def _read(source: str, named: tuple[str, ...], key: str) -> list[Conversation]:
    """The conversations of a file or of standard input, each with the list to rank under `key`."""
    name = "standard input" if source == "-" else source
    text = text_of(sys.stdin.buffer.read(), name) if source == "-" else read_text(source)
    if not text.strip():
        raise DataError(f"{name}: empty; say what is looked for")
    if text.lstrip().startswith("{"):
        rows = parse_conversations(text.split("\n"), file=name, candidates=None if named else key)
        return [replace(row, candidates={key: named}) if named else row for row in rows]
    if not named:
        raise ConfigError(NAME_THEM)
    return [Conversation(id=Path(name).stem, turns=turns_of(text), candidates={key: named}, file=name)]


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
