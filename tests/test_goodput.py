"""tools/goodput.py: every second once, and only steps that were not done again count."""

import dataclasses
import importlib.util
import json
import random
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest

from bloomjax.ledger import Interval, Start

_PATH = Path(__file__).resolve().parent.parent / "tools" / "goodput.py"
_SPEC = importlib.util.spec_from_file_location("goodput", _PATH)
assert _SPEC and _SPEC.loader
goodput = importlib.util.module_from_spec(_SPEC)
sys.modules["goodput"] = goodput  # dataclasses look there
_SPEC.loader.exec_module(goodput)

WORKER = Path(__file__).with_name("ledger_worker.py")


@pytest.fixture
def run(capsys):
    """run(*arguments): exit code, stdout and stderr."""

    def call(*arguments):
        with pytest.raises(SystemExit) as end:
            goodput.main(["goodput", *map(str, arguments)])
        out, err = capsys.readouterr()
        return end.value.code, out, err

    return call


def start(created, intervals, plan=None):
    """A Start of (phase, seconds[, first_step, last_step[, finished_seconds]]); `plan` is in its first interval."""
    found, at = [], 0.0
    for phase, seconds, *steps in intervals:
        finished = steps[2] if steps[2:] else seconds if steps else 0.0
        at += seconds
        end = created + at
        step = plan.get("step") if plan and not found else None
        fields = {"finished_seconds": finished, "from_step": step}
        found.append(Interval(phase, at - seconds, seconds, end, *steps[:2], **fields))
    return Start(f"{created:.2f}-1", created, "node1", 1, None, found, plan or {})


def write(model_dir, starts):
    model_dir.mkdir(exist_ok=True)
    with (model_dir / "goodput.jsonl").open("w") as file:
        for each in starts:
            for number, x in enumerate(each.intervals):
                line = {"run": each.run, "phase": x.phase}
                if number == 0:
                    line |= {"host": each.host, "created": each.created, "plan": each.plan}
                if x.last_step is not None:
                    line |= {"first_step": x.first_step, "last_step": x.last_step}
                    line |= {"finished_seconds": x.finished_seconds}
                line |= {"time": x.time, "seconds": x.seconds, "age_seconds": x.begun_seconds + x.seconds}  # fmt: skip
                print(json.dumps(line), file=file)


# ---- booking ----


def test_steps_that_a_later_start_did_again_are_lost():
    starts = [
        start(0, [("start", 5), ("step", 100, 1, 10), ("save", 2), ("step", 60, 11, 15, 50)]),
        start(200, [("start", 5), ("restore", 3), ("step", 100, 11, 20)], {"step": 10}),
    ]
    book = goodput.Book(starts)
    expected = {"step": 200, "lost work": 60, "idle": 33, "start": 10, "restore": 3, "save": 2}
    assert book.seconds_by_phase() == expected
    assert book.seconds == 308 and book.lost_steps() == 5 and not book.warnings


def test_half_an_interval_can_be_lost():
    """As when the newest checkpoint is damaged, and the one before is older than the interval's begin."""
    starts = [start(0, [("step", 100, 1, 10)]), start(100, [("step", 40, 7, 10)])]
    book = goodput.Book(starts)
    assert book.seconds_by_phase() == {"step": 60 + 40, "lost work": 40, "idle": 0}
    kept = [(p.phase, p.at, p.seconds, p.first_step, p.last_step) for p in book.pieces]
    assert kept == [
        ("step", 0, 60, 1, 6), ("lost work", 60, 40, 7, 10), ("idle", 100, 0, 0, 0), ("step", 100, 40, 7, 10),
    ]  # fmt: skip


def test_the_plan_alone_loses_steps():
    """A start that restored step 4 and died before it finished a step."""
    starts = [start(0, [("step", 10, 1, 10)]), start(10, [("restore", 3)], {"step": 4})]
    assert goodput.Book(starts).seconds_by_phase()["lost work"] == 6


