"""What made a run: code, packages, place. A run's tags."""

from __future__ import annotations

import contextlib
import getpass
import importlib.metadata
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
from pathlib import Path

from lavic.config.secrets import redact_words

PACKAGES = ("lavic", "torch", "transformers", "peft", "deepspeed", "safetensors", "ray", "webdataset", "mlflow")
"""Whose versions count, where they are installed."""
_PATIENCE_S = 5.0


def provenance() -> dict[str, str]:
    """Versions, git commit, user, host and command line; what cannot be told is left out."""
    tags = {"version.python": platform.python_version(), "host": socket.gethostname()}
    tags |= {f"version.{name}": version for name, version in versions(*PACKAGES).items()}
    tags["command"] = shlex.join(["lavic", *redact_words(sys.argv[1:])])
    try:
        tags["mlflow.user"] = getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        tags["mlflow.user"] = str(os.getuid())
    tags["mlflow.source.name"] = "lavic"
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        if os.environ.get(name):
            tags[name.lower()] = os.environ[name]
    return tags | _commit()


def versions(*packages: str) -> dict[str, str]:
    """Of packages, by name; one that is not installed is left out."""
    found: dict[str, str] = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _commit() -> dict[str, str]:
    """The commit that this package is run from: of its clone, else the one that pip installed it from."""
    here = Path(__file__).parent
    # a virtual environment inside another project's repository must not give that one's commit
    if _git(here, "ls-files", "--error-unmatch", Path(__file__).name) is not None:
        commit = _git(here, "rev-parse", "HEAD") or ""
        changed = bool(_git(here, "status", "--porcelain", "--untracked-files=no"))
        return {"mlflow.source.git.commit": commit, "git.changed": str(changed).lower()} if commit else {}
    try:
        origin = json.loads(importlib.metadata.distribution("lavic").read_text("direct_url.json") or "{}")
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return {}
    commit = origin.get("vcs_info", {}).get("commit_id")
    return {"mlflow.source.git.commit": commit} if commit else {}


def _git(folder: Path, *words: str) -> str | None:
    """What git says; None where it fails or is not there."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=_PATIENCE_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
