"""``rayflow compact``: small files of an output into larger ones."""

from __future__ import annotations

from dataclasses import asdict

import click

from rayflow.cli.options import as_json, print_json, storage_options
from rayflow.compaction import TARGET_BYTES, compact_files


@click.command()
@click.argument("url")
@click.option("--target-bytes", type=click.IntRange(min=1), default=TARGET_BYTES, show_default=True, help="Of a file.")
@storage_options
@as_json
def compact(url: str, target_bytes: int, storage_options: dict[str, str], as_json: bool) -> None:
    """Merge the small files of a Parquet output that was written with manifest=True. Safe while its job runs."""
    done = compact_files(url, target_bytes=target_bytes, storage_options=storage_options)
    if as_json:
        print_json(asdict(done))
    else:
        click.echo(f"{done.merged} files merged into {done.written}; {done.removed} left by earlier calls removed")
