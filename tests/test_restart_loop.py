"""tools/restart_loop.sh with a command that ends as it is told."""

import os
import signal
import subprocess
import time

import pytest
from tiny_run import REPOSITORY

LOOP = REPOSITORY / "tools" / "restart_loop.sh"

# Each start takes the first line of the plan: an exit code (or "kill"), then the checkpoint and the step of the metrics
# that it leaves behind.
COMMAND = """
read -r code checkpoint step < plan && sed -i 1d plan && echo "start $*" >> starts
[ -z "$checkpoint" ] || mkdir -p "model dir/checkpoints/$checkpoint"
line="{\\"step\\": $step, \\"loss\\": 0.$RANDOM, \\"more\\": {\\"step\\": 999}}"
[ -z "$step" ] || echo "$line" >> "model dir/metrics.jsonl"
[ "$code" != kill ] || kill -KILL $$
exit "$code"
"""


@pytest.fixture
def loop(tmp_path):
    """loop(plan, *options): exit code, stderr and how often the command was started."""

    def call(plan, *options):
        (tmp_path / "plan").write_text("".join(f"{line}\n" for line in plan))
        done = subprocess.run(
            [LOOP, "--wait=0", *options, "model dir", "bash", "-c", COMMAND, "-", "a b"],
            cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        starts = tmp_path / "starts"
        lines = starts.read_text().splitlines() if starts.exists() else []
        assert set(lines) <= {"start a b"}
        assert done.stdout == ""
        return done.returncode, done.stderr, len(lines)

    return call


@pytest.mark.parametrize("code", [0, 1, 2, 3, 130, 143, 253])
def test_what_is_not_started_again(loop, code):
    returned, err, starts = loop([code, 0])
    assert (returned, starts) == (code, 1)
    assert err == ("" if code == 0 else f"restart_loop: start 1 ended with {code} at step 0\n")


@pytest.mark.parametrize("code", [75, 134, 137, 247, 250, "kill"])
def test_what_is_started_again(loop, code):
    returned, err, starts = loop([code, 0])
    assert (returned, starts) == (0, 2)
    number = 137 if code == "kill" else code
    assert f"start 1 ended with {number} at step 0; next in 0 s" in err


def test_not_for_ever_without_progress(loop):
    returned, err, starts = loop([75, 137, 75, 0])
    assert (returned, starts) == (75, 3)
    assert err.endswith(
        "start 3 ended with 75; 3 in a row without progress beyond step 0 of model dir: giving up\n"
    )


def test_the_limit(loop):
    assert loop([134] * 9, "--max-stalls=1")[::2] == (134, 1)


@pytest.mark.parametrize(
    "plan",
    [
        ["75 10", "75", "75 20", "75", "75 30", "75", 0],
        ["75 10 12", "75 10 13", "75 10 14", "75 10 15", "75 20 16", "75 20 20", 0],
        ["75 9", "75 9", "75 10", "75 10", 0],  # steps are numbers, not words
    ],
    ids=["checkpoints", "metrics", "numbers"],
)
def test_progress_is_forgiven(loop, plan):
    assert loop(plan)[::2] == (0, len(plan))


def test_the_same_steps_over_and_over_are_no_progress(loop):
    # Each start restores step 10 and dies at 15 or before; its last line is another one every time.
    returned, err, starts = loop(["137 10 15", "137 10 13", "137 10 14", "137 10 15", "137 10 12"])
    assert (returned, starts) == (137, 4)
    assert "beyond step 15" in err
    assert "ended with 137 at step 13; next" in err


def test_a_checkpoint_that_is_not_whole_is_none(loop):
    assert loop(["75 10.orbax-checkpoint-tmp", "75 20.tmp", "75 x30", "75 40"])[::2] == (75, 3)


def test_what_was_there_before_is_no_progress(loop, tmp_path):
    (tmp_path / "model dir" / "checkpoints" / "70").mkdir(parents=True)
    returned, err, starts = loop(["75"] * 5)
    assert (returned, starts) == (75, 3)
    assert "beyond step 70" in err


def test_another_way_to_look(loop, tmp_path):
    """As launch_tpu.sh asks a host of the TPU."""
    # No word of the prefix may hold a space; the script comes as one word.
    asked = tmp_path / "ask"
    asked.write_text('#!/bin/sh\n[ "$1" = --command ] && echo asked >> asked && bash -c "$2"\n')
    asked.chmod(0o755)
    plan = ["75 1", "75 2", "75 3", "75 4", 0]
    assert loop(plan, f"--through={asked} --command")[::2] == (0, 5)
    assert (tmp_path / "asked").read_text().count("asked") == 6  # before, and after each start
    # A host that cannot be asked is no progress, and no error either.
    assert loop(["75 5", "75 6", "75 7", 0], "--through=false")[0] == 75


def test_dry_run_and_show_progress(loop, tmp_path):
    def output(*arguments):
        return subprocess.run(
            [LOOP, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout

    assert output("--dry-run", "runs/x", "train", "a b", "$c") == "train a\\ b \\$c \n"
    assert output("--show-progress", "model dir") == "0\n"
    loop(["0 20 27"])
    assert output("--show-progress", "model dir") == "27\n"
    loop(["0 30 28"])
    assert output("--show-progress", "model dir") == "30\n"
    assert "--max-stalls=3" in output("--help")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--max-stall=3", "d", "c"], "unknown option --max-stall=3; --help names all"),
        (["--max-stalls=0", "d", "c"], "--max-stalls=0 must be a positive number"),
        (["--wait=x", "d", "c"], "--wait=x must be a whole number of seconds"),
        (["d"], "needs MODEL_DIR and a command"),
    ],
)
def test_bad_input(arguments, message):
    done = subprocess.run([LOOP, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"restart_loop: {message}\n"


# ---- signals ----

# Says when it listens; saves step 50 if $SAVES, and ends with 75.
PATIENT = """
trap 'echo USR1 >> got; [ -z "$SAVES" ] || mkdir -p m/checkpoints/50; exit 75' USR1
trap 'echo TERM >> got; exit 143' TERM
echo >> ready
for _ in $(seq 600); do sleep 0.05; done
"""


@pytest.fixture
def patient(tmp_path):
    """patient(number, *options, saves=True): exit code and stderr after a signal to the loop, which runs PATIENT."""

    def call(number, *options, saves=True):
        with subprocess.Popen(
            [LOOP, "--wait=0", *options, "m", "bash", "-c", PATIENT],
            cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=os.environ | {"SAVES": "1" if saves else ""},
        ) as process:  # fmt: skip
            _wait_for(tmp_path / "ready")
            process.send_signal(number)
            _, err = process.communicate(timeout=30)
        return process.returncode, err

    return call


def _wait_for(path):
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_stops_all(patient, tmp_path, number):
    code, err = patient(number)
    assert code == 75
    assert (tmp_path / "ready").read_text() == "\n"  # one start
    assert (tmp_path / "got").read_text() == "USR1\n"
    assert err == "restart_loop: stopped by a signal at step 50; the same command goes on\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("saves", [True, False])
def test_requeue_after_progress_at_the_end_of_the_time(patient, tmp_path, number, saves):
    code, err = patient(number, "--requeue=echo again 4711 > requeued", saves=saves)
    assert code == 75
    assert (tmp_path / "requeued").exists() == (saves and number == signal.SIGUSR1)
    no_progress = "no progress beyond step 0 since the start, so not again: echo again 4711" in err
    assert no_progress == (not saves and number == signal.SIGUSR1)


def test_a_command_in_place_of_the_signal(patient, tmp_path):
    # As launch_tpu.sh does: the signal would reach gcloud, not the hosts.
    code, _ = patient(
        signal.SIGTERM, "--stop=echo stopped > stopped; pkill -USR1 -P $PPID -f 'trap .echo'"
    )
    assert code == 75
    assert (tmp_path / "stopped").read_text() == "stopped\n"


def test_a_signal_in_the_pause_ends_it(tmp_path):
    with subprocess.Popen(
        [LOOP, "--wait=60", "m", "bash", "-c", "echo >> starts; exit 137"],
        cwd=tmp_path, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stderr is not None
        assert "next in 60 s" in process.stderr.readline()
        process.terminate()
        _, err = process.communicate(timeout=10)
    assert process.returncode == 137
    assert (tmp_path / "starts").read_text() == "\n"
    assert "stopped by a signal" in err
