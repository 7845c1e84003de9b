"""The OpenAPI description as a page of one file: no script, nothing from another server."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from html import escape
from typing import Any

_STYLE = """:root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;max-width:56rem;margin:2rem auto;
padding:0 1rem}h2{margin-top:2.5rem}code,pre{font:14px/1.4 ui-monospace,monospace}pre{overflow:auto;padding:.75rem;
border:1px solid #8884;border-radius:6px}dt{margin-top:.5rem;font-weight:600}dd{margin-left:1.5rem}"""
_DIGEST = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
POLICY = f"default-src 'none'; style-src 'sha256-{_DIGEST}'; frame-ancestors 'none'; base-uri 'none'"
"""Content-Security-Policy: this very style and nothing else."""


def api_page(description: Mapping[str, Any]) -> str:
    """The page of an app's OpenAPI description."""
    parts = [
        f"<title>{escape(description['info']['title'])}: HTTP API</title>",
        f"<h1>{escape(description['info']['title'])}: HTTP API</h1>",
        f"<p>{escape(description['info'].get('description', ''))}</p>",
        '<p>For programs: <a href="openapi.json">openapi.json</a></p>',
    ]
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            parts.append(_operation(path, method, operation))
    parts.append("<h2>Schemas</h2>")
    for name, schema in description.get("components", {}).get("schemas", {}).items():
        parts.append(f'<h3 id="{escape(name)}">{escape(name)}</h3>{_schema(schema)}')
    body = "\n".join(parts)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<style>{_STYLE}</style>\n{body}\n</html>\n"
    )


def _operation(path: str, method: str, operation: Mapping[str, Any]) -> str:
    text = operation.get("description") or operation.get("summary", "")
    parts = [f"<h2><code>{escape(method.upper())} {escape(path)}</code></h2><p>{escape(text)}</p>"]
    for key in ("requestBody", "responses"):
        schemas = sorted(set(_references(operation.get(key, {}))))
        links = ", ".join(f'<a href="#{escape(name)}">{escape(name)}</a>' for name in schemas)
        if links:
            parts.append(f"<p>{'Body' if key == 'requestBody' else 'Answers'}: {links}</p>")
    return "".join(parts)


def _schema(schema: Mapping[str, Any]) -> str:
    rows = []
    for name, field in schema.get("properties", {}).items():
        needed = "" if name not in schema.get("required", ()) else " (required)"
        kind = {key: value for key, value in field.items() if key not in ("title", "description")}
        rows.append(
            f"<dt><code>{escape(name)}</code>{needed}</dt><dd>{escape(field.get('description', ''))} "
            f"<code>{escape(json.dumps(kind))}</code></dd>"
        )
    examples = "".join(f"<pre>{escape(json.dumps(example))}</pre>" for example in schema.get("examples", ()))
    return f"<p>{escape(schema.get('description', ''))}</p><dl>{''.join(rows)}</dl>{examples}"


def _references(value: Any) -> list[str]:
    """Names of the schemas that are referred to anywhere in a value."""
    if isinstance(value, Mapping):
        named = [value["$ref"].rpartition("/")[2]] if isinstance(value.get("$ref"), str) else []
        return named + [name for nested in value.values() for name in _references(nested)]
    if isinstance(value, list):
        return [name for nested in value for name in _references(nested)]
    return []