def test_a_roll_back_within_a_start():
    found = [("step", 10, 1, 10), ("restore", 2), ("step", 8, 7, 14), ("save", 1), ("step", 6, 15, 20)]  # fmt: skip
    book = goodput.Book([start(0, found, {"step": 0})])
    assert book.seconds_by_phase() == {"step": 20, "lost work": 4, "restore": 2, "save": 1}


def test_a_roll_back_that_says_so():
    """It restores step 4, and is killed before a step is done again."""
    found = start(0, [("step", 10, 1, 10), ("restore", 2), ("step", 1)], {"step": 0})
    found.intervals[1] = dataclasses.replace(found.intervals[1], from_step=4)
    by_phase = goodput.Book([found]).seconds_by_phase()
    assert by_phase == {"step": 4, "lost work": 7, "restore": 2}


def test_what_follows_the_last_finished_step_is_lost():
    """18 hours in a collective that never came back."""
    book = goodput.Book([start(0, [("step", 64_900, 1, 10, 100)])])
    assert book.seconds_by_phase() == {"step": 100, "lost work": 64_800}
    assert book.lost_steps() == 0
    between = goodput.Book([start(0, [("step", 110, 1, 10, 100), ("evaluate", 5)])])
    assert between.seconds_by_phase() == {"step": 110, "evaluate": 5}


def test_a_step_that_was_only_begun_is_no_step():
    starts = [start(0, [("step", 10, 1, 10), ("save", 1), ("step", 2), ("evaluate", 3)])]
    book = goodput.Book([*starts, start(16, [("restore", 1)], {"step": 10})])
    expected = {"step": 10, "lost work": 2, "idle": 0, "restore": 1, "save": 1, "evaluate": 3}
    assert book.seconds_by_phase() == expected and book.lost_steps() == 0


def test_clocks():
    first, second = start(1000, [("step", 100, 1, 10)]), start(1050, [("step", 10, 11, 20)])
    book = goodput.Book([first, second])
    assert book.seconds_by_phase() == {"step": 110}  # no negative idle
    (warning,) = book.warnings
    assert "start 2 was created 50.0 s before start 1 wrote its last line" in warning
    jumped = start(0, [("start", 5), ("step", 10, 1, 1), ("save", 5), ("step", 10, 2, 2)])
    jumped.intervals[2:] = [
        Interval(x.phase, x.begun_seconds, x.seconds, x.time + 3600, x.first_step, x.last_step, 10)
        for x in jumped.intervals[2:]
    ]
    book = goodput.Book([jumped])
    assert book.warnings == ["the wall clock jumped by +3600.0 s during start 1"]
    assert book.seconds == 30


def test_against_a_count_step_by_step():
    """Random histories; a step counts with the time of its last execution."""
    for seed in range(200):
        rng = random.Random(seed)
        executions = defaultdict(list)  # by step
        starts, clock, done, others = [], 0.0, 0, 0.0
        for _ in range(rng.randint(1, 6)):
            restored = rng.randint(0, done)
            plan = {"step": restored} if rng.random() < 0.5 else {}
            gap = rng.choice([0, 0.5, 30])
            intervals, done = [("start", 2.0)], restored
            for _ in range(rng.randint(1, 5)):
                num, each = rng.randint(1, 6), rng.choice([0.25, 1.0, 8.0])
                intervals.append(("step", num * each, done + 1, done + num))
                for step in range(done + 1, done + num + 1):
                    executions[step].append(each)
                done += num
                intervals.append(("save", 1.0))
                if rng.random() < 0.2:  # a roll back
                    done = rng.randint(0, done)
            if rng.random() < 0.5:
                intervals.pop()
            starts.append(start(clock + gap, intervals, plan))
            others += (gap if len(starts) > 1 else 0) + sum(x[1] for x in intervals if x[0] != "step")  # fmt: skip
            clock += gap + sum(x[1] for x in intervals)
        # What is beyond the last step of the last start was rolled back, if it was ever done.
        last = starts[-1].last_step
        reached = {step: times for step, times in executions.items() if step <= last}
        book = goodput.Book(starts)
        by_phase = book.seconds_by_phase()
        spent = sum(map(sum, executions.values()))
        assert book.seconds == pytest.approx(clock - starts[0].created) == pytest.approx(spent + others)  # fmt: skip
        kept = sum(times[-1] for times in reached.values())
        beyond = sum(times[-1] for step, times in executions.items() if step > last)
        assert kept - 1e-9 <= by_phase["step"] <= kept + beyond + 1e-9
        assert by_phase["step"] + by_phase.get("lost work", 0) == pytest.approx(spent)
        num_lost = sum(len(times) - 1 for times in reached.values())
        num_beyond = sum(len(times) for step, times in executions.items() if step > last)
        assert num_lost <= book.lost_steps() <= num_lost + num_beyond
        assert num_beyond or by_phase["step"] == pytest.approx(kept)
        ends = [piece.at + piece.seconds for piece in book.pieces]
        assert [piece.at for piece in book.pieces[1:]] == pytest.approx(ends[:-1])


