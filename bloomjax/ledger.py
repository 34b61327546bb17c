"""Where the seconds of a run went: goodput.jsonl, which grows over all starts in one MODEL_DIR.

A line is the time that a start (one process, from its creation) spent in one phase without a break:

    {"run": "1763691300.12-4711", "phase": "step", "first_step": 41, "last_step": 60, "finished_seconds": 58.11,
     "time": 1763691391.4, "seconds": 58.31, "age_seconds": 91.28}

`age_seconds` is the age of the process where the interval ends and `seconds` its length, both of a clock that never
jumps; `time` is the wall clock there. The last line of a start is written again, in its place, as its interval grows,
so that the file is as long as the run has phases, and so that kill -9 costs no more than `flush_seconds`.
"""

import contextlib
import dataclasses
import json
import math
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bloomjax.journal import read_lines

PHASES = ("start", "compile", "restore", "step", "save", "evaluate", "finish")
FILE_NAME = "goodput.jsonl"
FLUSH_SECONDS = 10.0

_LOADED = time.monotonic()
_NO_TIME = 0.01  # seconds; intervals are rounded to milliseconds
_AGES = 1e11  # seconds; no time is longer, and none later, than three thousand years
# Events of the journal after which a process ends; it may have had no time to close its ledger.
_LAST_WORDS = ("hang", "not_finite", "spike", "drift", "lost_peer", "stop", "done", "fault")
KILLED, NO_END = "killed or crashed", "no end yet"


class Ledger:
    """Books every second of this process, from its creation on, in MODEL_DIR/goodput.jsonl.

    Only one process of a MODEL_DIR may have one at a time: make it when the folder is locked, close it before the lock
    is given back. What the disk refuses is said once, kept and written later: bookkeeping ends no training.
    """

    _has_booked = False  # a second run in one process begins when it does, not with the process

    def __init__(
        self, model_dir: Path | str, enabled: bool = True, *, flush_seconds: float = FLUSH_SECONDS
    ):
        """Opens the phase "start", from the creation of the process. Without `enabled` all calls do nothing."""
        self._path = Path(model_dir) / FILE_NAME
        self._is_open = enabled
        self._lock = threading.RLock()  # of all below
        self._closing = threading.Event()
        self._flush_seconds = flush_seconds
        self._phase = "start"
        if not enabled:
            return
        age = 0.0 if Ledger._has_booked else process_age_seconds()
        Ledger._has_booked = True
        self._origin = time.monotonic() - age
        created = round(time.time() - age, 3)
        self._run = f"{created:.2f}-{os.getpid()}"
        self._file: int | None = None
        self._offset = 0  # of what is written in its place
        self._closed_lines = b""  # stands there before the open line, until the disk has taken it
        self._width = 0  # of the open line; what replaces it must cover it
        self._has_complained = False
        self._step_seconds = 0.0  # of the intervals before the open one
        here = {
            "host": os.uname().nodename, "pid": os.getpid(), "pid_namespace": pid_namespace(), "created": created
        }  # fmt: skip
        self._begin("start", 0.0, here)
        self._write()
        self._thread = threading.Thread(target=self._beat, name="ledger", daemon=True)
        self._thread.start()

    def enter(self, phase: str) -> None:
        """From now on the time is that of `phase`, one of PHASES; nothing if it is already."""
        if phase not in PHASES:
            raise ValueError(f"no phase {phase!r}; there are {', '.join(PHASES)}")
        with self._lock:
            if self._is_open and phase != self._phase:
                self._next(phase)
                self._write()
            self._phase = phase

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Inside the block the time is that of `phase`, afterwards that of the phase before."""
        before = self._phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def finished_step(self, step: int) -> None:
        """Step `step` is done (its loss is known); a step done again (after a roll back) begins a new line."""
        with self._lock:
            if not self._is_open:
                return
            if step <= self._line.get("last_step", -1):
                self._next(self._phase)
            self._line.setdefault("first_step", step)
            self._line["last_step"] = step
            self._finished = time.monotonic() - self._origin

    def note_plan(self, *, num_steps: int, step: int = 0, **fields: Any) -> None:
        """What comes: from after `step` to `num_steps`; steps after `step` that were done before are lost.

        After every restore, a roll back's too. Further fields (JSON), such as num_tokens, are written with it.
        """
        with self._lock:
            if self._is_open:
                self._next(self._phase)
                self._line["plan"] = {"num_steps": num_steps, "step": step, **fields}
                self._write()

    def seconds(self) -> tuple[float, float]:
        """Of this start so far: all of them, and those in the phase "step". Zeros without `enabled`."""
        with self._lock:
            if not self._is_open:
                return 0.0, 0.0
            age = time.monotonic() - self._origin
            return age, self._step_seconds + self._seconds_in_step(age)

    def _seconds_in_step(self, age: float) -> float:
        return age - self._begun if self._line["phase"] == "step" else 0.0

    def close(self, code: int | None = None, reason: str = "") -> None:
        """Writes how this start ends: its exit code, and why in a word or two ("done", "SIGTERM"). The last line."""
        with self._lock:
            if not self._is_open:
                return
            self._line["end"] = {"code": code, "reason": reason}
            self._write()
            self._is_open = False
            if self._file is not None:
                os.close(self._file)
        self._closing.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._closing.wait(self._flush_seconds):
            with self._lock:
                if self._is_open:
                    self._write()

    def _begin(self, phase: str, age: float, fields: dict[str, Any]) -> None:
        self._phase, self._begun, self._finished = phase, age, None
        self._line: dict[str, Any] = {"run": self._run, "phase": phase, **fields}

    def _next(self, phase: str) -> None:
        age = round(time.monotonic() - self._origin, 3)
        self._step_seconds += self._seconds_in_step(age)
        self._closed_lines += self._encoded(age)
        self._width = 0
        self._begin(phase, age, {})

    def _encoded(self, age: float) -> bytes:
        record = dict(self._line)
        if self._finished is not None:
            record["finished_seconds"] = round(max(self._finished - self._begun, 0.0), 3)
        seconds = round(age - self._begun, 3)
        record |= {"time": round(time.time(), 3), "seconds": seconds, "age_seconds": age}
        line = json.dumps(record).ljust(self._width)
        self._width = len(line)
        return line.encode() + b"\n"

    def _write(self) -> None:
        data = self._closed_lines + self._encoded(round(time.monotonic() - self._origin, 3))
        try:
            if self._file is None:
                self._file, self._offset = _open_at_end(self._path)
            if os.pwrite(self._file, data, self._offset) < len(data):
                raise OSError(0, "no room for a whole line")
        except OSError as error:
            if not self._has_complained:
                why = f"cannot be written: {error.strerror}; it is tried again"
                print(f"bloomjax: {self._path} {why}", file=sys.stderr)
            self._has_complained = True
            return
        self._offset += len(self._closed_lines)
        self._closed_lines, self._has_complained = b"", False


def _open_at_end(path: Path) -> tuple[int, int]:
    """A file descriptor and where the next line begins; a line that a crash cut off gets its end."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            size += os.pwrite(file, b"\n", size)
        return file, size
    except OSError:
        os.close(file)
        raise


