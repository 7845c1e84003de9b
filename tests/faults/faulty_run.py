"""The inputs of all commands, and runs of one command on a copy of them under a fault.

Commands are forked by `tests.fork_server`. New interpreters run them where the fault is in the process itself: other
capabilities, another user, another locale.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from tests.fork_server import MLFLOW_MODULES, ForkedProcess, ForkServer
from tests.train.assets import make_assets

SELF_KILLING = Path(__file__).with_name("self_killing_command.py")
BLOCK = 4096
TIMEOUT_S = 180.0


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
        """The error messages among its lines."""
        return [line for line in self.stderr.splitlines() if ": error: " in line]


@dataclass
class FaultyRun:
    """A command with a folder for its inputs and outputs."""

    command: Command
    folder: Path
    env: Mapping[str, str]
    fork_server: ForkServer

    @property
    def out(self) -> Path:
        """The folder of the outputs."""
        return self.folder / "out"

    @property
    def argv(self) -> list[str]:
        """The arguments of `lavic`."""
        return self.command.argv(self.folder)

    def blocks(self) -> int:
        """Disk blocks of the files in `out`."""
        return sum(-(-path.stat().st_size // BLOCK) for path in self.out.rglob("*") if path.is_file())

    def printed(self, outcome: Outcome) -> str:
        """What a command printed, without the name of its folder."""
        text, folder = outcome.stdout, str(self.folder)
        for spelling in (json.dumps(folder)[1:-1], folder.replace("%", "%%"), folder):
            text = text.replace(spelling, "FOLDER")
        return re.sub(r"[\d.]+ GiB", "N GiB", text.replace("'", ""))  # a shell needs quotes around some folders

    def start(self, *, program: Sequence[object] = ("-m", "lavic"), stdout: Path | None = None) -> ForkedProcess:
        """Starts the command, or a program with the command's arguments."""
        return self.fork_server.popen([*program, *self.argv], env=self.env, cwd=self.folder, stdout=stdout)

    def run(self, *, program: Sequence[object] = ("-m", "lavic"), stdout: Path | None = None) -> Outcome:
        """Runs the command to its end."""
        return wait(self.start(program=program, stdout=stdout))

    def run_interpreter(self, *prefix: str, env: Mapping[str, str] | None = None) -> Outcome:
        """Runs the command in a new interpreter, below the program `prefix` that changes the process."""
        done = subprocess.run(
            [*prefix, sys.executable, "-m", "lavic", *self.argv],
            env=self.env if env is None else env,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
            timeout=TIMEOUT_S,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    @contextlib.contextmanager
    def read_only(self) -> Iterator[None]:
        """Mounts `out` read-only."""
        with mounted(self.out, "--bind", str(self.out)):
            subprocess.run(["mount", "-o", "remount,bind,ro", str(self.out)], check=True)
            yield

    @contextlib.contextmanager
    def small_disk(self, free: int) -> Iterator[None]:
        """Puts `out` on a disk with `free` free blocks; keeps the files that it then has."""
        copy = self.folder / "out.copy"
        size = (self.blocks() + free + 1) * BLOCK
        shutil.copytree(self.out, copy, symlinks=True)
        with mounted(self.out, "-t", "tmpfs", "-o", f"size={size}", "tmpfs"):
            shutil.copytree(copy, self.out, symlinks=True, dirs_exist_ok=True)
            filler = self.out / ".filler"  # tmpfs takes a size of 0 for no limit
            filler.write_bytes(bytes(BLOCK))
            yield
            filler.unlink()
            shutil.rmtree(copy)
            shutil.copytree(self.out, copy, symlinks=True)
        shutil.rmtree(self.out)
        copy.rename(self.out)

    def run_obeying_modes(self) -> Outcome:
        """Runs without root's capabilities to ignore file modes."""
        return self.run_interpreter("setpriv", "--bounding-set=-dac_override,-dac_read_search")

    def run_without_home(self) -> Outcome:
        """Runs as a user without a name and a home who may write where root may."""
        capabilities = "+dac_override,+dac_read_search,+fowner"
        user = ["--reuid=54321", "--regid=54321", "--clear-groups"]
        user += [f"--inh-caps={capabilities}", f"--ambient-caps={capabilities}"]
        names = ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "XDG_CACHE_HOME", "HF_HOME")
        env = {key: value for key, value in self.env.items() if key not in names}
        return self.run_interpreter("setpriv", *user, env=env)

    def run_killed(self, moment: int) -> tuple[Outcome, int]:
        """Runs until SIGKILL at the n-th change of a file; 0 for no kill. Also returns the number of changes."""
        count = self.folder / "count"
        count.unlink(missing_ok=True)
        outcome = self.run(program=(SELF_KILLING, self.out, moment, count))
        return outcome, int(count.read_text()) if count.exists() else moment


