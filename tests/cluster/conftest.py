"""One Ray cluster for all tests of this folder that ask for it: starting one takes seconds."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from rayflow.cluster.job import attach, running_jobs
from rayflow.errors import RayflowError
from tests.cluster.ray_harness import story, subtask_processes, until

CPUS = 8
"""More than the machine has: what is tested is the protocol, not the speed."""


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """Address of a Ray cluster of this session."""
    with warnings.catch_warnings():
        # Ray leaves a log file open in its own process set-up.
        warnings.simplefilter("ignore")
        context = ray.init(
            address="local",
            num_cpus=CPUS,
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    yield str(context.address_info["gcs_address"])
    ray.shutdown()


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test on the cluster leaves no job and no process of one behind, however it ended."""
    yield
    if "cluster" not in request.fixturenames:
        return
    left = running_jobs()
    for name in left:
        with contextlib.suppress(ValueError, RayflowError):
            print(story(attach(name)))  # of a test that has failed
        with contextlib.suppress(ValueError):
            ray.kill(ray.get_actor(name, namespace="rayflow"))
    until(lambda: not subtask_processes(), "all subtask processes are gone")
    assert left == [], "a job was left behind"


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """The sources of `flows` trickle until this file is there."""
    return tmp_path / "gate"
