"""`lavic mini`: the parts of the miniature: its synthetic catalogue, its web server, its base model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field, PositiveInt

from lavic.config import Seed, dump, parse, settings
from lavic.errors import ConfigError, DataError
from lavic.mini.catalog import CatalogueSize, write_catalogue
from lavic.storage.output_folder import lock_output_folder

USAGE = """usage: lavic mini catalog|dump|serve|pretrain|realshape [--key value ...]

  catalog    generate products, their metadata and conversations into a folder
  dump       write the conversations of a synthetic catalogue as a Reddit dump, for 'lavic reddit'
  serve      serve a folder's photos over HTTP
  pretrain   train a miniature base model from scratch on a set of shards
  realshape  make a model folder that is LLaVA-v1.6-Mistral-7B in all but depth and weights

'lavic mini catalog --help' and so on print their flags. The base model in the package was made by
'lavic mini pretrain --config mini-pretrain'; describe, distill, embed and tune take it as '--model.name mini'."""


@settings
class CatalogSettings:
    """Generate a catalogue: photos, metadata in the formats of LaViC and of Amazon Reviews 2023, conversations."""

    out: Path
    """Output folder, for `images/` and the metadata."""
    base_url: str = "http://127.0.0.1:8000"
    """URL under which `images/` will be served."""
    seed: Seed = 0
    """Seed of the catalogue."""
    train_items: PositiveInt = CatalogueSize.train_items
    """Items for training."""
    valid_items: PositiveInt = CatalogueSize.valid_items
    """Validation items of stage 2, with combinations of attributes that training shows."""
    heldout_items: PositiveInt = CatalogueSize.heldout_items
    """Test items, with combinations of attributes that training shows."""
    combination_items: PositiveInt = CatalogueSize.combination_items
    """Test items whose combination of kind, colour and pattern is in no training photo."""
    train_conversations: PositiveInt = CatalogueSize.train_conversations
    """Rows of `train.jsonl`."""
    valid_conversations: PositiveInt = CatalogueSize.valid_conversations
    """Rows of `valid.jsonl`, of `valid_items`."""
    test_conversations: PositiveInt = CatalogueSize.test_conversations
    """Rows of `test.jsonl` (held-out items) and of `test_combinations.jsonl` (held-out combinations)."""


@settings
class DumpSettings:
    """Write the conversations of a synthetic catalogue as a Reddit dump: a month of submissions and comments per split.

    `lavic reddit --split.valid-from 2024-02-01 --split.test-from 2024-03-01` splits it by item again.
    """

    catalog: Path
    """Folder of `lavic mini catalog`."""
    out: Path
    """Folder for RS_2024-01.zst, RC_2024-01.zst and so on."""
    seed: Seed = 0
    """Seed of the text around the requests."""
    train: PositiveInt | None = None
    """Threads of January, from the first training conversations; by default all."""
    valid: PositiveInt | None = None
    """Threads of February, from the validation conversations."""
    test: PositiveInt | None = None
    """Threads of March, from the test conversations."""


@settings
class ServeSettings:
    """Serve a folder's photos over HTTP, until Ctrl-C."""

    folder: Path
    """The folder to serve."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """0 picks a free port."""
    host: str = "127.0.0.1"
    """Address to listen on; by default only this machine can connect. 0.0.0.0: every machine that reaches this one."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one of the parts."""
    args = list(argv or ())
    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if args else 2
    parts = {"catalog": _catalog, "dump": _dump, "serve": _serve, "pretrain": _pretrain, "realshape": _realshape}
    if args[0] not in parts:
        raise ConfigError(f"unknown part '{args[0]}'; choose one of {', '.join(parts)}")
    return parts[args[0]](args[1:])


