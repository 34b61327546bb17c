"""How the processes of a job find one another: by hand, Slurm, Open MPI, TPU pods, Kubernetes."""

import dataclasses
import os
import re
import socket
import sys
import threading
from collections.abc import Mapping
from typing import Any

from bloomjax import job
from bloomjax.errors import EXIT_RESTART, BadInput, Unreachable
from bloomjax.job import one_line

# By hand, or where a launcher says who is who but not where process 0 is: the first variable that is set counts.
COORDINATOR = "BLOOMJAX_COORDINATOR"
NUM_PROCESSES = ("BLOOMJAX_NUM_PROCESSES", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS")
PROCESS_ID = (
    "BLOOMJAX_PROCESS_ID", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID", "JOB_COMPLETION_INDEX",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Joins the processes of a job, before anything touches a device.

    Found are, in this order: BLOOMJAX_COORDINATOR=host:port with BLOOMJAX_NUM_PROCESSES and BLOOMJAX_PROCESS_ID; then
    what JAX detects of Open MPI, Slurm (srun), TPU pods on GKE and TPU VMs, and indexed Jobs of Kubernetes. Where there
    is none of it, or one process only, nothing happens.

    Attributes:
      initialization_timeout_seconds: how long all processes wait until all have come.
      heartbeat_timeout_seconds: a process that is silent for so long is lost, and all others end.
    """

    initialization_timeout_seconds: int = 300
    heartbeat_timeout_seconds: int = 100

    def __post_init__(self):
        if min(self.initialization_timeout_seconds, self.heartbeat_timeout_seconds) < 1:
            raise BadInput(f"{self}: time-outs are at least 1 second")

    def start(self) -> None:
        """BadInput where the environment contradicts itself, Unreachable if process 0 cannot open its port.

        If not all processes come in time, a line says who is missing and the process ends with EXIT_RESTART.
        """
        place = find_place(os.environ, self.initialization_timeout_seconds)
        if place is None or job.is_shared():
            return
        if place.process_id == 0:
            _check_port(place)
        import jax

        # It would take SIGTERM away from `stops.StopConditions`, and knows no other reason to stop.
        jax.config.update("jax_enable_preemption_service", False)
        # After its own time-out JAX aborts in C++, with a stack trace and without a word about who is missing.
        too_late = threading.Timer(
            self.initialization_timeout_seconds, _give_up, [place, self.initialization_timeout_seconds]
        )  # fmt: skip
        too_late.daemon = True
        too_late.start()
        try:
            jax.distributed.initialize(
                place.coordinator, place.num_processes, place.process_id, place.local_device_ids,
                cluster_detection_method="deactivate",  # find_place has done it
                initialization_timeout=self.initialization_timeout_seconds + 60,
                heartbeat_timeout_seconds=self.heartbeat_timeout_seconds,
            )  # fmt: skip
        except jax.errors.JaxRuntimeError as error:
            raise Unreachable(f"{place}: {one_line(error)}") from error
        finally:
            too_late.cancel()
        job.join(place.process_id, place.num_processes)
        if place.process_id:
            os.dup2(
                os.open(os.devnull, os.O_WRONLY), 1
            )  # process 0 alone speaks; errors go to stderr


@dataclasses.dataclass(frozen=True)
class Place:
    """Of this process in its job. `local_device_ids`: None for all devices that it sees."""

    coordinator: str
    num_processes: int
    process_id: int
    local_device_ids: list[int] | None = None

    def __str__(self) -> str:
        return f"process {self.process_id} of {self.num_processes}, coordinator {self.coordinator}"


def find_place(environment: Mapping[str, str], timeout_seconds: int) -> Place | None:
    """What the environment variables say; None for a process that is alone. BadInput where they are incomplete."""
    coordinator = environment.get(COORDINATOR)
    if coordinator is not None:
        if not re.fullmatch(r".+:\d{1,5}", coordinator) or int(coordinator.rsplit(":")[-1]) > 65535:
            raise BadInput(f"{COORDINATOR}={coordinator} must be host:port")
        num_processes = _number(environment, NUM_PROCESSES)
        place = Place(coordinator, num_processes, _number(environment, PROCESS_ID))
        if place.process_id >= num_processes:
            raise BadInput(f"{place}: processes are numbered from 0 to {num_processes - 1}")
        return place if num_processes > 1 else None
    alone = [name for name in (NUM_PROCESSES[0], PROCESS_ID[0]) if name in environment]
    if alone:
        raise BadInput(f"{alone[0]} is set, but {COORDINATOR}=host:port of process 0 is not")
    return _detected(environment, timeout_seconds)


def _number(environment: Mapping[str, str], names: tuple[str, ...]) -> int:
    found = [name for name in names if name in environment]
    if not found:
        raise BadInput(f"{COORDINATOR} is set, but {names[0]} is not (nor {', '.join(names[1:])})")
    if not environment[found[0]].isdecimal():
        raise BadInput(f"{found[0]}={environment[found[0]]} must be a number")
    return int(environment[found[0]])


def _detected(environment: Mapping[str, str], timeout_seconds: int) -> Place | None:
    """By JAX's detection, of which only initialize() is public; that cannot be asked before it acts."""
    from jax._src import clusters

    kinds: list[Any] = [clusters.OmpiCluster, clusters.SlurmCluster]
    kinds += [clusters.GkeTpuCluster, clusters.GceTpuCluster]
    if "JOB_COMPLETION_INDEX" in environment:
        kinds.append(clusters.K8sCluster)
    try:
        kind = next((kind for kind in kinds if kind.is_env_present()), None)
        if kind is None:
            for size in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
                if environment.get(size, "1") != "1":
                    raise BadInput(
                        f"{size}={environment[size]}, but nothing says where process 0 is: give all of them "
                        f"{COORDINATOR}=host:port (mpirun -x {COORDINATOR})"
                    )
            return None
        # A shell inside an allocation is one task, whatever the allocation has.
        if environment.get("SLURM_STEP_NUM_TASKS") == "1" and kind is clusters.SlurmCluster:
            return None
        num_processes = kind.get_process_count()
        if num_processes == 1:
            return None
        coordinator = kind.get_coordinator_address(
            timeout_secs=timeout_seconds,
            override_coordinator_port=environment.get("JAX_COORDINATOR_PORT"),
        )
        process_id = kind.get_process_id()
    except (RuntimeError, KeyError, OSError) as error:
        raise BadInput(f"this cluster cannot be made out: {one_line(error)}") from error
    local_id = kind.get_local_process_id()
    if local_id is None or not _is_shared(environment):
        return Place(coordinator, num_processes, process_id)
    return Place(coordinator, num_processes, process_id, [local_id])


def _is_shared(environment: Mapping[str, str]) -> bool:
    """Whether this host has several processes, of which each sees all GPUs and takes one."""
    if "JAX_LOCAL_DEVICE_IDS" in environment:
        return False
    tasks = re.findall(r"(?:^|,)(\d+)", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    tasks.append(environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1"))
    visible = environment.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
    return max(map(int, tasks)) > 1 and len(visible) > 1


def _check_port(place: Place) -> None:
    """Unreachable if another program has it; jaxlib would print its own words, or crash (0.10.2)."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with socket.socket(family) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("", int(place.coordinator.rsplit(":", 1)[1])))
        except (OSError, OverflowError) as error:
            raise Unreachable(f"{place}: its port cannot be opened: {one_line(error)}") from error


def _give_up(place: Place, seconds: int) -> None:
    host, port = place.coordinator.rsplit(":", 1)
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        reason = "the coordinator answers, but not all processes have come"
    except OSError as error:
        reason = f"the coordinator cannot be reached ({error.strerror or error})"
    print(f"bloomjax: {place}: after {seconds} s {reason}", file=sys.stderr, flush=True)
    os._exit(EXIT_RESTART)
