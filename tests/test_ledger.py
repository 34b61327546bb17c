"""goodput.jsonl: no second is lost or booked twice, whatever ends the process."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bloomjax import ledger
from bloomjax.ledger import Interval, Ledger, Start, ends, read_ledger


class Clock:
    """time.time and time.monotonic by hand; they move together unless the wall clock is set."""

    def __init__(self, monkeypatch):
        self.now, self.wall = 1000.0, 1_790_000_000.0
        monkeypatch.setattr(ledger.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(ledger.time, "time", lambda: self.wall)
        monkeypatch.setattr(ledger, "process_age_seconds", lambda: 7.5)
        monkeypatch.setattr(Ledger, "_has_booked", False)

    def passes(self, seconds):
        self.now += seconds
        self.wall += seconds


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def make(tmp_path, **changes):
    return Ledger(tmp_path, **{"flush_seconds": 1e6} | changes)


def lines(tmp_path):
    return [json.loads(x) for x in (tmp_path / "goodput.jsonl").read_text().splitlines()]


def booked(tmp_path, number=-1):
    """(phase, seconds, first_step, last_step) of the intervals of one start."""
    starts, bad = read_ledger(tmp_path / "goodput.jsonl")
    assert not bad
    return [(x.phase, round(x.seconds, 3), x.first_step, x.last_step) for x in starts[number].intervals]  # fmt: skip


def test_every_second_is_in_one_line(tmp_path, clock):
    book = make(tmp_path)
    clock.passes(2)
    book.enter("restore")
    clock.passes(3)
    book.note_plan(num_steps=100, step=40, num_tokens=12)
    book.enter("restore")  # it is that already
    clock.passes(1)
    book.enter("step")
    for step in (41, 42):
        clock.passes(10)
        book.finished_step(step)
    with book.during("save"):
        clock.passes(0.5)
        with book.during("evaluate"):
            clock.passes(4)
        clock.passes(0.25)
    clock.passes(6)
    book.finished_step(43)
    clock.passes(1.5)
    book.enter("finish")
    clock.passes(0.125)
    book.close(75, "SIGTERM")
    book.close(1, "again")  # too late
    book.enter("step")
    book.finished_step(99)
    expected = [
        ("start", 9.5, None, None), ("restore", 3, None, None), ("restore", 1, None, None),
        ("step", 20, 41, 42), ("save", 0.5, None, None),
        ("evaluate", 4, None, None), ("save", 0.25, None, None), ("step", 7.5, 43, 43), ("finish", 0.125, None, None),
    ]  # fmt: skip
    assert booked(tmp_path) == expected
    assert "   \n" not in (tmp_path / "goodput.jsonl").read_text()
    ((start,), _) = read_ledger(tmp_path / "goodput.jsonl")
    assert start.seconds == sum(each[1] for each in expected) == 45.875
    assert start.created == 1_790_000_000 - 7.5 and start.time == start.created + start.seconds
    assert start.plan == {"num_steps": 100, "step": 40, "num_tokens": 12}
    assert start.end == {"code": 75, "reason": "SIGTERM"} and start.last_step == 43
    assert (start.host, start.pid) == (os.uname().nodename, os.getpid())
    assert [x.from_step for x in start.intervals] == [None, None, 40] + 6 * [None]
    assert [x.finished_seconds for x in start.intervals if x.phase == "step"] == [20, 6]
    assert ends([start], []) == ["SIGTERM"]


def test_the_last_line_grows_in_its_place(tmp_path, clock):
    book = make(tmp_path)
    book.enter("step")
    sizes = set()
    for step in range(1, 2000):
        clock.passes(10)
        book.finished_step(step)
        book._write()
        sizes.add((tmp_path / "goodput.jsonl").stat().st_size)
        assert len(lines(tmp_path)) == 2 or step % 100
    assert max(sizes) - min(sizes) < 20  # digits
    assert booked(tmp_path)[-1] == ("step", 19990, 1, 1999)
    clock.wall = 5.0  # what it writes now is shorter
    book._write()
    assert len(lines(tmp_path)) == 2
    book.close(0, "done")
    assert len(lines(tmp_path)) == 2 and lines(tmp_path)[-1]["time"] == 5.0


def test_steps_done_again_begin_a_line(tmp_path, clock):
    book = make(tmp_path)
    book.enter("step")
    for step in (1, 2, 3, 4, 3, 4, 5):
        clock.passes(1)
        book.finished_step(step)
    book.close()
    # The second line begins when step 3 is found done again, as nobody said that it was begun.
    assert booked(tmp_path)[1:] == [("step", 5, 1, 4), ("step", 2, 3, 5)]


def test_a_second_run_in_one_process_begins_later(tmp_path, clock):
    make(tmp_path).close(0, "done")
    clock.passes(100)
    book = make(tmp_path)
    clock.passes(1)
    book.close(0, "done")
    first, second = read_ledger(tmp_path / "goodput.jsonl")[0]
    assert (first.seconds, second.seconds) == (7.5, 1)
    assert second.created == first.created + 7.5 + 100


def test_one_that_does_not_write(tmp_path):
    book = Ledger(tmp_path, enabled=False)
    book.note_plan(num_steps=3)
    with book.during("save"):
        book.finished_step(1)
    book.close(0, "done")
    assert not list(tmp_path.iterdir())


def test_what_the_disk_refuses_is_written_later(tmp_path, clock, monkeypatch, capfd):
    book = make(tmp_path)
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: real(file, data[:30], at))  # full
    for phase in ("restore", "compile", "step"):
        clock.passes(1)
        book.enter(phase)
    assert capfd.readouterr().err.count("cannot be written: no room for a whole line") == 1
    monkeypatch.setattr(os, "pwrite", real)
    book._write()
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: 0)
    book._write()
    assert capfd.readouterr().err.count("cannot be written: no room for a whole line") == 1
    monkeypatch.setattr(os, "pwrite", real)
    clock.passes(1)
    book.close(0, "done")
    expected = [("start", 8.5), ("restore", 1), ("compile", 1), ("step", 1)]
    assert [x[:2] for x in booked(tmp_path)] == expected


def test_a_folder_that_is_not_there_ends_no_training(tmp_path, capfd):
    book = Ledger(tmp_path / "gone")
    book.enter("step")
    book.close(0, "done")
    assert capfd.readouterr().err.count("\n") == 1


def test_a_line_that_was_cut_off_stays_alone(tmp_path, clock):
    (tmp_path / "goodput.jsonl").write_bytes(b'{"run": "1-1", "phase": "sta')
    make(tmp_path).close(0, "done")
    starts, bad = read_ledger(tmp_path / "goodput.jsonl")
    assert bad == [1] and len(starts) == 1


def test_no_such_phase(tmp_path):
    book = Ledger(tmp_path, enabled=False)
    with pytest.raises(ValueError, match="no phase 'stepp'; there are start, compile"):
        book.enter("stepp")


def test_age_of_this_process():
    """Against what ps says, in whole seconds."""
    told = subprocess.run(["ps", "-o", "etimes=", "-p", str(os.getpid())], capture_output=True, text=True)  # fmt: skip
    assert abs(ledger.process_age_seconds() - int(told.stdout)) < 2
    program = "import time; t = time.time(); from bloomjax import ledger; print(ledger.process_age_seconds())"
    began = time.monotonic()
    age = float(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout)  # fmt: skip
    assert 0.02 < age < time.monotonic() - began + 0.02


# ---- reading ----


def record(run="1.00-1", **changes):
    usual = {"run": run, "phase": "step", "time": 100.0, "seconds": 1.0, "age_seconds": 1.0}
    return usual | changes


def write(path, records):
    path.write_text("".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in records))
    return read_ledger(path)


def test_missing_lines_are_time_of_their_own(tmp_path):
    found = [record(age_seconds=5, time=105.0), "x", record(age_seconds=6), record(age_seconds=9.5)]
    (start,), bad = write(tmp_path / "x", found)
    assert bad == [2] and start.created == 100.0
    phases = [(x.phase, x.begun_seconds, x.seconds) for x in start.intervals]
    assert phases == [
        ("unknown", 0, 4), ("step", 4, 1), ("step", 5, 1), ("unknown", 6, 2.5), ("step", 8.5, 1),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"seconds": "1"}, {"seconds": -1}, {"age_seconds": None}, {"time": float("nan")}, {"run": 3}, {"phase": None},
        {"first_step": "a"}, {"plan": 3}, {"plan": {"step": None}}, {"end": []}, {"created": "x"}, {"age_seconds": 0.5},
        {"time": 1e300},
    ],
    ids=str,
)  # fmt: skip
def test_lines_that_say_nothing_are_numbered(tmp_path, changes):
    starts, bad = write(tmp_path / "x", [record(), record(seconds=1.0) | {"age_seconds": 2.0} | changes])  # fmt: skip
    assert bad == [2] and len(starts[0].intervals) == 1
    assert write(tmp_path / "x", [record(), record(age_seconds=2.0)])[1] == []


def test_how_starts_ended():
    def start(created, reason=None):
        end = {"code": 0, "reason": reason} if reason else None
        return Start(str(created), created, "h", 1, None, [Interval("step", 0, 5, created + 5)], {}, end)  # fmt: skip

    starts = [start(100), start(200, "SIGTERM"), start(300), start(400), start(500)]
    journal = [
        {"time": 101, "event": "start"}, {"time": 250, "event": "hang"}, {"time": 301, "event": "hang"},
        {"time": 401, "event": "fault", "kind": "crash"}, {"event": "no time"}, {"time": 501, "event": "save"},
    ]  # fmt: skip
    assert ends(starts, journal) == [
        "killed or crashed", "SIGTERM", "hang", "fault crash", "no end yet",
    ]  # fmt: skip


def test_words():
    texts = [ledger.duration(x) for x in (0, 59.94, 61.4, 3600, 86399.6, 90061, 100 * 86400)]
    assert texts[:4] == ["0.0 s", "59.9 s", "0:01:01", "1:00:00"]
    assert texts[4:] == ["1 d 00:00:00", "1 d 01:01:01", "100 d 00:00:00"]
    assert ledger.lines_text(Path("f"), [3]) == "f: line 3 cannot be read"
    assert ledger.lines_text(Path("f"), [1, 3, 4, 5, 9]) == "f: lines 1, 3-5, 9 cannot be read"
    text = ledger.lines_text(Path("f"), range(1, 100, 2))
    assert text.startswith("f: lines 1, 3, 5") and "19 and others, 50 in all, cannot" in text
    assert ledger.counted(["a", "b", "b"]) == "2 x b, 1 x a"