def _catalog(argv: Sequence[str]) -> int:
    chosen = parse(CatalogSettings, argv, command="mini catalog")
    sizes = {name: getattr(chosen, name) for name in CatalogueSize.__dataclass_fields__}
    with lock_output_folder(chosen.out):
        counts = write_catalogue(chosen.out, base_url=chosen.base_url, size=CatalogueSize(**sizes), seed=chosen.seed)
    print(f"{chosen.out}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    return 0


def _dump(argv: Sequence[str]) -> int:
    from lavic.mini.reddit_dump import MONTHS, write_reddit_dump

    chosen = parse(DumpSettings, argv, command="mini dump")
    limits = {split: limit for split in MONTHS if (limit := getattr(chosen, split))}
    with lock_output_folder(chosen.out):
        threads = write_reddit_dump(chosen.catalog, chosen.out, seed=chosen.seed, limits=limits)
    print(f"{chosen.out}: {threads} threads in {2 * len(MONTHS)} files")
    return 0


def _serve(argv: Sequence[str]) -> int:
    from lavic.mini.photo_server import serve_forever

    chosen = parse(ServeSettings, argv, command="mini serve")
    if not chosen.folder.is_dir():
        raise DataError(f"{chosen.folder}: no such folder")
    serve_forever(chosen.folder, chosen.port, chosen.host)
    return 0


def _realshape(argv: Sequence[str]) -> int:
    from lavic.mini.realshape.settings import RealShapeSettings
    from lavic.mini.realshape.tokenizer import find_model

    chosen = parse(RealShapeSettings, argv, command="mini realshape")
    tokenizer = find_model(chosen.tokenizer)
    if chosen.out.exists() and not (chosen.out.is_dir() and not any(chosen.out.iterdir())):
        raise ConfigError(f"{chosen.out}: something is here already: choose another --out or remove it")

    from lavic.mini.realshape.folder import write_folder

    shape, size = write_folder(
        chosen.out,
        tokenizer,
        layers=chosen.layers,
        vision_layers=chosen.vision_layers,
        narrow=chosen.narrow,
        seed=chosen.seed,
    )
    print(f"{chosen.out}: {shape.parameters:,} parameters, {size / 1e9:.2f} GB")
    return 0


def _pretrain(argv: Sequence[str]) -> int:
    from lavic.mini.pretrain_settings import MiniPretrainSettings

    chosen = parse(MiniPretrainSettings, argv, command="mini pretrain")

    import torch

    from lavic.data.conversations import read_conversations
    from lavic.data.shard_dataset import ShardDataset
    from lavic.data.sources.item_looks import read_looks
    from lavic.mini import architecture, pretrain_data
    from lavic.mini.pretrain import Pretrainer
    from lavic.mini.tokenizer import make_tokenizer
    from lavic.model.config import ModelSettings
    from lavic.model.hub import resolve
    from lavic.model.inputs.prompt_encoder import Encoder

    if (chosen.out / "model.safetensors").exists():
        raise ConfigError(f"{chosen.out}: already has a model: choose another --out or remove it")
    torch.set_num_threads(chosen.threads)
    valid = ShardDataset(chosen.valid, descriptions="shard")
    train = ShardDataset(chosen.shards, descriptions="shard")
    looks = read_looks(chosen.looks)
    side = 2 * chosen.architecture.view
    held_out = pretrain_data.read_photos(valid, side)
    photos = pretrain_data.read_photos(train, side, without=frozenset(valid.keys))
    titles = {sample.item_id: sample.title for sample in (train[i] for i in range(len(train)))}
    listings = pretrain_data.make_listings(
        read_conversations(chosen.train, candidates=chosen.candidates), looks, titles
    )
    if not photos or not listings:
        raise DataError(
            f"{chosen.shards}, {chosen.train}: {len(photos)} described photos and {len(listings)} usable lists"
        )
    tokenizer = make_tokenizer(pretrain_data.training_texts(photos, listings), minimum=chosen.minimum)
    torch.manual_seed(chosen.pretrain.seed)
    model = architecture.build(chosen.architecture, tokenizer)
    if chosen.start:
        copied = architecture.copy_weights(model, tokenizer, resolve(ModelSettings(name=chosen.start)))
        copied_parts = "vision side and language model are" if copied.vision else "language model is"
        print(f"{chosen.start}: its {copied_parts} copied; it knows {copied.words} of {len(tokenizer)} words")
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(photos)} photos, {len(listings)} lists, {len(tokenizer)} words, {parameters:,} parameters", flush=True)

    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "pretrain.yaml").write_text(dump(chosen))
    with (chosen.out / "pretrain.jsonl").open("w") as file:

        def log(record: dict) -> None:
            file.write(json.dumps(record) + "\n")
            file.flush()
            print(", ".join(f"{k} {v}" for k, v in record.items()), flush=True)

        encoder = Encoder(tokenizer, model.config.image_token_id)
        trainer = Pretrainer(model, encoder, chosen.pretrain, listings, log)
        model.train()
        trainer.train_language()
        trainer.train_vision(photos, held_out)
    architecture.save(model, tokenizer, chosen.out)
    print(f"{chosen.out}: done")
    return 0
