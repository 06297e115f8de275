"""Identifiers and addresses: quoted, never pasted; a password never comes into a message."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final
from urllib.parse import unquote, urlsplit

from rayflow.errors import ConfigError

_PATIENCE: Final = (
    ("connect_timeout", 10),
    ("keepalives_idle", 15),
    ("keepalives_interval", 5),
    ("keepalives_count", 4),
    ("tcp_user_timeout", 30_000),
)
"""Seconds, the last milliseconds."""
_PASSWORD: Final = re.compile(
    r"(?:^|[?&;\s])(?:password|sslpassword|passwd)\s*=\s*('(?:[^'\\]|\\.)*'?|[^&;\s]+)", re.IGNORECASE
)


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


def with_patience(url: str) -> str:
    """``url`` for libpq with bounds on waiting for a server that does not answer, but for those it sets itself.

    A subtask that waits for longer is taken for one that hangs; a coordinator would wait for hours.
    """
    missing = [f"{name}={value}" for name, value in _PATIENCE if not re.search(rf"(?:^|[?&\s]){name}\s*=", url)]
    if not url.startswith(("postgresql://", "postgres://")):
        return " ".join([url, *missing])
    return f"{url}{'&' if '?' in url else '?'}{'&'.join(missing)}" if missing else url


def passwords_of(url: str) -> tuple[str, ...]:
    """Every form in which a connection URL or a ``key=value`` string holds a password."""
    found = set(_PASSWORD.findall(url))
    for text in [each.strip("'") for each in found if each.startswith("'")]:
        found |= {
            text,
            re.sub(r"\\(.)", r"\1", text),
            *(word for word in text.split() if len(word) > 2),
        }  # libpq tells the word it stumbled over
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
