"""This process as one of several: what they agree on, and how they stop and end together.

Agreement goes through the key-value store of JAX's coordinator and costs no collective: it works before there are
devices, on threads, and when the devices hang. In a process that is alone every function here is trivial.
"""

import atexit
import json
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from bloomjax import out_of_memory
from bloomjax.errors import EXIT_RESTART, Unreachable

_LISTEN_SECONDS = 0.5
_GRACE_SECONDS = 3.0  # for another process's main thread to find out by itself and close its files

# JAX and its C++ libraries have no exception of their own for a lost peer.
_LOST = (
    "Connection reset by peer", "Connection closed by peer", "Connection refused", "Broken pipe",
    "Socket closed", "Read timeout", "Write timeout", "heartbeat", "CoordinationService",
    "coordination service", "coordination_service", "remote process exited", "ncclRemoteError",
)  # fmt: skip


# Of JAX's errors those that blame a device or its links: the next start may be on others.
_FAULTS = ("NCCL", "nccl", "CUDA_ERROR", "unhandled cuda error", "illegal memory access", "Xid")


class _Job:
    """This process as one of several."""

    def __init__(self, process_id: int, num_processes: int):
        from jax._src import distributed

        self.process_id = process_id
        self.num_processes = num_processes
        self._client: Any = distributed.global_state.client
        self._num_agreed = 0
        self._lock = threading.Lock()  # of what stands in the next lines
        # How often it was asked whether to stop, the same on all processes (a step may be taken twice, after a roll
        # back), and up to which such time this process has promised to go on.
        self._num_asked = self._begun = 0
        self._met: dict[str, tuple[int, str]] = {}  # meetings: at which of these times, and why
        self._saved: set[str] = set()  # those of them that were for a save, which has been made
        self._closing = threading.Event()
        self._listener = threading.Thread(target=self._listen, name="job", daemon=True)
        self._listener.start()
        # JAX's own exit handler is registered already, so this one runs first: a thread that is inside of C++ when
        # Python ends aborts the process.
        atexit.register(self._close)

    def _close(self) -> None:
        self._closing.set()
        self._listener.join()

    # The key-value store.

    def put(self, key: str, value: Any) -> None:
        self._client.key_value_set(f"bloomjax/{key}", json.dumps(value))

    def get(self, key: str) -> Any:
        """Waits for it as long as it takes; a lost peer ends the wait by ending the process."""
        import jax

        while True:
            try:
                return json.loads(self._client.blocking_key_value_get(f"bloomjax/{key}", 10_000))
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise

    def folder(self, key: str) -> dict[str, Any]:
        found = self._client.key_value_dir_get(f"bloomjax/{key}/")
        return {name.rsplit("/", 1)[1]: json.loads(value) for name, value in found}

    def delete(self, key: str) -> None:
        self._client.key_value_delete(f"bloomjax/{key}/")

    def next_key(self) -> str:
        """The same for the n-th agreement on every process."""
        self._num_agreed += 1
        return f"agreed/{self._num_agreed}"

    # Meeting: when all stop, or all save.

    def call_meeting(self, name: str, reason: str) -> None:
        try:
            self.put(f"news/{name}", reason)
        except Exception as error:
            if "ALREADY_EXISTS" not in str(error):
                raise

    def call_save(self) -> None:
        with self._lock:
            number = sum(name != "stop" for name in self._met)
        self.call_meeting(f"save-{number}", "save")

    def stopped_by(self) -> str | None:
        with self._lock:
            self._num_asked += 1
            at, reason = self._met.get("stop", (None, None))
            if at is not None and self._num_asked >= at:
                return reason
            self._begun = self._num_asked + 1
            return None

    def is_save_called(self) -> bool:
        with self._lock:
            due = {n for n, (at, _) in self._met.items() if n != "stop" and at <= self._num_asked}
            is_new = bool(due - self._saved)
            self._saved |= due
            return is_new

    def _listen(self) -> None:
        while not self._closing.wait(_LISTEN_SECONDS):
            try:
                news = self.folder("news")
                if news.keys() - self._met.keys() - {"end"}:
                    self._meet()
            except (
                Exception
            ):  # the coordinator is gone or too busy; JAX ends the process if it stays so
                continue
            if "end" in news and news["end"]["process"] != self.process_id:
                self._end_with(news["end"])

    def _meet(self) -> None:
        """While this holds the lock no step begins here; the last of those begun anywhere is the one for all."""
        promised: set[str] = set()
        with self._lock:
            while not self._closing.wait(0.05):
                try:
                    news = self.folder("news")
                    called = news.keys() - self._met.keys() - {"end"}
                    # All promises first: another process may wait for that of a meeting which it saw before this one.
                    for name in called - promised:
                        self._promise(name)
                        promised.add(name)
                    for name in called:
                        begun = self.folder(f"begun/{name}")
                        if len(begun) == self.num_processes:
                            self._met[name] = max(begun.values()), news[name]
                except Exception:  # too busy; a step that began now would break the promise
                    continue
                if called <= self._met.keys() or "end" in news:
                    return

    def _promise(self, meeting: str) -> None:
        try:
            self.put(f"begun/{meeting}/{self.process_id}", self._begun)
        except Exception as error:
            if "ALREADY_EXISTS" not in str(error):
                raise

    # Ending.

    def _end_with(self, end: dict[str, Any]) -> None:
        """Another process ended: this one cannot go on, and may hang in a collective that never comes back."""
        for callback in _before_leaving:
            try:
                callback(end["code"], end["line"])
            except Exception:
                traceback.print_exc()
        if self._closing.wait(_GRACE_SECONDS):
            return
        if self.process_id == 0:
            line = f"bloomjax: ends with process {end['process']}, exit code {end['code']}"
            print(line, file=sys.stderr)
        self._leave(end["code"])

    def end_all(self, code: int, line: str) -> NoReturn:
        """Ends this process and all others, with the exit code of the first that came to an end."""
        host = os.uname().nodename
        try:
            self.put("news/end", {"process": self.process_id, "code": code, "line": line})
            print(f"bloomjax: process {self.process_id} on {host}: {line}", file=sys.stderr)
        except Exception as error:
            if "ALREADY_EXISTS" in str(error):  # mostly, all have found the same at the same time
                code = self.get("news/end")["code"]
            else:  # the coordinator is gone
                print(f"bloomjax: process {self.process_id} on {host}: {line}", file=sys.stderr)
        self._leave(code)

    def _leave(self, code: int) -> NoReturn:
        """Not by sys.exit: JAX's exit handler waits for all others, which may wait for this process."""
        try:
            self.put(f"left/{self.process_id}", code)
            # With process 0 goes the coordinator, which aborts whoever is still there.
            deadline = time.monotonic() + _GRACE_SECONDS + 2 * _LISTEN_SECONDS
            while self.process_id == 0 and time.monotonic() < deadline:
                if len(self.folder("left")) == self.num_processes:
                    time.sleep(0.1)  # they have said so, and go
                    break
                time.sleep(0.05)
        except Exception:
            pass
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


