"""`KeyedState`: all tables of one operator instance, in and out of checkpoints."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from rayflow.operators.base import FrozenState, OperatorContext, RestoredState
from rayflow.operators.state.table import StateTable


class KeyedState:
    """Opened in `Operator.open`. Order of calls: restore? -> { table | freeze | use of tables }* -> close.

    ``keys`` are the key columns of the stream; every table's key begins with them, and the key group of a row is that
    of these columns alone (rule K2).
    """

    def __init__(self, ctx: OperatorContext, keys: tuple[str, ...]) -> None:
        raise NotImplementedError

    def restore(self, states: Sequence[RestoredState]) -> None:
        """Before the first `table`. States of tables that are never declared are kept and frozen again, not lost."""
        raise NotImplementedError

    def table(
        self, name: str, keys: pa.Schema, values: pa.Schema, *, subkeys: int = 0, ttl_us: int | None = None
    ) -> StateTable:
        """The table of this name; the same one for the same name. ``subkeys``: how many columns at the end of ``keys``
        are not of the stream's key. ``ttl_us``: rows not written for so long (wall time) are gone.

        Raises `StateSchemaError` if restored rows of that name have other columns and no migration leads to these.
        """
        raise NotImplementedError

    def freeze(self) -> FrozenState:
        """The state of all tables as it is now, in time that does not grow with it (rule A3): for `Operator.snapshot`.

        Tables are named in the checkpoint as they are here. Under ``memory`` and ``fs`` each is a `FrozenTable` with
        pieces: rows changed since the last freeze, and a moving part of the rest, so that pieces can be let go. Under
        ``rocksdb`` all are in one `FrozenFolder`.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Release files and memory; safe at any time and twice."""
        raise NotImplementedError