def process_age_seconds() -> float:
    """Seconds since this process was created; where /proc does not say, since this module was loaded."""
    known = time.monotonic() - _LOADED
    try:
        after_command = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        ticks = int(after_command[19])  # field 22, starttime: proc_pid_stat(5)
        boot = time.clock_gettime(time.CLOCK_BOOTTIME)
        return max(boot - ticks / os.sysconf("SC_CLK_TCK"), known)
    except (OSError, ValueError, IndexError, AttributeError):
        return known


def pid_namespace() -> str | None:
    """In which of a host's containers a process number means what; None where the system does not say."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


# ---- reading ----


@dataclasses.dataclass(frozen=True)
class Interval:
    """Time of one start in one phase ("unknown" where lines are missing).

    Attributes:
      begun_seconds: age of the process at the beginning.
      finished_seconds: from the beginning to the end of `last_step`.
      time: wall clock at the end.
      from_step: if given, what follows goes on after this step: steps after it that were done before are lost.
    """

    phase: str
    begun_seconds: float
    seconds: float
    time: float
    first_step: int | None = None
    last_step: int | None = None
    finished_seconds: float = 0.0
    from_step: int | None = None


@dataclasses.dataclass
class Start:
    """One process: from `created` (wall clock) on, for `seconds`; `end` and newest `plan` as the Ledger was told."""

    run: str
    created: float
    host: str | None
    pid: int | None
    pid_namespace: str | None
    intervals: list[Interval] = dataclasses.field(default_factory=list)
    plan: dict[str, Any] = dataclasses.field(default_factory=dict)
    end: dict[str, Any] | None = None

    @property
    def seconds(self) -> float:
        last = self.intervals[-1]
        return last.begun_seconds + last.seconds

    @property
    def time(self) -> float:
        """Wall clock of the last sign of life."""
        return self.intervals[-1].time

    @property
    def last_step(self) -> int | None:
        """The newest finished step, of those that were finished in this start."""
        steps = (each.last_step for each in reversed(self.intervals) if each.last_step is not None)
        return next(steps, None)


def read_ledger(path: Path) -> tuple[list[Start], list[int]]:
    """The starts in the file, oldest first, and the numbers (from 1) of lines that say nothing.

    The intervals of a start follow one upon the other without holes. OSError where the file cannot be read.
    """
    records, bad = read_lines(path)
    unreadable = set(bad)
    numbers = [n for n in range(1, len(records) + len(bad) + 1) if n not in unreadable]
    starts: dict[str, Start] = {}
    for number, record in zip(numbers, records, strict=True):
        interval = _interval(record)
        if interval is None or not _add(starts, record, interval):
            bad.append(number)
    return list(starts.values()), sorted(bad)


def _interval(record: dict[str, Any]) -> Interval | None:
    names = ("seconds", "age_seconds", "time", "created", "finished_seconds")
    seconds, age, end_time, _, finished = numbers = [record.get(name, 0.0) for name in names]
    first, last = steps = record.get("first_step"), record.get("last_step")
    plan = record.get("plan", {})
    is_one = (
        isinstance(record.get("run"), str)
        and isinstance(record.get("phase"), str)
        and all(isinstance(x, int | float) and 0 <= x < _AGES for x in numbers)
        and {"seconds", "age_seconds", "time"} <= record.keys()
        and all(step is None or isinstance(step, int) for step in steps)
        and isinstance(plan, dict)
        and isinstance(plan.get("step", 0), int)
        and isinstance(plan.get("num_steps", 0), int)
        and isinstance(record.get("end", {}), dict)
    )
    if not is_one:
        return None
    begun = max(age - seconds, 0.0)
    finished = min(finished, seconds)
    step = plan.get("step")
    return Interval(record["phase"], begun, seconds, end_time, first, last, finished, step)


def _add(starts: dict[str, Start], record: dict[str, Any], interval: Interval) -> bool:
    """Whether it fits behind what its start has."""
    run = record["run"]
    if run not in starts:
        age = interval.begun_seconds + interval.seconds
        created = record.get("created", interval.time - age)
        host, pid, namespace = (record.get(name) for name in ("host", "pid", "pid_namespace"))
        starts[run] = Start(run, created, host, pid, namespace)
    start = starts[run]
    at = start.seconds if start.intervals else 0.0
    hole = interval.begun_seconds - at
    if hole < -_NO_TIME:
        return False
    if hole > _NO_TIME:
        start.intervals.append(Interval("unknown", at, hole, interval.time - interval.seconds))
    start.intervals.append(interval)
    start.plan = record.get("plan", start.plan)
    start.end = record.get("end", start.end)
    return True


def ends(starts: Sequence[Start], journal: Sequence[dict[str, Any]]) -> list[str]:
    """How each start ended: as it said itself, else by the journal's last word of its time.

    KILLED where nobody had time to write, and NO_END of the last start, which may still run.
    """
    found = []
    for number, start in enumerate(starts):
        is_last = number == len(starts) - 1
        until = math.inf if is_last else starts[number + 1].created
        if start.end and start.end.get("reason"):
            found.append(str(start.end["reason"]))
            continue
        lines = [x for x in journal if start.created <= _time(x) < until]
        word = lines[-1] if lines and lines[-1].get("event") in _LAST_WORDS else {}
        why = word.get("signal") or word.get("kind") or ""
        said = f"{word['event']} {why}".rstrip() if word else ""
        found.append(said or (NO_END if is_last else KILLED))
    return found


def _time(record: dict[str, Any]) -> float:
    value = record.get("time")
    return value if isinstance(value, int | float) else -math.inf


# ---- for a person ----


def duration(seconds: float) -> str:
    """`12.3 s`, `1:02:03`, `4 d 01:02:03`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    days, rest = divmod(whole, 86400)
    clock = f"{rest // 3600}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
    return f"{days} d {clock:0>8}" if days else clock


def counted(words: Sequence[str]) -> str:
    """`2 x killed or crashed, 1 x done`, the most frequent first."""
    return ", ".join(f"{count} x {word}" for word, count in Counter(words).most_common())


def lines_text(path: Path, numbers: Sequence[int]) -> str:
    """One line about lines that cannot be read: `FILE: lines 3, 7-9 cannot be read`."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    texts = [str(a) if a == b else f"{a}-{b}" for a, b in ranges[:10]]
    more = f" and others, {len(numbers)} in all," if len(ranges) > 10 else ""
    return f"{path}: line{'s' if len(numbers) > 1 else ''} {', '.join(texts)}{more} cannot be read"
