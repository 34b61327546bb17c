"""tools/launch_*: what they would run, and real jobs through stand-ins of srun, mpirun, sbatch and gcloud."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cluster
import fake_launcher
import pytest
import tiny_run
import yaml
from tiny_run import REPOSITORY

TOOLS = REPOSITORY / "tools"
SLURM, MPI, TPU = (TOOLS / f"launch_{name}.sh" for name in ("slurm", "mpi", "tpu"))
RESTART_CODES = {75, 134, 137}
NUM_STEPS = 12
# As the tests of several processes, so that the compiled programs are the same.
FLAGS = (
    "--gin.train.mesh=@MeshShape()", "--gin.MeshShape.data=2", "--gin.BloomConfig.dtype='float32'",
    f"--gin.TRAIN_STEPS={NUM_STEPS}", "--gin.EVAL_EVERY_STEPS=100", "--gin.SAVE_EVERY_STEPS=4",
)  # fmt: skip


def run(*command, env=None, timeout=60, **more):
    return subprocess.run(
        [str(word) for word in command], env=env, timeout=timeout, check=False, text=True,
        capture_output=True, **more,
    )  # fmt: skip


@pytest.fixture
def fake(tmp_path):
    """An environment in which this machine is the cluster; `stub` takes the place of Python."""
    folder = fake_launcher.install(
        tmp_path / "bin", "srun", "sbatch", "scontrol", "mpirun", "gcloud"
    )
    own = cluster.environment(2, {"JAX_COORDINATOR_PORT": str(cluster.free_port())})
    stub = tmp_path / "stub"
    stub.write_text(STUB)
    stub.chmod(0o755)
    return own | {
        "PATH": f"{folder}:{os.environ['PATH']}", "SPOOL": str(tmp_path), "PYTHON": str(stub),
        "BLOOMJAX_WAIT_SECONDS": "0", fake_launcher.NOT_PASSED_ON: "1",
    }  # fmt: skip


# Instead of bloomjax.train: process N follows the file plan.N in the current folder, a line an attempt.
STUB = """#!/usr/bin/env bash
rank=${SLURM_PROCID-${OMPI_COMM_WORLD_RANK-$RANK}}
read -r code seconds step < <(sed -n "${ATTEMPT}p" "plan.$rank")
trap 'mkdir -p m/checkpoints/90; exit 75' USR1
[ "$code" != deaf ] || trap '' USR1 TERM
env > "environment.$rank"
echo "$*" > "arguments.$rank"
for _ in $(seq "$seconds"); do sleep 0.1; done
[ -z "$step" ] || mkdir -p "m/checkpoints/$step"
[ "$code" != kill ] || kill -KILL $$
exit "$code"
"""


def plan(folder, *of_processes):
    for rank, lines in enumerate(of_processes):
        (folder / f"plan.{rank}").write_text("".join(f"{line}\n" for line in lines))


def arguments(folder):
    return (folder / "arguments.0").read_text().rstrip("\n")


def calls(folder, name):
    lines = (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []
    return [line for line in lines if line.split()[0] == name]


# ---- what they would run ----


def dry_run(script, *options, env=None):
    done = run(script, *options, "--dry-run", "--", "--gin_file=a.gin", "--gin.X='a b'", env=env)
    assert (done.returncode, done.stderr) == (0, "")
    return [shlex.split(line) for line in done.stdout.splitlines()]


def train(python="python"):
    return [python, "-m", "bloomjax.train", "--gin.MODEL_DIR='/w/x'", "--gin_file=a.gin", "--gin.X='a b'"]  # fmt: skip


@pytest.fixture
def bare(tmp_path):
    """An environment with nothing in it: no launcher of the machine is found, no variable passed on."""
    return {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}


LOOP = [str(TOOLS / "restart_loop.sh"), "--max-stalls=3"]


def test_dry_run_of_slurm(bare, tmp_path):
    exclude = tmp_path / "bad_nodes"
    exclude.write_text(
        "# found by the straggler report\njean-zay-iam37\n\n  node[01-03]  # slow, node7\n"
    )
    own = ("--model-dir=/w/x", f"--exclude-file={exclude}", "--nodes=48", "--gpus-per-node=8")
    submit, in_job = dry_run(SLURM, *own, env=bare)
    assert submit == [
        "sbatch", "--ntasks-per-node=1", "--exclude=jean-zay-iam37,node[01-03]", "--nodes=48",
        "--gpus-per-node=8", str(SLURM), "--model-dir=/w/x", "--tasks-per-node=1", "--max-stalls=3",
        "--", "--gin_file=a.gin", "--gin.X='a b'",
    ]  # fmt: skip
    step = ["srun", "--kill-on-bad-exit=1", "--ntasks-per-node=1", "--cpu-bind=none"]
    step += [str(TOOLS / "launch_task.sh"), *train()]
    assert in_job == [*LOOP, "--requeue=scontrol requeue $SLURM_JOB_ID", "/w/x", *step]
    # What it submits is what it would run there.
    inside = bare | {"SLURM_JOB_ID": "12"}
    assert dry_run(*submit[5:9], env=inside) == [
        [*LOOP, "--requeue=scontrol requeue 12", "/w/x", *step]
    ]
    (eight,) = dry_run(SLURM, "--model-dir=/w/x", "--tasks-per-node=8", env=inside)
    assert "--ntasks-per-node=8" in eight


def test_directives_of_slurm():
    lines = SLURM.read_text().splitlines()
    directives = [line for line in lines if line.startswith("#SBATCH ")]
    assert lines[1 : 1 + len(directives)] == directives  # sbatch reads none after a command
    assert {"#SBATCH --requeue", "#SBATCH --signal=B:USR1@600"} <= set(directives)


def test_dry_run_of_mpi(bare):
    env = bare | {"XLA_FLAGS": "--xla_a", "NCCL_DEBUG": "INFO", "JAXLIKE": "no"}
    (words,) = dry_run(MPI, "--model-dir=/w/x", "--hosts=a,b", "--mpirun=--mca x y", env=env)
    assert words == [
        *LOOP, "/w/x", "mpirun", "-np", "2", "--host", "a:1,b:1", "--map-by", "ppr:1:node",
        "--bind-to", "none", "-x", "BLOOMJAX_COORDINATOR=a:8476", "-x", "NCCL_DEBUG", "-x", "PATH",
        "-x", "XLA_FLAGS", "--mca", "x", "y", *train(),
    ]  # fmt: skip


def test_dry_run_of_tpu(bare):
    own = ("--tpu=t", "--zone=z", "--project=p", "--dir=a folder", "--model-dir=/w/x")
    (words,) = dry_run(TPU, *own, env=bare)
    ssh = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "t", "--zone=z", "--project=p"]
    through = " ".join([*ssh, "--worker=0", "--command"])
    assert words[:3] == [*LOOP, f"--through={through}"]
    assert words[3] == f"--stop={through}='pkill -USR1 -f [b]loomjax.train'"
    assert words[4:-1] == ["/w/x", *ssh, "--worker=all"]
    remote = words[-1].removeprefix("--command=")
    assert shlex.split(remote) == ["cd", "a folder", "&&", "exec", *train(".venv/bin/python")]


@pytest.mark.parametrize("script", [SLURM, MPI, TPU], ids=lambda path: path.stem)
def test_help_and_bad_input(script, bare):
    text = run(script, "--help", env=bare)
    assert text.returncode == 0
    assert (
        "--dry-run" in text.stdout
        and "--model-dir=DIR" in text.stdout
        and "set -" not in text.stdout
    )
    name = script.stem
    for arguments, message in [
        (["--", "--gin_file=a.gin"], {"launch_tpu": "--tpu is missing"}.get(name, "--model-dir is missing")),
        ([*_required(name), "--gin_file=a.gin"], "" if name == "launch_slurm" else "unknown option --gin_file"),
        ([*_required(name)], "-- and the flags of bloomjax.train are missing"),
        ([*_required(name), "--"], "-- and the flags of bloomjax.train are missing"),
    ]:  # fmt: skip
        done = run(script, *arguments, env=bare)
        assert done.returncode == 2
        assert done.stderr.startswith(f"{name}: {message}") and done.stderr.count("\n") == 1


def _required(name):
    return ["--model-dir=m"] + (["--tpu=t", "--zone=z", "--dir=d"] if name == "launch_tpu" else [])


def test_slurm_says_what_comes_too_late(bare, tmp_path):
    inside = bare | {"SLURM_JOB_ID": "12"}
    done = run(SLURM, "--model-dir=m", "--nodes=4", "--", "--gin_file=a.gin", env=inside)
    assert (done.returncode, done.stderr) == (
        2,
        "launch_slurm: inside of a job, so --nodes=4 comes too late\n",
    )
    missing = tmp_path / "none"
    done = run(SLURM, "--model-dir=m", f"--exclude-file={missing}", "--", "--x", env=bare)
    assert (done.returncode, done.stderr) == (
        2,
        f"launch_slurm: --exclude-file={missing} cannot be read\n",
    )


def test_shellcheck():
    shellcheck = shutil.which("shellcheck", path=f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}")  # fmt: skip
    if not shellcheck:
        pytest.skip("shellcheck is not installed")
    done = run(shellcheck, *sorted(TOOLS.glob("*.sh")))
    assert (done.returncode, done.stdout) == (0, "")


def test_jobset():
    jobset = yaml.safe_load((TOOLS / "launch_gke.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    name = jobset["metadata"]["name"]
    (group,) = jobset["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["python", "-m", "bloomjax.train"]
    flags = dict(
        word.split("=", 1) for word in container["args"] if not word.startswith("--gin_file=")
    )
    assert flags["--gin.MODEL_DIR"].strip("'").startswith(container["volumeMounts"][0]["mountPath"])
    gin_files = [word.split("=", 1)[1] for word in container["args"] if word.startswith("--gin_file=")]  # fmt: skip
    assert gin_files and all((REPOSITORY / "gin" / path).exists() for path in gin_files)
    # One process a node, and process 0 where the coordinator is said to be: pod 0 of job 0.
    env = {item["name"]: item.get("value") for item in container["env"]}
    assert job["completionMode"] == "Indexed"
    assert int(env["BLOOMJAX_NUM_PROCESSES"]) == job["completions"] == job["parallelism"]
    assert env["BLOOMJAX_COORDINATOR"] == f"{name}-{group['name']}-0-0.{name}:8476"
    # Which ends are started again.
    assert (job["backoffLimit"], pod["restartPolicy"]) == (0, "Never")
    lost_node, rule = job["podFailurePolicy"]["rules"]
    assert lost_node["action"] == "Count" and rule["action"] == "FailJob"
    on_exit = rule["onExitCodes"]
    assert on_exit["containerName"] == container["name"]
    assert (on_exit["operator"], set(on_exit["values"])) == ("NotIn", RESTART_CODES)
    policy = jobset["spec"]["failurePolicy"]
    assert 0 < policy["maxRestarts"] < 1000
    (rule,) = policy["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])


def test_all_launchers_restart_on_the_same_codes():
    for script in ("restart_loop.sh", "launch_task.sh"):
        (line,) = [x for x in (TOOLS / script).read_text().splitlines() if "75 | 134" in x]
        codes = {int(word) for word in line.split(")")[0].split(" | ")}
        assert codes - {0} == RESTART_CODES | {247, 250}


# ---- the launchers with a stub for the training ----


def slurm_job(env, tmp_path, *, tasks=2, **more):
    return run(
        SLURM, "--model-dir=m", f"--tasks-per-node={tasks}", "--", "--gin_file=a.gin",
        env=env | {"SLURM_JOB_ID": "4711"}, cwd=tmp_path, **more,
    )  # fmt: skip


def test_slurm_starts_again(fake, tmp_path):
    plan(tmp_path, ["75 0", "137 0 1", "0 0"], ["kill 0", "75 0", "0 1"])
    done = slurm_job(fake, tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(calls(tmp_path, "srun")) == 3
    assert arguments(tmp_path) == "-m bloomjax.train --gin.MODEL_DIR='m' --gin_file=a.gin"
    assert not calls(tmp_path, "scontrol")


@pytest.mark.parametrize("other", ["0", "deaf"])
def test_slurm_does_not_repeat_bad_input(fake, tmp_path, other):
    """Although srun ends the other task with a code, or a signal, that asks for another start."""
    plan(tmp_path, ["1 0"], [f"{other} 9999"])
    done = slurm_job(fake, tmp_path)
    assert done.returncode == 143
    assert len(calls(tmp_path, "srun")) == 1
    assert f"launch_task: task 0 on {cluster.host()} ended with 1, so the job ends" in done.stderr


def test_slurm_does_not_wait_for_a_task_that_hangs(fake, tmp_path):
    plan(tmp_path, ["75 0"] * 2 + ["0 0"], ["0 9999", "deaf 9999", "0 0"])
    started = time.monotonic()
    assert slurm_job(fake, tmp_path).returncode == 0
    assert time.monotonic() - started < 30
    assert len(calls(tmp_path, "srun")) == 3


def test_slurm_gives_up(fake, tmp_path):
    plan(tmp_path, ["75 0"] * 9)
    done = slurm_job(fake, tmp_path, tasks=1)
    assert done.returncode == 75
    assert len(calls(tmp_path, "srun")) == 3
    assert "giving up" in done.stderr


def test_slurm_requeues_at_the_end_of_the_time(fake, tmp_path):
    """SIGUSR1 comes to the batch shell alone; from there it goes to every process."""
    plan(tmp_path, ["0 9999"], ["0 9999"])
    with subprocess.Popen(
        [SLURM, "--model-dir=m", "--tasks-per-node=2", "--", "--gin_file=a.gin"],
        env=fake | {"SLURM_JOB_ID": "4711"}, cwd=tmp_path,
    ) as process:  # fmt: skip
        wait_for(lambda: all((tmp_path / f"arguments.{i}").exists() for i in range(2)), process)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(30) == 75
    assert calls(tmp_path, "scontrol") == ["scontrol requeue 4711"]
    assert len(calls(tmp_path, "srun")) == 1


def test_mpi_starts_again_and_passes_the_environment_on(fake, tmp_path):
    plan(tmp_path, ["75 99", "0 0"], ["kill 0", "0 0"])
    done = run(
        MPI, "--model-dir=m", "--processes-per-host=2", "--port=5", "--", "--gin_file=a.gin",
        env=fake | {"XLA_FLAGS": "--xla_a --xla_b"}, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(calls(tmp_path, "mpirun")) == 2
    seen = (tmp_path / "environment.1").read_text().splitlines()
    assert "BLOOMJAX_COORDINATOR=localhost:5" in seen
    assert "XLA_FLAGS=--xla_a --xla_b" in seen
    assert not [line for line in seen if line.startswith(fake_launcher.NOT_PASSED_ON)]


def test_tpu_starts_again_after_progress_on_the_hosts(fake, tmp_path):
    # Four ends, which would be one too many without the progress that only host 0 knows of.
    plan(tmp_path, [*(f"75 0 {step}" for step in (8, 9, 10, 11)), "0 0"], ["137 0"] * 4 + ["0 0"])
    own = ("--tpu=t", "--zone=z", f"--dir={tmp_path}", f"--model-dir={tmp_path}/m")
    done = run(TPU, *own, "--", "--gin_file=a.gin", "--gin.X='a b'", env=fake, cwd="/")
    assert done.returncode == 0, done.stderr
    assert sum("--worker=all" in call for call in calls(tmp_path, "gcloud")) == 5
    assert arguments(tmp_path).endswith("--gin_file=a.gin --gin.X='a b'")
    asked = [call for call in calls(tmp_path, "gcloud") if "--worker=0" in call]
    assert len(asked) == 6 and "checkpoints" in asked[0]


def wait_for(condition, process):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


# ---- the launchers with real training ----


def processes(model_dir):
    """Of the newest start: what each process said of itself."""
    lines = (model_dir / "journal.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["event"] == "start"][-1]["processes"]


@pytest.fixture(scope="module")
def train_flags(tiny_text):
    """Flags of the run, without MODEL_DIR, which the launchers set."""
    found = tiny_run.command(tiny_text, Path("unused"), *FLAGS)[3:]
    return [flag for flag in found if not flag.startswith("--gin.MODEL_DIR")]


@pytest.fixture(scope="module")
def by_slurm(tmp_path_factory, train_flags):
    """MODEL_DIR of two processes that sbatch and srun have started."""
    folder = tmp_path_factory.mktemp("slurm")
    fake_launcher.install(folder / "bin", "srun", "sbatch")
    done = run(
        SLURM, f"--model-dir={folder}/run", "--tasks-per-node=2", "--nodes=1", "--", *train_flags,
        env=real(folder, 2), cwd=folder, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert cluster.without_gloo(done.stdout).count("checkpoint: ") == 1  # process 0 alone speaks
    return folder / "run"


def real(folder, num_processes):
    """An environment of devices for so many processes."""
    port = {"JAX_COORDINATOR_PORT": str(cluster.free_port())}
    return cluster.environment(num_processes, port) | {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "SPOOL": str(folder),
        "PYTHON": sys.executable, "BLOOMJAX_WAIT_SECONDS": "0",
    }  # fmt: skip


@pytest.mark.slow
def test_slurm_trains_in_two_processes(by_slurm):
    assert len({process["pid"] for process in processes(by_slurm)}) == 2
    assert list(tiny_run.losses(by_slurm)) == list(range(1, NUM_STEPS + 1))


@pytest.mark.slow
def test_mpi_trains_in_four_processes(by_slurm, train_flags, tmp_path):
    fake_launcher.install(tmp_path / "bin", "mpirun")
    done = run(
        MPI, f"--model-dir={tmp_path}/run", "--processes-per-host=4", f"--port={cluster.free_port()}",
        "--", *train_flags, env=real(tmp_path, 4), cwd=tmp_path, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len({process["pid"] for process in processes(tmp_path / "run")}) == 4
    expected = tiny_run.losses(by_slurm)
    assert tiny_run.losses(tmp_path / "run") == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_costs_nothing_but_time(by_slurm, train_flags, tmp_path, victim):
    """kill -9 at some moment: the launcher starts again, the job ends by itself, with the same final loss."""
    fake_launcher.install(tmp_path / "bin", "srun")
    run_dir = tmp_path / "run"
    with subprocess.Popen(
        [SLURM, f"--model-dir={run_dir}", "--tasks-per-node=2", "--", *train_flags],
        env=real(tmp_path, 2) | {"SLURM_JOB_ID": "4711"}, cwd=tmp_path, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        moment = 1 + time.time_ns() % (NUM_STEPS - 2)
        print(f"process {victim} is killed after {moment} lines of metrics")
        wait_for(lambda: cluster.num_records(run_dir) >= moment, process)
        os.kill(processes(run_dir)[victim]["pid"], signal.SIGKILL)
        _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "restart_loop: start 1 ended with 137" in err
    assert tiny_run.losses(run_dir) == tiny_run.losses(by_slurm)
    assert tiny_run.fingerprints(run_dir, NUM_STEPS) == tiny_run.fingerprints(by_slurm, NUM_STEPS)
