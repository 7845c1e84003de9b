"""The seal of a shard: written last, it says that the shard is whole and what it holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lavic.data.ledger import ledger_path
from lavic.data.manifest import EMPTY_TAR, ShardEntry
from lavic.data.tar_shards import beside, index_path
from lavic.shards.pack.host_failures import Failures
from lavic.storage.checksummed_json import dump_checked, load_checked
from lavic.storage.paths import storage_errors


@dataclass(frozen=True, kw_only=True)
class Seal:
    """That a shard is whole, and what it holds."""

    plan: str
    """Digest of what was planned for it."""
    entry: ShardEntry
    outcomes: Mapping[str, int]
    """Planned photos by outcome."""
    began: float
    """Seconds since the epoch."""
    ended: float
    failures: Failures = field(default_factory=dict)
    """Photos that failed, by kind and host."""
    refresh: str = ""
    """Name of the refresh that it has gone through, see `lavic.shards.pack.refresh`."""
    refreshed: Mapping[str, int] = field(default_factory=dict)
    """What that made of its stored photos."""
    left: int = 0
    """Photos that were left for later since their hosts are slow; they are among those `unasked`."""
    references: str = ""
    """Digest of the photos that refer to others, see `lavic.shards.pack.dedup`; empty where every photo is stored."""
    ledger_sha256: str = ""
    """Of the ledger's file."""
    references_sha256: str = ""
    """Of the references' file; empty where there is none."""

    @property
    def photos(self) -> int:
        """Planned photos."""
        return sum(self.outcomes.values())


def seal_path(shard: Path) -> Path:
    """Where a shard's seal stands: `x-000000.tar` -> `x-000000.seal.json`."""
    return beside(shard, "seal.json")


def read_seal(shard: Path, plan: str, found: Mapping[str, int]) -> Seal | None:
    """The seal of a shard that is whole and of this plan, or None.

    Args:
        shard: Where its tar stands.
        plan: Digest of what is planned for it.
        found: Bytes of the files in its folder, by name.
    """
    if not {seal_path(shard).name, ledger_path(shard).name} <= found.keys():
        return None
    try:
        seal = unpack_seal(seal_path(shard).read_bytes())
    except storage_errors(ValueError, TypeError, KeyError):
        return None
    tar, index = found.get(shard.name, 0), found.get(index_path(shard).name, 0)
    if seal.entry.samples:
        whole = tar == seal.entry.bytes and index == 8 * (seal.entry.samples + 1)
    else:
        whole = tar in (0, len(EMPTY_TAR)) and index == 0
    return seal if seal.plan == plan and whole else None


def pack_seal(seal: Seal) -> str:
    """A seal as text."""
    return dump_checked(asdict(seal))


def unpack_seal(data: bytes) -> Seal:
    """The seal that `pack_seal` made a text of. Raises ValueError, TypeError or KeyError for anything else."""
    body = load_checked(data)
    return Seal(**{**body, "entry": ShardEntry(**body["entry"])})
