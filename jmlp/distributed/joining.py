"""Joining the other processes of a job, and leaving them.

`jax.distributed` is the engine: its rendezvous, its heartbeats. This module finds out whether
there are others, and sets time-outs that answer in seconds.
"""

import os
import re
import sys
from collections.abc import Mapping
from typing import NamedTuple

import jax

from jmlp.distributed import addresses
from jmlp.errors import ClusterError, ConfigError

HEARTBEAT_S = 10  # a peer that has been silent for so long is lost
RENDEZVOUS_S = 300  # machines of one job may start minutes apart
SHUTDOWN_S = 30

# Names jax reads itself, and the two that complete them for those who start processes by hand.
ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
# Who else says how many processes there are and which one this is.
RANKS = (
    (COUNT, INDEX),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),  # Open MPI
    ("PMI_SIZE", "PMI_RANK"),  # MPICH, Intel MPI
    ("SLURM_NTASKS", "SLURM_PROCID"),
    ("WORLD_SIZE", "RANK"),  # torchrun, Kubeflow
)


class Cluster(NamedTuple):
    """How this process joins the others: what `jax.distributed.initialize` is told."""

    by: str
    """slurm, ompi, k8s, tpu: jax asks them for the rest. env: all is said here"""
    address: str | None = None
    processes: int | None = None
    process: int | None = None


def find_cluster(env: Mapping[str, str], tpu: bool = False) -> Cluster | None:
    """The cluster that the environment speaks of; None where this process is alone.

    Args:
      tpu: whether this is a Cloud TPU VM, whose metadata server knows the others.

    Raises:
      ConfigError: it says that there are others, but not where to meet.
    """
    address = env.get(ADDRESS)
    if not address and "MASTER_ADDR" in env and "RANK" in env:
        address = f"{env['MASTER_ADDR']}:{env.get('MASTER_PORT', '29500')}"
    count_name, index_name = next((p for p in RANKS if p[0] in env and p[1] in env), ("", ""))
    count, index = _number(env, count_name), _number(env, index_name)
    if env.get("JOB_COMPLETION_INDEX") and count is None:  # an indexed Kubernetes Job
        count, index = _number(env, COUNT), _number(env, "JOB_COMPLETION_INDEX")
    if count == 1:
        return None
    if address and count is not None and index is not None:
        if not 0 <= index < count:
            raise ConfigError(f"{index_name}={index}: expected 0 to {count - 1} of {count}")
        return Cluster("env", address, count, index)
    if address:
        raise ConfigError(
            f"{ADDRESS}={address[:100]}, but not how many processes there are and which one "
            f"this is: set {COUNT} and {INDEX}"
        )
    if "SLURM_STEP_NODELIST" in env and count_name == "SLURM_NTASKS":
        return Cluster("slurm")
    if "OMPI_MCA_orte_hnp_uri" in env:
        return Cluster("ompi")
    if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env:
        return Cluster("k8s")
    if tpu:
        return Cluster("tpu")
    if count_name and count_name != "SLURM_NTASKS":  # a Slurm shell, outside srun, is alone
        raise ConfigError(
            f"{count_name}={count}, but not where the processes meet: "
            f"set {ADDRESS}=HOST:PORT, a port that is free on the host of process 0"
        )
    return None


def _number(env: Mapping[str, str], name: str) -> int | None:
    text = env.get(name, "")
    if text and not re.fullmatch("[0-9]{1,9}", text):
        raise ConfigError(f"{name}={text[:100]}: expected a number")
    return int(text) if text else None


def join() -> int:
    """Joins the other processes of this job, if there are any; returns how many there are.

    Call it before any other use of jax; `jmlp train` does. It returns when all have
    arrived. Process 0 listens on the address that was said, if it is its own, and on no other;
    CPUs talk (gloo) over the interface that leads to it. Heartbeats tell within
    `JMLP_HEARTBEAT_SECONDS` (10) of a process that is gone or stopped; the others then end, with
    exit code 3 or by SIGABRT, instead of waiting.

    Raises:
      ConfigError: the environment contradicts itself.
      ClusterError: a cluster was found, but not joined.
    """
    if _joined():
        return _count()
    cluster = find_cluster(os.environ, _on_tpu_slice())
    if cluster is None:
        return 1
    if cluster.by == "k8s":
        _need_kubernetes()
    _keep_stdout_clean()
    _initialize(cluster)
    addresses.meet_by_route()
    return _count()


def _initialize(cluster: Cluster) -> None:
    # Its notifier swallows SIGTERM; the loop agrees on a signal by itself.
    jax.config.update("jax_enable_preemption_service", False)
    rendezvous, heartbeat = rendezvous_s(), heartbeat_s()
    try:
        jax.distributed.initialize(
            cluster.address,
            cluster.processes,
            cluster.process,
            initialization_timeout=rendezvous,
            heartbeat_timeout_seconds=heartbeat,
            shutdown_timeout_seconds=SHUTDOWN_S,
            coordinator_bind_address=addresses.bind_address(cluster.address),
        )
    except Exception as error:  # whatever the detection or the connection met
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ClusterError(
            f"found a cluster ({cluster.by}) but could not join it: {reason}. Set {ADDRESS}, "
            f"{COUNT} and {INDEX} to say it all by hand, or {COUNT}=1 to train alone."
        ) from error


def _joined() -> bool:
    return jax.distributed.is_initialized()


def _count() -> int:
    """Processes of the job. `jax.process_count` would start the devices, too early for a choice."""
    from jax._src import distributed

    return distributed.global_state.num_processes


def heartbeat_s() -> int:
    """Seconds of silence after which a process counts as lost."""
    return _seconds("JMLP_HEARTBEAT_SECONDS", HEARTBEAT_S, 2)


def rendezvous_s() -> int:
    """Seconds in which all processes must have arrived."""
    return _seconds("JMLP_RENDEZVOUS_SECONDS", RENDEZVOUS_S, 1)


def _seconds(name: str, usual: int, least: int) -> int:
    text = os.environ.get(name, "")
    if text and (not re.fullmatch("[0-9]{1,9}", text) or int(text) < least):
        shown = text[:100]
        raise ConfigError(f"{name}={shown}: expected a number of seconds, {least} or more")
    return int(text or usual)


def _on_tpu_slice() -> bool:
    """Whether this is one of several hosts of a Cloud TPU slice."""
    if os.environ.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu":
        return False
    if "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
        return True
    from jax._src import cloud_tpu_init

    return bool(getattr(cloud_tpu_init, "running_in_cloud_tpu_vm", False))


def _need_kubernetes() -> None:
    try:
        import kubernetes  # noqa: F401
    except ImportError:
        raise ConfigError(
            "this is a pod of an indexed Kubernetes Job; to find the others install "
            f"`pip install 'jax[k8s]'`, or set {ADDRESS} and {COUNT} in the pod's template"
        ) from None


def _keep_stdout_clean() -> None:
    """Sends what libraries write to file descriptor 1 (gloo does) to stderr instead."""
    sys.stdout.flush()
    try:
        kept = os.dup(sys.stdout.fileno())
        os.dup2(2, sys.stdout.fileno())
    except (OSError, ValueError):  # a notebook's stdout has no descriptor
        return
    sys.stdout = os.fdopen(kept, "w", buffering=1)


def quiet_gloo() -> None:
    """Drops what gloo says on stdout of every connection. Call it when devices are set up."""
    if jax.default_backend() == "cpu":
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)


def leave(code: int) -> None:
    """Ends this process where others may wait for it: at once, without their consent."""
    if code and _joined():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
