"""``rayflow checkpoints explain | gc``: why a checkpoint was slow or large, and what lies there for nothing."""

from __future__ import annotations

import click

from rayflow.cli.explaining import sentences
from rayflow.cli.inspection import JobDirectory, only_job, open_jobs, resolve
from rayflow.cli.options import as_json, print_json, storage_options
from rayflow.cli.tables import size
from rayflow.storage.filesystem import ObjectStore
from rayflow.storage.garbage import KEEP_ALL, collect_garbage


@click.command()
@click.argument("url")
@click.argument("which", default="latest", metavar="[N|latest]")
@storage_options
@as_json
def explain(url: str, which: str, storage_options: dict[str, str], as_json: bool) -> None:
    """Where the time and the bytes of one checkpoint went."""
    directory = only_job(url, storage_options)
    manifest = resolve(directory, which)
    told = sentences(manifest)
    if which == "latest":
        told += _unfinished(directory, manifest.checkpoint)
    if as_json:
        print_json({"job": directory.job, "checkpoint": manifest.checkpoint, "sentences": told})
        return
    for sentence in told:
        click.echo(sentence)


@click.command()
@click.argument("url")
@click.option("--keep", type=click.IntRange(min=1), help="Also drop complete checkpoints but for the newest N.")
@click.option("--delete", is_flag=True, help="Delete them; without this they are only listed.")
@storage_options
@as_json
def gc(url: str, keep: int | None, delete: bool, storage_options: dict[str, str], as_json: bool) -> None:
    """Files that no checkpoint needs: what crashed runs left behind. Savepoints are kept; safe while a job runs."""
    found = []
    for directory in open_jobs(url, storage_options):
        store = ObjectStore(directory.url, storage_options)
        garbage = collect_garbage(store, directory.job, keep=KEEP_ALL if keep is None else keep, delete=delete)
        found.append((directory, garbage))
    if as_json:
        print_json(
            [
                {
                    "job": d.job,
                    "url": d.url,
                    "deleted": delete,
                    "files": [{"path": path, "nbytes": nbytes} for path, nbytes in garbage.files],
                }
                for d, garbage in found
            ]
        )
        return
    for directory, garbage in found:
        for path, nbytes in garbage.files:
            click.echo(f"{path}  {size(nbytes)}")
        what = "deleted" if delete else "not needed; add --delete to delete them"
        count = len(garbage.files)
        told = f"{count} files, {size(garbage.nbytes)}, {what}" if count else "nothing to delete"
        click.echo(f"{directory.job}: {told}")


def _unfinished(directory: JobDirectory, newest: int) -> list[str]:
    """Newer checkpoints that have files but no manifest."""
    survey = directory.reader.survey()
    return [
        f"checkpoint {checkpoint} has {len(paths)} files and no manifest: it is under way, or failed and was not "
        "cleaned up; its job says why"
        for checkpoint, paths in sorted(survey.folders.items())
        if checkpoint > newest and checkpoint not in survey.manifests
    ]
