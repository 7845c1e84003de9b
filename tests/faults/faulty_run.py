"""The inputs of all commands, and a command that runs on a copy of them under one fault."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml

from lavic.mini.drawing import draw
from lavic.mini.photo_server import PhotoServer
from lavic.model.bundle import save_bundle
from lavic.model.config import LoraSettings, ModelSettings
from lavic.model.loading import Backbone
from lavic.model.lora import add_adapter
from lavic.storage.compression import zstd_module
from lavic.tracking.journal import JOURNAL_FILE, Journal
from tests.faults.commands import MINI, Command
from tests.train.assets import make_assets

KILLED = Path(__file__).with_name("self_killing_command.py")
BLOCK = 4096
_BIND = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
# A size of 0 would be none: one block is taken by a file that is nobody's.
_SMALL = (
    'mkdir "$0.kept" && cp -a "$0/." "$0.kept" && '
    'mount -t tmpfs -o "size=$SIZE" tmpfs "$0" && cp -a "$0.kept/." "$0" && '
    'head -c 4096 /dev/zero >"$0/.filler" && '
    '{ "$@"; code=$?; rm -r "$0.kept" "$0/.filler"; cp -a "$0/." "$0.kept"; exit $code; }'
)


def make_inputs(folder: Path, server: PhotoServer) -> None:
    """Everything that commands read, into `folder`."""
    folder.mkdir()
    assets = make_assets(folder)
    backbone = Backbone.load(ModelSettings(name=str(assets.base)))
    language = add_adapter(backbone, "language", LoraSettings(r=2))
    for name, parameter in language.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    save_bundle(folder / "bundle", backbone, vision=assets.vision, language=language, tokens="items", max_length=512)

    rows = []
    for number in range(6):
        draw("mug", "red", "plain", number).save(server.folder / f"{number}.jpg")
        rows.append(
            {
                "parent_asin": f"B{number:09d}",
                "title": "Tassé" + number * " rouge",
                "images": [{"large": f"{server.url}/{number}.jpg"}],
            }
        )
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    conversations = [json.loads(line) for line in (folder / "rows.jsonl").read_text("utf-8").splitlines()]
    listed = sorted({item for row in conversations for item in row["candidates_st"]})
    titles = ({"parent_asin": item, "title": f"Mug {item}", "images": []} for item in listed)
    (folder / "titles.jsonl").write_text("".join(json.dumps(row) + "\n" for row in titles))

    posts = [{"id": "s1", "title": "Which mug?", "selftext": "A red mug, please.", "author": "asker"}]
    posts[0] |= {"created_utc": 1_700_000_000, "score": 3, "subreddit": "mugs"}
    for number in range(3):
        links = {"id": f"c{number}", "link_id": "t3_s1", "parent_id": "t3_s1", "author": f"helper_{number}"}
        body = f"Take https://www.amazon.com/dp/B{number:09d}"
        posts.append({**posts[0], **links, "body": body, "created_utc": 1_700_000_100 + number})
        del posts[-1]["title"]
    for name, part in (("RS", posts[:1]), ("RC", posts[1:])):
        dump = "".join(json.dumps(post) + "\n" for post in part).encode()
        (folder / f"{name}.zst").write_bytes(zstd_module().compress(dump))

    size = dict(zip((word.strip("-").replace("-", "_") for word in MINI[::2]), map(int, MINI[1::2]), strict=True))
    (folder / "catalog.yaml").write_text("# lavic mini catalog\n" + yaml.safe_dump(size))
    pipeline = {
        "out": "runs of today",
        "stages": ["distill", "tune"],
        "photos": {"train": {"items": ["a.json"]}, "valid": {"items": ["b.json"], "described": True}},
        "conversations": {"train": "t.jsonl", "valid": "v.jsonl", "test": ["e.jsonl"]},
    }
    (folder / "pipeline").mkdir()
    for file in (folder / "pipeline.yaml", folder / "pipeline" / "pipeline.yaml"):
        file.write_text("# lavic submit\n" + yaml.safe_dump(pipeline))

    journal = Journal(folder / "run" / JOURNAL_FILE)
    journal.event("start", id="5" * 32, command="tune", experiment="faults")
    for step in range(1, 9):
        journal.log(step, loss=1 / step)
    journal.close("FINISHED")


@dataclass
class Outcome:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def errors(self) -> list[str]:
        """Its lines that say what was wrong."""
        return [line for line in self.stderr.splitlines() if ": error: " in line]


@dataclass
class FaultyRun:
    """A command in a folder of its own."""

    command: Command
    folder: Path
    env: dict[str, str] = field(default_factory=dict)

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def words(self) -> list[str]:
        return self.command.words(self.folder)

    def blocks(self) -> int:
        """Blocks that the files of `out` take."""
        return sum(-(-path.stat().st_size // BLOCK) for path in self.out.rglob("*") if path.is_file())

    def printed(self, ended: Outcome) -> str:
        """What a command printed, whatever its folder is called."""
        text, folder = ended.stdout, str(self.folder)
        for spelled in (json.dumps(folder)[1:-1], folder.replace("%", "%%"), folder):
            text = text.replace(spelled, "FOLDER")
        return re.sub(r"[\d.]+ GiB", "N GiB", text.replace("'", ""))  # a shell needs quotes around some folders

    def start(
        self,
        prefix: Sequence[str] = (),
        env: dict[str, str] | None = None,
        program: Sequence[str] = (),
        stdout: str = "",
    ) -> subprocess.Popen[str]:
        """The command as a process, after words that spoil something for it."""
        words = [*prefix, sys.executable, *(program or ("-m", "lavic")), *self.words()]
        target = open(stdout, "w") if stdout else subprocess.PIPE  # noqa: PTH123, SIM115
        return subprocess.Popen(
            words,
            env=self.env if env is None else env,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=target,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="surrogateescape",
        )

    def run(self, *prefix: str, **how: object) -> Outcome:
        """The command to its end."""
        return wait(self.start(prefix, **how))  # type: ignore[arg-type]

    def read_only(self) -> Outcome:
        """With everything that it writes to on a file system that is mounted to be read only."""
        return self.run("unshare", "--mount", "sh", "-c", _BIND, str(self.out))

    def on_a_small_disk(self, free: int) -> Outcome:
        """With so many blocks left where it writes; afterwards `out` holds what it left."""
        env = {**self.env, "SIZE": str((self.blocks() + free + 1) * BLOCK)}
        ended = self.run("unshare", "--mount", "sh", "-c", _SMALL, str(self.out), env=env)
        shutil.rmtree(self.out)
        self.out.with_name("out.kept").rename(self.out)
        return ended

    def obeying_modes(self) -> Outcome:
        """As a user whom file modes bind; root's power over them is taken away."""
        return self.run("setpriv", "--bounding-set=-dac_override,-dac_read_search")

    def nobody_at_home(self) -> Outcome:
        """As a user without a name and a home, who may write where root may."""
        powers = "+dac_override,+dac_read_search,+fowner"
        who = ["--reuid=54321", "--regid=54321", "--clear-groups", f"--inh-caps={powers}", f"--ambient-caps={powers}"]
        gone = ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "XDG_CACHE_HOME", "HF_HOME")
        return self.run("setpriv", *who, env={key: value for key, value in self.env.items() if key not in gone})

    def killed(self, moment: int) -> tuple[Outcome, int]:
        """Killed at its n-th change of a file; 0 kills nothing. Also returns how many it has made by its end."""
        count = self.folder / "count"
        count.unlink(missing_ok=True)
        ended = self.run(program=(str(KILLED), str(self.out), str(moment), str(count)))
        return ended, int(count.read_text()) if count.exists() else moment


