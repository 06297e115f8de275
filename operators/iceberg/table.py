"""An Iceberg table seen from outside: its catalog, what its columns may be, and how one commit is made once.

The catalog is used through ``pyiceberg``. A commit names the snapshot that it follows, and the catalog refuses it when
there is another by now; but ``pyiceberg`` then builds it anew on top of that one and tries again, four times by
default. A coordinator that does not know that it was replaced would so add what its successor has added already. Here
every commit is made from a handle that tries once (`tries_once`), and whoever is refused looks at the table again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from rayflow.errors import ConfigError, ConnectorError, PlanError, RayflowError, SchemaChangedError
from rayflow.operators.sources.schemas import describe, difference, plain, same_columns

_RETRIES = "commit.retry.num-retries"
_METRICS = "write.metadata.metrics.column."


def check_library() -> None:
    """Raises `ConfigError` where the library is not installed."""
    try:
        import pyiceberg.catalog  # noqa: F401
    except ImportError as error:
        raise ConfigError("write_iceberg needs a library: pip install 'rayflow[iceberg]'") from error


@dataclass(eq=False, slots=True)
class IcebergTable:
    """A table by its name in a catalog, which is opened when it is first asked. Of one process."""

    name: str
    properties: Mapping[str, str] = field(repr=False)
    """Of the catalog, as for ``pyiceberg.catalog.load_catalog``; ``name`` is the catalog's own."""
    _catalog: Any = None

    def catalog(self) -> Any:
        """Raises `ConfigError` for properties that say no catalog, `ConnectorError` for one that cannot be reached."""
        if self._catalog is None:
            from pyiceberg.catalog import load_catalog
            from pyiceberg.exceptions import NotInstalledError

            rest = {key: value for key, value in self.properties.items() if key != "name"}
            try:
                self._catalog = load_catalog(self.properties.get("name", "default"), **rest)
            except (ValueError, NotInstalledError) as error:
                raise ConfigError(f"write_iceberg(catalog) says no catalog: {error}; see pyiceberg's docs") from error
            except Exception as error:
                raise self.failed("reach the catalog of", error) from error
        return self._catalog

    def open(self) -> Any:
        """The table as it is now, None when there is none. Raises `ConnectorError`."""
        from pyiceberg.exceptions import NoSuchNamespaceError, NoSuchTableError

        catalog = self.catalog()
        try:
            return catalog.load_table(self.name)
        except (NoSuchTableError, NoSuchNamespaceError):
            return None
        except Exception as error:
            raise self.failed("read", error) from error

    def create(self, schema: pa.Schema, partition_by: Sequence[str]) -> Any:
        """A new empty table, its namespace too; the one that is there if somebody was faster."""
        for last in (False, True):
            try:
                self._create(schema, partition_by)
            except Exception as error:
                found = self.open()
                if found is not None:
                    return found
                if last:  # the first time somebody may have been faster with the namespace
                    raise self.failed("create", error) from error
            else:
                break
        return self.open()

    def _create(self, schema: pa.Schema, partition_by: Sequence[str]) -> None:
        catalog = self.catalog()
        catalog.create_namespace_if_not_exists(self.name.rpartition(".")[0])
        with catalog.create_table_transaction(self.name, schema=schema) as making:
            if partition_by:
                with making.update_spec() as spec:
                    for column in partition_by:
                        spec.add_identity(column)

    def close(self) -> None:
        catalog, self._catalog = self._catalog, None
        if catalog is not None:
            catalog.close()

    def failed(self, what: str, error: Exception) -> RayflowError:
        return ConnectorError(
            f"cannot {what} the Iceberg table {self.name!r}: {type(error).__name__}: {str(error).strip()}; nothing "
            "committed is lost, check that the catalog and its storage can be reached and written"
        )


