"""Files of one JSON object a line, which only grow: journal.jsonl (what happened to a run) and their like."""

import errno
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Appends one JSON object as one line, in one write."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


class LineFile:
    """A file of one JSON object a line, which grows; what a full disk refuses is said once, kept, and written later."""

    def __init__(self, path: Path):
        self._path = path
        self._pending = b""
        self._has_complained = False

    def append(self, record: dict[str, Any]) -> None:
        """One object as one line, in one write."""
        self._pending += (json.dumps(record, ensure_ascii=False) + "\n").encode()
        try:
            file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                self._pending = self._pending[os.write(file, self._pending) :]
            finally:
                os.close(file)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE):
                raise
            if not self._has_complained:
                why = f"cannot be written: {error.strerror}; it is tried again"
                print(f"bloomjax: {self._path} {why}", file=sys.stderr, flush=True)
        self._has_complained = bool(self._pending)


def read_lines(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The objects in a file, and the numbers (from 1) of lines that hold none, such as one that a crash cut off.

    Nothing of a file that does not exist. OSError where it cannot be read.
    """
    if not path.exists():
        return [], []
    found, unreadable = [], []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if isinstance(record, dict):
                found.append(record)
            else:
                unreadable.append(number)
    return found, unreadable


class Journal:
    """journal.jsonl: starts, restores, saves, stops, incidents; a line each, never rewritten."""

    def __init__(self, model_dir: Path, enabled: bool = True):
        self._path = model_dir / "journal.jsonl"
        self._lines = LineFile(self._path)
        self._enabled = enabled

    def write(self, event: str, **fields: Any) -> None:
        """From the process that writes for all."""
        if self._enabled:
            self._lines.append({"time": round(time.time(), 3), "event": event, **fields})

    def write_from_here(self, event: str, **fields: Any) -> None:
        """From any process, which is named: what only it can know."""
        here = {"host": os.uname().nodename, "pid": os.getpid()}
        append_line(self._path, {"time": round(time.time(), 3), "event": event, **here, **fields})

    def events(self, *names: str) -> Iterator[dict[str, Any]]:
        """The lines of these events so far; what cannot be read is passed over."""
        return (record for record in read_lines(self._path)[0] if record.get("event") in names)
