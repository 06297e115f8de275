"""Jobs on several nodes, and nodes that vanish: ``python -m tests.cluster.node_loss [SCENARIO ...]`` prints JSON.

A process of its own, because a process belongs to one Ray cluster; and Ray's files in a folder of their own, because
Ray leaves the address of such a cluster where every later ``ray.init()`` of the machine would find it.

All nodes are on this machine, each with a loopback address of its own, so that what binds or dials a wrong address is
seen; checkpoints and output lie on the one disk, which stands for shared storage. A node is removed as a machine is
lost: its raylet is killed, and its processes end with it.

Where the coordinator is matters, and Ray puts an actor that takes no CPU anywhere; so it is placed here. When its node
is lost, Ray starts it again on another one: it fences its former life, starts processes of its own and goes on from
the newest checkpoint (`coordinator_lost`). The head is never removed: with it goes the cluster.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import rayflow as rf
from rayflow.cluster import job as jobs
from rayflow.cluster.coordinator_actor import CoordinatorProcess
from rayflow.cluster.job import Job
from tests.cluster import flows
from tests.cluster.ray_harness import recovered, running, until

FEW_ROWS = 50_000


class Nodes:
    """A head without CPUs, and workers of one each: a job of parallelism 2 takes two of them."""

    def __init__(self) -> None:
        self._count = 0
        self._cluster = Cluster(shutdown_at_exit=True)
        # A raylet that is gone refuses each probe: Ray then knows within 1.5 s, by default 15 s and more. The time for
        # an answer stays as it is, so that a busy machine loses no node.
        self.head = self._add(0, _system_config={"health_check_period_ms": 500, "health_check_failure_threshold": 3})
        self.workers: list[Any] = []
        self.have_workers(2)
        ray.init(address=self._cluster.address, logging_level=logging.ERROR, log_to_driver=False)

    def _add(self, cpus: int, **options: Any) -> Any:
        self._count += 1
        # Not 127.0.0.1: a driver takes that for the address that other machines see.
        return self._cluster.add_node(
            num_cpus=cpus, node_ip_address=f"127.0.0.{self._count + 1}", include_dashboard=False, **options
        )

    def have_workers(self, count: int) -> None:
        while len(self.workers) < count:
            self.workers.append(self._add(1))

    def remove(self, worker: Any) -> None:
        self.workers.remove(worker)
        self._cluster.remove_node(worker, allow_graceful=False)

    def close(self) -> None:
        ray.shutdown()
        self._cluster.shutdown()


def coordinator_on(node: Any) -> AbstractContextManager[Any]:
    """Jobs that are submitted meanwhile have their coordinator there; elsewhere once the node is gone."""
    where = NodeAffinitySchedulingStrategy(node.node_id, soft=True)
    # One byte of memory: Ray places an actor that takes nothing at all at random, whatever it is told (2.60).
    placed = ray.remote(max_restarts=-1, max_task_retries=0, num_cpus=0, memory=1, scheduling_strategy=where)
    return mock.patch.object(jobs, "CoordinatorActor", placed(CoordinatorProcess))


class Running:
    """A job that runs and has completed a checkpoint."""

    def __init__(self, nodes: Nodes, folder: Path, *, coordinator: Any, rows: int = flows.ROWS) -> None:
        folder.mkdir()
        self._rows = rows
        self._gate, self._out = folder / "gate", folder / "out"
        flow = flows.windows_flow(self._gate, self._out, rows)
        with coordinator_on(coordinator):
            self.job: Job = flow.submit(
                parallelism=2, checkpoints=rf.CheckpointConfig(str(folder / "checkpoints"), interval="200ms")
            )
        running(self.job)
        self.attempt = self.job.status().attempt
        self.leader = self.job.coordinator()
        assert self.leader.node == coordinator.node_id

    def subtasks_on(self, node: Any) -> set[int]:
        """Pids."""
        return {s.pid for s in self.job.subtasks() if s.node == node.node_id}

    def finish(self) -> None:
        """Let the rest through, but not before a checkpoint shows that the job goes on; compare with DuckDB."""
        self.job.checkpoint()
        self._gate.touch()
        self.job.wait(60)
        flows.assert_windows(self._out, self._rows)


def exchange(job: Job) -> dict[str, object]:
    """Where subtasks listen and where they connect to one another, as pairs (address of its node, address used)."""
    address_of = {n["NodeID"]: n["NodeManagerAddress"] for n in ray.nodes()}
    home = {s.pid: address_of[s.node] for s in job.subtasks()}
    sockets = [(home[pid], c) for pid in home for c in psutil.Process(pid).net_connections("tcp")]
    # gRPC shows IPv4 as IPv6; "::" alone is the port of Ray itself, which listens everywhere.
    listens = {(c.laddr.ip.removeprefix("::ffff:"), c.laddr.port) for _, c in sockets if c.status == psutil.CONN_LISTEN}
    bound = {
        (at, c.laddr.ip.removeprefix("::ffff:"))
        for at, c in sockets
        if c.status == psutil.CONN_LISTEN and c.laddr.ip != "::"
    }
    dialled = {(at, c.raddr.ip.removeprefix("::ffff:"), c.raddr.port) for at, c in sockets if c.raddr}
    return {
        "nodes": sorted(set(home.values())),
        "bound": sorted(bound),
        "dialled": sorted({(at, ip) for at, ip, port in dialled if (ip, port) in listens}),
    }


def spread(nodes: Nodes, folder: Path) -> dict[str, object]:
    """No faults: the subtasks are on two nodes and send to each other."""
    run = Running(nodes, folder, coordinator=nodes.head, rows=FEW_ROWS)
    told = exchange(run.job)
    run.finish()
    return told | {"restarts": run.job.status().restarts}


def worker_lost(nodes: Nodes, folder: Path) -> dict[str, object]:
    """A worker with subtasks is lost, and the others have room."""
    nodes.have_workers(3)
    run = Running(nodes, folder, coordinator=nodes.head)
    victim = next(w for w in nodes.workers if run.subtasks_on(w))
    before = run.subtasks_on(victim)
    nodes.remove(victim)
    recovered(run.job, run.attempt)
    run.job.checkpoint()
    left = len(run.subtasks_on(victim))
    still = before & {s.pid for s in run.job.subtasks()}
    found, again = ([e.at for e in run.job.timeline() if e.what == w] for w in ("failure detected", "running"))
    run.finish()
    return {
        "lost": len(before),
        "left": left + len(still),
        "restarts": run.job.status().restarts,
        "out_s": round(again[-1] - found[0], 1),
    }


def too_few_cpus(nodes: Nodes, folder: Path) -> dict[str, object]:
    """A worker is lost and the other one has no room: the job waits until there is a new node.

    One of its subtasks may have a process nevertheless: the spare one, which takes no CPU.
    """
    nodes.have_workers(2)
    run = Running(nodes, folder, coordinator=nodes.head)
    victim = nodes.workers[0]
    before = run.subtasks_on(victim)
    nodes.remove(victim)
    until(lambda: "0 of 1 CPUs free" in run.job.status().detail, "the job says what it waits for")
    waiting = run.job.status()
    nodes.have_workers(2)
    new = nodes.workers[-1]
    until(lambda: run.job.status().state == "running", "the job runs again")
    on_new = len(run.subtasks_on(new))
    run.finish()
    return {"lost": len(before), "state": waiting.state, "detail": waiting.detail, "on_new_node": on_new}


def coordinator_lost(nodes: Nodes, folder: Path) -> dict[str, object]:
    """The node of the coordinator is lost, with the subtasks that were there; those elsewhere are ended by Ray."""
    nodes.have_workers(3)
    victim = nodes.workers[0]
    run = Running(nodes, folder, coordinator=victim)
    before = {s.pid for s in run.job.subtasks()}
    nodes.remove(victim)
    recovered(run.job, run.attempt)
    run.job.checkpoint()
    leader = run.job.coordinator()
    told = {
        "coordinator_moved": leader.node != victim.node_id and leader.life != run.leader.life,
        "left": len(run.subtasks_on(victim)) + len(before & {s.pid for s in run.job.subtasks()}),
    }
    run.finish()
    return told


SCENARIOS = (spread, worker_lost, too_few_cpus, coordinator_lost)


def main(names: list[str]) -> None:
    told: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory(prefix="rf-", ignore_cleanup_errors=True) as folder:
        os.environ["RAY_TMPDIR"] = folder
        nodes = Nodes()
        try:
            for scenario in SCENARIOS:
                if not names or scenario.__name__ in names:
                    began = time.monotonic()
                    told[scenario.__name__] = scenario(nodes, Path(folder) / scenario.__name__)
                    print(f"{scenario.__name__}: {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
        finally:
            nodes.close()
    print(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1:])
