"""One checkpoint on its way to the disk: written behind by all processes, and whole for all of them or for none.

Orbax's own managers let the processes wait for each other at barriers, which a process whose disk is full never
reaches; here each says how it went, and the main process decides. The files are those that Orbax's handlers write.
"""

import asyncio
import errno
import itertools
import json
import os
import threading
import time
import traceback
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import Any

from absl import logging
from etils import epath
from orbax.checkpoint.args import CheckpointArgs

from bloomjax import checkpoint_manifest, job

ITEMS = ("state", "position")
_COMMIT_FILE = "commit_success.txt"
_METADATA_FILE = "_CHECKPOINT_METADATA"
_numbers = itertools.count()  # of the saves of this process: the same on all

# How TensorStore and the system say that a disk, or a quota, is full.
_FULL = ("No space left", "Disk quota exceeded", "ENOSPC", "EDQUOT")


def is_disk_full(error: BaseException | None) -> bool:
    """Whether this error, or one behind it, says that nothing more can be written."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(words in str(error) for words in _FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


class Save:
    """A save in the background. It has begun when the constructor returns: the caller may overwrite the state.

    Attributes:
      step: that is saved.
      error: what went wrong in this process.
      outcome: the same in all processes, once `join` has returned: `step`, `error` (a line; None if all went well),
        `full` (whether it was a full disk) and what the main process's `finish` added.
    """

    def __init__(
        self,
        step: int,
        temporary: epath.Path,
        handlers: dict[str, Any],
        items: dict[str, CheckpointArgs],
        finish: Callable[[dict[str, Any]], dict[str, Any]],
    ):
        """Every process makes one at the same time; `temporary` has folders of the ITEMS.

        `finish` is called by the main process with the outcome; what it returns is joined to it. If all went well the
        checkpoint lies in `temporary`, manifest and all, and `finish` commits it.
        """
        self.step = step
        self.error: BaseException | None = None
        self.outcome: dict[str, Any] = {"step": step, "error": "was not finished", "full": False}
        self._temporary, self._handlers, self._finish = temporary, handlers, finish
        self._key = f"saves/{next(_numbers)}"
        self._started, self._started_nsecs = time.monotonic(), time.time_ns()
        futures: list[Any] = []
        try:
            for name, args in items.items():
                futures += _run(handlers[name].async_save(temporary / name, args=args)) or []
        except Exception as error:
            self.error = error
        self._thread = threading.Thread(target=self._run, args=(futures,), name="save")
        self._thread.start()

    def is_running(self) -> bool:
        return self._thread.is_alive()

    def join(self) -> dict[str, Any]:
        """Waits; returns `outcome`."""
        self._thread.join()
        return self.outcome

    def _run(self, futures: list[Any]) -> None:
        try:
            mine = self._write(futures)
            everyone = self._everyone(mine)
            outcome = self._decide(everyone) if job.is_main() else self._decided()
            self.outcome = outcome
        except Exception as error:  # another process is lost, mostly
            self.error = self.error or error
            self.outcome |= {"error": _line(error), "full": False, "is_agreed": False}
            logging.error("save of step %d: %s", self.step, traceback.format_exc())

    def _write(self, futures: list[Any]) -> dict[str, Any]:
        """How the writing went here, and the entries of the manifest of the big files that this process wrote."""
        files: dict[str, Any] = {}
        seconds = 0.0
        for future in _single(futures):  # all: none may write on when the folder is deleted
            try:
                future.result()
            except Exception as error:
                self.error = self.error or error
        if self.error is None:
            try:
                started = time.monotonic()
                files = checkpoint_manifest.entries_of(
                    self._temporary, self._own_files(), sync=True
                )
                seconds = time.monotonic() - started
            except Exception as error:
                self.error = error
        error = self.error
        line = _line(error) if error else None
        return {"error": line, "full": is_disk_full(error), "files": files, "seconds": seconds}

    def _own_files(self) -> Iterator[str]:
        """What the merging of the processes' parts only refers to."""
        import jax

        part = f"state/ocdbt.process_{jax.process_index()}/d"
        folder = self._temporary / part
        if folder.exists():
            return (f"{part}/{name}" for name in checkpoint_manifest.files_below(folder))
        return iter(())

    def _everyone(self, mine: dict[str, Any]) -> list[dict[str, Any]]:
        """On the main process: how it went in all processes."""
        if not job.is_shared():
            return [mine]
        job.publish(f"{self._key}/written", mine)
        if not job.is_main():
            return []
        for pause in _pauses():
            found = job.published(f"{self._key}/written")
            if len(found) == job.num_processes():
                return [found[number] for number in sorted(found)]
            time.sleep(pause)
        raise AssertionError

    def _decided(self) -> dict[str, Any]:
        """What the main process has published."""
        for pause in _pauses():
            found = job.published(f"{self._key}/outcome")
            if found:
                return found[min(found)]
            time.sleep(pause)
        raise AssertionError

    def _decide(self, everyone: list[dict[str, Any]]) -> dict[str, Any]:
        outcome: dict[str, Any] = {
            "step": self.step, "error": None, "full": False, "is_agreed": True
        }  # fmt: skip
        failed = [n for n, each in enumerate(everyone) if each["error"]]
        if failed:
            outcome["error"] = everyone[failed[0]]["error"]
            if job.is_shared():
                outcome["process"] = failed[0]
            # One that is no full disk must be heard.
            outcome["full"] = all(everyone[n]["full"] for n in failed)
        else:
            try:
                outcome |= self._complete(everyone)
            except Exception as error:
                self.error = error
                outcome |= {"error": _line(error), "full": is_disk_full(error)}
        outcome |= self._finished(outcome)
        if job.is_shared():
            job.publish(f"{self._key}/outcome", outcome)
        return outcome

    def _finished(self, outcome: dict[str, Any]) -> dict[str, Any]:
        try:
            return self._finish(outcome)
        except Exception as error:
            self.error = error
            return {"error": _line(error), "full": is_disk_full(error)}

    def _complete(self, everyone: list[dict[str, Any]]) -> dict[str, Any]:
        """Merges the parts and writes the manifest, the last file."""
        final = os.fspath(self._temporary.parent / str(self.step))
        for name in ITEMS:
            if hasattr(self._handlers[name], "finalize"):
                self._handlers[name].finalize(self._temporary / name)
            (self._temporary / name / _COMMIT_FILE).write_text(_committed(f"{final}/{name}"))
        (self._temporary / _METADATA_FILE).write_text(json.dumps(self._metadata()))
        (self._temporary / _COMMIT_FILE).write_text(_committed(final))
        known = {name: tuple(x) for each in everyone for name, x in each["files"].items()}
        started = time.monotonic()
        entries = checkpoint_manifest.write(self._temporary, known)
        now = time.monotonic()
        hashing_seconds = now - started + max(each["seconds"] for each in everyone)
        return {
            "num_bytes": sum(size for size, _ in entries.values()),
            "num_files": len(entries) + 1,
            "manifest_seconds": round(hashing_seconds, 3),
            "seconds": round(now - self._started, 3),
        }

    def _metadata(self) -> dict[str, Any]:
        """As Orbax 0.12 describes a step, so that its CheckpointManager can read it."""
        kinds = {name: type(self._handlers[name]) for name in ITEMS}
        return {
            "item_handlers": {n: f"{k.__module__}.{k.__qualname__}" for n, k in kinds.items()},
            "metrics": {},
            "performance_metrics": {},
            "init_timestamp_nsecs": self._started_nsecs,
            "commit_timestamp_nsecs": time.time_ns(),
            "custom_metadata": {},
        }


def _run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Not by asyncio.run: where several threads end their loops that way, one may fail."""
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(coroutine)
    finally:
        loop.close()


def _single(futures: Iterable[Any]) -> Iterator[Any]:
    """Orbax's chained futures stop waiting when the first of the chain fails: their parts, then the chain."""
    for future in futures:
        yield from _single(getattr(future, "_futures", ()))
        yield future


def _committed(final: str) -> str:
    return f"Checkpoint commit was successful to {final}"


def _pauses() -> Iterator[float]:
    """Seconds between questions to the key-value store, which has hundreds of clients."""
    seconds = 0.02
    while True:
        yield seconds
        seconds = min(1.0, 1.3 * seconds)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {job.one_line(error)}"
