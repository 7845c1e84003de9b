"""`lavic describe`: the teacher's description of every photo of a set, in a sidecar per shard.

The teacher is the base model in this process, which sees all tokens of a photo, or a model behind OpenAI-compatible
servers. Rank r of n takes every n-th shard. A shard with a sidecar is skipped, and the descriptions of an unfinished
shard are kept beside it, so the same command resumes after any stop.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from lavic.config import Seed, parse, settings
from lavic.data.descriptions import described_by, descriptions_path, is_of_photo, read_rows
from lavic.data.manifest import Manifest
from lavic.data.remote_shards import CacheSettings
from lavic.data.shard_dataset import ShardDataset
from lavic.distributed.context import DistributedContext
from lavic.distributed.ray_session import RaySettings
from lavic.distributed.signals import StopRequest
from lavic.endpoint.client import Endpoint
from lavic.endpoint.settings import EndpointSettings, require_endpoint
from lavic.errors import DataError
from lavic.model import hub
from lavic.model.chat_template.template import prompt_version
from lavic.model.config import ModelSettings
from lavic.model.dims import weights_estimate
from lavic.shards.teacher.description_page import write_page
from lavic.shards.teacher.endpoint_teacher import EndpointTeacher, endpoint_origin
from lavic.shards.teacher.local_teacher import LocalTeacher
from lavic.shards.teacher.partial_descriptions import partial_path
from lavic.shards.teacher.question import DEFAULT_QUESTION, Question, read_question
from lavic.shards.teacher.shard_work import CATALOGUE, describe_shard
from lavic.shards.teacher.tally import Tally
from lavic.shards.teacher.teacher import Sampling, Teacher
from lavic.storage.output_folder import lock_output_folder

DESCRIPTION = """Describe every photo of a set of shards, for stage 1: with the uncompressed base model in this process,
or with a model behind one or many OpenAI-compatible servers.

  lavic describe --config describe-7b --shards shards/train --nproc 8
  lavic describe --shards shards/train --endpoint.url http://node1:8000/v1 http://node2:8000/v1 \\
      --endpoint.model llava-hf/llava-v1.6-mistral-7b-hf --endpoint.concurrency 64 --page descriptions.html

Writes a sidecar beside each shard. A text that is empty, loops, repeats the title or refuses is written once more, and
flagged if that does not help. The same command continues after any stop."""

_NAMES = {
    "weights": "the weights",
    "prompt": "prompt version",
    "views": "--model.views",
    "dtype": "--model.dtype",
    "max_new_tokens": "--max-new-tokens",
    "sampling": "the sampling",
}
"""Names of `ORIGIN`'s fields in messages."""


@settings
class DescribeSettings:
    """Describe every photo of a set of shards with the teacher of stage 1."""

    model: ModelSettings = ModelSettings()
    """The teacher, without an endpoint."""
    endpoint: EndpointSettings = EndpointSettings()
    """The teacher on servers: with --endpoint.url and --endpoint.model no model is loaded here."""
    shards: Path
    """Folder of a set by `lavic crawl`."""
    batch_size: PositiveInt = 8
    """Batch size of a model in this process; an endpoint has --endpoint.concurrency."""
    max_new_tokens: PositiveInt = 128
    """Maximum length of a description. A truncated one ends with its last complete sentence."""
    prompt_file: Path | None = None
    """Text file with the question; {title} is replaced by the item's title. By default the question of --model.prompt,
    or ours for an endpoint."""
    temperature: NonNegativeFloat = 0.0
    """Sampling temperature; 0 is greedy decoding."""
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    """Nucleus sampling: the most likely tokens that together have this probability."""
    seed: Seed = 0
    """Sampling seed."""
    flagged: Literal["empty", "keep"] = "empty"
    """A text that is still unusable after the second attempt becomes an empty description (`empty`), and stage 1 skips
    the photo, or is kept (`keep`). Its row says what is wrong with it."""
    keep: Literal["none", "catalogue"] = "none"
    """`catalogue`: photos with a description in the catalogue keep it; only the others are described."""
    page: Path | None = None
    """Write an HTML page of examples with their photos, flagged ones first, and the counts of the set."""
    examples: NonNegativeInt = 48
    """Photos on that page."""
    nproc: PositiveInt = 1
    """Processes on this machine; ignored inside torchrun or srun."""
    cache: CacheSettings = CacheSettings()
    """Cache of shards, if `shards` is in an object store."""
    ray: RaySettings = RaySettings()
    """With --ray.workers N: N processes on a Ray cluster, one per GPU, instead of `nproc`."""

    @property
    def sampling(self) -> Sampling:
        """Settings of the sampling."""
        return Sampling(temperature=self.temperature, top_p=self.top_p, seed=self.seed)

    @property
    def has_endpoint(self) -> bool:
        """Whether the teacher is on servers."""
        return bool(self.endpoint.url or self.endpoint.model)

    @property
    def needs_gpu(self) -> bool:
        """Whether a model is loaded here."""
        return not self.has_endpoint


