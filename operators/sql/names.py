"""Identifiers and addresses: quoted, never pasted; a password never comes into a message."""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import unquote, urlsplit

from rayflow.errors import ConfigError


def quoted(name: str) -> str:
    """An SQL identifier that means exactly ``name``. Raises `ConfigError` for one that no database can have."""
    if not name or "\0" in name:
        raise ConfigError(f"an SQL name must be a text that is not empty and without NUL, got {name!r}")
    return '"' + name.replace('"', '""') + '"'


def listed(names: Iterable[str]) -> str:
    return ", ".join(map(quoted, names))


def literal(text: str) -> str:
    """A text constant, where a statement takes no parameters. Backslashes are written so that no setting matters."""
    if "\0" in text:
        raise ConfigError(f"an SQL text cannot hold NUL, got {text!r}")
    doubled = text.replace("'", "''")
    return " E'" + doubled.replace("\\", "\\\\") + "'" if "\\" in text else f"'{doubled}'"


def passwords_of(url: str) -> tuple[str, ...]:
    """Every form in which a connection URL or a ``key=value`` string holds a password."""
    found = set(re.findall(r"(?:^|[?&;\s])(?:password|sslpassword|passwd)=([^&;\s]+)", url, flags=re.IGNORECASE))
    try:
        parts = urlsplit(url)
    except ValueError:
        parts = None
    if parts is not None and parts.password:
        found.add(parts.password)
    else:
        found |= set(re.findall(r"://[^/@\s]*?:([^/\s]*)@", url))
    return tuple(sorted({form for each in found if each for form in (each, unquote(each))}, key=len, reverse=True))


def without_secrets(text: str, url: str) -> str:
    """``text`` with the passwords of ``url`` blotted out."""
    for password in passwords_of(url):
        text = text.replace(password, "***")
    return text
