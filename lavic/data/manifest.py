"""The manifest of a set of shards. It is written last: a set with a manifest is complete."""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lavic.errors import DataError, first_line
from lavic.storage.atomic import atomic_write
from lavic.storage.checksummed_json import UnknownFormat, digest_json, dump_checked, load_checked
from lavic.storage.paths import as_path, file_sizes, storage_errors

FORMAT = "lavic-shards/1"
NAME = "manifest.json"
SIZES = "sizes.json"
"""Samples by shard, in the form that open_clip reads."""
CARD = "README.md"
"""The dataset card, by which `datasets.load_dataset(FOLDER)` finds the shards."""
CARD_MARK = "Written by `lavic crawl`."
EMPTY_TAR = bytes(10240)
"""A tar without members. It replaces a shard without photos, so that the names have no gap."""
_NAME = re.compile(r"[A-Za-z0-9_]+-[A-Za-z0-9_]+-(\d{6,})\.tar")


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardEntry:
    """One shard of a set."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of a set."""

    folder: Path
    set: str
    split: str
    shards: tuple[ShardEntry, ...]
    """The shards with samples, sorted by name."""
    empty: tuple[str, ...] = ()
    """Names of the tars without samples (see `EMPTY_TAR`), sorted."""
    plan: str = ""
    """Digest of the plan of the set; equal plans give equal shards."""
    outcomes: Mapping[str, int] = field(default_factory=dict)
    """Number of planned photos by outcome, including failures."""
    references: int = 0
    """Number of photos that are not stored because another has the same bytes; see `lavic.data.duplicates`."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of the packages that wrote it; not part of the digest."""

    @property
    def samples(self) -> int:
        """Number of photos in the set."""
        return sum(shard.samples for shard in self.shards)

    def path(self, shard: ShardEntry) -> Path:
        """The path of a shard's tar."""
        return self.folder / shard.name

    @property
    def digest(self) -> str:
        """Digest of the set's content: of the manifest without the versions of packages."""
        return digest_json({name: value for name, value in self._body().items() if name != "versions"})

    def save(self) -> None:
        """Writes `sizes.json`, the dataset card and, last, the manifest."""
        atomic_write(self.folder / SIZES, self.sizes_text())
        atomic_write(self.folder / CARD, card(self.set, [self]))
        atomic_write(self.folder / NAME, dump_checked(self._body(), indent=1))

    def sizes_text(self) -> str:
        """The content of `sizes.json`: every tar, including those without samples."""
        counts = {**{shard.name: shard.samples for shard in self.shards}, **dict.fromkeys(self.empty, 0)}
        return json.dumps(dict(sorted(counts.items())), indent=1) + "\n"

    def _body(self) -> dict[str, Any]:
        body = {"format": FORMAT, "samples": self.samples, **asdict(self)}
        del body["folder"]
        return body

    @classmethod
    def load(cls, folder: str | Path, *, check: bool = True) -> Manifest:
        """Reads the manifest of a set in a folder, or at a URI such as s3://bucket/prefix.

        Raises:
            DataError: There is no complete set; with `check`, also if a shard is missing or has another size.
        """
        folder = as_path(folder)
        path = folder / NAME
        try:
            data = path.read_bytes()
        except storage_errors() as error:
            if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
                raise DataError(f"{path}: cannot be read ({first_line(error)})") from None
            if not folder.is_dir():
                raise DataError(f"{folder}: no such folder of shards") from None
            raise DataError(
                f"{folder}: no {NAME}, so the set is not complete; if a crawl stopped, run the same command again"
            ) from None
        try:
            body = load_checked(data, FORMAT)
            samples = body.pop("samples")
            body["shards"] = tuple(ShardEntry(**shard) for shard in body["shards"])
            body["empty"] = tuple(body.get("empty", ()))
            manifest = cls(folder=folder, **body)
            manifest._check_types()
        except UnknownFormat as error:
            raise DataError(f"{path}: {error}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: broken manifest ({error}); run the same crawl again to rewrite it") from None
        if samples != manifest.samples:
            raise DataError(f"{path}: broken manifest ({samples} samples, but its shards have {manifest.samples})")
        actual = file_sizes(folder) if check else {}
        for shard in manifest.shards if check else ():
            size = actual.get(shard.name)
            if size != shard.bytes:
                problem = "is missing" if size is None else f"has {size} bytes, not {shard.bytes}"
                raise DataError(f"{manifest.path(shard)} {problem}; `lavic verify {folder}` lists every difference")
        return manifest

    def _check_types(self) -> None:
        """Raises ValueError for an invalid value, such as a name that points outside the folder."""
        for name in (*(shard.name for shard in self.shards), *self.empty):
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise ValueError(f"{name!r} is not the name of a shard")
        numbers = [*(n for shard in self.shards for n in (shard.samples, shard.bytes)), self.references]
        numbers += dict(self.outcomes).values()
        texts = [*(shard.sha256 for shard in self.shards), self.set, self.split, self.plan]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError("a count is not a number")
        if not all(type(text) is str for text in texts):
            raise ValueError("a name or digest is not text")


def digest_manifest(folder: Path) -> str:
    """The `Manifest.digest` of a folder. Raises DataError where the manifest is missing or broken."""
    return Manifest.load(folder, check=False).digest


def shard_name(set: str, split: str, number: int) -> str:
    """`<set>-<split>-NNNNNN.tar`."""
    return f"{set}-{split}-{number:06d}.tar"


def card(title: str, sets: Sequence[Manifest], folder: Path | None = None) -> str:
    """The dataset card: `datasets.load_dataset(FOLDER)` finds the shards by its header and ignores other files.

    There is a set for each split. `folder` is that of the card, if it is not the folder of the shards.
    """
    lines = ["---", "configs:", "- config_name: default", "  data_files:"]
    for manifest in sets:
        inner = "" if folder is None else f"{manifest.folder.name}/"
        # Quoted: `2023` and `no` are a number and a boolean in yaml.
        lines += [f"  - split: {json.dumps(manifest.split)}", "    path:"]
        lines += [f"    - {json.dumps(inner + pattern)}" for pattern in _patterns(manifest)]
    lines += ["---", f"# {title}", ""]
    for manifest in sets:
        count = len(manifest.shards)
        lines.append(f"- {manifest.split}: {manifest.samples:,} product photos in {count:,} WebDataset shards")
    return (
        "\n".join(lines)
        + f"""

{CARD_MARK} Read them with `webdataset`, `datasets.load_dataset(FOLDER)` or `ray.data.read_webdataset`;
check them with `lavic verify FOLDER`.
"""
    )


def _patterns(manifest: Manifest) -> Iterator[str]:
    """Globs of the tars, from the first one with samples on: `datasets` infers the columns from the first tar."""
    first = manifest.shards[0].name if manifest.shards else ""
    if not any((len(name), name) < (len(first), first) for name in manifest.empty):
        yield "*.tar"
        return
    digits = first[first.rindex("-") + 1 : -len(".tar")]
    stem = first[: -len(digits) - len(".tar")]
    patterns = [first]
    for n in reversed(range(len(digits))):
        if digits[n] != "9":
            patterns.append(f"{stem}{digits[:n]}[{int(digits[n]) + 1}-9]{'[0-9]' * (len(digits) - n - 1)}.tar")
    patterns.append(f"{stem}[1-9]{'[0-9]' * len(digits)}.tar")
    # `datasets` fails on a pattern without files.
    names = [*(shard.name for shard in manifest.shards), *manifest.empty]
    yield from (pattern for pattern in patterns if fnmatch.filter(names, pattern))
