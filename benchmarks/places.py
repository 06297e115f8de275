"""Where a run writes, what it wrote, and what it left behind: a local folder or a prefix on an S3 server."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

import rayflow as rf
from rayflow.core.ids import CheckpointId
from rayflow.storage.catalog import CheckpointReader
from rayflow.storage.filesystem import ObjectStore
from rayflow.storage.layout import CHECKPOINTS, SHARED, job_root, manifest_path, released_path


class Place(Protocol):
    """One run's own room: output below ``out``, checkpoints beside it."""

    @property
    def out(self) -> str: ...

    @property
    def storage_options(self) -> dict[str, Any]: ...

    def checkpoints(self, interval: str) -> rf.CheckpointConfig: ...

    def output(self) -> pa.Table:
        """All that readers of the output see."""

    def leftovers(self, job: str) -> list[str]:
        """What lies in the output beside its files, and below ``chk-*`` and ``shared`` without being named."""


@dataclass(frozen=True, slots=True)
class LocalPlace:
    folder: Path

    @property
    def out(self) -> str:
        return str(self.folder / "out")

    @property
    def storage_options(self) -> dict[str, Any]:
        return {}

    def checkpoints(self, interval: str) -> rf.CheckpointConfig:
        return rf.CheckpointConfig(str(self.folder / "checkpoints"), interval=interval)

    def output(self) -> pa.Table:
        return pa.concat_tables(pq.read_table(path) for path in sorted(Path(self.out).glob("*.parquet")))

    def leftovers(self, job: str) -> list[str]:
        odd = [str(path) for path in sorted(Path(self.out).iterdir()) if not _is_part(path.name)]
        root = job_root(str(self.folder / "checkpoints"), job)
        empty = [str(path) for path in Path(root).glob("chk-*") if not any(path.iterdir())]
        return odd + empty + unnamed(ObjectStore(root), job)


@dataclass(frozen=True, slots=True)
class S3Place:
    """``client`` is boto3's; ``bucket`` is this run's alone."""

    bucket: str
    options: dict[str, Any]
    client: Any

    @property
    def out(self) -> str:
        return f"s3://{self.bucket}/out"

    @property
    def storage_options(self) -> dict[str, Any]:
        return self.options

    def checkpoints(self, interval: str) -> rf.CheckpointConfig:
        return rf.CheckpointConfig(f"s3://{self.bucket}/checkpoints", interval=interval, storage_options=self.options)

    def output(self) -> pa.Table:
        return pa.concat_tables(
            pq.read_table(pa.BufferReader(self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read()))
            for key in self._keys("out/")
            if _is_part(key.removeprefix("out/"))
        )

    def leftovers(self, job: str) -> list[str]:
        odd = [key for key in self._keys("out/") if not _is_part(key.removeprefix("out/"))]
        uploads = self.client.list_multipart_uploads(Bucket=self.bucket).get("Uploads", [])
        odd += [f"unfinished upload of {upload['Key']}" for upload in uploads]
        root = job_root(f"s3://{self.bucket}/checkpoints", job)
        return odd + unnamed(ObjectStore(root, dict(self.options)), job)

    def _keys(self, prefix: str) -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        return sorted(found["Key"] for page in pages for found in page.get("Contents", []))


def s3_place(server: Any) -> S3Place:
    """A new bucket on ``server`` (`tests.servers.S3Server`)."""
    return S3Place(server.bucket().removeprefix("s3://"), server.storage_options, server.client())


def unnamed(store: ObjectStore, job: str) -> list[str]:
    """Files below ``chk-*`` and ``shared`` that no manifest names; a manifest that counts for nothing is one too. The
    mark of a savepoint that may go belongs to its manifest."""
    reader = CheckpointReader(store, job)
    directory = reader.survey()
    named: set[str] = set()
    for checkpoint in directory.manifests:
        with contextlib.suppress(rf.CorruptCheckpointError):  # named by nobody, so a leftover
            manifest = reader.load(CheckpointId(checkpoint))
            if manifest is not None:
                named |= {manifest_path(checkpoint), *(file.path for file in manifest.files())}
                named.add(released_path(checkpoint))
    return [path for path in directory.files if path.startswith((CHECKPOINTS, SHARED)) and path not in named]


def _is_part(name: str) -> bool:
    return name.startswith("part-") and name.endswith(".parquet")
