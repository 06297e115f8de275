"""Where everything lies below a job's checkpoint directory. Every path has one builder, and where needed one parser.

    chk-00000042/manifest.json                            the commit point of checkpoint 42 (rule C5)
    chk-00000042/<chain>-<subtask>.arrows                 all small state that a subtask wrote for checkpoint 42
    chk-00000042/released                                 savepoint 42 is needed no longer, and kept like any other
    shared/00000042-<operator>-<subtask>.<state>-<n>.arrow   a piece of state that later manifests may name too (C7)
    shared/00000042-<operator>-<subtask>.<file>.sst       the same for a file of a store on local disk
    coordinators/00000003.claim.json                      the third coordinator of this directory exists (rule C8)
    coordinators/00000003.restored-00000042.ids-00000101-00000201.json   what it decided (`rayflow.storage.fencing`)
    staging/...                                           rows that sinks keep until they are committed; their own
    savepoints/...                                        the user's own; never deleted by rayflow

Text of users (job, operator, state names) is quoted injectively: two different names never give one path, and no name
can leave the directory. What is shared is named by the checkpoint that wrote it, not by its content: a content name
could be deleted for an old checkpoint just while it is written again for a new one. Numbers have at least eight digits,
so that people see them in order; parsers take more.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from urllib.parse import unquote as _percent_decode

from rayflow.core.ids import CheckpointId

COORDINATORS = "coordinators/"
CHECKPOINTS = "chk-"
SHARED = "shared/"
SAVEPOINTS = "savepoints/"
STAGING = "staging"

_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")
_QUOTED_MAX = 100
_CHECKPOINT = re.compile(r"chk-(\d{8,})/(.+)")
_SHARED = re.compile(r"shared/(\d{8,})-.+")
_IMMUTABLE = re.compile(r"shared/\d{8,}-[^./]+\.([^./]+)\.sst")
_CLAIM = re.compile(r"coordinators/(\d{8,})\.claim\.json")
_DECISION = re.compile(r"coordinators/(\d{8,})\.restored-(none|\d{8,})\.ids-(\d{8,})-(\d{8,})\.json")


@dataclass(frozen=True, slots=True, order=True)
class Decision:
    """What coordinator ``incarnation`` went on from, and which ids it may give to checkpoints (rule C4).

    All of it stands in the name of its file, so that one listing tells every decision and none can be torn.
    """

    incarnation: int
    restored: CheckpointId | None
    ids_from: int
    ids_until: int
    """Exclusive. A later file of the same coordinator may raise it."""


def quote(text: str, *, dots: bool = True) -> str:
    """``text`` as one path part: letters, digits, ``_ -`` (and inner dots if ``dots``) stay, other bytes are %XX.

    Long text keeps its beginning and a SHA-256 of the whole, behind a ``~`` that short text never contains.
    """
    if not text:
        return "%"  # a lone percent sign is the quoting of nothing else
    out = []
    for position, char in enumerate(text):
        if char in _PLAIN or (dots and char == "." and position > 0):
            out.append(char)
        else:
            out.extend(f"%{byte:02X}" for byte in char.encode("utf-8", "surrogatepass"))
    quoted = "".join(out)
    if len(quoted) <= _QUOTED_MAX:
        return quoted
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:40]
    return f"{quoted[: _QUOTED_MAX - 41]}~{digest}"


def unquote(part: str) -> str | None:
    """The text that `quote` was given; None when it was too long to be kept."""
    if "~" in part:
        return None
    return "" if part == "%" else _percent_decode(part, errors="surrogatepass")


def job_root(url: str, job: str) -> str:
    """The checkpoint directory of ``job`` below the configured ``url``."""
    base = url if url.endswith("://") else url.rstrip("/") + "/"
    return base + quote(job)


def staging_url(url: str, job: str) -> str:
    """Where the sinks of ``job`` may keep rows: beside its checkpoints, and never touched by retention."""
    return f"{job_root(url, job)}/{STAGING}"


def checkpoint_folder(checkpoint: int) -> str:
    return f"chk-{checkpoint:08d}/"


def manifest_path(checkpoint: int) -> str:
    return f"{checkpoint_folder(checkpoint)}manifest.json"


def pack_path(checkpoint: int, chain: str, subtask: int) -> str:
    return f"{checkpoint_folder(checkpoint)}{quote(chain, dots=False)}-{subtask}.arrows"


def released_path(checkpoint: int) -> str:
    """An object, whatever is in it, that takes the pin off a savepoint kept as a checkpoint."""
    return f"{checkpoint_folder(checkpoint)}released"


def shared_prefix(checkpoint: int) -> str:
    """Of everything in ``shared/`` that this checkpoint has written."""
    return f"{SHARED}{checkpoint:08d}-"


def piece_path(checkpoint: int, operator: str, subtask: int, name: str, number: int) -> str:
    """``number`` tells the pieces of one state in one checkpoint apart."""
    where = f"{quote(operator, dots=False)}-{subtask}.{quote(name, dots=False)}-{number}"
    return f"{shared_prefix(checkpoint)}{where}.arrow"


def immutable_path(checkpoint: int, operator: str, subtask: int, immutable: str) -> str:
    """A file of a local store; see `FolderFile.immutable`."""
    return f"{shared_prefix(checkpoint)}{quote(operator, dots=False)}-{subtask}.{quote(immutable, dots=False)}.sst"


def claim_path(incarnation: int) -> str:
    return f"{COORDINATORS}{incarnation:08d}.claim.json"


def decision_path(decision: Decision) -> str:
    restored = "none" if decision.restored is None else f"{decision.restored:08d}"
    ids = f"{decision.ids_from:08d}-{decision.ids_until:08d}"
    return f"{COORDINATORS}{decision.incarnation:08d}.restored-{restored}.ids-{ids}.json"


def parse_manifest(path: str) -> CheckpointId | None:
    """The checkpoint whose manifest ``path`` is; None if it is something else."""
    match = _CHECKPOINT.fullmatch(path)
    return CheckpointId(int(match[1])) if match and match[2] == "manifest.json" else None


def parse_checkpoint(path: str) -> CheckpointId | None:
    """The checkpoint in whose folder ``path`` lies; None if it lies elsewhere."""
    match = _CHECKPOINT.fullmatch(path)
    return CheckpointId(int(match[1])) if match else None


def parse_shared(path: str) -> CheckpointId | None:
    """The checkpoint that wrote this file of ``shared/``; None if it lies elsewhere."""
    match = _SHARED.fullmatch(path)
    return CheckpointId(int(match[1])) if match else None


def parse_immutable(path: str) -> str | None:
    """The `FolderFile.immutable` that `immutable_path` was given; None if it is another file, or was too long."""
    match = _IMMUTABLE.fullmatch(path)
    return unquote(match[1]) if match else None


def parse_claim(path: str) -> int | None:
    match = _CLAIM.fullmatch(path)
    return int(match[1]) if match else None


def parse_decision(path: str) -> Decision | None:
    match = _DECISION.fullmatch(path)
    if match is None:
        return None
    restored = None if match[2] == "none" else CheckpointId(int(match[2]))
    return Decision(int(match[1]), restored, int(match[3]), int(match[4]))