# ---- processes that are killed ----


def num_lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """MODEL_DIR of 60 steps in four starts: three killed with -9 or stopped, between them pauses; (folder, pauses)."""
    model_dir, num_steps = tmp_path_factory.mktemp("killed") / "run", 60
    command = [sys.executable, str(WORKER), str(model_dir), str(num_steps)]
    pauses, ended = [], None
    kill, stop = signal.SIGKILL, signal.SIGTERM
    for number, (num_new, how) in enumerate([(18, kill), (8, stop), (17, kill), (0, None)]):
        if ended:
            time.sleep(0.15 * number)
            pauses.append(time.monotonic() - ended)
        process = subprocess.Popen(command)
        log = model_dir / "steps"
        before = num_lines(log)
        while how and num_lines(log) < before + num_new:
            assert process.poll() is None
            time.sleep(0.005)
        if how:
            process.send_signal(how)
        code = process.wait(20)
        ended = time.monotonic()
        assert code == {kill: -9, stop: 75, None: 0}[how]
    return model_dir, pauses


def test_killed_processes_are_booked_to_the_second(killed, run):
    model_dir, pauses = killed
    code, out, err = run(model_dir, "--json")
    found = json.loads(out)
    assert code == 0 and not err
    by_phase = found["seconds_by_phase"]
    assert sum(by_phase.values()) == pytest.approx(found["seconds"], abs=1e-6)
    assert found["seconds"] == pytest.approx(found["to"] - found["from"], abs=0.02)
    # By the worker's own log.
    last, spent = {}, 0.0
    for line in (model_dir / "steps").read_text().splitlines():
        step, seconds = line.split()
        last[int(step)] = float(seconds)
        spent += float(seconds)
    assert sorted(last) == list(range(1, 61)) and found["last_step"] == 60
    again = spent - sum(last.values())
    assert again > 0.1 and found["lost_steps"] >= 2
    # Beside its sleep a step has the worker's writing. What a kill makes the ledger miss is idle.
    assert sum(last.values()) - 1e-3 <= by_phase["step"] < 1.5 * sum(last.values()) + 0.1
    assert by_phase["lost work"] < 1.5 * again + 0.1
    assert by_phase["idle"] > sum(pauses) - 0.02
    assert -0.02 < by_phase["lost work"] + by_phase["idle"] - again - sum(pauses) < 0.4
    assert 4 * 0.05 <= by_phase["compile"] < 4 * 0.05 + 0.2
    assert 4 * 0.03 <= by_phase["restore"] < 4 * 0.03 + 0.2
    assert by_phase["start"] > 4 * 0.02  # Python itself
    ends = [each["end"] for each in found["starts"]]
    assert ends == ["killed or crashed", "SIGTERM", "killed or crashed", "done"]
    assert found["goodput"] == by_phase["step"] / found["seconds"]


def test_the_table(killed, run):
    code, out, _ = run(f"--model_dir={killed[0]}")
    assert code == 0
    head, *rows = out.splitlines()
    assert "UTC, " in head and head.endswith("starts: 4 (2 x killed or crashed, 1 x SIGTERM, 1 x done)")  # fmt: skip
    shares = [float(row.split()[-1].rstrip("%")) for row in rows if row.startswith("  ") and "%" in row]  # fmt: skip
    assert sum(shares) == pytest.approx(100, abs=0.05)
    assert any(row.startswith("goodput ") and "steps were done again" in row for row in rows)
    assert rows[-1].split()[0] == "4" and rows[-1].endswith("done")


