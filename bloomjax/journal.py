"""Files of one JSON object a line, which only grow: journal.jsonl (what happened to a run) and their like."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Appends one JSON object as one line, in one write."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


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
        self._enabled = enabled

    def write(self, event: str, **fields: Any) -> None:
        """From the process that writes for all."""
        if self._enabled:
            append_line(self._path, {"time": round(time.time(), 3), "event": event, **fields})

    def write_from_here(self, event: str, **fields: Any) -> None:
        """From any process, which is named: what only it can know."""
        here = {"host": os.uname().nodename, "pid": os.getpid()}
        append_line(self._path, {"time": round(time.time(), 3), "event": event, **here, **fields})

    def events(self, *names: str) -> Iterator[dict[str, Any]]:
        """The lines of these events so far; what cannot be read is passed over."""
        return (record for record in read_lines(self._path)[0] if record.get("event") in names)
