"""What PostgreSQL refuses, in one sentence that blames the right side: the data, the settings or the server."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pyarrow as pa

from rayflow.errors import ConfigError, ConnectorError, DataError, RayflowError
from rayflow.operators.sql.names import without_secrets

UNDEFINED_OBJECT = "42704"
BUSY = "55000"
"""Of a prepared transaction that another process is ending."""
_HOPELESS_CONNECT = re.compile(
    r"authentication failed|no password supplied|role .* does not exist|database .* does not exist|"
    r"no pg_hba.conf entry|not permitted to log in|permission denied for database|invalid URI|"
    r"invalid connection option|invalid port|missing \"=\" after",
    re.IGNORECASE,
)
_REFUSED_FOR_NOW = ("08", "40", "53", "55P03", "57", "58", "XX")
"""Connection, rollback (deadlock), resources, lock timeout, shutdown or cancel, system, internal."""
_DATA = ("22", "23", "21", "44")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a statement runs, for messages."""

    where: str
    table: str
    url: str


def translated(error: Exception, place: Place, rows: pa.Table | None = None) -> RayflowError:
    """An error of ADBC as one of ours; ``rows`` are those that were being copied."""
    text = _one_line(error, place)
    state = getattr(error, "sqlstate", None) or ""
    status = getattr(getattr(error, "status_code", None), "name", "")
    if state.startswith(_DATA):
        return DataError(f"{place.where} cannot write to table {place.table}: {text}{_value_at(error, rows)}")
    if state.startswith(_REFUSED_FOR_NOW) or (not state and status in ("IO", "TIMEOUT", "CANCELLED", "UNKNOWN")):
        return ConnectorError(f"{place.where} cannot write to table {place.table} for now: {text}")
    return ConfigError(
        f"{place.where} cannot write to table {place.table}: {text}; mend the table, its rights or the step"
    )


def not_connected(error: Exception, place: Place) -> RayflowError:
    text = _one_line(error, place)
    if _HOPELESS_CONNECT.search(text):
        return ConfigError(f"{place.where} cannot log in to PostgreSQL: {text}; correct the url")
    return ConnectorError(f"{place.where} cannot reach PostgreSQL: {text}")


def _one_line(error: Exception, place: Place) -> str:
    details = dict(getattr(error, "details", None) or [])
    said = [details.get(f"PG_DIAG_MESSAGE_{part}") for part in ("PRIMARY", "DETAIL", "HINT")]
    said = [s.decode(errors="replace") if isinstance(s, bytes) else s for s in said]
    if not said[0]:  # the keys come as text or as bytes
        raw = {(k.decode() if isinstance(k, bytes) else k): v for k, v in details.items()}
        said = [raw.get(f"PG_DIAG_MESSAGE_{part}") for part in ("PRIMARY", "DETAIL", "HINT")]
        said = [s.decode(errors="replace") if isinstance(s, bytes) else s for s in said]
    text = ": ".join(s.rstrip(". ") for s in said if s) if said[0] else str(error)
    text = re.sub(r"^[A-Z_]+: (\[libpq\] )?", "", " ".join(text.split())).rstrip(". ")
    return without_secrets(text, place.url)


def _value_at(error: Exception, rows: pa.Table | None) -> str:
    """The value that did not fit, where the server tells line and column."""
    found = re.search(r"COPY .*?, line (\d+)(?:, column ([^\n:]+))?", str(error))
    if rows is None or found is None:
        return ""
    line, column = int(found[1]) - 1, (found[2] or "").strip()
    if column not in rows.column_names or line >= rows.num_rows:
        return ""
    value = repr(rows.column(column)[line].as_py())
    return f"; column {column!r} has the value {value if len(value) <= 100 else value[:97] + '...'}"