def wait(process: ForkedProcess) -> Outcome:
    """Waits until a process ends; kills one that hangs, and fails the test."""
    stdout, stderr = process.communicate(TIMEOUT_S)
    assert process.returncode is not None
    return Outcome(process.returncode, stdout, stderr)


@contextlib.contextmanager
def mounted(folder: Path, *options: str) -> Iterator[None]:
    """A mount at a folder."""
    subprocess.run(["mount", *options, str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


class FaultInputs:
    """Inputs of all commands, and what each command makes of them without a fault."""

    def __init__(self, folder: Path, fork_server: ForkServer) -> None:
        """Makes the inputs and serves the photos until `close`."""
        self.folder = folder
        self.fork_server = fork_server
        fork_server.preload(*MLFLOW_MODULES)
        (folder / "images").mkdir()
        self.server = PhotoServer(folder / "images").__enter__()
        make_inputs(folder / "in", self.server)
        self._undisturbed: dict[str, Undisturbed] = {}

    def close(self) -> None:
        """Stops the server."""
        self.server.__exit__(None, None, None)

    def undisturbed(self, command: Command) -> Undisturbed:
        """How the command ends without a fault."""
        if command.name not in self._undisturbed:
            run = self.prepare(command, self.folder / "undisturbed" / command.name.replace(" ", "_"))
            blocks_before = run.blocks()
            outcome, changes = run.run_killed(0)
            assert not outcome.errors, outcome.stderr
            self._undisturbed[command.name] = Undisturbed(
                code=outcome.code,
                stdout=run.printed(outcome),
                signature=command.signature(run.folder),
                changes=changes,
                blocks=run.blocks() - blocks_before,
            )
        return self._undisturbed[command.name]

    def prepare(self, command: Command, folder: Path) -> FaultyRun:
        """The command with a copy of the inputs in a folder."""
        shutil.copytree(self.folder / "in", folder / "in")
        (folder / "out").mkdir()
        (folder / "home").mkdir()
        for name in command.copies:
            (folder / "in" / name).rename(folder / "out" / name)
        env = {key: value for key, value in os.environ.items() if key in ("PATH", "TMPDIR", "LD_LIBRARY_PATH")}
        env |= {"HOME": str(folder / "home"), "LAVIC_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "LANG": "C.UTF-8"}
        env |= {"PYTHONPATH": str(Path(__file__).parents[2]), "NO_COLOR": "1"}
        return FaultyRun(command, folder, env, self.fork_server)


@dataclass(frozen=True, kw_only=True)
class Undisturbed:
    """How a command ends without a fault."""

    code: int
    stdout: str
    signature: dict[str, object]
    changes: int
    """Number of changes of files, made by Python code."""
    blocks: int
    """Disk blocks of its files."""


def missing() -> str:
    """Why faults cannot be injected on this machine; empty if they can."""
    for argv in (["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/tmp"], ["setpriv", "--reuid=1", "true"]):
        try:
            done = subprocess.run(argv, capture_output=True, text=True)
        except FileNotFoundError:
            return f"there is no {argv[0]} (package util-linux)"
        if done.returncode:
            return f"mounting and changing users need root: {' '.join(argv)}: {done.stderr.strip()}"
    return ""
