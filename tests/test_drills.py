"""Every fault of the injector, unattended: two processes under restart_loop.sh, compared with a run without it."""

import json
import subprocess
import sys

import cluster
import pytest
import tiny_run
from tiny_run import REPOSITORY

STEPS = 24
# A mesh of copies, so that a bit can differ: data=2. Guard and checks as they are by default, but for short runs.
FLAGS = (
    "--gin.train.mesh=@MeshShape()", "--gin.MeshShape.data=2", "--gin.MeshShape.fsdp=1",
    "--gin.BloomConfig.dtype='float32'", f"--gin.TRAIN_STEPS={STEPS}", "--gin.EVAL_EVERY_STEPS=12",
    "--gin.SAVE_EVERY_STEPS=4", "--gin.SpikeGuard.min_steps=4", "--gin.SpikeGuard.window_steps=8",
    "--gin.SpikeGuard.loss_deviations=2.0", "--gin.ReplicaCheck.every_steps=5",
    "--gin.Stragglers.every_steps=5", "--gin.Watchdog.limit_seconds=10",
)  # fmt: skip


def journal(model_dir, *events):
    lines = (model_dir / "journal.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if not events or e["event"] in events]


def unattended(text, model_dir, *flags):
    """Exit code and stderr of the restart loop."""
    job = [sys.executable, cluster.__file__, "slurm", "2", "2"]
    done = subprocess.run(
        [REPOSITORY / "tools" / "restart_loop.sh", "--wait=0", model_dir,
         *job, *tiny_run.command(text, model_dir, *FLAGS, *flags)],
        env=tiny_run.environment(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def peaceful(tiny_text, tmp_path_factory):
    """The same job without a fault."""
    model_dir = tmp_path_factory.mktemp("peaceful") / "run"
    code, err = unattended(tiny_text, model_dir)
    assert code == 0, err
    assert {e["event"] for e in journal(model_dir)} <= {
        "start",
        "save",
        "energy",
        "done",
        "straggler",
    }
    return model_dir


def assert_same(model_dir, peaceful):
    """To the bit, each step once, and the same samples."""
    assert tiny_run.losses(model_dir) == tiny_run.losses(peaceful)
    assert tiny_run.fingerprints(model_dir, STEPS) == tiny_run.fingerprints(peaceful, STEPS)
    chains = [
        json.loads((d / f"checkpoints/{STEPS}/position/metadata").read_text())["chain"][1]
        for d in (model_dir, peaceful)
    ]
    assert chains[0] == chains[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "flags", "num_starts", "word"),
    [
        ("crash", ["crash_at_step=11"], 2, None),
        ("crash of process 0", ["crash_at_step=11", "process=0"], 2, None),
        ("crash in a save", ["crash_in_save_of_step=12"], 2, None),
        ("hang", ["hang_at_step=11"], 2, "hang"),
        ("bit flip", ["flip_bit_at_step=9"], 2, "drift"),
        ("bit flip in a moment", ["flip_bit_at_step=13", "flip_leaf='.opt_state'"], 2, "drift"),
        ("slow host", ["slow_host_seconds=0.2"], 1, "straggler"),
        ("full disk", ["full_disk_at_step=8"], 1, "disk_full"),
    ],
    ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else "",
)
def test_a_fault_costs_no_sample(tiny_text, peaceful, tmp_path, name, flags, num_starts, word):
    model_dir = tmp_path / "run"
    code, err = unattended(tiny_text, model_dir, *(f"--gin.fault.{flag}" for flag in flags))
    assert code == 0, (name, err)
    (happened,) = journal(model_dir, "fault")
    assert flags[0].startswith(happened["kind"])
    assert len(journal(model_dir, "start")) == num_starts
    assert_same(model_dir, peaceful)
    if word:
        assert journal(model_dir, word), err
    if word == "hang":
        hangs = journal(model_dir, "hang")
        assert any("before_step" in h["stacks"] for h in hangs)  # where it hangs
        assert len({h["pid"] for h in hangs}) == 2  # and where the other one waits
    if word == "drift":
        (drift,) = journal(model_dir, "drift")
        assert {d["process"] for d in drift["differences"]} == {
            0,
            1,
        }  # two copies: either may be it
        assert all(d["host"] == cluster.host() for d in drift["differences"])
    if word == "straggler":
        assert all(s["process"] == 1 for e in journal(model_dir, "straggler") for s in e["slow"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nan_samples", "noise_samples"])
@pytest.mark.parametrize("policy", ["skip", "rollback", "stop"])
def test_bad_samples(tiny_text, tmp_path, kind, policy):
    model_dir = tmp_path / "run"
    flags = [f"--gin.fault.{kind}=(128,136)", f"--gin.SpikeGuard.policy='{policy}'"]
    code, err = unattended(tiny_text, model_dir, *flags)
    (incident,) = journal(model_dir, "spike", "not_finite")
    assert incident["step"] == 17 and incident["samples"] == [[128, 136]]
    assert incident["action"] == policy
    if policy == "stop":
        assert code == 1 and "stopped, nothing of it is saved" in err
        assert len(journal(model_dir, "start")) == 1  # nobody starts it again
        assert max(int(p.name) for p in (model_dir / "checkpoints").glob("[0-9]*")) == 16
        return
    assert code == 0, err
    if policy == "skip":
        assert tiny_run.records(model_dir)[-1]["refused_steps"] == 1
        return
    never = tmp_path / "never"
    code, err = unattended(tiny_text, never, "--gin.TrainData.skip_samples=((128,136),)")
    assert code == 0, err
    assert_same(model_dir, never)


@pytest.mark.slow
def test_kill_switch_and_clock(tiny_text, tmp_path):
    """A file that appears ends both processes with 0; saves by minutes are made by all after the same step."""
    model_dir = tmp_path / "run"
    flags = [
        "--gin.train.writer=@SlowWriter",
        "--gin.TRAIN_STEPS=100000",
        "--gin.SAVE_EVERY_STEPS=100000",
    ]
    flags += ["--gin.Checkpoints.save_every_minutes=0.03"]
    line = tiny_run.command(tiny_text, model_dir, *FLAGS, *flags)
    pair = cluster.Cluster(line, 2, num_devices=2)
    pair.when(
        lambda: (model_dir / "journal.jsonl").exists() and len(journal(model_dir, "save")) > 2
    )
    (model_dir / "kill_switch").touch()
    (code, out, err), (other, _, _) = pair.end()
    assert (code, other) == (0, 0), err
    assert "stopped by kill switch after step" in out
    times = [e["time"] for e in journal(model_dir, "save")]
    assert all(b - a > 1.0 for a, b in zip(times[:-2], times[1:-1], strict=True))
    assert tiny_run.records(model_dir)[-1]["step"] == journal(model_dir, "stop")[0]["step"]
    # While it is there nothing is trained.
    again = cluster.Cluster(line, 2, num_devices=2).end()
    assert [code for code, _, _ in again] == [0, 0] and "nothing is done while" in again[0][1]
