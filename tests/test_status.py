"""tools/status.py: what it says of runs that go on, hang, were killed, have ended; its exit codes."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bloomjax.ledger import pid_namespace
from bloomjax.metrics import lock_model_dir

_PATH = Path(__file__).resolve().parent.parent / "tools" / "status.py"
_SPEC = importlib.util.spec_from_file_location("status", _PATH)
assert _SPEC and _SPEC.loader
status = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(status)

WORKER = Path(__file__).with_name("ledger_worker.py")


@pytest.fixture
def run(capsys):
    """run(*arguments): exit code, stdout and stderr."""

    def call(*arguments):
        with pytest.raises(SystemExit) as end:
            status.main(["status", *map(str, arguments)])
        out, err = capsys.readouterr()
        return end.value.code, out, err

    return call


@pytest.fixture
def worker(tmp_path):
    """worker(num_steps, *hang_at): the process, once it has finished a step."""
    begun = []

    def begin(num_steps, *hang_at):
        command = [sys.executable, WORKER, tmp_path / "run", num_steps, *hang_at]
        process = subprocess.Popen(list(map(str, command)))
        begun.append(process)
        log = tmp_path / "run" / "steps"
        size = log.stat().st_size if log.exists() else 0
        while not log.exists() or log.stat().st_size == size:
            assert process.poll() is None
            time.sleep(0.005)
        return process

    yield begin
    for process in begun:
        process.kill()
        process.wait()


def until(check, seconds=10):
    deadline = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


# ---- real processes ----


def test_alive_killed_and_gone_on(worker, run, tmp_path):
    process = worker(100_000)
    code, out, err = run(tmp_path / "run")
    assert code == 0 and not err
    assert f"ALIVE (pid {process.pid} on {os.uname().nodename})" in out and "of 100,000" in out
    until(lambda: "last_save_step" in json.loads(run(tmp_path / "run", "--json")[1]))
    found = json.loads(run(tmp_path / "run", "--json")[1])
    assert found["state"] == "alive" and found["phase"] in ("step", "save")
    assert 0.02 <= found["usual_step_seconds"] < 0.1 and found["idle_seconds"] < 1
    assert found["eta_seconds"] > 100_000 * 0.02 and found["last_save_seconds"] < 5
    process.kill()
    # Even before anybody has asked for its exit code.
    until(lambda: run(tmp_path / "run")[0] == 4, 2)
    process.wait()
    code, out, _ = run(tmp_path / "run")
    assert code == 4 and ": DEAD" in out and "ETA" not in out
    assert "1 in 24 h; ends: 1 x killed or crashed" in out
    process = worker(100_000)
    code, out, _ = run(tmp_path / "run")
    assert code == 0 and "2 in 24 h; ends: 1 x killed or crashed" in out
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 75
    code, out, _ = run(tmp_path / "run")
    assert code == 4 and ": ENDED" in out and "1 x SIGTERM" in out


@pytest.mark.parametrize("how", ["hangs", "is stopped"])
def test_stuck(worker, run, tmp_path, how):
    process = worker(1000, *([3] if how == "hangs" else []))
    if how == "is stopped":
        process.send_signal(signal.SIGSTOP)
    code, out, _ = run(tmp_path / "run")
    assert code == 0 and "(stuck after 0:05:00)" in out
    time.sleep(0.6)
    code, out, _ = run(tmp_path / "run", "--stuck_seconds=0.5")
    assert code == 3 and ": STUCK (pid" in out
    assert run(tmp_path / "run")[0] == 0  # by the default


def test_finished(worker, run, tmp_path):
    assert worker(12).wait(10) == 0
    code, out, err = run(tmp_path / "run")
    assert code == 0 and not err and ": FINISHED" in out and "12 of 12 (100.0%)" in out
    found = json.loads(run("--json", f"--model_dir={tmp_path / 'run'}")[1])
    assert (found["state"], found["step"], found["last_save_step"]) == ("finished", 12, 12)


def test_it_never_takes_the_lock(worker, run, tmp_path, monkeypatch):
    """A run that starts while status looks must not find its folder taken."""
    import fcntl

    def refuse(*_):
        raise AssertionError("flock")

    worker(12).wait(10)
    monkeypatch.setattr(fcntl, "flock", refuse)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert run(tmp_path / "run")[0] == 0
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}


# ---- made-up folders ----


def folder(tmp_path, *, lines=(), journal=(), metrics=(), lock=None):
    """MODEL_DIR; a line of the ledger is (phase, seconds, seconds ago[, fields])."""
    model_dir = tmp_path / "run"
    model_dir.mkdir(exist_ok=True)
    now, age, records = time.time(), 0.0, []
    for phase, seconds, ago, *fields in lines:
        age += seconds
        usual = {"run": "1.00-999999999", "phase": phase, "host": "node17", "pid": 999999999}
        times = {"time": now - ago, "seconds": seconds, "age_seconds": age}
        records.append(usual | times | (fields[0] if fields else {}))
    for name, found in (("goodput", records), ("journal", journal), ("metrics", metrics)):
        if found:
            text = "".join(x if isinstance(x, str) else json.dumps(x) + "\n" for x in found)
            (model_dir / f"{name}.jsonl").write_text(text)
    if lock:
        (model_dir / ".lock").write_text(lock + "\n")
    return model_dir


ELSEWHERE = "pid 999999999 on node17"
PLAN = {"plan": {"num_steps": 1000, "step": 0}}
STEPS = {"first_step": 1, "last_step": 100}


@pytest.mark.parametrize("ago, state, code", [(60, "alive", 0), (300, "dead", 4)])
def test_on_another_host_the_sign_of_life_counts(tmp_path, run, ago, state, code):
    steps = STEPS | {"finished_seconds": 1000.0}
    lines = [("start", 9, ago + 1000, PLAN), ("step", 1000, ago, steps)]
    answer = run(folder(tmp_path, lines=lines, lock=ELSEWHERE), "--json")
    assert answer[0] == code and json.loads(answer[1])["state"] == state
    assert json.loads(answer[1])["step"] == 100


def test_on_another_host_the_last_word_counts_more(tmp_path, run):
    end = {"end": {"code": 75, "reason": "SIGUSR1"}}
    found = folder(tmp_path, lines=[("start", 9, 5), ("finish", 1, 4, end)], lock=ELSEWHERE)
    code, out, _ = run(found)
    assert code == 4 and ": ENDED" in out and "1 x SIGUSR1" in out


def test_in_another_container_of_this_host_too(tmp_path, run):
    """There the same number is another process."""
    here = {"host": os.uname().nodename, "pid": 999999999}
    lock = f"pid 999999999 on {os.uname().nodename}"
    for namespace, state in ((pid_namespace(), "dead"), ("pid:[1]", "alive")):
        lines = [("start", 9, 5, here | {"pid_namespace": namespace})]
        found = folder(tmp_path, lines=lines, lock=lock)
        assert json.loads(run(found, "--json")[1])["state"] == state


def test_a_number_that_another_process_has_now(tmp_path, run):
    """This process exists, but has not opened the lock."""
    lock = f"pid {os.getpid()} on {os.uname().nodename}"
    found = folder(tmp_path, journal=[{"event": "start", "time": 1}], lock=lock)
    assert run(found)[0] == 4
    file = lock_model_dir(found)
    code, out, _ = run(found)
    file.close()
    assert code == 0 and ": ALIVE" in out
    assert run(found)[0] == 4


@pytest.mark.parametrize(
    "lines, flags, code",
    [
        ([("start", 9, 9), ("step", 250, 2, STEPS)], [], 0),
        ([("start", 9, 9), ("step", 350, 2, STEPS)], [], 3),
        ([("start", 9, 9), ("step", 350, 2, STEPS)], ["--stuck_seconds=400"], 0),
        ([("start", 9, 9), ("step", 9000, 2, STEPS | {"finished_seconds": 8990})], [], 0),
        # Compilation has half an hour.
        ([("start", 9, 9), ("compile", 1500, 2)], [], 0),
        ([("start", 9, 9), ("compile", 2000, 2)], [], 3),
        # An evaluation may take twice as long as those before.
        ([("start", 9, 9), ("evaluate", 350, 2)], [], 3),
        ([("start", 9, 9), ("evaluate", 900, 2500), ("step", 9, 1800, STEPS), ("evaluate", 1700, 2)], [], 0),
        ([("start", 9, 9), ("evaluate", 900, 2500), ("step", 9, 1800, STEPS), ("evaluate", 1900, 2)], [], 3),
    ],
)  # fmt: skip
def test_when_it_is_stuck(tmp_path, run, lines, flags, code):
    assert run(folder(tmp_path, lines=lines, lock=ELSEWHERE), *flags)[0] == code


def test_slow_steps_have_more_time(tmp_path, run):
    """Ten usual steps."""
    metrics = [{"step": n, "seconds": 100.0} for n in range(1, 60)]
    lines = [("start", 9, 9), ("step", 950, 2, STEPS)]
    found = folder(tmp_path, lines=lines, metrics=metrics, lock=ELSEWHERE)
    code, out, _ = run(found)
    assert code == 0 and "rate       100 s a step" in out
    lines[1] = ("step", 1050, 2, STEPS)
    assert run(folder(tmp_path, lines=lines, lock=ELSEWHERE))[0] == 3


def test_eta(tmp_path, run):
    """900 steps of 10 s, and a quarter more for what is not training; tokens count where they are known."""
    metrics = [
        {"step": n, "seconds": 10.0, "tokens": 100 * n, "tokens_per_second": 50.0} for n in range(81, 101)
    ]  # fmt: skip
    lines = [
        ("start", 500, 1300, PLAN), ("step", 800, 500, {"first_step": 1, "last_step": 80}), ("save", 250, 250),
        ("step", 200, 2, {"first_step": 81, "last_step": 100, "finished_seconds": 200.0}),
    ]  # fmt: skip
    found = json.loads(run(folder(tmp_path, lines=lines, metrics=metrics, lock=ELSEWHERE), "--json")[1])  # fmt: skip
    assert found["eta_seconds"] == pytest.approx(900 * 10 * 1.25)
    lines[0] = ("start", 500, 1300, {"plan": PLAN["plan"] | {"num_tokens": 40_000}})
    found = json.loads(run(folder(tmp_path, lines=lines, metrics=metrics, lock=ELSEWHERE), "--json")[1])  # fmt: skip
    assert found["eta_seconds"] == pytest.approx((40_000 - 10_000) / 50 * 1.25)


def test_incidents_of_a_day(tmp_path, run):
    now = time.time()
    journal = [
        {"time": now - 90_000, "event": "hang", "step": 1}, {"time": now - 80_000, "event": "start", "num_steps": 900},
        {"time": now - 7000, "event": "hang", "host": "node17", "step": 5, "stacks": "Thread 1\n  File x\n" * 50},
        *({"time": now - 100 + n, "event": "spike", "step": n, "loss": 9.5} for n in range(11)),
        {"time": now - 30, "event": "save", "step": 40},
    ]  # fmt: skip
    found = folder(tmp_path, journal=journal, lines=[("step", 5, 3)], lock=ELSEWHERE)
    code, out, _ = run(found)
    assert code == 0 and "incidents  12 in 24 h: 11 x spike, 1 x hang" in out
    assert "the newest 10, all in journal.jsonl" in out and "last save  step 40, 30." in out
    assert len(out.splitlines()) < 24 and max(map(len, out.splitlines())) <= 150
    assert len(json.loads(run(found, "--json")[1])["incidents"]) == 12


def test_the_next_process_has_begun(tmp_path, run):
    """It holds the lock and has not written yet; the last line is of the one before, and old."""
    found = folder(tmp_path, lines=[("step", 50, 86_400, STEPS)], lock="pid 5 on node18")
    code, out, _ = run(found)
    assert code == 0 and "ALIVE (pid 5 on node18)" in out and "phase unknown" in out


def test_corrupt_lines(tmp_path, run):
    found = folder(
        tmp_path, lines=[("step", 50, 5, STEPS), ("step", -1, 5)],
        journal=["x\n", "[]\n", {"event": [], "time": time.time()}, {"event": "a", "time": 1e300}],
        metrics=["{\n", {"step": 7, "seconds": "x", "tokens_per_second": None}, '{"step": 8'], lock=ELSEWHERE,
    )  # fmt: skip
    code, _, err = run(found)
    assert code == 0
    assert err.splitlines() == [
        f"bloomjax: {found}/journal.jsonl: lines 1-2 cannot be read",
        f"bloomjax: {found}/goodput.jsonl: line 2 cannot be read",
    ]


def test_a_run_of_a_version_without_a_ledger(tmp_path, run):
    journal = [{"time": 1, "event": "start", "num_steps": 40, "step": 0}, {"time": 2, "event": "stop"}]  # fmt: skip
    found = folder(tmp_path, journal=journal, metrics=[{"step": 7, "seconds": 1.5}])
    for name in ("journal", "metrics"):
        os.utime(found / f"{name}.jsonl", (1, 1))
    code, out, _ = run(found)
    assert code == 4 and ": ENDED" in out and "step       7 of 40" in out


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "status needs the MODEL_DIR of a run"),
        (["nowhere"], "nowhere is no folder: is it the MODEL_DIR of a run?"),
        (["EMPTY"], "has no journal.jsonl: is it the MODEL_DIR of a run?"),
        (["EMPTY", "--stuck_seconds=0"], "--stuck_seconds=0.0 must be a number above 0"),
        (["EMPTY", "--stuck_seconds=nan"], "--stuck_seconds=nan must be a number above 0"),
    ],
)
def test_mistakes_are_one_line(tmp_path, run, arguments, message):
    (tmp_path / "EMPTY").mkdir()
    code, out, err = run(*(tmp_path / x if x.isupper() else x for x in arguments))
    assert code == 1 and not out and err.count("\n") == 1 and message in err


def test_the_command_itself(tmp_path):
    """From another folder, without JAX."""
    found = folder(tmp_path, lines=[("step", 50, 5, STEPS)], lock=ELSEWHERE)
    program = f"""
import atexit, runpy, sys
sys.argv = ["status.py", {str(found)!r}]
atexit.register(lambda: print(sorted({{"jax", "numpy", "matplotlib"}} & set(sys.modules))))
runpy.run_path({str(_PATH)!r}, run_name="__main__")
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd="/")  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"
