from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from rayflow.operators.sinks.spool import Spool, sweep


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


OWNER = """
import sys, tempfile
tempfile.tempdir = sys.argv[1]
from rayflow.operators.sinks.spool import Spool
spool = Spool()
open(spool.path + "/rows", "w").close()
print(spool.path, flush=True)
sys.stdin.read()
"""


def test_a_spool_goes_when_it_is_closed(root: Path) -> None:
    spool = Spool()
    assert list(root.iterdir()) == [Path(spool.path)]
    spool.close()
    spool.close()
    assert list(root.iterdir()) == []


def test_the_spool_of_a_killed_process_goes_with_the_next_one_and_that_of_a_living_one_stays(root: Path) -> None:
    command = [sys.executable, "-c", OWNER, str(root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        theirs = Path(owner.stdout.readline().strip())
        first = Spool()
        sweep(root)
        assert (theirs / "rows").exists()
        assert Path(first.path).exists()
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        second = Spool()
        assert sorted(root.iterdir()) == sorted([Path(first.path), Path(second.path)])
        first.close()
        second.close()
