"""Files of a JSON object a line."""

import json
import os
import time

from bloomjax.journal import Journal, append_line, read_lines


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_lines_are_plain_utf8(tmp_path):
    append_line(tmp_path / "x", {"text": "ኢት 中\u2028文\n"})
    raw = (tmp_path / "x").read_text(encoding="utf-8")
    assert raw.count("\n") == 1 and "中" in raw and json.loads(raw) == {"text": "ኢት 中\u2028文\n"}


def test_journal_only_grows(tmp_path):
    before = time.time()
    journal = Journal(tmp_path)
    journal.write("start", step=0, pid=1)
    Journal(tmp_path).write("save", step=10, stall_seconds=0.5)
    start, save = lines(tmp_path / "journal.jsonl")
    assert start["event"] == "start" and start["pid"] == 1
    assert (save["event"], save["step"], save["stall_seconds"]) == ("save", 10, 0.5)
    assert before - 1 < start["time"] <= save["time"] <= time.time() + 1


def test_only_the_main_process_writes_for_all(tmp_path):
    journal = Journal(tmp_path, enabled=False)
    journal.write("start")
    assert not (tmp_path / "journal.jsonl").exists()
    journal.write_from_here("hang", stacks="...")
    (record,) = lines(tmp_path / "journal.jsonl")
    assert record["event"] == "hang" and record["pid"] == os.getpid()
    assert record["host"] == os.uname().nodename


def test_lines_that_cannot_be_read_are_numbered(tmp_path):
    path = tmp_path / "journal.jsonl"
    assert read_lines(path) == ([], [])
    path.write_bytes(b'{"event": "a"}\n\xff\xfe\n[1]\n{"event": "b", "n": 1}\n{"event": "b"')
    assert read_lines(path) == ([{"event": "a"}, {"event": "b", "n": 1}], [2, 3, 5])
    assert [e["n"] for e in Journal(tmp_path).events("b")] == [1]
    assert not list(Journal(tmp_path / "nowhere").events("a"))
