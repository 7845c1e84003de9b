"""`lavic describe` with the packaged model: a sidecar per shard, stop and resume, which descriptions are refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from lavic.cli import main
from lavic.data.descriptions import descriptions_path, read_descriptions, write_descriptions
from lavic.data.shard_dataset import ShardDataset
from lavic.data.tar_shards import Sample
from lavic.mini.drawing import COLOURS, PATTERNS
from lavic.model import prompts
from lavic.model.config import ModelSettings
from lavic.model.hub import fingerprint, resolve
from tests.crawled_sets import write_set
from tests.shards.drawn_sets import photo, read_rows, shard_paths

pytestmark = pytest.mark.slow


def test_describe_stops_on_sigusr1_and_resumes(shards: Path, sigusr1_after: Callable[[str], None]) -> None:
    argv = ["describe", "--config", "describe-mini", "--shards", str(shards), "--batch-size", "4"]

    def written() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in shards.glob("*.descriptions.jsonl")}

    assert main(argv) == 0
    uninterrupted = written()
    for name in uninterrupted:
        (shards / name).unlink()
    sigusr1_after("lavic.shards.teacher.local_teacher.describe")
    assert main(argv) == 75
    assert not written()
    sigusr1_after("lavic.shards.teacher.shard_work.write_descriptions")
    assert main(argv) == 75
    assert len(written()) == 1
    assert main(argv) == 0
    assert written() == uninterrupted


def test_flagged_descriptions_are_sampled_once_more(
    small_set: Path, capsys: pytest.CaptureFixture[str], sigusr1_after: Callable[[str], None]
) -> None:
    """The miniature has never seen sentences as titles: it repeats itself on them."""
    titles = ["The photo shows a red plain lamp.", "The photo shows a blue striped shoe."]
    titles += ["The photo shows a green dotted shoe.", "The photo shows a yellow checked hat."]
    titled = [
        Sample.of(item_id=s.item_id, n=9, jpg=s.jpg, title=title, width=96, height=96)
        for title, s in zip(titles, (photo(n) for n in range(4)), strict=True)
    ]
    folder = small_set.parent / "titled"
    write_set(folder, titled)
    argv = ["describe", "--config", "describe-mini", "--shards", str(folder), "--batch-size", "2"]
    capsys.readouterr()
    assert main(argv) == 0
    (shard,) = shard_paths(folder)
    uninterrupted = descriptions_path(shard).read_bytes()
    rows = read_rows(shard)
    out = capsys.readouterr().out
    repeated = re.search(r"Written twice +(\d+)", out)
    assert repeated and int(repeated[1]) >= max(1, sum(row["flag"] != "" for row in rows))
    assert all((row["text"] == "") == (row["flag"] != "") for row in rows)
    descriptions_path(shard).unlink()
    sigusr1_after("lavic.shards.teacher.local_teacher.describe")
    assert main(argv) == 75
    assert main(argv) == 0
    assert descriptions_path(shard).read_bytes() == uninterrupted, "draws do not depend on interruptions"
    descriptions_path(shard).unlink()
    assert main([*argv, "--temperature", "3", "--seed", "5"]) == 0
    sampled = descriptions_path(shard).read_bytes()
    descriptions_path(shard).unlink()
    assert main([*argv, "--temperature", "3", "--seed", "5"]) == 0
    assert descriptions_path(shard).read_bytes() == sampled != uninterrupted


def test_prompt_file_replaces_the_prompt(small_set: Path, tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text("What colour is {title}?")
    argv = ["describe", "--model.name", "mini", "--shards", str(small_set), "--max-new-tokens", "4"]
    assert main([*argv, "--prompt-file", str(tmp_path / "q.txt")]) == 0
    (shard,) = shard_paths(small_set)
    assert all(row["prompt"].startswith("question-") for row in read_rows(shard))
    assert main(argv) == 2, "the texts have another prompt"


def test_descriptions_by_other_weights_are_refused(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A base that was trained again in its folder keeps its name, but its old texts must not be trained on."""
    argv = ["describe", "--config", "describe-mini", "--shards", str(shards), "--batch-size", "4"]
    assert main(argv) == 0
    (sidecar, *_) = sorted(shards.glob("*.descriptions.jsonl"))
    rows = [json.loads(line) for line in sidecar.read_text().splitlines()]
    sidecar.write_text("".join(json.dumps({**row, "weights": "0" * 16}) + "\n" for row in rows))
    capsys.readouterr()
    assert main(argv) == 2
    assert f"{sidecar}: by mini with the weights {'0' * 16}, not " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--model.views", "lavic"], "--model.views five, not lavic"),
        (["--model.prompt", "lavic"], "prompt version "),
        (["--model.dtype", "bfloat16"], "--model.dtype float32, not bfloat16"),
        (["--max-new-tokens", "9"], "--max-new-tokens 64, not 9"),
    ],
)
def test_descriptions_made_with_other_settings_are_refused(
    small_set: Path, capsys: pytest.CaptureFixture[str], change: list[str], message: str
) -> None:
    argv = ["describe", "--model.name", "mini", "--shards", str(small_set), "--max-new-tokens", "64"]
    (shard,) = shard_paths(small_set)
    recorded = {"model": "mini", "weights": fingerprint(resolve(ModelSettings(name="mini"))), "views": "five"}
    recorded |= {"prompt": prompts.VERSION, "dtype": "float32", "max_new_tokens": "64"}
    write_descriptions(shard, [{"key": key, "text": "A red mug.", **recorded} for key in ShardDataset(small_set).keys])
    assert main(argv) == 0, "nothing to do"
    assert main([*argv, *change]) == 2
    assert message in capsys.readouterr().err
    old = [{k: v for k, v in row.items() if k not in ("dtype", "max_new_tokens")} for row in read_rows(shard)]
    descriptions_path(shard).write_text("".join(json.dumps(row) + "\n" for row in old))
    assert main([*argv, "--model.dtype", "bfloat16"]) == 0, "an older version did not record it"


def test_catalogue_texts_are_refused_without_keep_catalogue(small_set: Path, capsys) -> None:
    (shard,) = shard_paths(small_set)
    row = {"text": "A mug.", "model": "catalogue", "weights": "", "prompt": prompts.VERSION, "views": "five"}
    write_descriptions(shard, [{"key": key, **row} for key in ShardDataset(small_set).keys])
    argv = ["describe", "--model.name", "mini", "--shards", str(small_set)]
    assert main([*argv, "--keep", "catalogue"]) == 0
    assert main(argv) == 2
    assert "has texts of the catalogue; use --keep catalogue" in capsys.readouterr().err


def test_describe_writes_a_sidecar_per_shard_and_skips_existing_ones(shards: Path) -> None:
    argv = ["describe", "--config", "describe-mini", "--shards", str(shards)]
    assert main(argv) == 0
    data = ShardDataset(shards)
    paths = shard_paths(shards)
    texts = {key: text for path in paths for key, text in read_descriptions(path).items()}
    assert set(texts) == set(data.keys)
    right = 0
    for n in range(30):
        words_seen = texts[f"B0MN{n:06d}_0"].rstrip(".").split()
        right += list(COLOURS)[n % 10] in words_seen and PATTERNS[n % 4] in words_seen
    assert right >= 24
    stamps = [descriptions_path(path).stat().st_mtime_ns for path in paths]
    descriptions_path(paths[1]).unlink()
    assert main(argv) == 0
    after = [descriptions_path(path).stat().st_mtime_ns for path in paths]
    assert [a == b for a, b in zip(stamps, after, strict=True)] == [True, False, True, True]