def test_pictures(killed, run, tmp_path):
    pytest.importorskip("matplotlib")
    code, _, err = run(killed[0], f"--plot={tmp_path / 'a.png'}")
    assert code == 0 and not err
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_three_months(run, tmp_path):
    """A start a week, a save every half an hour: fast enough to be looked at, and the newest starts are listed."""
    starts, clock, step = [], 1_790_000_000.0, 0
    for _ in range(13):
        intervals, plan = [("start", 60.0), ("compile", 300.0)], {"step": step, "num_steps": 80_000}
        for _ in range(330):
            intervals += [("step", 1800.0, step + 1, step + 18), ("save", 4.0)]
            step += 18
        starts.append(start(clock, intervals + [("step", 900.0, step + 1, step + 9)], plan))
        clock = starts[-1].time + 300
    write(tmp_path / "run", starts)
    began = time.monotonic()
    code, out, err = run(tmp_path / "run", "--json")
    assert code == 0 and not err and time.monotonic() - began < 2
    found = json.loads(out)
    assert found["num_starts"] == 13 and 0.99 < found["goodput"] < 1
    assert found["seconds_by_phase"]["lost work"] == 12 * 900
    assert "the newest 10 starts:" in run(tmp_path / "run")[1]


# ---- bad input ----


def test_lines_that_cannot_be_read_are_numbered_in_one_line(tmp_path, run):
    intervals = [("start", 1), ("step", 9, 1, 9), ("save", 1), ("step", 9, 10, 18)]
    write(tmp_path / "run", [start(0, intervals)])
    path = tmp_path / "run" / "goodput.jsonl"
    text = path.read_text().splitlines(keepends=True)
    path.write_text(text[0] + "\x00rubbish\n" + text[1] + text[3])
    (tmp_path / "run" / "journal.jsonl").write_text("{}\n[\n")
    code, out, err = run(tmp_path / "run", "--json")
    assert code == 0 and err.splitlines() == [
        f"bloomjax: {path}: line 2 cannot be read",
        f"bloomjax: {tmp_path}/run/journal.jsonl: line 2 cannot be read",
    ]
    found = json.loads(out)["seconds_by_phase"]
    assert found == {"step": 18, "start": 1, "unknown": 1} and len(json.loads(out)["warnings"]) == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "goodput needs the MODEL_DIR of a run"),
        (["nowhere"], "nowhere is no folder: is it the MODEL_DIR of a run?"),
        (["EMPTY"], "has no goodput.jsonl: is it the MODEL_DIR of a run?"),
        (["BROKEN"], "goodput.jsonl has no line that can be read"),
        (["EMPTY", "--plot=x.bmp"], "--plot=x.bmp: pictures end in .png, .svg, .pdf"),
        (["EMPTY", "--plot=no/x.png"], "--plot=no/x.png: there is no folder no"),
        (["EMPTY", "more"], "unexpected argument 'more'"),
    ],
)
def test_mistakes_are_one_line(tmp_path, run, arguments, message):
    for name in ("EMPTY", "BROKEN"):
        (tmp_path / name).mkdir()
    (tmp_path / "BROKEN" / "goodput.jsonl").write_text("no\n")
    arguments = [tmp_path / x if x.isupper() else x for x in arguments]
    code, out, err = run(*arguments)
    assert code == 1 and not out and err.count("\n") == 1 and message in err


def test_the_command_itself(killed):
    """From another folder, and without JAX."""
    program = f"""
import atexit, runpy, sys
sys.argv = ["goodput.py", {str(killed[0])!r}]
atexit.register(lambda: print("jax" in sys.modules, "matplotlib" in sys.modules))
runpy.run_path({str(_PATH)!r}, run_name="__main__")
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd="/")  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "False False"