_job: _Job | None = None
_before_leaving: list[Callable[[int, str], None]] = []


def join(process_id: int, num_processes: int) -> None:
    """After jax.distributed.initialize()."""
    global _job
    _job = _Job(process_id, num_processes)


def is_shared() -> bool:
    """Whether this process is one of several."""
    return _job is not None


def is_main() -> bool:
    """Whether this process speaks and writes for all."""
    return _job is None or _job.process_id == 0


def agree(value: Any) -> Any:
    """The value (JSON) that process 0 has; the others wait for it. Every process calls it, in the same order."""
    if _job is None:
        return value
    key = _job.next_key()
    if _job.process_id == 0:
        _job.put(key, value)
    return _job.get(key)


def on_main(function: Callable[[], Any]) -> Any:
    """What `function` (of process 0 alone) returns, on every process."""
    return agree(function() if is_main() else None)


def gather(value: Any) -> list[Any]:
    """The values (JSON) of all processes, by their number, on every process."""
    job = _job
    if job is None:
        return [value]
    key = job.next_key()
    job.put(f"{key}/{job.process_id}", value)
    return on_main(lambda: [job.get(f"{key}/{n}") for n in range(job.num_processes)])


def publish(key: str, value: Any) -> None:
    """Lets the other processes see a value (JSON); waits for nobody. Each key once in a job."""
    if _job is not None:
        _job.put(f"{key}/{_job.process_id}", value)


