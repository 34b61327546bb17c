"""Stands in for sbatch, srun, scontrol, mpirun and gcloud: a cluster that is this machine.

What matters to the launchers behaves as the originals do: which processes get a signal, which are killed when one has
failed, which environment they get, and what the exit code is. It imports nothing of the project, so it starts at once.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve()
# An exported variable that no launcher passes on by itself.
NOT_PASSED_ON = "NOT_FOR_OTHER_HOSTS"


def install(folder: Path, *names: str) -> Path:
    """Commands of these names in `folder`, which is returned.

    Each call is noted in $SPOOL/calls; in $ATTEMPT a job learns how often its launcher has been called.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        path = folder / name
        path.write_text(f'#!/bin/sh\nexec {sys.executable} -S {HERE} {name} "$@"\n')
        path.chmod(0o755)
    return folder


def split_options(arguments: list[str], with_value: tuple[str, ...] = ()) -> tuple[dict, list[str]]:
    """--name=value and those of `with_value` followed by one, up to the first word that is no option."""
    options: dict[str, list[str]] = {}
    rest = list(arguments)
    while rest and rest[0].startswith("-"):
        name, _, value = rest.pop(0).partition("=")
        options.setdefault(name, []).append(rest.pop(0) if name in with_value else value)
    return options, rest


class Tasks:
    """Processes that were started together, each in a group of its own."""

    def __init__(self, commands: list[tuple[list[str], dict[str, str]]]):
        self.processes = [
            subprocess.Popen(command, env=environment, start_new_session=True)
            for command, environment in commands
        ]
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, lambda number, _: self.send(number))

    def send(self, number: int, to_group: bool = False) -> None:
        for process in self.processes:
            try:
                (os.killpg if to_group else os.kill)(process.pid, number)
            except ProcessLookupError:
                pass

    def end_within(self, seconds: float) -> None:
        """SIGTERM to these processes and their children, then SIGKILL."""
        self.send(signal.SIGTERM, to_group=True)
        deadline = time.monotonic() + seconds
        self.wait(lambda codes: time.monotonic() > deadline)
        self.send(signal.SIGKILL, to_group=True)
        self.wait()

    def ended(self) -> list[int]:
        """As subprocess says it: minus the signal."""
        return [p.returncode for p in self.processes if p.poll() is not None]

    def wait(self, is_enough=lambda codes: False) -> list[int]:
        while len(codes := self.ended()) < len(self.processes) and not is_enough(codes):
            time.sleep(0.02)
        return codes


def srun(arguments: list[str]) -> int:
    options, command = split_options(arguments)
    number = int(options["--ntasks-per-node"][0])
    shared = os.environ | {
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_TASKS": str(number),
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_STEP_TASKS_PER_NODE": str(number),
        "SLURM_NTASKS": str(number),
    }
    # What it passes on goes to the tasks alone, as with proctrack/cgroup, not to their children.
    tasks = Tasks(
        [(command, shared | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}) for i in range(number)]
    )  # fmt: skip
    if options["--kill-on-bad-exit"] == ["1"]:
        tasks.wait(any)
        if any(tasks.ended()):
            tasks.end_within(seconds=1)  # KillWait
    codes = tasks.wait()
    signals = [-code for code in codes if code < 0]
    return 128 + max(signals) if signals else max(codes)  # srun(1), return value


def mpirun(arguments: list[str]) -> int:
    """As Open MPI 5: nothing says where process 0 is. Other hosts get what -x names, and nothing else."""
    options, command = split_options(arguments, ("-np", "--host", "--map-by", "--bind-to", "-x"))
    number = int(options["-np"][0])
    given = [word.partition("=") for word in options["-x"]]
    shared: dict[str, str] = {
        name: value if sep else os.environ[name] for name, sep, value in given
    }
    shared |= {"HOME": os.environ["HOME"], "OMPI_COMM_WORLD_SIZE": str(number)}
    shared |= {"OMPI_COMM_WORLD_LOCAL_SIZE": str(number), "ATTEMPT": os.environ["ATTEMPT"]}
    ranks = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
    tasks = Tasks([(command, {**shared, **dict.fromkeys(ranks, str(i))}) for i in range(number)])
    first = [code for code in tasks.wait(any) if code]
    if first:
        tasks.end_within(seconds=1)
    return 0 if not first else first[0] if first[0] > 0 else 128 - first[0]


def sbatch(arguments: list[str]) -> int:
    """Runs a copy of the script at once."""
    options, (script, *rest) = split_options(arguments)
    copy = Path(os.environ["SPOOL"]) / "slurm_script"
    shutil.copy(script, copy)
    job = {"SLURM_JOB_ID": "4711", "SLURM_SUBMIT_DIR": os.getcwd()}
    return subprocess.run([copy, *rest], env=os.environ | job, check=False).returncode


def gcloud(arguments: list[str]) -> int:
    """gcloud compute tpus tpu-vm ssh NAME: the command, with the shell of every worker."""
    assert arguments[:4] == ["compute", "tpus", "tpu-vm", "ssh"], arguments
    options, _ = split_options(arguments[5:], ("--command",) if "--command" in arguments else ())
    workers = 2 if options["--worker"] == ["all"] else 1
    tasks = Tasks(
        [(["bash", "-c", options["--command"][0]], os.environ | {"RANK": str(i)}) for i in range(workers)]
    )  # fmt: skip
    return next((code for code in tasks.wait() if code), 0)


def scontrol(arguments: list[str]) -> int:
    return 0


if __name__ == "__main__":
    name, *words = sys.argv[1:]
    calls = Path(os.environ["SPOOL"]) / "calls"
    with calls.open("a") as file:
        file.write(" ".join(" ".join([name, *words]).split()) + "\n")
    starts = [
        x for x in calls.read_text().splitlines() if x.split()[0] == name and "--worker=0" not in x
    ]
    os.environ["ATTEMPT"] = str(len(starts))
    sys.exit(globals()[name](words))
