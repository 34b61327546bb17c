"""Several processes are one run: the same samples and losses, saved together, and ended together whatever ends one."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import cluster
import jax
import numpy as np
import pytest
import tiny_run
from cluster import Cluster
from tiny_run import REPOSITORY, FirstDevices

from bloomjax import distributed, job
from bloomjax.distributed import Cluster as Here
from bloomjax.distributed import Place, find_place
from bloomjax.errors import BadInput

STEPS = 24
FLAGS = (
    "--gin.train.mesh=@MeshShape()", "--gin.BloomConfig.dtype='float32'", f"--gin.TRAIN_STEPS={STEPS}",
    "--gin.EVAL_EVERY_STEPS=12", "--gin.SAVE_EVERY_STEPS=4",
)  # fmt: skip
SLOW = "--gin.train.writer=@SlowWriter"


def command(text, model_dir, *flags):
    return tiny_run.command(text, model_dir, *FLAGS, *flags)


def in_this_process(text, model_dir, num_devices, **changes):
    changes = dict(
        model=tiny_run.tiny_model(dtype="float32"), train_steps=STEPS, eval_every_steps=12,
        mesh=FirstDevices(num=num_devices), checkpoints=tiny_run.Checkpoints(save_every_steps=4),
    ) | changes  # fmt: skip
    return tiny_run.run(text, model_dir, **changes)


@pytest.fixture(scope="module")
def alone(tiny_text, tmp_path_factory):
    """MODEL_DIR of the undisturbed run: one process with two devices."""
    model_dir = tmp_path_factory.mktemp("alone") / "run"
    assert in_this_process(tiny_text, model_dir, 2) == 0
    return model_dir


def journal(model_dir):
    path = model_dir / "journal.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def starts(model_dir):
    return [event for event in journal(model_dir) if event["event"] == "start"]


def chain(model_dir):
    """Of the samples up to the last step."""
    path = model_dir / "checkpoints" / str(STEPS) / "position" / "metadata"
    return json.loads(path.read_text())["chain"][1]


def assert_same_run(model_dir, other):
    """The same samples, each step once, and the losses of other reduction orders."""
    losses, expected = tiny_run.losses(model_dir), tiny_run.losses(other)
    assert list(losses) == list(expected) == list(range(1, STEPS + 1))
    np.testing.assert_allclose([*losses.values()], [*expected.values()], rtol=1e-6)
    last, expected = tiny_run.records(model_dir)[-1], tiny_run.records(other)[-1]
    assert last["loss_by_language"] == pytest.approx(expected["loss_by_language"], rel=1e-6)
    assert chain(model_dir) == chain(other)
    assert not list((model_dir / "checkpoints").glob("*tmp*"))


def wait_for(condition, process):
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, "it has ended, or hangs"
        time.sleep(0.01)


# ---- whole runs ----


@pytest.mark.slow
def test_a_job_that_is_stopped_and_killed_finishes_by_itself(tiny_text, alone, tmp_path):
    """Two processes under srun's variables: SIGTERM to one, kill -9 of one, then the end, with nobody looking."""
    model_dir = tmp_path / "run"
    launched = [sys.executable, cluster.__file__, "slurm", "2", "2"]
    loop = subprocess.Popen(
        [REPOSITORY / "tools" / "restart_loop.sh", "--wait=0", model_dir,
         *launched, *command(tiny_text, model_dir, SLOW)],
        env=tiny_run.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        for number, sent in ((1, signal.SIGTERM), (2, signal.SIGKILL)):
            wait_for(lambda number=number: len(starts(model_dir)) == number, loop)
            begun = starts(model_dir)[-1]
            wait_for(lambda begun=begun: cluster.num_records(model_dir) > begun["step"] + 3, loop)
            processes = begun["processes"]
            assert [len(process["devices"]) for process in processes] == [1, 1]
            assert {process["host"] for process in processes} == {cluster.host()}
            os.kill(processes[1]["pid"], sent)
        out, err = loop.communicate(timeout=300)
    finally:
        loop.kill()
    assert loop.returncode == 0, err
    stop = next(event for event in journal(model_dir) if event["event"] == "stop")
    assert stop["signal"] == "SIGTERM"
    assert f"stopped by SIGTERM after step {stop['step']}, saved; the same command goes on" in out
    second, third = starts(model_dir)[1:]
    assert second["step"] == stop["step"]
    # The newest save that was finished: the kill may have come before the first of that start.
    assert third["step"] == second["step"] or third["step"] % 4 == 0 < third["step"]
    lines = [line for line in err.splitlines() if line.startswith("restart_loop: ")]
    assert "start 1 ended with 75 " in lines[0], err
    assert any(f"start 2 ended with {code} " in lines[1] for code in (75, 137)), err
    others = [line for line in err.splitlines() if line not in lines]
    assert len(others) == 1 and "bloomjax: process 0 on " in others[0], err
    assert "a peer is lost: " in others[0] and out.count("held-out loss in nats") == 1
    assert_same_run(model_dir, alone)


@pytest.mark.slow
def test_process_0_is_killed_and_one_process_goes_on(tiny_text, alone, tmp_path):
    """With the coordinator. Under the variables of Open MPI."""
    model_dir = tmp_path / "run"
    pair = Cluster(command(tiny_text, model_dir, SLOW), 2, cluster.open_mpi, num_devices=2)
    pair.when((model_dir / "checkpoints" / "4").exists).processes[0].kill()
    killed = time.monotonic()
    (_, out, _), (code, silent, _) = pair.end(timeout_seconds=60)
    assert code in (75, -signal.SIGABRT) and time.monotonic() - killed < 30
    assert "in 2 processes" in out and not silent
    assert in_this_process(tiny_text, model_dir, 2) == 0
    assert [len(start["processes"]) for start in starts(model_dir)] == [2, 1]
    assert starts(model_dir)[1]["step"] >= 4
    assert_same_run(model_dir, alone)


@pytest.mark.slow
def test_from_two_processes_to_four_to_one_to_four(tiny_text, tmp_path):
    """Four devices in all cases, on a mesh of two axes. How they are spread over processes changes no bit."""
    mesh = ("--gin.MeshShape.data=2",)
    results = {}
    for name, launcher in ((2, cluster.by_hand), (4, cluster.open_mpi_5)):
        results[name] = tmp_path / str(name)
        line = command(tiny_text, results[name], *mesh)
        ended = Cluster(line, name, launcher).end()
        assert [code for code, _, _ in ended] == [0] * name, ended
        assert not "".join(out for _, out, _ in ended[1:])
    assert tiny_run.losses(results[2]) == tiny_run.losses(results[4])
    assert tiny_run.fingerprints(results[2], STEPS) == tiny_run.fingerprints(results[4], STEPS)
    parts = {path.name for path in (results[4] / "checkpoints" / "24" / "state").iterdir()}
    assert {f"ocdbt.process_{number}" for number in range(4)} <= parts

    mixed = tmp_path / "mixed"
    for num_steps, num_processes in ((6, 2), (12, 4), (18, 1), (STEPS, 4)):
        line = command(tiny_text, mixed, *mesh, f"--gin.TRAIN_STEPS={num_steps}")
        ended = Cluster(line, num_processes).end()
        assert [code for code, _, _ in ended] == [0] * num_processes, ended
    assert [len(start["processes"]) for start in starts(mixed)] == [2, 4, 1, 4]
    assert not any(event["event"] == "damaged_checkpoint" for event in journal(mixed))
    # To the bit until one process adds up in another order.
    losses, whole = tiny_run.losses(mixed), tiny_run.losses(results[2])
    assert [losses[step] for step in range(1, 13)] == [whole[step] for step in range(1, 13)]
    assert_same_run(mixed, results[2])


@pytest.mark.slow
def test_damage_that_one_process_sees_is_damage_for_all(tiny_text, alone, tmp_path):
    model_dir = tmp_path / "run"
    line = command(tiny_text, model_dir)
    assert [code for code, _, _ in Cluster(line, 2, num_devices=2).end()] == [0, 0]
    part = model_dir / "checkpoints" / str(STEPS) / "state" / "ocdbt.process_1"
    largest = max((p for p in part.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    (code, _, err), (other, _, silent) = Cluster(line, 2, num_devices=2).end()
    assert code == other == 0, err
    assert f"checkpoints/{STEPS} is damaged" in err
    assert "is damaged" not in silent  # Orbax may have more to say
    assert (model_dir / "checkpoints" / f"damaged-{STEPS}").is_dir()
    assert starts(model_dir)[1]["step"] == STEPS - 4
    assert_same_run(model_dir, alone)


@pytest.mark.slow
def test_a_process_that_stands_still(tiny_text, tmp_path):
    model_dir = tmp_path / "run"
    line = command(tiny_text, model_dir, SLOW, "--gin.Cluster.heartbeat_timeout_seconds=10")
    pair = Cluster(line, 2, num_devices=2).when(lambda: cluster.num_records(model_dir) > 3)
    pair.processes[1].send_signal(signal.SIGSTOP)
    try:
        assert pair.processes[0].wait(40) in (75, -signal.SIGABRT)
    finally:
        pair.processes[1].kill()
        pair.end()


# ---- one line ----


def test_bad_input_of_one_process_ends_all(tiny_text, tmp_path):
    pair = Cluster(
        command(tiny_text, tmp_path / "run", "--gin.train.prepare=None"), 2, num_devices=2,
        flags_of=lambda number: ("--gin.STORE_DIR='/nowhere'",) if number == 1 else (),
    )  # fmt: skip
    (code, _, of_main), (other, _, err) = pair.end(timeout_seconds=60)
    assert code == other == 1
    assert err.startswith(f"bloomjax: process 1 on {cluster.host()}: there is no token store ")
    assert err.count("\n") == 1
    assert of_main in ("", "bloomjax: ends with process 1, exit code 1\n")


START = """
import sys
from bloomjax import config
from bloomjax.distributed import Cluster
config.call(lambda: Cluster(initialization_timeout_seconds=2).start(), ["start"])
"""


@pytest.mark.parametrize("case", ["nobody there", "no such host", "not all came", "taken"])
def test_a_coordinator_that_cannot_be_reached(case):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1] if case == "taken" else cluster.free_port()
        number = 1 if case in ("nobody there", "no such host") else 0
        launched = cluster.by_hand(number, 2, port)
        if case == "no such host":
            launched["BLOOMJAX_COORDINATOR"] = f"no-such-host.invalid:{port}"
        done = subprocess.run(
            [sys.executable, "-c", START], env=cluster.environment(2, launched),
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    reason = {
        "nobody there": "after 2 s the coordinator cannot be reached (Connection refused)",
        "no such host": "after 2 s the coordinator cannot be reached (",
        "not all came": "after 2 s the coordinator answers, but not all processes have come",
        "taken": "its port cannot be opened: [Errno 98] Address already in use",
    }[case]
    place = f"process {number} of 2, coordinator {launched['BLOOMJAX_COORDINATOR']}"
    assert done.stderr.startswith(f"bloomjax: {place}: {reason}") and done.returncode == 75
    assert done.stderr.count("\n") == 1


# ---- what the environment says ----

ALONE = [
    {},
    {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"},  # the script of sbatch itself
    cluster.slurm(0, 1, 5),
    cluster.slurm(0, 8, 5) | {"SLURM_STEP_NUM_TASKS": "1"},  # a shell inside of an allocation
    cluster.open_mpi(0, 1, 5),
    cluster.by_hand(0, 1, 5),
    {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
]


@pytest.fixture
def place(monkeypatch):
    """find_place, for JAX's detection, too, which reads os.environ."""

    def call(environment):
        for name in list(os.environ):
            if name.startswith(cluster._FOREIGN):
                monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return find_place(environment, 1)

    return call


@pytest.mark.parametrize("environment", ALONE)
def test_one_process_starts_nothing(place, environment):
    assert place(environment) is None
    Here().start()
    assert not job.is_shared() and job.agree(3) == 3 and job.gather("x") == ["x"]


def test_places(place):
    assert place(cluster.by_hand(2, 4, 99)) == Place("localhost:99", 4, 2)
    assert place(cluster.slurm(3, 4, 99)) == Place("localhost:99", 4, 3, [3])
    nodes = {"SLURM_STEP_NODELIST": "gpu[017-064],gpu099", "SLURM_STEP_TASKS_PER_NODE": "1(x49)"}
    assert place(cluster.slurm(3, 49, 99) | nodes) == Place("gpu017:99", 49, 3)
    # Each task was given a GPU of its own by Slurm: there is nothing to choose.
    assert place(cluster.slurm(3, 4, 99) | {"CUDA_VISIBLE_DEVICES": "3"}) == Place("localhost:99", 4, 3)  # fmt: skip
    assert place(cluster.open_mpi(1, 2, 99)) == Place("127.0.0.1:99", 2, 1, [1])
    assert place(cluster.open_mpi_5(1, 2, 99)) == Place("localhost:99", 2, 1)
    pod = {
        "BLOOMJAX_COORDINATOR": "train-0-0.train:8476",
        "BLOOMJAX_NUM_PROCESSES": "48",
        "JOB_COMPLETION_INDEX": "7",
    }
    assert place(pod) == Place("train-0-0.train:8476", 48, 7)


WRONG = {
    "no rank": ({"BLOOMJAX_COORDINATOR": "a:1"}, "BLOOMJAX_NUM_PROCESSES is not"),
    "no coordinator": ({"BLOOMJAX_NUM_PROCESSES": "2"}, "BLOOMJAX_COORDINATOR=host:port of process 0 is not"),
    "no port": (cluster.by_hand(0, 2, 1) | {"BLOOMJAX_COORDINATOR": "a"}, "BLOOMJAX_COORDINATOR=a must be host:port"),
    "rank": (cluster.by_hand(4, 4, 1), "processes are numbered from 0 to 3"),
    "number": (cluster.by_hand(0, 4, 1) | {"BLOOMJAX_NUM_PROCESSES": "four"}, "=four must be a number"),
    "Open MPI 5": ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE=4, but nothing says where"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_an_environment_that_is_incomplete(place, case):
    environment, message = WRONG[case]
    with pytest.raises(BadInput) as error:
        place(environment)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_which_errors_mean_a_lost_peer(monkeypatch):
    lost = jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed: Connection reset by peer")
    wrapped = ValueError("the save failed")
    wrapped.__cause__ = lost
    others = [
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory allocating 8 bytes"),
        jax.errors.JaxRuntimeError("INTERNAL: a kernel failed"),
        ConnectionResetError("Connection reset by peer"),  # of a file system, say
    ]
    assert not job.is_lost_peer(lost)  # a process that is alone has none
    monkeypatch.setattr(job, "_job", object())
    assert job.is_lost_peer(lost) and job.is_lost_peer(wrapped)
    assert not any(map(job.is_lost_peer, others))


def test_no_gin_file_touches_a_device_before_the_processes_are_joined(tmp_path):
    """What they build before `train` begins: jax.distributed comes too late otherwise."""
    program = (
        "import sys\n"
        "from bloomjax import config\n"
        "from bloomjax.distributed import Cluster\n"
        "from jax._src import xla_bridge\n"
        "def start(self): raise SystemExit(50 + xla_bridge.backends_are_initialized())\n"
        "Cluster.start = start\n"
        "config.run('train')\n"
    )
    flags = [
        "--gin_file=176b.gin",
        *(f"--gin.{name}='{tmp_path}/x'" for name in ("MODEL_DIR", "STORE_DIR", "VOCABULARY")),
    ]
    done = tiny_run.execute([sys.executable, "-c", program, *flags])
    assert done.returncode == 50, done.stderr


def test_time_outs_are_positive():
    with pytest.raises(BadInput, match="at least 1 second"):
        distributed.Cluster(heartbeat_timeout_seconds=0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("INTERNAL: NCCL operation ncclAllReduce() failed: unhandled cuda error", 75),
        ("INTERNAL: CUDA_ERROR_ECC_UNCORRECTABLE: uncorrectable ECC error encountered", 75),
        ("RESOURCE_EXHAUSTED: CUDA_ERROR_OUT_OF_MEMORY: out of memory", 1),
        ("INVALID_ARGUMENT: shapes do not fit", 1),
    ],
)
def test_a_fault_of_a_device_is_worth_another_start(text, expected, capsys):
    assert job.fail_with(jax.errors.JaxRuntimeError(text)) == expected
    assert text in capsys.readouterr().err
