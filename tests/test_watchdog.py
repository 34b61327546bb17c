"""A process in which nothing moves ends with 75 and says where each of its threads stands; one that moves goes on."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import cluster
import pytest
from cluster import Cluster

from bloomjax import watchdog
from bloomjax.errors import BadInput
from bloomjax.journal import Journal, read_lines
from bloomjax.watchdog import Watchdog, stacks

WORKER = str(Path(__file__).with_name("watchdog_worker.py"))


class Recorded(Watchdog):
    """Notes when it would end the process."""

    def __init__(self, **limits):
        super().__init__(**limits)
        self.ends = []

    def _end(self, what):
        self.ends.append((what, self._step))
        self.beat()


def wait_for(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# ---- when ----


def test_beats_keep_a_process(tmp_path):
    with Recorded(limit_seconds=0.4).start(Journal(tmp_path)) as dog:
        for step in range(40):
            dog.beat(step)
            time.sleep(0.02)
        assert not dog.ends
        wait_for(lambda: dog.ends)
    assert dog.ends == [("no finished step", 39)]
    assert not any(thread.name == "watchdog" for thread in threading.enumerate())


def test_setup_has_a_limit_of_its_own(tmp_path):
    dog = Recorded(limit_seconds=0.1, setup_limit_seconds=0.8)
    with dog.start(Journal(tmp_path), 5):
        with dog.setup("restore"):
            with dog.setup("compile"):
                time.sleep(0.3)
            time.sleep(0.3)
            assert not dog.ends
            wait_for(lambda: dog.ends)
        assert dog.ends == [("no end of restore", 5)]
        with pytest.raises(ZeroDivisionError), dog.setup("save"):
            _ = 1 / 0
        wait_for(lambda: len(dog.ends) > 1)
    assert dog.ends[1] == ("no finished step", 5)


def test_it_can_be_without_limits(tmp_path):
    with Recorded(limit_seconds=None, setup_limit_seconds=0.1).start(Journal(tmp_path)) as dog:
        time.sleep(0.3)
        assert not dog.ends
        with dog.setup():
            wait_for(lambda: dog.ends)
    with Recorded(limit_seconds=None, setup_limit_seconds=None).start(Journal(tmp_path)) as dog:
        assert not dog.ends


def test_time_in_which_the_process_was_stopped_does_not_count(tmp_path, monkeypatch):
    jump = [0.0]

    class Clock:
        CLOCK_MONOTONIC = time.CLOCK_MONOTONIC
        monotonic = staticmethod(lambda: time.monotonic() + jump[0])

    monkeypatch.setattr(watchdog, "time", Clock)
    with Recorded(limit_seconds=2.0).start(Journal(tmp_path)) as dog:  # looks every 0.25 s
        time.sleep(0.3)
        jump[0] = 1000.0
        time.sleep(0.4)
        assert not dog.ends and dog._silent_seconds < 2
        wait_for(lambda: dog.ends)


@pytest.mark.parametrize("limits", [{"limit_seconds": 0}, {"setup_limit_seconds": -1}])
def test_limits_that_make_no_sense(limits):
    with pytest.raises(BadInput, match=r"Watchdog\.(setup_)?limit_seconds must be positive"):
        Watchdog(**limits)


def test_a_beat_costs_nothing(tmp_path):
    with Recorded().start(Journal(tmp_path)) as dog:
        start = time.perf_counter()
        for step in range(10_000):
            dog.beat(step)
        assert (time.perf_counter() - start) / 10_000 < 20e-6  # 0.1e-6 on an idle machine


def test_stacks_name_threads_and_calls():
    def waits_here(event):
        event.wait()

    event = threading.Event()
    thread = threading.Thread(target=waits_here, args=[event], name="the other one")
    thread.start()
    try:
        found = []
        own = threading.Thread(target=lambda: found.append(stacks()), name="asks")
        own.start()
        own.join()
    finally:
        event.set()
        thread.join()
    (text,) = found
    first, _, rest = text.partition("\nthread the other one\n")
    assert first.startswith("thread MainThread\n") and "thread asks" not in text
    assert "test_watchdog.py" in first and "waits_here" in rest
    assert rest.index("waits_here") < rest.index("wait\n" if "wait\n" in rest else " Event.wait")


# ---- how it ends ----


def arguments(model_dir, how, **more):
    model_dir.mkdir(exist_ok=True)
    given = {"model_dir": str(model_dir), "how": how, "limit_seconds": [1.0, 1.0]} | more
    return [sys.executable, WORKER, json.dumps(given)]


def start(model_dir, how, **more):
    """The worker, alone."""
    return subprocess.Popen(
        arguments(model_dir, how, **more), env=cluster.environment(2, {}, 2),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def hangs(model_dir):
    records, unreadable = read_lines(model_dir / "journal.jsonl")
    assert not unreadable
    return [record for record in records if record["event"] == "hang"]


def main_stack(record):
    return record["stacks"].partition("\nthread ")[0]


def test_a_process_that_is_alone(tmp_path):
    # A setup that is longer than a step may take, and than the kernel's timer if nothing renewed it.
    more = {"limit_seconds": [0.8], "_FUSE_SECONDS": 0.2, "compile_seconds": 2.5}
    process = start(tmp_path, "python", **more)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75
    line = "watchdog: no finished step for 1 s after step 2; journal.jsonl has the stacks"
    assert err == f"bloomjax: {line}\n"
    (record,) = hangs(tmp_path)
    assert record["step"] == 2 and 0.8 <= record["seconds"] < 3
    assert record["pid"] == process.pid and record["host"] == cluster.host()
    assert record["reason"] == "no finished step for 1 s after step 2"
    assert main_stack(record).splitlines()[-1].endswith(" hang_in_python")


@pytest.mark.slow
def test_a_process_that_was_stopped_and_goes_on(tmp_path):
    process = start(tmp_path, "none", num_steps=30)
    wait_for((tmp_path / str(process.pid)).exists, 60)
    process.send_signal(signal.SIGSTOP)
    time.sleep(1.5)
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out == "done\n" and not hangs(tmp_path)


def test_a_journal_that_cannot_be_written(tmp_path):
    """A pipe that nobody reads stands in for a file system that does not answer."""
    os.mkfifo(tmp_path / "journal.jsonl")
    process = start(tmp_path, "python", _JOURNAL_SECONDS=0.5)
    started = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75 and time.monotonic() - started < 30
    assert " hang_in_python\n" in err and "thread MainThread\n" in err
    assert err.splitlines()[-1].endswith("after step 2; the stacks are on stderr")


@pytest.mark.skipif(sys.platform != "linux", reason="a timer of Linux")
def test_something_holds_the_lock_of_the_interpreter(tmp_path):
    process = start(tmp_path, "lock", limit_seconds=[0.5], _FUSE_SECONDS=1.0)
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert "in hang_with_the_lock\n" in err


# ---- several processes ----


@pytest.mark.slow
def test_one_of_two_hangs_and_the_other_finds_it(tmp_path):
    """So the one that hangs is told to write its stacks, which are those that matter."""
    pair = Cluster(arguments(tmp_path, "python", process=1, limit_seconds=[1.0, 60.0]), 2)
    results = pair.end(timeout_seconds=60)
    assert [code for code, _, _ in results] == [75, 75], results
    said = "".join(err for _, _, err in results)
    assert f" on {cluster.host()}: watchdog: no finished step for 1 s after step " in said
    records = {record["pid"]: record for record in hangs(tmp_path)}
    assert len(hangs(tmp_path)) == 2
    waiting, hanging = (records[process.pid] for process in pair.processes)
    assert main_stack(hanging).splitlines()[-1].endswith(" hang_in_python")
    assert (
        main_stack(waiting).splitlines()[-1].endswith(" main")
    )  # inside of JAX, which is no Python


@pytest.mark.slow
def test_one_of_two_hangs_and_finds_it_first(tmp_path):
    """The other one may find a broken connection before it can tell what it waited for."""
    pair = Cluster(arguments(tmp_path, "python", process=1, limit_seconds=[60.0, 1.0]), 2)
    results = pair.end(timeout_seconds=60)
    assert [code for code, _, _ in results] == [75, 75], results
    line = f"bloomjax: process 1 on {cluster.host()}: watchdog: no finished step for 1 s after step 2; "
    assert results[1][2] == f"{line}journal.jsonl has the stacks\n"
    hanging = [record for record in hangs(tmp_path) if record["pid"] == pair.processes[1].pid]
    assert main_stack(hanging[0]).splitlines()[-1].endswith(" hang_in_python")


@pytest.mark.parametrize("stopped", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_one_of_two_stands_still(tmp_path, stopped):
    """Process 0 takes the coordinator with it, so nobody can be told."""
    command = arguments(
        tmp_path, "none", _LEAVE_SECONDS=1.0 if stopped == 0 else 9.0, _JOURNAL_SECONDS=1.0
    )
    pair = Cluster(command, 2)
    pair.when((tmp_path / str(pair.processes[stopped].pid)).exists)
    pair.processes[stopped].send_signal(signal.SIGSTOP)
    other = pair.processes[1 - stopped]
    try:
        assert other.wait(30) == 75
    finally:
        pair.processes[stopped].kill()
        _, _, err = pair.end()[1 - stopped]
    (record,) = hangs(tmp_path)
    assert record["pid"] == other.pid
    assert "watchdog: no finished step for " in err and err.count("watchdog: ") == 1
    assert ("ended without the other processes" in err) == (stopped == 0)
