"""A Delta table seen from outside: where it is, what its columns may be, what has been committed to it by whom.

The log of a table is written by ``deltalake``. It knows application transactions: a commit may carry (application id,
version), readers of the log can ask for the newest version of an id, and of two commits that are made from one state of
the table with one id the second is refused. That is all that exactly-once needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from rayflow.errors import ConfigError, ConnectorError, PlanError, RayflowError, SchemaChangedError
from rayflow.operators.sources.paths import is_local
from rayflow.operators.sources.schemas import describe, difference, plain, same_columns

_S3_OPTIONS = {
    "key": "AWS_ACCESS_KEY_ID",
    "secret": "AWS_SECRET_ACCESS_KEY",
    "token": "AWS_SESSION_TOKEN",
    "endpoint_url": "AWS_ENDPOINT_URL",
}
"""What fsspec calls it -> what deltalake does."""


def deltalake() -> Any:
    """The library. Raises `ConfigError` where it is not installed."""
    try:
        import deltalake
    except ImportError as error:
        raise ConfigError("write_delta needs a library: pip install 'rayflow[delta]'") from error
    return deltalake


@dataclass(frozen=True, slots=True)
class DeltaTable:
    """``options`` as for fsspec; keys in capitals go to deltalake as they are."""

    url: str
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def open(self) -> Any:
        """The newest version, None when there is no table. Raises `ConnectorError`."""
        library = deltalake()
        try:
            return library.DeltaTable(self.url, storage_options=self.log_options())
        except library.exceptions.TableNotFoundError:
            return None
        except Exception as error:
            raise self.failed("read", error) from error

    def create(self, schema: pa.Schema, partition_by: tuple[str, ...]) -> Any:
        """A new empty table; the one that is there if somebody was faster."""
        library = deltalake()
        try:
            return library.DeltaTable.create(
                self.url,
                schema=schema,
                mode="ignore",
                partition_by=list(partition_by) or None,
                storage_options=self.log_options(),
            )
        except Exception as error:
            raise self.failed("create", error) from error

    def log_options(self) -> dict[str, str]:
        """The options as deltalake wants them."""
        if is_local(self.url):
            return {}
        found = {name: str(value) for name, value in self.options.items() if name.isupper()}
        client = dict(self.options.get("client_kwargs", {}))
        known = {**self.options, "endpoint_url": self.options.get("endpoint_url", client.get("endpoint_url"))}
        for name, theirs in _S3_OPTIONS.items():
            if known.get(name):
                found.setdefault(theirs, str(known[name]))
        found.setdefault("AWS_REGION", str(client.get("region_name", "us-east-1")))
        if found.get("AWS_ENDPOINT_URL", "").startswith("http://"):
            found.setdefault("AWS_ALLOW_HTTP", "true")
        # Without it two writers could both make one version of the log.
        found.setdefault("aws_conditional_put", "etag")
        return found

    def failed(self, what: str, error: Exception) -> RayflowError:
        return ConnectorError(
            f"cannot {what} the Delta table {self.url!r}: {type(error).__name__}: {str(error).strip()}; nothing "
            "committed is lost, check that the place can be reached and written"
        )


def columns_of(schema: pa.Schema) -> pa.Schema:
    """The columns as a Delta table holds them: times in us, zones as UTC, plain texts.

    Raises `PlanError` for a type that a Delta table cannot hold whole.
    """
    return pa.schema([pa.field(f.name, _type_of(f.name, f.type), f.nullable) for f in schema])


def check_columns(table: Any, got: pa.Schema, partition_by: Sequence[str], *, where: str, url: str) -> None:
    """Raises `SchemaChangedError` for rows that the table was not made for."""
    expected = columns_of(plain(pa.schema(table.schema().to_arrow())))
    if not same_columns(expected, plain(got)):
        raise SchemaChangedError(
            f"{where} cannot append to the Delta table {url!r}: {difference(expected, got)}; expected "
            f"{describe(expected)}, got {describe(got)}; select and cast the columns alike, or write to a new table"
        )
    found = list(table.metadata().partition_columns)
    if found != list(partition_by):
        raise SchemaChangedError(
            f"{where} cannot append to the Delta table {url!r}: it is partitioned by {found or 'nothing'}, "
            f"got partition_by={list(partition_by)}; say the same"
        )


def _type_of(name: str, kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        return _type_of(name, kind.value_type)
    if pa.types.is_timestamp(kind) and kind.unit != "ns":
        return pa.timestamp("us", None if kind.tz is None else "UTC")
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind) or pa.types.is_fixed_size_binary(kind):
        return pa.binary()
    if pa.types.is_date(kind):
        return pa.date32()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.list_(kind.value_field.with_type(_type_of(name, kind.value_type)))
    if pa.types.is_struct(kind):
        return pa.struct([f.with_type(_type_of(f"{name}.{f.name}", f.type)) for f in kind])
    plain = (
        pa.types.is_signed_integer(kind)
        or pa.types.is_float32(kind)
        or pa.types.is_float64(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_string(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_decimal128(kind)
    )
    if not plain:
        raise PlanError(
            f"write_delta cannot hold column {name!r} of type {kind}: a Delta table has no such type; cast it first "
            "(unsigned integers to int64, times in ns to us)"
        )
    return kind
