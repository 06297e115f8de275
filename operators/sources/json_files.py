"""Newline-delimited JSON files as a source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.json as pj

from rayflow.core.manifest import Json
from rayflow.operators.sources.lines import Parser, open_binary
from rayflow.operators.sources.paths import FileInfo, Paths
from rayflow.operators.sources.text_files import BOM, Opening, TextSource, one_batch


class JsonSource(TextSource):
    """Reads files with one JSON object a line, in parallel by byte ranges; paths as for `CsvSource`.

    Without ``schema`` the first 4 MB decide (texts that are ISO 8601 timestamps become timestamps). Members that the
    schema does not have are left out, missing ones are null.
    """

    _suffixes = (".json", ".jsonl", ".ndjson")
    _function = "read_json"

    def __init__(
        self,
        paths: Paths,
        *,
        schema: pa.Schema | None = None,
        on_error: Literal["fail", "skip"] = "fail",
        storage_options: Mapping[str, Any] | None = None,
        columns: Sequence[str] | None = None,
        watch_s: float | None = None,
    ) -> None:
        super().__init__(
            paths, schema=schema, on_error=on_error, storage_options=storage_options, columns=columns, watch_s=watch_s
        )

    def _opening(self, file: FileInfo) -> Opening | None:
        binary = open_binary(file.url, self.storage_options)
        try:
            first = binary.read(len(BOM))
        finally:
            binary.close()
        return Opening((), len(BOM) if first == BOM else 0) if first else None

    def _infer(self, block: bytes) -> pa.Schema:
        if not block.strip():
            raise pa.ArrowInvalid("there are only blank lines")
        return pj.read_json(pa.BufferReader(block), read_options=_json_options(block)).schema

    def _parser(self, schema: pa.Schema, split: Json) -> Parser:
        return _JsonParser(schema)


@dataclass(frozen=True)
class _JsonParser(Parser):
    schema: pa.Schema

    @property
    def hint(self) -> str:
        return "there must be one JSON object on each line: mend it, pass a schema that fits"

    def parse(self, block: bytes) -> pa.RecordBatch:
        # pyarrow reads no dates from JSON texts; they pass as timestamps.
        read_as = pa.schema(
            [pa.field(f.name, pa.timestamp("s") if pa.types.is_date(f.type) else f.type) for f in self.schema]
        )
        table = pj.read_json(
            pa.BufferReader(block),
            read_options=_json_options(block),
            parse_options=pj.ParseOptions(explicit_schema=read_as, unexpected_field_behavior="ignore"),
        )
        return one_batch(table.select(self.schema.names).cast(self.schema), self.schema)


def _json_options(block: bytes) -> pj.ReadOptions:
    return pj.ReadOptions(use_threads=False, block_size=len(block) + 64)