class KeepingIO:
    """The ``FileIO`` of a table, but what is to be deleted is only noted.

    ``pyiceberg`` deletes the manifests of a commit that was refused. A client or a proxy that sends a request again
    because the answer was lost is refused because the first has been done: those manifests are in the table.
    """

    def __init__(self, io: Any) -> None:
        self._io = io
        self._unwanted: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._io, name)

    def delete(self, location: str) -> None:
        self._unwanted.append(location)

    def clean(self) -> None:
        """The commit has been done: what is unwanted are old metadata, where the table is set up so."""
        for location in self._unwanted:
            with contextlib.suppress(Exception):  # as pyiceberg: the commit is not undone by a file that stays
                self._io.delete(location)


def tries_once(table: Any, partition_by: Sequence[str] = ()) -> Any:
    """The handle, with properties that hold for what is committed through it; the table itself keeps its own.

    So other writers of the table go on trying again as they do. Partitions are read from the statistics of the files
    (``add_files``): those of their columns are needed, whatever the table says of statistics.
    """
    table.io = KeepingIO(table.io)
    own = {_RETRIES: "0", **{f"{_METRICS}{column}": "full" for column in partition_by}}
    metadata = table.metadata
    table.metadata = metadata.model_copy(update={"properties": {**metadata.properties, **own}})
    return table


def columns_of(schema: pa.Schema) -> pa.Schema:
    """The columns as an Iceberg table holds them: times in us, zones as UTC, plain texts, integers of 32 and 64 bits.

    Raises `PlanError` for a type that an Iceberg table cannot hold whole.
    """
    return pa.schema([pa.field(f.name, _type_of(f.name, f.type)) for f in schema])


def columns_in(table: Any) -> pa.Schema:
    """The columns of a table, as `columns_of` writes them."""
    return columns_of(plain(table.schema().as_arrow()))


def check_columns(table: Any, got: pa.Schema, partition_by: Sequence[str], *, where: str, name: str) -> None:
    """Raises `SchemaChangedError` for rows that the table was not made for."""
    try:
        expected = columns_in(table)
    except PlanError as error:
        raise SchemaChangedError(f"{where} cannot append to the Iceberg table {name!r}: {error}") from error
    if not same_columns(expected, got):
        raise SchemaChangedError(
            f"{where} cannot append to the Iceberg table {name!r}: {difference(expected, got)}; expected "
            f"{describe(expected)}, got {describe(got)}; select and cast the columns alike, or write to a new table"
        )
    fields = table.spec().fields
    found = [f"{f.transform}({table.schema().find_column_name(f.source_id)})" for f in fields]
    if found != [f"identity({column})" for column in partition_by]:
        raise SchemaChangedError(
            f"{where} cannot append to the Iceberg table {name!r}: it is partitioned by {found or 'nothing'}, "
            f"got partition_by={list(partition_by)}; say the same, identity is the only transform that can be written"
        )


def _type_of(name: str, kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        return _type_of(name, kind.value_type)
    if pa.types.is_int8(kind) or pa.types.is_int16(kind):
        return pa.int32()
    if pa.types.is_timestamp(kind) and kind.unit != "ns":
        return pa.timestamp("us", None if kind.tz is None else "UTC")
    if pa.types.is_time(kind) and kind.unit != "ns":
        return pa.time64("us")
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return pa.binary()
    if pa.types.is_date(kind):
        return pa.date32()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.list_(_type_of(name, kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(f.name, _type_of(f"{name}.{f.name}", f.type)) for f in kind])
    if not any(same(kind) for same in _SAME):
        raise PlanError(
            f"write_iceberg cannot hold column {name!r} of type {kind}: such rows are not written to Iceberg "
            "tables; cast it first (unsigned integers to int64, times in ns to us)"
        )
    return kind


_SAME = (
    pa.types.is_int32,
    pa.types.is_int64,
    pa.types.is_float32,
    pa.types.is_float64,
    pa.types.is_boolean,
    pa.types.is_string,
    pa.types.is_binary,
    pa.types.is_fixed_size_binary,
    pa.types.is_decimal128,
)