def wait(process: subprocess.Popen[str]) -> Outcome:
    """How a process ends; one that hangs is killed and fails the test."""
    try:
        stdout, stderr = process.communicate(timeout=180)
    except subprocess.TimeoutExpired:
        process.kill()
        stdout, stderr = process.communicate()
        raise AssertionError(f"it hangs: {stdout or ''}{stderr}") from None
    return Outcome(process.returncode, stdout or "", stderr)


class FaultInputs:
    """Inputs, made once, and what each command makes of them undisturbed."""

    def __init__(self, folder: Path) -> None:
        """Make the inputs; the photos are served until `close`."""
        self.folder = folder
        (folder / "images").mkdir()
        self.server = PhotoServer(folder / "images").__enter__()
        make_inputs(folder / "in", self.server)
        self._undisturbed: dict[str, Undisturbed] = {}

    def close(self) -> None:
        """End the server."""
        self.server.__exit__(None, None, None)

    def undisturbed(self, command: Command) -> Undisturbed:
        """What the command does when nothing is in its way."""
        if command.name not in self._undisturbed:
            run = self.prepare(command, self.folder / "undisturbed" / command.name.replace(" ", "_"))
            held = run.blocks()
            ended, changes = run.killed(0)
            assert not ended.errors, ended.stderr
            made = Undisturbed(
                code=ended.code,
                stdout=run.printed(ended),
                signature=command.signature(run.folder),
                changes=changes,
                blocks=run.blocks() - held,
            )
            self._undisturbed[command.name] = made
        return self._undisturbed[command.name]

    def prepare(self, command: Command, folder: Path) -> FaultyRun:
        """The command with inputs of its own, in a folder."""
        shutil.copytree(self.folder / "in", folder / "in")
        (folder / "out").mkdir()
        (folder / "home").mkdir()
        for name in command.copies:
            (folder / "in" / name).rename(folder / "out" / name)
        kept = {key: value for key, value in os.environ.items() if key in ("PATH", "TMPDIR", "LD_LIBRARY_PATH")}
        env = {**kept, "HOME": str(folder / "home"), "LAVIC_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "LANG": "C.UTF-8"}
        env |= {"PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
        return FaultyRun(command, folder, env)


@dataclass(frozen=True, kw_only=True)
class Undisturbed:
    """How a command ends when nothing is in its way."""

    code: int
    stdout: str
    signature: dict[str, object]
    changes: int
    """Changes of files that it makes itself."""
    blocks: int
    """Blocks of the disk that its files take."""


def missing() -> str:
    """Why faults cannot be made here; empty where they can."""
    for words in (["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/tmp"], ["setpriv", "--reuid=1", "true"]):
        try:
            done = subprocess.run(words, capture_output=True, text=True)
        except FileNotFoundError:
            return f"there is no {words[0]} (package util-linux)"
        if done.returncode:
            return f"mounting and changing users need root: {' '.join(words)}: {done.stderr.strip()}"
    return ""
