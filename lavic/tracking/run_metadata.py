"""Tags of a run: the code, packages, user and host that made it."""

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

from lavic.config.secrets import redact_args

PACKAGES = ("lavic", "torch", "transformers", "peft", "deepspeed", "safetensors", "ray", "webdataset", "mlflow")
"""Packages whose versions are recorded."""
_GIT_TIMEOUT_S = 5.0


def run_tags() -> dict[str, str]:
    """Versions, git commit, user, host and command line; what is unknown is left out."""
    tags = {"version.python": platform.python_version(), "host": socket.gethostname()}
    tags |= {f"version.{name}": version for name, version in versions(*PACKAGES).items()}
    tags["command"] = shlex.join(["lavic", *redact_args(sys.argv[1:])])
    try:
        tags["mlflow.user"] = getpass.getuser()
    except (OSError, KeyError):  # a user without a name, as in a container
        tags["mlflow.user"] = str(os.getuid())
    tags["mlflow.source.name"] = "lavic"
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        if os.environ.get(name):
            tags[name.lower()] = os.environ[name]
    return tags | _commit()


def versions(*packages: str) -> dict[str, str]:
    """Versions of packages by name; one that is not installed is left out."""
    installed: dict[str, str] = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed


def _commit() -> dict[str, str]:
    """The git commit of this package: of its clone, else the one that pip installed it from."""
    package_dir = Path(__file__).parent
    # in a virtual environment inside another repository, this file is not tracked
    if _git(package_dir, "ls-files", "--error-unmatch", Path(__file__).name) is not None:
        commit = _git(package_dir, "rev-parse", "HEAD") or ""
        changed = bool(_git(package_dir, "status", "--porcelain", "--untracked-files=no"))
        return {"mlflow.source.git.commit": commit, "git.changed": str(changed).lower()} if commit else {}
    try:
        origin = json.loads(importlib.metadata.distribution("lavic").read_text("direct_url.json") or "{}")
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return {}
    commit = origin.get("vcs_info", {}).get("commit_id")
    return {"mlflow.source.git.commit": commit} if commit else {}


def _git(folder: Path, *args: str) -> str | None:
    """The output of a git command; None where it fails or git is not installed."""
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), *args], capture_output=True, text=True, timeout=_GIT_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
