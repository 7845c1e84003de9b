"""Addresses of MLflow stores: of a sqlite store from its path and back, and a name however an address is spelled."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from pathlib import Path
from urllib.parse import unquote, urlsplit

from lavic.config.secrets import redact
from lavic.errors import LaunchError

DATABASE = "mlflow.db"
_ODD = re.compile("[%?#\udc80-\udcff]")
"""Characters of a path that mean something else in a database URL, or that are not text."""


def default_store(folder: Path) -> str:
    """The address of the sqlite store in a folder; symbolic links are followed, so that one folder has one store."""
    return sqlite_uri(folder.resolve() / DATABASE)


def sqlite_uri(path: Path) -> str:
    """The address of the sqlite store in a file.

    SQLAlchemy 2.0 and 2.1 quote a database's name differently, and MLflow makes the parent folder of what follows
    `sqlite:///` without unquoting it. Both leave `sqlite+pysqlite:` with SQLite's own `file:` URI alone.

    Raises:
        LaunchError: The path needs quoting and mlflow, which brings SQLAlchemy, is not installed.
    """
    path = path.absolute()
    if not _ODD.search(str(path)):
        return f"sqlite:///{path}"
    try:
        from sqlalchemy import URL
    except ModuleNotFoundError:
        raise LaunchError("MLflow is not installed; install it with: pip install 'lavic[mlflow]'") from None
    url = URL.create("sqlite+pysqlite", database=path.as_uri(), query={"uri": "true"})
    return url.render_as_string(hide_password=False)


def anchored(uri: str) -> str:
    """An address, or a `@FILE` that holds one, which means the same from any folder; symbolic links stay."""
    if uri.startswith("@"):
        return f"@{Path(uri[1:]).expanduser().absolute()}"
    if Path(uri).parts[:1] == ("..",) or uri.startswith("./"):
        return str(Path(uri).absolute())
    path = sqlite_path(uri)
    return uri if path is None or "?" in uri else sqlite_uri(path)


def sqlite_path(uri: str) -> Path | None:
    """The file of a sqlite store; None for any other address, and for a database in memory."""
    if not uri.startswith("sqlite"):
        return None
    if uri.startswith("sqlite:///") and not _ODD.search(uri):
        name = uri.removeprefix("sqlite:///")
    else:
        try:
            from sqlalchemy import make_url
            from sqlalchemy.exc import ArgumentError
        except ModuleNotFoundError:
            return None
        try:
            url = make_url(uri)
        except (ArgumentError, ValueError):
            return None
        name = url.database or ""
        if url.query.get("uri") == "true":
            name = unquote(urlsplit(name).path, errors="surrogateescape")
    return Path(name).absolute() if name and name != ":memory:" else None


def store_key(uri: str) -> str:
    """A name for a store that does not depend on how its address is spelled, and that holds no secret.

    The name of a store is its own name.
    """
    path = Path(uri.removeprefix("sqlite:")) if uri.startswith("sqlite:/") and uri[8:9] != "/" else sqlite_path(uri)
    if path is not None:
        return f"sqlite:{path.resolve()}"
    return re.sub(r"^(https?://)[^/@]*@", r"\1", redact(uri)).rstrip("/")


def lock_path(uri: str) -> Path:
    """A file whose lock keeps the processes of one store apart: beside a sqlite store, else one of the user's."""
    path = sqlite_path(uri)
    if path is not None:
        return path.with_name(f".{path.name}.lock")
    digest = hashlib.sha256(store_key(uri).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"lavic-mlflow-{os.getuid()}-{digest}.lock"