def published(key: str) -> dict[int, Any]:
    """What has been published under `key` so far, by process; waits for nobody. Empty in a process that is alone."""
    return {int(n): value for n, value in _job.folder(key).items()} if _job else {}


def forget(key: str) -> None:
    """Lets go of what all have published under `key`."""
    if _job is not None:
        _job.delete(key)


def request_stop(reason: str) -> None:
    """Asks all processes to stop; `stopped_by` says when."""
    assert _job is not None
    _job.call_meeting("stop", reason)


def request_save() -> None:
    """Asks all processes to save; `is_save_requested` says when. Any process may ask."""
    assert _job is not None
    _job.call_save()


def is_save_requested() -> bool:
    """Whether all processes save now, asked once after every step, after `stopped_by`."""
    return _job is not None and _job.is_save_called()


def stopped_by() -> str | None:
    """Why all processes stop now; None to go on. Costs a lock, no message.

    To be asked once after every step: None is a promise to take the next one. When a stop is requested, the promises
    are exchanged in the background, and the last step that any process has promised is the last for all.
    """
    return _job.stopped_by() if _job else None


def num_processes() -> int:
    """Of this job."""
    return _job.num_processes if _job else 1


def is_lost_peer(error: BaseException | None) -> bool:
    """Whether this error, or one behind it, says that another process no longer answers."""
    import jax

    while error is not None and _job is not None:
        if isinstance(error, Unreachable):
            return True
        if isinstance(error, jax.errors.JaxRuntimeError) and any(w in str(error) for w in _LOST):
            return "RESOURCE_EXHAUSTED" not in str(error)
        error = error.__cause__ or error.__context__
    return False


def is_fault(error: BaseException) -> bool:
    """Whether this error blames a device or its network: another start may be on others."""
    import jax

    text = str(error)
    if "RESOURCE_EXHAUSTED" in text or "OUT_OF_MEMORY" in text:
        return False
    return isinstance(error, jax.errors.JaxRuntimeError) and any(word in text for word in _FAULTS)


def fail(code: int, line: str) -> int:
    """Says why this process ends and returns its exit code; one of several ends here, and takes the others along."""
    if _job is None:
        print(f"bloomjax: {line}", file=sys.stderr)
        return code
    _job.end_all(code, line)


def end_now(code: int, line: str) -> NoReturn:
    """`fail` where Python cannot unwind, because its main thread hangs; it takes the other processes along."""
    if _job is not None:
        _job.end_all(code, line)
    print(f"bloomjax: {line}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def before_leaving(callback: Callable[[int, str], None]) -> None:
    """Has `callback(exit code, line)` called when this process ends because another one did; it must soon return."""
    _before_leaving.append(callback)


def fail_with(error: Exception) -> int:
    """`fail` for an exception that nobody has foreseen."""
    if is_lost_peer(error):
        return fail(EXIT_RESTART, f"a peer is lost: {one_line(error)}")
    if too_much := out_of_memory.line(error):
        return fail(1, too_much)
    traceback.print_exception(error)
    if is_fault(error):
        return fail(EXIT_RESTART, f"a device or its network failed: {one_line(error)}")
    return fail(1, f"{type(error).__name__}: {one_line(error)}")


def one_line(error: BaseException) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()[:300]