SETTINGS = DescribeSettings
resolve = partial(parse, DescribeSettings, command="describe", description=DESCRIPTION)
"""The settings of a command line; see `lavic.cli.command_module`."""


Cached = Callable[[Path, str, Callable[[], bool]], bool]
"""(file, key, compute) -> the value of `compute`, which may be cached while the file does not change."""


def is_complete(settings: DescribeSettings, *, cached: Cached = lambda file, key, compute: compute()) -> bool:
    """Whether every shard has descriptions of exactly its photos; callers that check often pass a cache."""
    try:
        if not Manifest.load(settings.shards).shards:
            return True
        data = ShardDataset(settings.shards, descriptions=None, cache=settings.cache)
        for number, shard in enumerate(data.manifest.shards):
            sidecar = descriptions_path(data.manifest.path(shard))
            key = f"describes {shard.sha256}"
            if not sidecar.is_file() or not cached(sidecar, key, partial(_describes_all, data, number)):
                return False
    except (DataError, OSError):
        return False
    return True


def _describes_all(data: ShardDataset, number: int) -> bool:
    """Whether a shard's sidecar has exactly its photos: a crawl may have packed it again with more or other photos."""
    rows = {row["key"]: row for row in read_rows(data.manifest.path(data.manifest.shards[number]))}
    keys = data.keys_of(number)
    if rows.keys() != set(keys):
        return False
    if not any(row["source_sha256"] for row in rows.values()):
        return True
    return all(is_of_photo(rows[key], digest) for key, digest in zip(keys, data.digests_of(number), strict=True))


def estimate(settings: DescribeSettings) -> str:
    """Memory of a rank, as text."""
    if settings.has_endpoint:
        servers = len(settings.endpoint.url)
        return f"no model is loaded: {settings.endpoint.model} answers on {servers} server{'s' * (servers != 1)}"
    return weights_estimate(settings.model, lambda shape: shape.parameters)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    chosen = resolve(argv)
    if chosen.has_endpoint:
        require_endpoint(chosen.endpoint, "--endpoint")
    world = DistributedContext.from_env()
    if world.must_start(chosen.nproc):
        from lavic.cli import start_ranks

        return start_ranks("describe", argv, chosen.nproc)
    if chosen.ray.workers and not world.launcher:
        from lavic.shards.cluster.rank_actors import run_on_ray

        return run_on_ray("describe", argv or (), chosen.ray)
    return run(chosen, world)


def run(chosen: DescribeSettings, world: DistributedContext) -> int:
    """Describes this rank's shards."""
    data = ShardDataset(chosen.shards, descriptions="shard", cache=chosen.cache)
    # Rank 0 holds the lock for all ranks, which do not wait for each other here. An object store has no locks: there,
    # two commands may describe the same shard, and the last sidecar wins.
    locks = world.is_main and not data.is_remote
    with lock_output_folder(chosen.shards, exclusive=world.size == 1) if locks else nullcontext():
        return _describe_set(data, chosen, world)


