"""The seal of a shard, its completion marker: written last, it holds what the shard contains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lavic.data.ledger import ledger_path
from lavic.data.manifest import EMPTY_TAR, ShardEntry
from lavic.data.tar_shards import index_path, sidecar_path
from lavic.shards.pack.host_failures import Failures
from lavic.storage.atomic import atomic_write
from lavic.storage.checksummed_json import dump_checked, load_checked
from lavic.storage.paths import storage_errors


@dataclass(frozen=True, kw_only=True)
class Seal:
    """What a complete shard contains."""

    plan: str
    """Digest of the shard's plan."""
    entry: ShardEntry
    outcomes: Mapping[str, int]
    """Planned photos by outcome."""
    began: float
    """Seconds since the epoch."""
    ended: float
    failures: Failures = field(default_factory=dict)
    """Failed photos by kind and host."""
    refresh: str = ""
    """Name of the last refresh that it went through, see `lavic.shards.pack.refresh`."""
    refreshed: Mapping[str, int] = field(default_factory=dict)
    """Stored photos by the result of that refresh."""
    left: int = 0
    """Photos that were deferred since their hosts are slow; their outcome is `unasked`."""
    references: str = ""
    """Digest of the photos that refer to others, see `lavic.shards.pack.dedup`; empty if every photo is stored."""
    ledger_sha256: str = ""
    references_sha256: str = ""
    """Digest of the file of references; empty if there is none."""

    @property
    def photos(self) -> int:
        """Planned photos."""
        return sum(self.outcomes.values())


def seal_path(shard: Path) -> Path:
    """The path of a shard's seal: `x-000000.tar` -> `x-000000.seal.json`."""
    return sidecar_path(shard, "seal.json")


def read_seal(shard: Path, plan: str, files: Mapping[str, int]) -> Seal | None:
    """The seal of a shard that is complete and of this plan, else None; `files`: sizes in its folder by name."""
    if not {seal_path(shard).name, ledger_path(shard).name} <= files.keys():
        return None
    try:
        seal = unpack_seal(seal_path(shard).read_bytes())
    except storage_errors(ValueError, TypeError, KeyError):
        return None
    tar, index = files.get(shard.name, 0), files.get(index_path(shard).name, 0)
    if seal.entry.samples:
        complete = tar == seal.entry.bytes and index == 8 * (seal.entry.samples + 1)
    else:
        complete = tar in (0, len(EMPTY_TAR)) and index == 0
    return seal if seal.plan == plan and complete else None


def write_seal(shard: Path, seal: Seal) -> Seal:
    """Mark a shard as complete; returns the seal."""
    atomic_write(seal_path(shard), pack_seal(seal))
    return seal


def pack_seal(seal: Seal) -> str:
    """A seal as text."""
    return dump_checked(asdict(seal))


def unpack_seal(data: bytes) -> Seal:
    """The seal from the text of `pack_seal`. Raises ValueError, TypeError or KeyError for anything else."""
    body = load_checked(data)
    return Seal(**{**body, "entry": ShardEntry(**body["entry"])})
