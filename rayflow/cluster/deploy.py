"""From this process to a cluster: connect to Ray, quietly, and see that the plan fits.

User code travels by pickle: what a script or notebook defines itself goes along by value; modules that it imports must
be importable on the nodes. On one machine they are (Ray gives its workers the driver's ``sys.path``); on several,
install them there or call ``ray.init(runtime_env={"working_dir": "."})`` before the flow is run: a Ray that is
initialised already is used as it is.
"""

from __future__ import annotations

import logging

import ray

from rayflow.cluster.resources import check_fits
from rayflow.errors import ClusterError
from rayflow.plan import Plan


def connect(*, start: bool = True) -> None:
    """Use the Ray of this process, else the cluster of ``RAY_ADDRESS`` or ``ray start``, else start a local one.

    Not ``address="auto"``: that would join the private Ray of any other program on this machine, and end with it. With
    ``start=False`` just that is wanted, to look after jobs that run there; then nothing is started.
    Ray's token authentication stays as Ray sets it (on, for a local cluster of 2.59 and later); its banner is a warning
    of Ray's logger, which is silenced with the rest below errors. What user code prints comes to this terminal.
    """
    if ray.is_initialized():
        return
    logger = logging.getLogger("ray")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        if start:
            ray.init(logging_level=logging.ERROR, log_to_driver=True, include_dashboard=False)
        else:
            ray.init(address="auto", logging_level=logging.ERROR, log_to_driver=False)
    except Exception as error:
        if not start:
            raise ClusterError(
                "no Ray cluster is running here, so there is no job to look after; set RAY_ADDRESS for one elsewhere"
            ) from error
        raise ClusterError(
            f"no connection to Ray: {error}; start a cluster, or unset RAY_ADDRESS (and run `ray stop`) for a local one"
        ) from error
    finally:
        logger.setLevel(logging.ERROR if level == logging.NOTSET else level)


def default_parallelism() -> int:
    """One for each CPU of the cluster."""
    return max(1, int(_total_cpus()))


def check_cluster(plan: Plan) -> None:
    """Raises `ClusterError` with the numbers when the cluster is too small for the plan, whatever else runs on it."""
    check_fits(plan, _total_cpus())


def _total_cpus() -> float:
    return float(ray.cluster_resources().get("CPU", 0.0))
