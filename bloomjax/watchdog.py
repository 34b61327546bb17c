"""Ends a process whose steps no longer finish, and writes down where each of its threads stands."""

import contextlib
import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from bloomjax import job
from bloomjax.errors import EXIT_RESTART, BadInput
from bloomjax.journal import Journal

_POLL_SECONDS = 5.0
_JOURNAL_SECONDS = 10.0  # a file system that takes longer for a line is taken for dead
_PEER_JOURNAL_SECONDS = 2.0  # process 0, which may be leaving, waits no longer for the others
_LEAVE_SECONDS = 30.0  # the coordinator of the job may be what hangs
_FUSE_SECONDS = 5.0  # for faulthandler to write before the kernel kills
_MARK = "watchdog: "


class Watchdog:
    """Ends the job with EXIT_RESTART when no step has finished for too long; a context manager around the loop.

    It works on a thread of its own, so also while the main thread waits for a collective that never comes back. Before
    the end each process of the job writes an event `hang` with the stacks of its threads to the journal. Time in which
    the process was stopped (SIGSTOP, `scontrol suspend`) does not count, up to twice the limit: if for so long no
    thread gets to run, mostly because something holds the interpreter's lock, the stacks go to stderr and the kernel
    kills the process.

    Args:
      limit_seconds: between two beats: finished steps, batches of an evaluation. None: as long as it takes.
      setup_limit_seconds: of what `setup` brackets. None: as long as it takes.
    """

    def __init__(
        self, *, limit_seconds: float | None = 1800, setup_limit_seconds: float | None = 14400
    ):
        for name, limit in (("limit", limit_seconds), ("setup_limit", setup_limit_seconds)):
            if limit is not None and not limit > 0:
                raise BadInput(f"Watchdog.{name}_seconds must be positive or None, got {limit}")
        self._limit_seconds = limit_seconds
        self._setup_limit_seconds = setup_limit_seconds
        self._journal: Journal | None = None
        self._step: int | None = None
        self._num_beats = 0
        self._setups: list[str] = []  # those under way, the innermost last
        self._silent_seconds = 0.0
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._reporting = threading.Lock()  # for the rest of the process's life once it reports

    def start(self, journal: Journal, step: int | None = None) -> "Watchdog":
        """From now on it counts. `step`: the last one that was finished."""
        assert self._thread is None, "it runs already"
        self._journal, self._step = journal, step
        self._stopping = threading.Event()
        self._thread = threading.Thread(
            target=self._watch, args=[self._stopping], name="watchdog", daemon=True
        )
        job.before_leaving(self._follow)
        self._thread.start()
        return self

    def stop(self) -> None:
        """Nothing is ended any more."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._stopping.set()
            thread.join()

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, *exc_info) -> None:
        self.stop()

    def beat(self, step: int | None = None) -> None:
        """Something has finished: this step, or a batch of an evaluation. Costs an addition."""
        self._num_beats += 1
        if step is not None:
            self._step = step

    @contextlib.contextmanager
    def setup(self, what: str = "setup") -> Iterator[None]:
        """Around what takes long once: compiling, restoring, saving. May stand inside another; its ends are beats."""
        self._setups.append(what)
        self._num_beats += 1
        try:
            yield
        finally:
            self._setups.remove(what)
            self._num_beats += 1

    def _watch(self, stopping: threading.Event) -> None:
        limits = [x for x in (self._limit_seconds, self._setup_limit_seconds) if x is not None]
        poll_seconds = min([_POLL_SECONDS, *(limit / 8 for limit in limits)])
        fuse = _Fuse(None if self._limit_seconds is None else 2 * self._limit_seconds)
        num_beats, clock = self._num_beats, time.monotonic()
        self._silent_seconds = 0.0
        try:
            while not stopping.wait(poll_seconds):
                fuse.renew()
                now = time.monotonic()
                # At most a few polls: after SIGSTOP and SIGCONT the process gets its time to go on.
                passed, clock = min(now - clock, 4 * poll_seconds), now
                if self._num_beats != num_beats:
                    num_beats, self._silent_seconds = self._num_beats, 0.0
                    continue
                self._silent_seconds += passed
                setups = tuple(self._setups)
                limit = self._setup_limit_seconds if setups else self._limit_seconds
                if limit is not None and self._silent_seconds >= limit:
                    fuse.put_out()
                    self._end(f"no end of {setups[-1]}" if setups else "no finished step")
        finally:
            fuse.put_out()

    def _end(self, what: str) -> None:
        where = "" if self._step is None else f" after step {self._step}"
        line = f"{_MARK}{what} for {self._silent_seconds:.0f} s{where}"
        last_resort = threading.Timer(_JOURNAL_SECONDS + _LEAVE_SECONDS, _leave_anyway, [line])
        last_resort.daemon = True
        last_resort.start()
        if not self._reporting.acquire(blocking=False):
            # Another process was faster, and the job ends already.
            self._stopping.wait(_LEAVE_SECONDS)
            return
        is_written = self._report(line, _JOURNAL_SECONDS)
        line += "; journal.jsonl has the stacks" if is_written else "; the stacks are on stderr"
        job.end_now(EXIT_RESTART, line)

    def _follow(self, code: int, line: str) -> None:
        """The job ends because of another process: if its watchdog ends it, what this one waits for is of interest."""
        del code
        if not line.startswith(_MARK) or self._thread is None:
            return
        if self._reporting.acquire(blocking=False):
            self._report(line, _PEER_JOURNAL_SECONDS)

    def _report(self, line: str, timeout_seconds: float) -> bool:
        """Writes the stacks to the journal, or to stderr if that takes too long, and then returns False."""
        found = stacks()
        fields: dict[str, Any] = {
            "step": self._step,
            "seconds": round(self._silent_seconds, 1),
            "reason": line.removeprefix(_MARK),
            "stacks": found,
        }
        written = threading.Event()

        def write() -> None:
            assert self._journal is not None
            with contextlib.suppress(OSError):
                self._journal.write_from_here("hang", **fields)
                written.set()

        writer = threading.Thread(target=write, name="watchdog's journal", daemon=True)
        writer.start()
        writer.join(timeout_seconds)
        if not written.is_set():
            print(found, file=sys.stderr, flush=True)
        return written.is_set()


def stacks() -> str:
    """Where each thread of this process stands, except the calling one: the innermost call last, the main thread first.

    It reads no file, so it works where the file system with the program does not.
    """
    own, main = threading.get_ident(), threading.main_thread().ident
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    lines = []
    for ident, frame in sorted(sys._current_frames().items(), key=lambda found: found[0] != main):
        if ident == own:
            continue
        calls, at = [], frame
        while at is not None:
            calls.append(f"  {at.f_code.co_filename}:{at.f_lineno} {at.f_code.co_qualname}")
            at = at.f_back
        lines += [f"thread {names.get(ident, ident)}", *reversed(calls)]
    return "\n".join(lines)


def _leave_anyway(line: str) -> None:
    """On a thread of its own: neither a dead file system nor a coordinator that hangs keeps the process."""
    try:
        os.write(2, f"bloomjax: {line}; ended without the other processes\n".encode())
    finally:
        os._exit(EXIT_RESTART)


class _Fuse:
    """A timer of the kernel that kills this process (137 for the launcher) unless a thread of Python renews it.

    Some seconds before, faulthandler writes the stacks to stderr, which needs no lock of the interpreter. Does nothing
    where the system has no timer_create.
    """

    def __init__(self, seconds: float | None):
        self._seconds = seconds
        self._timer = ctypes.c_void_p()
        self._libc = ctypes.CDLL(None)
        # struct sigevent is 64 bytes: sigval (8), sigev_signo, sigev_notify (0: SIGEV_SIGNAL), room.
        event = (ctypes.c_int * 16)(0, 0, signal.SIGKILL, 0)
        create = getattr(self._libc, "timer_create", None)
        self._is_set = (
            seconds is not None
            and sys.platform == "linux"
            and create is not None
            and create(time.CLOCK_MONOTONIC, event, ctypes.byref(self._timer)) == 0
        )
        self.renew()

    def renew(self) -> None:
        if self._is_set:
            assert self._seconds is not None
            faulthandler.dump_traceback_later(self._seconds, file=2)  # type: ignore[arg-type]
            self._set_timer(self._seconds + _FUSE_SECONDS)

    def put_out(self) -> None:
        if self._is_set:
            faulthandler.cancel_dump_traceback_later()
            self._set_timer(0)  # 0 disarms it
            self._libc.timer_delete(self._timer)
            self._is_set = False

    def _set_timer(self, seconds: float) -> None:
        nanoseconds = int(seconds * 1e9)
        # struct itimerspec: interval (none), value.
        value = (ctypes.c_long * 4)(0, 0, *divmod(nanoseconds, 10**9))
        self._libc.timer_settime(self._timer, 0, value, None)
