import json
import os
import sys
from pathlib import Path

import pytest

from bloomjax.errors import BadInput
from bloomjax.metrics import (
    EventFileWriter,
    MetricsFile,
    Progress,
    lock_model_dir,
)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_steps(folder, *steps):
    metrics = MetricsFile(folder)
    for step in steps:
        metrics.write({"step": step, "loss": 1 / (step + 3)})
    return metrics


def test_floats_come_back_to_the_bit(tmp_path):
    values = [0.1 + 0.2, 1 / 3, 5.960464477539063e-08, 3.3592, 1e300]
    metrics = MetricsFile(tmp_path)
    for step, value in enumerate(values):
        metrics.write({"step": step, "loss": value})
    assert [record["loss"] for record in lines(tmp_path / "metrics.jsonl")] == values
    assert metrics.last() == {"step": 4, "loss": 1e300}


def test_what_a_resume_supersedes_is_cut_and_kept(tmp_path):
    metrics = write_steps(tmp_path, 0, 1, 2, 3, 4, 5)
    metrics.resume_after(3)
    assert [r["step"] for r in lines(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]
    assert [r["step"] for r in lines(tmp_path / "metrics.superseded.jsonl")] == [4, 5]
    metrics.write({"step": 4, "loss": 7.0})
    metrics.resume_after(2)
    assert [r["step"] for r in lines(tmp_path / "metrics.jsonl")] == [0, 1, 2]
    assert [r["step"] for r in lines(tmp_path / "metrics.superseded.jsonl")] == [4, 5, 3, 4]
    assert lines(tmp_path / "metrics.superseded.jsonl")[-1]["loss"] == 7.0
    metrics.resume_after(-1)
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    assert metrics.last() is None
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    "unfinished", ['{"step": 3, "lo', '{"step": 3, "loss": 0.5}', "{", "\x00\x00"]
)
def test_a_line_that_a_crash_left_unfinished_is_cut(tmp_path, unfinished):
    metrics = write_steps(tmp_path, 1, 2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(unfinished)
    metrics.resume_after(10)
    assert [r["step"] for r in lines(tmp_path / "metrics.jsonl")] == [1, 2]
    assert (tmp_path / "metrics.superseded.jsonl").read_text() == unfinished + "\n"
    assert metrics.last()["step"] == 2


def test_nothing_to_cut_changes_nothing(tmp_path):
    metrics = write_steps(tmp_path, 1, 2)
    before = os.stat(tmp_path / "metrics.jsonl")
    metrics.resume_after(2)
    assert os.stat(tmp_path / "metrics.jsonl").st_ino == before.st_ino
    assert not (tmp_path / "metrics.superseded.jsonl").exists()
    MetricsFile(tmp_path / "no such folder").resume_after(3)


def test_only_the_main_process_writes(tmp_path):
    write_steps(tmp_path, 1, 2)
    other = MetricsFile(tmp_path, enabled=False)
    other.write({"step": 3})
    other.resume_after(0)
    assert [r["step"] for r in lines(tmp_path / "metrics.jsonl")] == [1, 2]


def test_first_and_last_evaluation(tmp_path):
    metrics = MetricsFile(tmp_path)
    assert metrics.first_and_last_with("validation_loss") is None and metrics.last() is None
    metrics = write_steps(tmp_path, 1)
    assert metrics.first_and_last_with("validation_loss") is None
    for step in (2, 3, 4):
        metrics.write({"step": step, "validation_loss": 10.0 - step})
    metrics.write({"step": 5})
    first, last = metrics.first_and_last_with("validation_loss")
    assert (first["step"], last["step"]) == (2, 4)


def test_event_files_hold_the_scalars(tmp_path):
    before = {"torch", "tensorflow"} & sys.modules.keys()
    writer = EventFileWriter(str(tmp_path), 1)
    assert {"torch", "tensorflow"} & sys.modules.keys() == before  # tensorboardX would load torch
    writer.write_scalars(7, {"loss": 2.5, "loss_by_language/aa": 3})
    writer.write_texts(7, {"sample": "text"})
    writer.flush()
    writer.close()
    from tensorboardX.proto.event_pb2 import Event

    (path,) = tmp_path.glob("events.*")
    data, at, found = path.read_bytes(), 0, {}
    while at < len(data):
        size = int.from_bytes(data[at : at + 8], "little")
        event = Event.FromString(data[at + 12 : at + 12 + size])
        at += 12 + size + 4  # length, its checksum, record, its checksum
        for value in event.summary.value:
            found[value.tag] = (event.step, value.simple_value)
    assert found["loss"] == (7, 2.5) and found["loss_by_language/aa"] == (7, 3.0)
    assert any("sample" in tag for tag in found)


def test_progress_in_a_log(capsys):
    progress = Progress(20, 40, log_seconds=1000)
    for step in range(21, 41):
        progress.update(step, 1.25, 12345.6)
    progress.close()
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 2  # the first and the last
    assert out[-1].startswith("step 40/40  loss 1.2500  12,346 tokens/s  ETA 0:00:00")


def test_model_dir_must_be_writable(tmp_path):
    with lock_model_dir(tmp_path / "new" / "folder"):
        with pytest.raises(BadInput, match=rf"pid {os.getpid()} on .* trains in MODEL_DIR"):
            lock_model_dir(tmp_path / "new" / "folder")
    lock_model_dir(tmp_path / "new" / "folder").close()
    assert [p.name for p in (tmp_path / "new" / "folder").iterdir()] == [".lock"]
    with pytest.raises(BadInput, match="URLs are not supported"):
        lock_model_dir("gs://bucket/run")
    assert not Path("gs:").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="MODEL_DIR .*/file cannot be written: File exists"):
        lock_model_dir(tmp_path / "file")
    with pytest.raises(BadInput, match="MODEL_DIR .*/file/run cannot be written: Not a directory"):
        lock_model_dir(tmp_path / "file" / "run")
