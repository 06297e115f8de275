"""Mapped files: no handle each, gone when nobody reads them, small when they are released."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from rayflow.operators.joins.files import RowFiles
from rayflow.operators.joins.kernels import sort_rows
from rayflow.operators.mapping import Mapping
from rayflow.operators.spill import RowOrder, Spill


def _handles() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def _resident_kb(path: Path) -> int:
    """Of mappings of the file."""
    lines, found, mine = Path("/proc/self/smaps").read_text().splitlines(), 0, False
    for line in lines:
        if line[0] in "0123456789abcdef" and "-" in line.split()[0]:
            mine = line.endswith(str(path))
        elif mine and line.startswith("Rss:"):
            found += int(line.split()[1])
    return found


def test_a_mapping_holds_no_handle_and_gives_its_memory_back(tmp_path: Path) -> None:
    before, path = _handles(), tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 4_096)
    mapping = Mapping(path)
    assert _handles() == before
    content = np.frombuffer(mapping.buffer, np.uint8)
    assert int(content.sum()) == 4_096 * sum(range(256))
    assert _resident_kb(path) >= 1_024
    mapping.release()
    assert _resident_kb(path) == 0
    path.unlink()
    assert int(content[-1]) == 255, "it may be read on"


def test_state_on_disk_takes_no_handles(tmp_path: Path) -> None:
    before = _handles()
    rows = pa.record_batch({"k": np.arange(50), "w": pa.array(np.zeros(50, np.int64), pa.timestamp("us"))})
    files = RowFiles(lambda _: tmp_path, 1, ["k"], "under test")
    joined = [files.write(sort_rows(rows, ["k"], np.arange(50))) for _ in range(20)]
    spill = Spill(lambda _: tmp_path, 1, RowOrder("w", ("k",)), "under test")
    windows = [spill.write_one(spill.order.arrange(pa.Table.from_batches([rows]))) for _ in range(20)]
    assert _handles() == before
    assert len(joined) + len(windows) == 40