def _describe_set(data: ShardDataset, chosen: DescribeSettings, world: DistributedContext) -> int:
    shards = data.manifest.shards
    own_shards = range(world.rank, len(shards), world.size)
    question = read_question(chosen.prompt_file) if chosen.prompt_file else None
    origin = _origin(chosen, question)
    to_describe = [n for n in own_shards if not _described(data, n, chosen, origin)]
    if not data.is_remote:
        _remove_partial_descriptions(data, set(own_shards).difference(to_describe))
    if world.is_main:
        print(
            f"{data.manifest.samples} photos in {len(shards)} shards; {len(to_describe)} of rank 0's {len(own_shards)} "
            "to describe"
        )
    tally = Tally()
    if to_describe:
        with StopRequest() as stop, _teacher(chosen, world, origin, question, tally, stop) as teacher:
            for position, n in enumerate(to_describe):
                data.read_ahead(data.bounds[to_describe[position : position + 3]])
                describe_shard(
                    data,
                    n,
                    teacher,
                    tally,
                    keep_catalogue=chosen.keep == "catalogue",
                    keep_flagged=chosen.flagged == "keep",
                    stopped=lambda: stop.requested,
                )
        print(tally.summary(), flush=True)
    if chosen.page is not None and world.is_main:
        write_page(chosen.page, data, chosen.examples, tally if to_describe else None)
        print(chosen.page)
    return tally.exit_code


def _origin(chosen: DescribeSettings, question: Question | None) -> dict[str, str]:
    """The `ORIGIN` of the descriptions; an empty value is known only when the model is loaded."""
    if chosen.has_endpoint:
        return endpoint_origin(chosen.endpoint, question or DEFAULT_QUESTION, chosen.sampling, chosen.max_new_tokens)
    folder = hub.resolve(chosen.model)
    return {
        "model": "",
        "weights": hub.fingerprint(folder),
        "prompt": question.version if question else prompt_version(chosen.model, folder),
        "views": chosen.model.views,
        "dtype": "" if chosen.model.dtype == "auto" else chosen.model.dtype,  # "": a shard keeps its precision
        "max_new_tokens": str(chosen.max_new_tokens),
        "sampling": chosen.sampling.text,
    }


@contextmanager
def _teacher(
    chosen: DescribeSettings,
    world: DistributedContext,
    origin: Mapping[str, str],
    question: Question | None,
    tally: Tally,
    stop: StopRequest,
) -> Iterator[Teacher]:
    if chosen.has_endpoint:
        with Endpoint(chosen.endpoint, stopped=lambda: stop.requested) as endpoint:
            tally.usage = endpoint.usage
            yield EndpointTeacher(endpoint, question or DEFAULT_QUESTION, chosen.sampling, chosen.max_new_tokens)
        return
    from lavic.model.loading import Backbone

    backbone = Backbone.load(chosen.model, world.device())
    dtype = str(backbone.model.dtype).removeprefix("torch.")
    yield LocalTeacher(
        backbone=backbone,
        origin={**origin, "model": backbone.name, "dtype": dtype},
        batch_size=chosen.batch_size,
        max_new_tokens=chosen.max_new_tokens,
        sampling=chosen.sampling,
        question=question,
    )


def _remove_partial_descriptions(data: ShardDataset, described: Collection[int]) -> None:
    """Removes what a command left that was killed after it had written the sidecar of a shard."""
    for number in described:
        path = partial_path(data.manifest.path(data.manifest.shards[number]))
        if path.exists():  # in a read-only folder, removing a file that is not there is an error too
            path.unlink()


def _described(data: ShardDataset, number: int, chosen: DescribeSettings, expected: Mapping[str, str]) -> bool:
    """Whether a shard has a sidecar with these settings.

    Raises:
        DataError: It has one with other settings.
    """
    shard = data.manifest.path(data.manifest.shards[number])
    if not descriptions_path(shard).exists():
        return False
    if not _describes_all(data, number):
        return False
    for origin in described_by(shard):
        if origin["model"] == CATALOGUE and not origin["weights"]:
            if chosen.keep == "catalogue":
                continue
            raise DataError(
                f"{descriptions_path(shard)}: has texts of the catalogue; use --keep catalogue, or remove it to "
                "describe again"
            )
        # A model that was moved or renamed has the same fingerprint.
        differ = [
            f"{name} {origin[field]}, not {value}"
            for field, name in _NAMES.items()
            if (value := expected[field]) and origin[field] and origin[field] != value
        ]
        if differ:
            raise DataError(
                f"{descriptions_path(shard)}: by {origin['model']} with {'; '.join(differ)}: use the same settings, or "
                "remove it to describe again"
            )
    return True
