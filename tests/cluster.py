"""A job of several processes on this machine, under the environment variables of a launcher."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import tiny_run

NUM_DEVICES = 4  # of a job, over all of its processes
# Of what the tests run under themselves, nothing may reach a job.
_FOREIGN = (
    "BLOOMJAX_",
    "SLURM_",
    "OMPI_",
    "PMI_",
    "JAX_COORDINATOR",
    "KUBERNETES_",
    "JOB_COMPLETION",
)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def by_hand(number: int, num_processes: int, port: int) -> dict[str, str]:
    return {
        "BLOOMJAX_COORDINATOR": f"localhost:{port}",
        "BLOOMJAX_NUM_PROCESSES": str(num_processes),
        "BLOOMJAX_PROCESS_ID": str(number),
    }


def slurm(number: int, num_processes: int, port: int) -> dict[str, str]:
    """As srun sets them for tasks of one node."""
    return {
        "SLURM_JOB_ID": "4711",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_TASKS": str(num_processes),
        "SLURM_STEP_TASKS_PER_NODE": str(num_processes),
        "SLURM_NTASKS": str(num_processes),
        "SLURM_PROCID": str(number),
        "SLURM_LOCALID": str(number),
        "JAX_COORDINATOR_PORT": str(port),
    }


def open_mpi(number: int, num_processes: int, port: int) -> dict[str, str]:
    """As mpirun of Open MPI 4 sets them."""
    return {
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": str(num_processes),
        "OMPI_COMM_WORLD_RANK": str(number),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(number),
        "OMPI_COMM_WORLD_LOCAL_SIZE": str(num_processes),
        "JAX_COORDINATOR_PORT": str(port),
    }


def open_mpi_5(number: int, num_processes: int, port: int) -> dict[str, str]:
    """It no longer says where process 0 is, so the launcher has to (mpirun -x BLOOMJAX_COORDINATOR)."""
    found = open_mpi(number, num_processes, port)
    del found["OMPI_MCA_orte_hnp_uri"]
    return found | {"BLOOMJAX_COORDINATOR": f"localhost:{port}"}


def environment(
    num_processes: int, launched: dict[str, str], num_devices: int = NUM_DEVICES
) -> dict[str, str]:
    """Of one process with its share of the devices."""
    devices = f"--xla_force_host_platform_device_count={num_devices // num_processes}"
    own = {k: v for k, v in tiny_run.environment().items() if not k.startswith(_FOREIGN)}
    return own | {"XLA_FLAGS": devices, "JAX_PLATFORMS": "cpu"} | launched


class Cluster:
    """Processes that were started together.

    Attributes:
      processes: by their number; `flags_of` gives a process flags of its own.
    """

    def __init__(
        self,
        command: Sequence[str],
        num_processes: int,
        launcher: Callable[[int, int, int], dict[str, str]] = by_hand,
        flags_of: Callable[[int], Sequence[str]] = lambda number: (),
        num_devices: int = NUM_DEVICES,
    ):
        port = free_port()
        # Not pipes: one that nobody reads while another process is waited for would fill up and stop all.
        self._outputs = [(tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+"))
                         for _ in range(num_processes)]  # fmt: skip
        self.processes = [
            subprocess.Popen(
                [*command, *flags_of(number)],
                env=environment(num_processes, launcher(number, num_processes, port), num_devices),
                stdout=out, stderr=err, text=True,
            )
            for number, (out, err) in enumerate(self._outputs)
        ]  # fmt: skip

    def when(self, condition: Callable[[], bool]) -> "Cluster":
        """Waits until it holds; fails if a process ends before."""
        deadline = time.monotonic() + 300
        while not condition():
            if any(process.poll() is not None for process in self.processes):
                raise AssertionError(self.end())
            assert time.monotonic() < deadline, "nothing happened in five minutes"
            time.sleep(0.005)
        return self

    def end(self, timeout_seconds: float = 300) -> list[tuple[int, str, str]]:
        """Exit code, stdout and stderr of each; none is left behind."""
        deadline = time.monotonic() + timeout_seconds
        try:
            for process in self.processes:
                process.wait(deadline - time.monotonic())
        finally:
            for process in self.processes:
                process.kill()
                process.wait()
        results = []
        for process, (out, err) in zip(self.processes, self._outputs, strict=True):
            out.seek(0)
            err.seek(0)
            results.append((process.returncode, out.read(), err.read()))
            out.close()
            err.close()
        return results


def checked(results: list[tuple[int, str, str]]) -> list[tuple[int, str, str]]:
    """The same, if all ended well, and only process 0 had something to say."""
    assert [code for code, _, _ in results] == [0] * len(results), results
    assert not [out for _, out, _ in results[1:] if out], results
    return results


def num_records(model_dir: Path) -> int:
    path = model_dir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def without_gloo(text: str) -> str:
    """Gloo, the collectives of CPUs, greets on stdout."""
    return "".join(line for line in text.splitlines(True) if not line.startswith("[Gloo]"))


def host() -> str:
    return os.uname().nodename


def main(launcher: str, num_processes: str, num_devices: str, *command: str) -> int:
    """As srun and mpirun do: once a process has failed, the others have some time, and its exit code is that of all."""
    job = Cluster(command, int(num_processes), globals()[launcher], num_devices=int(num_devices))
    while True:
        codes = [process.poll() for process in job.processes]
        failed = [code for code in codes if code]
        if failed or None not in codes:
            break
        time.sleep(0.05)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and any(p.poll() is None for p in job.processes):
        time.sleep(0.05)
    for process in job.processes:
        process.kill()
    for _, out, err in job.end():
        print(without_gloo(out), end="", flush=True)
        print(err, end="", file=sys.stderr, flush=True)
    code = failed[0] if failed else 0
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
