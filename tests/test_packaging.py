"""The two symlinks reach the user: wheel and sdist carry `rayflow`, whole, and nothing beside it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOT_SOURCE = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist", "out", "checkpoints")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a wheel and an sdist, built from a copy: a build writes into the tree it builds."""
    workspace = tmp_path_factory.mktemp("packaging")
    source = workspace / "source"
    shutil.copytree(ROOT, source, symlinks=True, ignore=NOT_SOURCE)
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--sdist",
        "--no-isolation",
        "--outdir",
        str(workspace),
    ]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return workspace


def modules_of(folder: str) -> set[str]:
    return {f"rayflow/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / folder).rglob("*.py") if path.is_file()}


def expected_files() -> set[str]:
    own = {path.relative_to(ROOT).as_posix() for path in (ROOT / "rayflow").rglob("*.py")}
    return own | modules_of("operators") | modules_of("storage") | {"rayflow/py.typed"}


def test_the_symlinks_are_relative() -> None:
    """An absolute link would work on one machine only."""
    assert os.readlink(ROOT / "rayflow" / "operators") == "../operators"
    assert os.readlink(ROOT / "rayflow" / "storage") == "../storage"


def test_the_wheel_holds_rayflow_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    metadata = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    assert {name.split("/")[0] for name in names - metadata} == {"rayflow"}
    assert names - metadata == expected_files()
    assert "rayflow/operators/__init__.py" in names
    assert "rayflow/storage/__init__.py" in names
    assert any(name.endswith("licenses/LICENSE") for name in metadata)


def test_the_sdist_can_build_the_same(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers()}
    assert expected_files() <= names
    assert {"pyproject.toml", "README.md", "LICENSE"} <= names


def test_the_wheel_imports_on_its_own(built: Path) -> None:
    """From the wheel alone, away from the repository: nothing needs the folders it was built from."""
    (wheel,) = built.glob("*.whl")
    probe = (
        "import rayflow.operators, rayflow.storage, rayflow;"
        f"assert rayflow.operators.__file__.startswith({str(wheel)!r}), rayflow.operators.__file__"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe],
        cwd=built,
        env={**os.environ, "PYTHONPATH": str(wheel)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
